"""DPO: the loss in plain torch, the optimum that the labels set, and the stage on written comparisons."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_stages import base, do, open_run, rows_of, same, weights
from tiny import gradients, relative_difference, tiny_model
from torch import Tensor

from cai_fast import comparisons, dpo, fit, losses, model
from cai_fast.batching import Example, pack_targets
from cai_fast.model import Model
from cai_fast.optim import Optimizer
from cai_fast.pipeline import Context
from cai_fast.stages import rl, sft

__all__ = ["base"]  # a fixture
EXAMPLES = [
    Example("", [1, 7], [9, 4, 2]), Example("", [1, 7], [5, 2]), Example("", [3], [8]), Example("", [3], [6, 6, 6, 2]),
    Example("", [2, 4, 6], [11, 2]), Example("", [2, 4, 6], [12, 13, 2]),
]  # fmt: skip
PROB_A, WEIGHTS = torch.tensor([0.9, 0.35, 0.5]), torch.tensor([1.0, 2.5, 0.5])


def summed(of: Model, example: Example) -> Tensor:
    """The log-probability of an answer, in fp64."""
    batch = pack_targets([example])
    logits = of(batch.packed)[batch.rows].double() @ of.lm_head_weight.double().t()
    return logits.log_softmax(-1).gather(1, batch.targets[:, None]).sum()


def reference() -> Tensor:
    """[3, 2] of another model than the policy."""
    with torch.no_grad():
        return losses.answer_logprobs(tiny_model(1), pack_targets(EXAMPLES)).unflatten(0, (-1, 2))


def test_loss_and_gradient_are_those_of_plain_torch() -> None:
    policy, other, beta = tiny_model(2), tiny_model(1).requires_grad_(False), 0.3
    terms, shown = [], []
    for c, (p, w) in enumerate(zip(PROB_A.tolist(), WEIGHTS.tolist(), strict=True)):
        a, b = (summed(policy, e) - summed(other, e) for e in EXAMPLES[2 * c : 2 * c + 2])
        d = beta * (a - b)
        terms.append(w * -(p * d.sigmoid().log() + (1 - p) * (-d).sigmoid().log()))
        right = 0.5 if p == 0.5 else float((float(d.detach()) > 0) == (p > 0.5))
        shown.append([w * float(x) for x in (right, d.detach().abs(), ((a + b) / 2).detach())])
    names, parameters = zip(*policy.named_parameters(), strict=True)
    total = torch.stack(terms).sum()
    expected = dict(zip(names, torch.autograd.grad(total / 4, parameters), strict=True))
    loss, stats = losses.dpo_loss(policy, pack_targets(EXAMPLES), reference(), PROB_A, WEIGHTS, beta, 0.25)
    loss.backward()
    assert relative_difference(gradients(policy), expected) < 1e-4
    assert float(loss.detach()) == pytest.approx(float(total.detach()) / 4, rel=1e-5)
    assert {name: float(total) for name, (total, _) in stats.items()} == pytest.approx(
        dict(zip(dpo.STATS, [float(total.detach()), *map(sum, zip(*shown, strict=True))], strict=True)), rel=1e-4
    )
    assert all(float(count) == 4.0 for _, count in stats.values())


@pytest.mark.parametrize(("prob_a", "beta"), [(0.8, 0.5), (0.3, 0.5), (0.8, 0.1)])
def test_the_implicit_reward_comes_to_reproduce_the_label(prob_a: float, beta: float) -> None:
    """Not 1 / (2 beta), IPO's target, nor the infinity of hard labels."""
    policy, batch = tiny_model(1), pack_targets(EXAMPLES[:2])
    before, optimizer = reference()[:1], Optimizer.adamw(policy.named_parameters(), 3e-3, head=policy.lm_head_weight)
    for step in range(60):
        loss, _ = losses.dpo_loss(policy, batch, before, torch.tensor([prob_a]), torch.ones(1), beta, 1.0)
        loss.backward()
        if step == 0:
            assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-5), "the policy starts as the reference"
        optimizer.clip(1.0)
        optimizer.step(min(1.0, (60 - step) / 30))
    with torch.no_grad():
        a, b = (losses.answer_logprobs(policy, batch) - before[0]).tolist()
    assert beta * (a - b) == pytest.approx(math.log(prob_a / (1 - prob_a)), abs=0.05)


DPO = {"rl__algorithm": "dpo", "rl__batch_pairs": 8, "rl__lr": 3e-3, "rl__dpo_beta": 0.3}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Context:  # noqa: F811
    """A run whose stage rl was DPO; it has no preference model at all."""
    ctx = open_run(tmp_path_factory.mktemp("dpo") / "run", base, **DPO)
    do(ctx, sft, rl)
    ctx.run.close()
    return ctx


def curve(ctx: Context) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k.startswith("rl/")} for row in rows_of(ctx, "rl")]


def test_the_stage_fits_what_the_preference_model_would_have_been_fitted_to(tuned: Context) -> None:
    assert not tuned.checkpoint("pm").exists()
    summary = tuned.run.record("rl")["summary"]
    pairs, _ = comparisons.load(tuned, "sl_cai")
    sides = [(p.kind, p.side(0.2)) for p in pairs]
    assert summary["trained_on"] == {k: sides.count((k, ("pm", False))) for k in comparisons.KINDS}
    assert {k: summary[k]["count"] for k in comparisons.KINDS} == {
        k: sides.count((k, ("pm", True))) for k in comparisons.KINDS
    }
    steps, last = curve(tuned)[:-1], curve(tuned)[-1]
    assert summary["steps"] == len(steps) == 2 * math.ceil(sum(summary["trained_on"].values()) / 8)
    assert steps[0]["rl/loss"] == pytest.approx(math.log(2), abs=1e-4) and steps[-1]["rl/loss"] < 0.62
    assert {f"rl/{name}" for name in (*dpo.STATS, "grad_norm", "lr")} == set(steps[0])
    assert last["rl/held_out_helpful_accuracy"] == summary["helpful"]["accuracy"] == 1.0
    assert not same(weights(tuned, "rl_cai"), weights(tuned, "sl_cai"))
    assert tuned.run.path("rollouts.jsonl").read_bytes() == b"" and summary["rollouts"] == 0
    read = tuned.run.record("rl")["inputs"]
    assert set(read["models"]) == {"sl_cai"}
    assert read["settings"]["pm.harmless_weight"] == 2.0  # of preset toy
    card = (tuned.checkpoint("rl_cai") / "README.md").read_text()
    assert "DPO" in card and "PPO" not in card and "`rl/loss`" in card


def test_answers_are_targets_without_the_end_of_context(tuned: Context) -> None:
    pair = comparisons.load(tuned, "sl_cai")[0][0]
    renderer = tuned.renderer("sl_cai")
    for example, ids in zip(pair.examples(), (pair.ids_a, pair.ids_b), strict=True):
        assert list(example.prompt_ids) == renderer.dialogue(pair.turns)
        assert [*example.prompt_ids, *example.target_ids, renderer.tokenizer.eoc_id] == ids
        assert example.target_ids[-1] == renderer.tokenizer.eos_id


def test_kill_and_resume_give_the_same_bits(
    tmp_path: Path,
    base: Path,
    tuned: Context,
    monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:
    real, calls = losses.dpo_loss, iter(range(10**6))

    def dying(*arguments: Any) -> tuple[Tensor, losses.Stats]:
        if next(calls) == 11:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(losses, "dpo_loss", dying)
    ctx = open_run(tmp_path / "run", base, **DPO)
    with pytest.raises(KeyboardInterrupt):
        do(ctx, sft, rl)
    ctx.run.close()
    monkeypatch.undo()
    ctx = open_run(tmp_path / "run", base, **DPO)
    do(ctx, sft, rl)
    ctx.run.close()
    assert same(weights(ctx, "rl_cai"), weights(tuned, "rl_cai")) and curve(ctx) == curve(tuned)


def test_micro_batches_change_nothing_and_the_weights_of_comparisons_do(
    tmp_path: Path,
    base: Path,
    tuned: Context,
    monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:
    first = fit.batches

    def begun(task: fit.Task, settings: fit.FitSettings) -> list[tuple[int, list[int]]]:
        return first(task, settings)[:2]

    monkeypatch.setattr(fit, "batches", begun)
    found = {}
    for name, changes in (("small", {"rl__micro_tokens": 60}), ("heavy", {"pm__harmless_weight": 5.0})):
        ctx = open_run(tmp_path / name, base, **DPO | changes)
        ctx.run.begin("sft", {})
        ctx.checkpoint("sl_cai").parent.mkdir(exist_ok=True)
        ctx.checkpoint("sl_cai").symlink_to(tuned.checkpoint("sl_cai"))
        ctx.run.finish("sft", ["checkpoints/sl_cai"], {})
        do(ctx, rl)
        ctx.run.close()
        found[name] = curve(ctx)[1]
    expected = curve(tuned)[1]
    assert {k: v for k, v in found["small"].items() if k != "rl/lr"} == pytest.approx(
        {k: v for k, v in expected.items() if k != "rl/lr"}, rel=1e-4, abs=1e-6
    )
    assert abs(found["heavy"]["rl/loss"] - expected["rl/loss"]) > 1e-3


def test_adapters_are_trained_and_their_trunk_is_the_reference(tmp_path: Path, base: Path) -> None:  # noqa: F811
    lora = {"lora__rank": 4, "lora__alpha": 8.0, "sft__lr": 1e-2, "rl__lr": 1e-2, "rl__epochs": 1}
    ctx = open_run(tmp_path / "run", base, **DPO | lora)
    do(ctx, sft, rl)
    ctx.run.close()
    summary, losses_seen = ctx.run.record("rl")["summary"], [row["rl/loss"] for row in curve(ctx)[:-1]]
    assert summary["trained_parameters"] < summary["parameters"] / 4
    assert losses_seen[0] == pytest.approx(math.log(2), abs=1e-4) and losses_seen[-1] < losses_seen[0]
    trunk = json.loads((ctx.checkpoint("rl_cai") / "adapter" / "trunk.json").read_text())
    assert trunk == {"sha256": ctx.model_hash("sl_cai")}
    assert not same(model.load(ctx.checkpoint("rl_cai")).state_dict(), weights(ctx, "sl_cai"))
