"""What stage rl leaves along its way: snapshots of the policy, and the state that it exports after a guard's trip."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_guards import plain_share
from test_training_stages import Killed, do, open_run, rows_of, same, weights
from tiny import alone, byte_checkpoint

from cai_fast import advantages, config, distributed, guards, measure, model, pipeline, records, roles
from cai_fast.checkpoint import Checkpoints
from cai_fast.distributed import Stopped
from cai_fast.errors import InputError
from cai_fast.pipeline import Context
from cai_fast.planner import Planner
from cai_fast.policy_gradient import PolicyGradient
from cai_fast.rl_states import RlStates
from cai_fast.rundir import RunDir
from cai_fast.stages import pm, rl, sft

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "pm__epochs": 1, "rl__steps": 4, "rl__epochs": 1, "rl__minibatches": 1, "rl__reward_transform": "none",
    "rl__critic": "detached", "rl__snapshot_every": 2,
}  # fmt: skip
SNAPSHOTS = ["rl_cai_step_00002", "rl_cai_step_00004"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The run folder as stage rl finds it."""
    ctx = open_run(tmp_path_factory.mktemp("before") / "run", base, **SETTINGS)
    do(ctx, sft, pm)
    ctx.run.close()
    return ctx.run.root


@contextlib.contextmanager
def opened(before: Path, folder: Path, base: Path, **changes: Any) -> Iterator[Context]:
    """A run that is about to begin stage rl, or goes on with it."""
    if not folder.exists():
        shutil.copytree(before, folder)
    ctx = open_run(folder, base, data__preferences=before.parent / "preferences.jsonl", **SETTINGS | changes)
    try:
        yield ctx
    finally:
        ctx.run.close()


@pytest.fixture(scope="module")
def whole(before: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A run of which stage rl is done."""
    with opened(before, tmp_path_factory.mktemp("whole") / "run", base) as ctx:
        do(ctx, rl)
    return ctx


def test_snapshots_are_the_policies_of_their_iterations(
    whole: Context, before: Path, base: Path, tmp_path: Path
) -> None:
    assert [path.name for path in whole.run.snapshots()] == SNAPSHOTS
    assert same(weights(whole, SNAPSHOTS[1]), weights(whole, "rl_cai"))
    assert not same(weights(whole, SNAPSHOTS[0]), weights(whole, "rl_cai"))
    with opened(before, tmp_path / "run", base, rl__steps=4, rl__save_every=2, rl__snapshot_every=0) as ctx:
        do_until(ctx, 3)
        with Checkpoints(ctx.run.state_dir("rl"), alone()) as states:
            saved = states.latest()
            policy = model.load(whole.checkpoint("sl_cai"))
            tensors = {n: torch.empty_like(t, device="cpu") for n, t in saved.tensors.items()}
            states.load(saved, tensors)
    assert saved.step == 2
    trained = {f"policy.{name}": value for name, value in policy.named_parameters()}
    snapshot = dict(model.load(whole.checkpoint(SNAPSHOTS[0])).named_parameters())
    assert all(torch.equal(tensors[name], snapshot[name.partition(".")[2]]) for name in trained)


def do_until(ctx: Context, step: int) -> None:
    """Stage rl, killed as it measures the answers of an iteration."""
    real = PolicyGradient.measure

    def dying(trainer: PolicyGradient, examples: Any, now: int, *rest: Any) -> Any:
        if now == step:
            raise Killed
        return real(trainer, examples, now, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyGradient, "measure", dying)
        with pytest.raises(Killed):
            do(ctx, rl)


def test_snapshots_are_outputs_with_cards_that_answer_as_roles(whole: Context) -> None:
    outputs = whole.run.record("rl")["outputs"]
    for number, name in zip((2, 4), SNAPSHOTS, strict=True):
        assert {f"checkpoints/{name}/{file}" for file in ("model.safetensors", "config.json", "README.md")} <= set(
            outputs
        )
        card = (whole.checkpoint(name) / "README.md").read_text()
        assert (
            f"after {number} iterations" in card
            and f"- kl_exact: {rows_of(whole, 'rl')[number]['rl/kl_exact']:.5g}" in card
        )
        assert whole.folder(name) == whole.checkpoint(name)
    with pytest.raises(InputError, match="rl_cai_step_00003 not found; run stage rl first"):
        whole.folder("rl_cai_step_00003")
    prompts = pipeline.load_prompts(whole)[:3]
    rows = measure.answers(whole, SNAPSHOTS[0], prompts)
    assert [row.prompt for row in rows] == prompts
    assert rows[0].provenance["model"] == whole.model_hash(SNAPSHOTS[0]) != whole.model_hash("rl_cai")


@pytest.mark.parametrize("moment", ["after a snapshot", "in a snapshot"])
def test_a_killed_run_has_the_snapshots_of_an_unbroken_one(
    moment: str, whole: Context, before: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, changes = tmp_path / "run", {"rl__save_every": 3 if moment == "after a snapshot" else 2}
    with opened(before, folder, base, **changes) as ctx:
        if moment != "in a snapshot":
            do_until(ctx, 3)  # that of iteration 2 has no state
        else:
            real = roles.export

            def dying(*args: Any, **kwargs: Any) -> None:
                real(*args, **kwargs)
                shutil.move(ctx.checkpoint(SNAPSHOTS[0]), ctx.checkpoint(SNAPSHOTS[0] + ".partial"))
                raise Killed

            monkeypatch.setattr(roles, "export", dying)
            with pytest.raises(Killed):
                do(ctx, rl)
            monkeypatch.undo()
        ctx.checkpoint("rl_cai_step_00003").mkdir()  # of an attempt that went another way
    with opened(before, folder, base, **changes) as ctx:
        do(ctx, rl)
    assert [path.name for path in ctx.run.snapshots()] == SNAPSHOTS
    for name in (*SNAPSHOTS, "rl_cai"):
        assert (ctx.checkpoint(name) / "model.safetensors").read_bytes() == (
            whole.checkpoint(name) / "model.safetensors"
        ).read_bytes()
    assert ctx.run.record("rl")["outputs"].keys() == whole.run.record("rl")["outputs"].keys()


def test_snapshots_go_with_the_stage(whole: Context, tmp_path: Path) -> None:
    for restart, left in (("evaluate", SNAPSHOTS), ("sft", [])):
        shutil.copytree(whole.run.root, tmp_path / restart)
        run = RunDir.open(tmp_path / restart, whole.config, restart_from=restart)
        run.close()
        assert [path.name for path in run.snapshots()] == left


def test_the_disk_for_snapshots_and_for_all_states_is_planned() -> None:
    words = "--stages rl --model.device cpu --rl.steps 40 --rl.critic detached"
    bare = Planner(config.load(words.split()))

    def disk(more: str) -> tuple[float, float]:
        return Planner(config.load(f"{words} {more}".split()), bare.inputs).disk("rl")

    (kept, states), one = bare.disk("rl"), bare.shape("base").params * 4
    assert disk("--rl.snapshot_every 40") == (pytest.approx(kept + one), states)
    assert disk("--rl.snapshot_every 12") == (pytest.approx(kept + 3 * one), states)
    assert disk("--rl.snapshot_every 41") == (kept, states)
    another = disk("--checkpoint.keep 2")[1] - states
    assert states == pytest.approx(4 * another)  # the newest, the best, one of a stop, and one that is being written
    offline = config.load("--stages rl --model.device cpu --rl.algorithm dpo".split())
    assert Planner(offline, bare.inputs).disk("rl")[1] == pytest.approx(2 * another)


def test_adapters_are_merged_in_a_snapshot(base: Path, tmp_path: Path) -> None:
    lora = {"lora__rank": 2, "rl__steps": 1, "rl__snapshot_every": 1, "rl__lr": 1e-2}
    ctx = open_run(tmp_path / "run", base, **SETTINGS | lora)
    with contextlib.closing(ctx.run):
        do(ctx, sft, pm, rl)
        assert same(weights(ctx, "rl_cai_step_00001"), weights(ctx, "rl_cai"))
        assert not same(weights(ctx, "rl_cai"), weights(ctx, "sl_cai"))
        assert (ctx.checkpoint("rl_cai_step_00001") / "adapter" / "trunk.json").is_file()
    assert len(records.read_jsonl(ctx.run.path("rollouts.jsonl"), records.Rollout)) == 16


# Guards: what is exported after a trip

PM_EVAL = (0.0, 1.0, 3.0, 2.0, -9.0)  # by iteration; the last trips the guard of divergence
WATCHED = {"guards__divergence": "rollback", "guards__max_divergence": 5.0, "rl__snapshot_every": 1} | dict.fromkeys(
    ("guards__length", "guards__boilerplate", "guards__kl_jump", "guards__entropy"), "off"
)


def planted(patch: pytest.MonkeyPatch, pm_eval: tuple[float, ...] = PM_EVAL, length: float = 0.0) -> None:
    """Answers whose scores are given; those of iteration 2 are so many tokens long, if any."""
    real = rl.Loop.signs

    def signs(loop: rl.Loop, answers: Any, step: int) -> dict[str, float]:
        found = real(loop, answers, step)
        given = {"rl/score": 0.0, "rl/score_deviation": 1.0, "rl/pm_eval_deviation": 1.0}
        given |= {"rl/pm_eval": pm_eval[step]} if "rl/pm_eval" in found else {}
        return found | given | ({"rl/length": length} if length and step == 2 else {})

    patch.setattr(rl.Loop, "signs", signs)


@pytest.mark.parametrize(("changes", "pm_eval", "length", "step", "why"), [
    ({}, PM_EVAL, 0.0, 2, "best by mean pm_eval score, 3, "),
    ({"guards__divergence": "stop"}, PM_EVAL, 0.0, 3, "newest"),
    ({"guards__divergence": "stop", "rl__save_every": 0}, PM_EVAL, 0.0, 0, "SL-CAI, as no state was saved"),
    ({"guards__length": "warn"}, PM_EVAL, 999.0, 3, "best by mean pm_eval score, 2, "),  # iteration 2 has tripped one
    ({}, (0.0, -1.0, -1.0, -1.0, -9.0), 0.0, 0, "best by mean pm_eval score, 0, "),  # SL-CAI itself
    ({"rl__save_every": 2, "checkpoint__keep": 3}, (0.0, 1.0, 0.5, 2.0, -9.0), 0.0, 2, "pm_eval score, 0.5, "),
])  # fmt: skip
def test_a_rollback_exports_the_best_state_bit_for_bit(
    changes: dict[str, Any], pm_eval: tuple[float, ...], length: float, step: int, why: str,
    before: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    planted(monkeypatch, pm_eval, length)
    with opened(before, tmp_path / "run", base, **WATCHED | changes) as ctx:
        do(ctx, rl)
    summary = ctx.run.record("rl")["summary"]
    found = [summary[f"guard_{name}"] for name in ("name", "step", "action")]
    assert found == ["divergence", 4, changes.get("guards__divergence", "rollback")]
    assert summary["iterations"] == step and why in summary["exported"]
    assert "iteration 4: the preference model's score has gained 9 deviations more" in summary["guard"]
    assert summary["guards"]["divergence"]["tripped"] == 4 and summary["guards"]["kl"]["tripped"] is None
    name = f"rl_cai_step_{step:05}" if step else "sl_cai"
    assert same(weights(ctx, "rl_cai"), weights(ctx, name))
    assert not same(weights(ctx, "rl_cai"), weights(ctx, "rl_cai_step_00001"))
    said = capsys.readouterr().err
    assert f"stopped by guard divergence at iteration 4: {summary['guard'].partition(': ')[2]}" in said
    assert f"exporting the policy after {step} iterations: {summary['exported']}" in said
    assert said.count("warning: rl: guard length at iteration 2") == bool(length)
    assert [row["rl/guard"] for row in rows_of(ctx, "rl")] == [0, 0, 0, 0, 1]
    assert not list(ctx.run.path("journal").iterdir())


def test_without_pm_eval_the_best_is_that_of_the_highest_reward(
    before: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WATCHED | {"guards__pm_eval_every": 0, "guards__max_refusal_rate": 0.0}
    real = rl.Loop.statistics

    def statistics(loop: rl.Loop, *rest: Any) -> dict[str, float]:
        step = len(loop.guards.memory["kl"])
        return real(loop, *rest) | {"rl/reward": PM_EVAL[step], "rl/refusal_rate_helpful": 0.1 * (step == 4)}

    monkeypatch.setattr(rl.Loop, "statistics", statistics)
    with opened(before, tmp_path / "run", base, **settings) as ctx:
        assert "pm_eval" not in rl.inputs(ctx)["models"]
        do(ctx, rl)
    summary = ctx.run.record("rl")["summary"]
    assert (summary["iterations"], summary["guard_name"]) == (2, "refusals")
    assert "best by mean reward, 3, " in summary["exported"]
    assert same(weights(ctx, "rl_cai"), weights(ctx, "rl_cai_step_00002"))
    assert not any("rl/pm_eval" in row or "rl/pm_divergence" in row for row in rows_of(ctx, "rl"))


def test_pm_eval_scores_as_often_as_asked_and_wherever_a_state_is_saved(
    before: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for every, scored in ((1, [0, 1, 2, 3, 4]), (2, [0, 2, 3, 4])):  # saved at 3 and at the end
        settings = {"guards__pm_eval_every": every, "rl__save_every": 3}
        with opened(before, tmp_path / str(every), base, **settings) as ctx:
            do(ctx, rl)
        rows = rows_of(ctx, "rl")
        assert [row["step"] for row in rows if "rl/pm_eval" in row] == scored
        assert rows[0]["rl/pm_divergence"] == 0 and "rl/length_slope" in rows[0]
        for name in ("score", "pm_eval"):
            assert rows[0][f"rl/{name}_deviation"] > 0
    answers = records.read_jsonl(ctx.run.path("rollouts.jsonl"), records.Rollout)[:8]
    prompts = {p.id: p for p in pipeline.load_prompts(ctx)}
    tokens, renderer = records.read_tokens(ctx.run.path("tokens", "rollouts.safetensors")), ctx.renderer("pm_eval")
    stops = renderer.stops("response")[0]
    ids = [[t for t in tokens[a.id][0] if t not in stops] for a in answers]
    stopped = [len(body) < len(tokens[a.id][0]) for body, a in zip(ids, answers, strict=True)]
    sequences = [
        renderer.preference(prompts[a.prompt_id].turns, body + [renderer.tokenizer.eos_id] * end)
        for a, body, end in zip(answers, ids, stopped, strict=True)
    ]
    scores = ctx.scorer(ctx.model("pm_eval")).scores(sequences, range(8))
    assert rows[0]["rl/pm_eval"] == pytest.approx(float(scores.double().mean()), rel=1e-5)
    assert rows[0]["rl/pm_eval_deviation"] == pytest.approx(float(scores.double().std(unbiased=False)), rel=1e-5)


def test_the_stage_measures_boilerplate_and_the_slope_by_prompt_and_kind(
    before: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "NGRAM", 1)  # phrases that a random model does repeat
    monkeypatch.setattr(guards, "COMMON", 0.4)
    several = {"rl__prompts_per_step": 4, "rl__samples_per_prompt": 3, "rl__steps": 1, "rl__snapshot_every": 0,
               "rl__max_new_tokens": 60, "rl__missing_eos_penalty": 0.0}  # fmt: skip
    with opened(before, tmp_path / "run", base, **several) as ctx:
        do(ctx, rl)
    rows = [r for r in records.read_jsonl(ctx.run.path("rollouts.jsonl"), records.Rollout) if r.iteration == 0]
    tokens, renderer = records.read_tokens(ctx.run.path("tokens", "rollouts.safetensors")), ctx.renderer("sl_cai")
    answers = [[int(t) for t in tokens[row.id][0]] for row in rows]
    bodies = [renderer.finish(ids, "response").body_ids for ids in answers]
    prompts = [number // 3 for number in range(12)]
    found = rows_of(ctx, "rl")[0]
    assert found["rl/boilerplate"] == pytest.approx(plain_share(bodies, prompts))
    assert found["rl/boilerplate"] > 0
    assert 0 < sum(body == ids for body, ids in zip(bodies, answers, strict=True)) < 12, "some were cut off"
    kinds = {p.id: p.kind for p in pipeline.load_prompts(ctx)}
    x, y, of_kind = (
        np.array(column) for column in
        ([len(ids) for ids in answers], [row.reward for row in rows], [kinds[row.prompt_id] for row in rows])
    )  # fmt: skip
    x, y = (column - np.array([column[of_kind == kind].mean() for kind in of_kind]) for column in (x, y))
    assert found["rl/length_slope"] == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()), rel=1e-3)


def test_an_answer_is_compared_with_the_others_to_its_prompt(
    before: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = advantages.rloo, []

    def spy(returns: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
        seen.append((returns.tolist(), list(groups)))
        return real(returns, groups)

    monkeypatch.setattr(advantages, "rloo", spy)
    several = {"rl__algorithm": "rloo", "rl__prompts_per_step": 4, "rl__samples_per_prompt": 3, "rl__steps": 2,
               "rl__snapshot_every": 0, "rl__kl_coef": 0.5}  # fmt: skip
    with opened(before, tmp_path / "run", base, **several) as ctx:
        do(ctx, rl)
    rows = records.read_jsonl(ctx.run.path("rollouts.jsonl"), records.Rollout)
    assert len(seen) == 2 and any(row.kl for row in rows if row.iteration == 1)
    for step, (returns, groups) in enumerate(seen):
        mine = [row for row in rows if row.iteration == step]
        assert returns == pytest.approx([row.reward - 0.5 * row.kl for row in mine], rel=1e-5, abs=1e-6)
        pairs = Counter(zip(groups, (row.prompt_id for row in mine), strict=True))
        assert len(pairs) == len(set(groups)) == 4 and set(pairs.values()) == {3}


@pytest.mark.parametrize("moment", ["a stop between saves", "before the best was kept", "after the best was kept"])
def test_an_interrupted_run_rolls_back_to_what_an_unbroken_one_does(
    moment: str, before: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = WATCHED | {"rl__save_every": 2 if moment == "a stop between saves" else 1}
    planted(monkeypatch, PM_EVAL if changes["rl__save_every"] == 1 else (0.0, 5.0, 3.0, 9.0, -9.0))
    folder = tmp_path / "run"
    with opened(before, folder, base, **changes) as ctx, pytest.MonkeyPatch.context() as patch:
        if moment == "a stop between saves":
            real_save = RlStates.judged

            def judged(states: RlStates, step: int, *rest: Any) -> None:
                patch.setattr(distributed, "stop_requested", lambda: step == 3)
                real_save(states, step, *rest)

            patch.setattr(RlStates, "judged", judged)
            expected: Any = Stopped
        else:
            name = "copy" if moment == "before the best was kept" else "save"
            real, calls = getattr(Checkpoints, name), iter(range(10**6))

            def dying(states: Checkpoints, *args: Any) -> None:
                if next(calls) == (0 if name == "copy" else 2):  # iteration 3, which replaces that of 2
                    raise Killed
                real(states, *args)

            patch.setattr(Checkpoints, name, dying)
            expected = Killed
        with pytest.raises(expected):
            do(ctx, rl)
    states = {path.name for path in (folder / "journal").glob("rl*.state")}
    assert ("rl_stopped.state" in states) == (moment == "a stop between saves")
    with opened(before, folder, base, **changes) as ctx:
        do(ctx, rl)
    with opened(before, tmp_path / "whole", base, **changes) as whole:
        do(whole, rl)
    summaries = [c.run.record("rl")["summary"] for c in (ctx, whole)]
    assert summaries[0] == summaries[1] and summaries[0]["iterations"] == 2
    assert same(weights(ctx, "rl_cai"), weights(whole, "rl_cai"))
    assert same(weights(ctx, "rl_cai"), weights(ctx, "rl_cai_step_00002"))
    rows = [
        [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows_of(c, "rl")]
        for c in (ctx, whole)
    ]
    assert rows[0] == rows[1]
