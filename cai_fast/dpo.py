"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): SL-CAI fitted to the comparisons themselves.

Nothing is sampled and no preference model is loaded. The comparisons, their halves and their weights are those of stage
pm. Labels are soft: the loss -[p log sigmoid(d) + (1 - p) log sigmoid(-d)], d = rl.dpo_beta x (log-ratio of answer a
minus that of answer b, to SL-CAI), is least where d = logit(p): the implicit reward reproduces the label. Conservative
DPO has the same form with one p for all pairs, as label noise. IPO has another target, a fixed difference.
"""

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from cai_fast import comparisons, losses, roles, sharing
from cai_fast.batching import Example, pack_targets
from cai_fast.comparisons import Pair
from cai_fast.fit import FitSettings, Task, fit
from cai_fast.model import Model
from cai_fast.pipeline import Context
from cai_fast.runlog import in_words

STATS = ("loss", "accuracy", "margin", "log_ratio")


def inputs(ctx: Context) -> dict[str, Any]:
    """What the result depends on: the preference model's data and weights, and not the preference model."""
    pm, made = ctx.config.pm, ctx.inputs("rl", files=comparisons.FILES, roles=["sl_cai"])
    made["settings"] |= {
        "pm.harmless_weight": pm.harmless_weight, "pm.helpful_weight": pm.helpful_weight,
        "pm.harmless_only": pm.harmless_only, "pm.eval_fraction": pm.eval_fraction,
    }  # fmt: skip
    return made


def train(ctx: Context) -> tuple[Model, dict[str, Any]]:
    """The trained policy and a summary of its training. Collective."""
    pairs, rejected = comparisons.load(ctx, "sl_cai")
    training, held_out = comparisons.half(pairs, "pm", ctx.config.pm.eval_fraction)
    trunk = roles.frozen(ctx, "sl_cai", head="lm")
    reference = log_probs(ctx, "rl: reference", trunk, training + held_out)
    if not ctx.config.lora.rank:
        trunk = None  # given back before there is a policy
    policy = roles.trained(ctx, "sl_cai", head="lm", name="rl", trunk=trunk)
    steps = _fit(ctx, policy, training, reference[: len(training)])
    results = _held_out(ctx, policy, held_out, reference[len(training) :])
    shown = {f"rl/held_out_{kind}_{m}": row[m] for kind, row in results.items() for m in ("accuracy", "ece", "brier")}
    ctx.log.truncate("rl", steps)
    ctx.log.metrics("rl", steps, shown)
    ctx.log.info(f"rl: held out: {in_words(shown)}")
    counts = {"trained_on": dict(Counter(p.kind for p in training)), "rejected": rejected, "steps": steps}
    return policy, counts | roles.sizes(policy) | results


def _fit(ctx: Context, policy: Model, pairs: list[Pair], reference: list[list[float]]) -> int:
    """Train on the pairs, whose answers have these log-probabilities under SL-CAI; returns the number of steps."""
    cfg = ctx.config.rl
    examples = [p.examples() for p in pairs]

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        batch = pack_targets([e for i in items for e in examples[i]], ctx.device)
        before = torch.tensor([reference[i] for i in items], device=ctx.device)
        prob_a, weights = (torch.tensor([getattr(pairs[i], name) for i in items], device=ctx.device)
                           for name in ("prob_a", "weight"))  # fmt: skip
        return losses.dpo_loss(policy, batch, before, prob_a, weights, cfg.dpo_beta, scale)

    lengths = [a.tokens + b.tokens for a, b in examples]
    task = Task("rl", lengths, [p.weight for p in pairs], loss, [1.0] * len(pairs), STATS)
    settings = FitSettings.of(ctx.config, cfg, cfg.batch_pairs)
    return fit(policy, task, settings, stage="rl", state_dir=ctx.run.state_dir("rl"), log=ctx.log, dist=ctx.dist)


def _held_out(
    ctx: Context, policy: Model, pairs: list[Pair], reference: list[list[float]]
) -> dict[str, dict[str, Any]]:
    """Accuracy and calibration of the implicit reward on comparisons that it was not fitted to. Collective."""
    replica, began = roles.replica(ctx, policy), time.monotonic()
    after = log_probs(ctx, "rl: held out", replica.model if replica else policy, pairs)
    margins = [
        ctx.config.rl.dpo_beta * ((a - ref_a) - (b - ref_b))
        for (a, b), (ref_a, ref_b) in zip(after, reference, strict=True)
    ]
    ctx.log.info(f"rl: {len(pairs)} held-out comparisons measured in {time.monotonic() - began:.0f} s")
    return comparisons.agreement_by_kind(margins, pairs)


def log_probs(ctx: Context, name: str, model: Model, pairs: list[Pair]) -> list[list[float]]:
    """[C][2] summed log-probabilities of both answers of each pair, by all ranks. Collective; `model` is whole."""

    @torch.no_grad()
    def process(given: list[Example]) -> list[float]:
        return losses.answer_logprobs(model, pack_targets(given, ctx.device)).tolist()

    examples = [e for p in pairs for e in p.examples()]
    found = sharing.shared(ctx, name, examples, sharing.token_chunks([e.tokens for e in examples]), process)
    return [found[i : i + 2] for i in range(0, len(found), 2)]
