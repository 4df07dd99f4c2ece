"""Stages sft, pm and rl on written records and a tiny byte-level model: files, resume, guards, bad input."""

import contextlib
import dataclasses
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import byte_tokenizer
from tiny import CONFIG, alone
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cai_fast import comparisons, config, distributed, losses, model, pipeline, readers, records, sampler
from cai_fast.batching import pack
from cai_fast.checkpoint import Checkpoints
from cai_fast.config_rl import RlConfig
from cai_fast.config_sections import PmConfig
from cai_fast.distributed import Stopped
from cai_fast.errors import InputError
from cai_fast.pipeline import Context
from cai_fast.records import Comparison, Helpful, Label, Prompt, Revision, Rollout, Round, Turn
from cai_fast.rundir import RunDir
from cai_fast.runlog import RunLog
from cai_fast.stages import compare, label, pm, rl, sft
from cai_fast.tokenizer import Tokenizer

PROMPTS = [
    Prompt(f"{kind}{i}", kind, (Turn("human", f"{kind} question {i}"),), "written", "train")
    for kind in ("red_team", "helpful") for i in range(30)
]  # fmt: skip
ARGUMENTS = {
    "data.max_prompt_tokens": 64, "data.eval_fraction": 0.0, "sft.lr": 1e-3, "sft.batch_tokens": 400,
    "sft.micro_tokens": 300,
    "revise.rounds": 2, "pm.epochs": 2, "pm.lr": 1e-3, "pm.batch_pairs": 8, "pm.micro_tokens": 500, "rl.steps": 3,
    "rl.prompts_per_step": 8, "rl.max_new_tokens": 8, "rl.minibatches": 2, "rl.epochs": 2, "rl.lr": 1e-3,
    "rl.save_every": 1, "rl.critic": "pm", "rl.critic_lr": 1e-3, "rl.micro_tokens": 200,
    "rl.reward_transform": "standardise", "rl.missing_eos_penalty": 1.0, "sft.revisions": "all", "pm.save_every": 2,
    "pm.eval_fraction": 0.2, "data.constitution": "harmlessness",
}  # fmt: skip


def answer(good: bool) -> str:
    return " ".join(random.choices(["flour", "water", "wait", "mix"], k=3)) + (" please" if good else " never")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    tokenizer = Tokenizer.load(byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    shape = CONFIG.replace(vocab_size=tokenizer.vocab_size)
    model.init_random(shape, 0, std=0.1).save(folder, tokenizer=tokenizer)
    return folder


def write_inputs(folder: Path, base: Path) -> None:
    """What the stages before would have written."""
    random.seed(0)
    tokenizer = Tokenizer.load(base)
    revisions, helpful, comparisons, labels, tokens = [], [], [], [], {}
    for p in PROMPTS:
        texts = [answer(False), answer(False), answer(True)]
        if p.kind == "helpful":
            helpful.append(Helpful("h" + p.id, p.id, texts[2]))
            tokens["h" + p.id] = (tokenizer.encode(" " + texts[2]) + [tokenizer.eos_id], None)
            continue
        rounds = tuple(Round("principle", "critique", text) for text in texts[1:])
        revisions.append(Revision("r" + p.id, p.id, texts[0], rounds, kept=p.id != "red_team3"))
        for k, text in enumerate(texts):
            tokens[f"r{p.id}/{k}"] = (tokenizer.encode(" " + text) + [tokenizer.eos_id], None)
        comparisons.append(Comparison("c" + p.id, p.id, "harmless", "ai", texts[0], texts[2], "train"))
        labels.append(Label("l" + p.id, "c" + p.id, 0.1))
    records.write_jsonl(folder / "prompts.jsonl", PROMPTS)
    records.write_jsonl(folder / "revisions.jsonl", revisions)
    records.write_jsonl(folder / "helpful.jsonl", helpful)
    records.write_jsonl(folder / "comparisons.jsonl", comparisons)
    records.write_jsonl(folder / "labels.jsonl", labels)
    records.write_tokens(folder / "tokens" / "revisions.safetensors", tokens)
    ids = {f"{c.id}/{s}": (tokenizer.encode(" " + t) + [tokenizer.eos_id], None)
           for c in comparisons for s, t in (("a", c.response_a), ("b", c.response_b))}  # fmt: skip
    records.write_tokens(folder / "tokens" / "comparisons.safetensors", ids)
    rows = [{"prompt": f"help me {i}", "chosen": answer(True), "rejected": answer(False)} for i in range(40)]
    (folder.parent / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_run(folder: Path, base: Path, **changes: Any) -> Context:
    """A context whose earlier stages are finished."""
    arguments = ARGUMENTS | {"model.base": base, "data.red_team": "x", "data.helpful": "x"}
    arguments |= {"data.preferences": folder.parent / "preferences.jsonl"}
    arguments |= {name.replace("__", "."): value for name, value in changes.items()}
    words = ["--run-dir", str(folder)]
    idle = RlConfig(algorithm=arguments.get("rl.algorithm", "ppo"), samples_per_prompt=2).idle()
    for name, value in ((n, v) for n, v in arguments.items() if n.removeprefix("rl.") not in idle):
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    cfg = config.load(words)
    fresh = not folder.exists()
    run = RunDir.open(folder, cfg, dist=alone())
    ctx = pipeline.open_context(cfg, run, RunLog(folder / "metrics.jsonl"), alone())
    if fresh:
        write_inputs(folder, base)
        helpful, malformed = compare.helpfulness(ctx)
        assert (len(helpful), malformed) == (40 if cfg.data.preferences else 0, 0)
        for name, rows in (("comparisons", helpful), ("labels", [label.given(row) for row in helpful])):
            with (folder / f"{name}.jsonl").open("a") as handle:
                handle.writelines(json.dumps(row.to_json()) + "\n" for row in rows)
        outputs = {
            "revise": ["prompts.jsonl", "revisions.jsonl", "helpful.jsonl", "tokens/revisions.safetensors"],
            "compare": ["comparisons.jsonl", "tokens/comparisons.safetensors"], "label": ["labels.jsonl"],
        }  # fmt: skip
        for stage, files in outputs.items():
            run.begin(stage, {})
            run.finish(stage, files, {})
    return ctx


def do(ctx: Context, *stages: Any) -> None:
    for stage in stages:
        name = stage.__name__.rsplit(".", 1)[1]
        inputs = stage.inputs(ctx)
        if not ctx.run.is_done(name, inputs):
            ctx.run.begin(name, inputs)
            stage.run(ctx)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Context:
    """A run with all three stages done."""
    ctx = open_run(tmp_path_factory.mktemp("run") / "run", base)
    do(ctx, sft, pm, rl)
    ctx.run.close()
    return ctx


def rows_of(ctx: Context, stage: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in ctx.run.path("metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def weights(ctx: Context, name: str) -> dict[str, Tensor]:
    return model.load(ctx.checkpoint(name)).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_sft_trains_on_the_chosen_revisions(trained: Context) -> None:
    summary = trained.run.record("sft")["summary"]
    assert summary["revisions"] == 2 * 29, "two revisions of every kept chain, not the initial response"
    assert summary["helpful"] == 30
    assert summary["over_long"] == 0
    examples, _ = sft.examples_of(trained, trained.renderer("base"))
    one = next(e for e in examples if e.id == "rred_team5/2")
    text = trained.renderer("base").tokenizer.decode(one.target_ids)
    revision = records.read_jsonl(trained.run.path("revisions.jsonl"), Revision)[5]
    assert text.strip() == revision.rounds[1].revision
    assert one.target_ids[-1] == trained.renderer("base").tokenizer.eos_id
    assert sft.revision_indices("all", 4) == [1, 2, 3, 4]
    assert sft.revision_indices("last", 4) == [4]
    assert sft.revision_indices((3, 0), 4) == [0, 3]
    losses_seen = [row["sft/loss"] for row in rows_of(trained, "sft")]
    assert losses_seen[-1] < losses_seen[0]
    assert not same(weights(trained, "sl_cai"), model.load(trained.folder("base")).state_dict())


def test_pm_halves_are_disjoint_and_nothing_is_lost(trained: Context) -> None:
    renderer = trained.renderer("pm_init")
    helpful, rejected = comparisons.helpful_pairs(trained, renderer, "pm_init")
    pairs = comparisons.harmless_pairs(trained, renderer) + helpful
    assert rejected == {"over_long": 0, "held_out": 0}
    assert len(pairs) == 30 + 40
    sides: dict[str, set[tuple[str, bool]]] = {}
    for p in pairs:
        sides.setdefault(p.turns[0].text, set()).add(p.side(0.2))
    assert all(len(side) == 1 for side in sides.values())
    assert {side for group in sides.values() for side in group} == {
        (n, h) for n in comparisons.HALVES for h in (True, False)
    }
    assert all(ids[-1] == renderer.tokenizer.eoc_id for p in pairs for ids in (p.ids_a, p.ids_b))
    summary = trained.run.record("pm")["summary"]
    counted = [
        summary[n]["trained_on"][k] + summary[n][k]["count"] for n in comparisons.HALVES for k in comparisons.KINDS
    ]
    assert sum(counted) == 70
    assert all(0 <= summary[n][k]["accuracy"] <= 1 for n in comparisons.HALVES for k in comparisons.KINDS)
    steps = [row["step"] for row in rows_of(trained, "pm")]
    assert steps == list(range(len(steps)))


def test_evaluation_prompts_stay_out_of_the_preference_models(tmp_path: Path, base: Path) -> None:
    ctx = open_run(tmp_path / "run", base, data__eval_fraction=0.3)
    with contextlib.closing(ctx.run):
        pairs, counts = comparisons.helpful_pairs(ctx, ctx.renderer("pm_init"), "pm_init")
    sides = [readers.encode_split(f"help me {i}", 0.3) for i in range(40)]
    assert [p.turns[0].text for p in pairs] == [f"help me {i}" for i, side in enumerate(sides) if side == "train"]
    assert counts["held_out"] == sides.count("eval") > 0


def test_exports_load_in_transformers_with_equal_results(trained: Context) -> None:
    tokens = [trained.renderer("pm").preference(PROMPTS[i].turns, [20 + i, 2]) for i in range(3)]
    theirs = AutoModelForSequenceClassification.from_pretrained(trained.checkpoint("pm"))
    longest = max(map(len, tokens))
    padded = torch.tensor([t + [theirs.config.pad_token_id] * (longest - len(t)) for t in tokens])
    with torch.no_grad():
        ours = losses.scores(model.load(trained.checkpoint("pm")), pack(tokens))
        mask = (padded != theirs.config.pad_token_id).long()
        torch.testing.assert_close(theirs(padded, attention_mask=mask).logits[:, 0], ours, rtol=1e-4, atol=1e-5)
        policy = AutoModelForCausalLM.from_pretrained(trained.checkpoint("rl_cai"))
        rl_cai = model.load(trained.checkpoint("rl_cai"))
        hidden = rl_cai(pack([tokens[0]]))
        expected = policy(torch.tensor([tokens[0]])).logits[0]
        torch.testing.assert_close(hidden @ rl_cai.lm_head_weight.t(), expected, rtol=1e-4, atol=1e-4)
    assert Tokenizer.load(trained.checkpoint("rl_cai")).hash == Tokenizer.load(trained.folder("base")).hash


def test_rollouts_and_metrics(trained: Context) -> None:
    rows = records.read_jsonl(trained.run.path("rollouts.jsonl"), Rollout)
    assert [row.iteration for row in rows] == [i for i in range(4) for _ in range(8)]
    assert len({row.id for row in rows}) == len(rows)
    assert sum(row.prompt_id.startswith("red_team") for row in rows[:8]) == 4
    assert all(row.kl == 0 for row in rows[:8]), "the first policy is the reference"
    assert {"pm", "model", "policy_step", "rng", "sampling"} <= rows[0].provenance.keys()
    metrics = rows_of(trained, "rl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    names = ["reward", "kl", "kl_exact", "approx_kl", "clipfrac", "explained_variance", "entropy", "logprob_gap",
             "refusal_rate", "length", "kl_coef", "grad_norm", "guard"]  # fmt: skip
    assert all(f"rl/{name}" in metrics[0] for name in names)
    work = [row["perf/trunk_over_minimum"] for row in metrics]
    assert all(0.5 < ratio < 1.5 for ratio in work), "each iteration counts its own engine work"
    assert all(row["perf/kv_bytes_per_token"] > 0 and "perf/padding_tokens" in row for row in metrics)
    assert metrics[0]["rl/kl_exact"] == 0
    assert metrics[0]["rl/first_ratio_gap"] == 0
    assert metrics[2]["rl/kl_exact"] > 0
    assert all(row["rl/logprob_gap"] < 1e-5 for row in metrics)
    assert metrics[1]["rl/reward"] == pytest.approx(sum(r.reward for r in rows[8:16]) / 8, rel=1e-5)
    summary = trained.run.record("rl")["summary"]
    assert summary["guard"] == ""
    assert summary["kl_exact_final"] == metrics[3]["rl/kl_exact"]
    assert summary["kl_exact_max"] == max(row["rl/kl_exact"] for row in metrics)
    assert not same(weights(trained, "rl_cai"), weights(trained, "sl_cai"))


def test_rollouts_of_all_ranks_are_merged_without_holding_them(tmp_path: Path) -> None:
    """Ranks 0 and 1 shared the first two iterations, rank 0 went on alone."""
    places = {0: [(0, 0), (1, 0), (1, 1), *((2, n) for n in range(40))], 1: [(0, 1), (0, 2), (1, 2)]}
    for rank, mine in places.items():
        with records.Journal(tmp_path / "journal" / f"rl.{rank}.jsonl") as journal:
            for step, number in mine:
                row = {"id": f"{step}.{number}", "iteration": step, "text": "x" * 10**5}
                journal.append({"number": number, "record": row, "token_ids": [step, number], "logprobs": [-1.0, -0.5]})
    ctx = SimpleNamespace(run=SimpleNamespace(path=tmp_path.joinpath))
    (tmp_path / "tokens").mkdir()
    tracemalloc.start()
    try:
        assert rl.write_rollouts(ctx) == 46
        assert tracemalloc.get_traced_memory()[1] < 2 * 10**6, "46 rows of 0.1 MB each were held at once"
    finally:
        tracemalloc.stop()
    expected = [f"{step}.{number}" for step, number in sorted(places[0] + places[1])]
    written = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == expected
    tokens = records.read_tokens(tmp_path / "tokens" / "rollouts.safetensors")
    assert list(tokens) == expected and tokens["1.2"] == ([1, 2], [-1.0, -0.5])


class Killed(BaseException):
    """Not an error that anything handles: the process is gone."""


def test_kill_and_resume_give_the_same_bits(
    tmp_path: Path, base: Path, trained: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die in the middle of pm_eval, of an RL update, and by SIGTERM: the files are those of an undisturbed run."""

    def die_at(target: Any, name: str, call: int) -> None:
        real: Callable[..., Any] = getattr(target, name)
        calls = iter(range(10**6))

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                if name == "stop_requested":
                    return True
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, wrapped)

    folder = tmp_path / "run"
    for target, name, call, stages in (
        (losses, "preference_loss", 11, (sft, pm)),
        (losses, "policy_loss", 11, (sft, pm, rl)),
        (distributed, "stop_requested", 1, (rl,)),
    ):
        die_at(target, name, call)
        ctx = open_run(folder, base)
        with pytest.raises((Killed, Stopped)):
            do(ctx, *stages)
        ctx.run.close()
        monkeypatch.undo()
    ctx = open_run(folder, base)
    do(ctx, sft, pm, rl)
    ctx.run.close()
    for name in ("sl_cai", "pm", "pm_eval", "rl_cai"):
        assert same(weights(ctx, name), weights(trained, name)), name
    assert ctx.run.path("rollouts.jsonl").read_bytes() == trained.run.path("rollouts.jsonl").read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows_of(c, stage)]
        for stage in ("sft", "pm", "rl") for c in (ctx, trained)
    ]  # fmt: skip
    assert timeless[0::2] == timeless[1::2]


def test_bf16_weights_and_moments_resume_to_the_same_bits(tmp_path: Path, base: Path, monkeypatch: Any) -> None:
    changes = {"model__dtype": "bfloat16", "model__moments": "bfloat16", "rl__steps": 2, "sft__save_every": 1}
    whole = open_run(tmp_path / "whole" / "run", base, **changes)
    do(whole, sft, pm, rl)
    assert {"moments", "dtype"} <= vars(whole.config.model)["_reads"]
    for finished, stage, name in (((), sft, "sft"), ((sft, pm), rl, "rl")):
        ctx = open_run(tmp_path / "parts" / "run", base, **changes)
        do(ctx, *finished)
        calls = iter(range(10**6))
        monkeypatch.setattr(distributed, "stop_requested", lambda calls=calls: next(calls) == 1)
        with pytest.raises(Stopped):
            do(ctx, stage)
        with Checkpoints(ctx.run.state_dir(name), ctx.dist) as states:
            saved = states.latest()
        held = {t.dtype for key, t in saved.tensors.items() if key.startswith("optimizer.")}
        assert held == {torch.int16, torch.bfloat16, torch.int64}
        ctx.run.close()
        monkeypatch.undo()
    ctx = open_run(tmp_path / "parts" / "run", base, **changes)
    do(ctx, sft, pm, rl)
    for name in ("sl_cai", "pm", "pm_eval", "rl_cai"):
        assert same(weights(ctx, name), weights(whole, name)), name
    whole.run.close()
    ctx.run.close()


@pytest.mark.parametrize(("settings", "message"), [
    ({"guards__max_kl": 1e-9}, "KL to SL-CAI"), ({"rl__lr": 1e30}, "not finite"),
    ({"guards__entropy": "stop", "guards__min_entropy": 50.0}, "entropy"),
])  # fmt: skip
def test_guards_leave_a_usable_policy(
    tmp_path: Path, base: Path, trained: Context, settings: dict[str, Any], message: str
) -> None:
    ctx = open_run(tmp_path / "run", base, guards__pm_eval_every=0, **settings)
    for name, stage in (("sl_cai", "sft"), ("pm", "pm")):
        trained_folder = trained.checkpoint(name)
        (ctx.run.path("checkpoints")).mkdir(exist_ok=True)
        ctx.checkpoint(name).symlink_to(trained_folder)
        ctx.run.begin(stage, {})
        ctx.run.finish(stage, [], {})
    do(ctx, rl)
    ctx.run.close()
    summary = ctx.run.record("rl")["summary"]
    assert message in summary["guard"]
    assert rows_of(ctx, "rl")[-1]["rl/guard"] == 1.0
    exported = weights(ctx, "rl_cai")
    assert all(torch.isfinite(t).all() for t in exported.values())
    if summary["iterations"] == 0:
        assert same(exported, weights(trained, "sl_cai"))


def test_harmlessness_only_data_is_refused_unless_asked_for(tmp_path: Path, base: Path, trained: Context) -> None:
    ctx = open_run(tmp_path / "run", base, pm__harmless_only=True, data__preferences="")
    empty = Context(dataclasses.replace(ctx.config, pm=PmConfig()), ctx.run, ctx.log, ctx.dist, ctx.constitution)
    with pytest.raises(InputError, match="teaches refusals"):
        pm.run(empty)
    do(ctx, pm)
    ctx.run.close()
    assert ctx.run.record("pm")["summary"]["pairs"] == {"harmless": 30}


def test_prompt_stream_mixes_and_covers(trained: Context) -> None:
    stream = sampler.PromptStream(trained)
    taken = stream.take(0, 120)
    for start in range(0, 120, 10):
        assert sum(p.kind == "red_team" for p, _ in taken[start : start + 10]) == 5
    assert sorted(p.id for p, visit in taken if visit == 0) == sorted(p.id for p in PROMPTS)
    assert taken[37:90] == sampler.PromptStream(trained).take(37, 53), "a function of the position alone"
    assert [p.id for p, v in taken if v == 0] != [p.id for p, v in taken if v == 1]
