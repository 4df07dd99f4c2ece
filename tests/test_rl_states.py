"""What stage rl leaves along its way: snapshots of the policy."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import byte_tokenizer
from test_training_stages import Killed, do, open_run, rows_of, same, weights
from tiny import CONFIG, alone

from cai_fast import config, measure, model, pipeline, records, roles
from cai_fast.checkpoint import Checkpoints
from cai_fast.errors import InputError
from cai_fast.pipeline import Context
from cai_fast.planner import Planner
from cai_fast.policy_gradient import PolicyGradient
from cai_fast.rundir import RunDir
from cai_fast.stages import pm, rl, sft
from cai_fast.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "pm__epochs": 1, "rl__steps": 4, "rl__epochs": 1, "rl__minibatches": 1, "rl__reward_transform": "none",
    "rl__critic": "detached", "rl__snapshot_every": 2,
}  # fmt: skip
SNAPSHOTS = ["rl_cai_step_00002", "rl_cai_step_00004"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    tokenizer = Tokenizer.load(byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    model.init_random(CONFIG.replace(vocab_size=tokenizer.vocab_size), 0, std=0.1).save(folder, tokenizer=tokenizer)
    return folder


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

    def dying(ppo: PolicyGradient, examples: Any, now: int, *rest: Any) -> Any:
        if now == step:
            raise Killed
        return real(ppo, examples, now, *rest)

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


@pytest.mark.parametrize("moment", ["before the first state", "after a snapshot", "in a snapshot"])
def test_a_killed_run_has_the_snapshots_of_an_unbroken_one(
    moment: str, whole: Context, before: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, changes = tmp_path / "run", {"rl__save_every": 3 if moment == "after a snapshot" else 2}
    with opened(before, folder, base, **changes) as ctx:
        if moment != "in a snapshot":
            do_until(ctx, 1 if moment == "before the first state" else 3)  # that of iteration 2 has no state
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


def test_snapshots_are_planned() -> None:
    def kept(words: str) -> float:
        return Planner(config.load(f"--stages rl --model.device cpu --rl.steps 40 {words}".split())).disk("rl")[0]

    weights_of_one = kept("--rl.snapshot_every 40") - kept("")
    assert weights_of_one == pytest.approx(Planner(config.load(["--model.device", "cpu"])).shape("base").params * 4)
    assert kept("--rl.snapshot_every 12") - kept("") == pytest.approx(3 * weights_of_one)
    assert kept("--rl.snapshot_every 41") == kept("")


def test_adapters_are_merged_in_a_snapshot(base: Path, tmp_path: Path) -> None:
    lora = {"lora__rank": 2, "rl__steps": 1, "rl__snapshot_every": 1, "rl__lr": 1e-2}
    ctx = open_run(tmp_path / "run", base, **SETTINGS | lora)
    with contextlib.closing(ctx.run):
        do(ctx, sft, pm, rl)
        assert same(weights(ctx, "rl_cai_step_00001"), weights(ctx, "rl_cai"))
        assert not same(weights(ctx, "rl_cai"), weights(ctx, "sl_cai"))
        assert (ctx.checkpoint("rl_cai_step_00001") / "adapter" / "trunk.json").is_file()
    assert len(records.read_jsonl(ctx.run.path("rollouts.jsonl"), records.Rollout)) == 16
