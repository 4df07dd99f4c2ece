"""Stage pm: two preference models, `pm` for RL and `pm_eval` for guards and reports, on disjoint comparisons.

Paper §4.1-4.2: AI harmlessness labels and human helpfulness comparisons together, cross-entropy with soft targets,
score at an end-of-context token.
"""

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from cai_fast import comparisons, losses, measure, roles
from cai_fast.batching import pack
from cai_fast.comparisons import Pair
from cai_fast.fit import FitSettings, Task, fit
from cai_fast.model import Model
from cai_fast.pipeline import Context
from cai_fast.runlog import in_words
from cai_fast.scorer import Scorer

OUTPUTS = ("checkpoints/pm", "checkpoints/pm_eval")


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on."""
    return ctx.inputs("pm", files=comparisons.FILES, roles=[start(ctx)])


def start(ctx: Context) -> str:
    """The role of the model that training starts from: SL-CAI, where preference models are adapters on it."""
    return "sl_cai" if ctx.config.lora.rank else "pm_init"


def run(ctx: Context) -> None:
    """Write checkpoints/pm and checkpoints/pm_eval."""
    cfg, renderer = ctx.config.pm, ctx.renderer(start(ctx))
    if renderer.tokenizer.eoc_id in renderer.tokenizer.stop_ids:
        ctx.log.warn("pm: the tokenizer has no reserved token to end a context with; scores are read at a second EOS")
    pairs, rejected = comparisons.load(ctx, start(ctx))
    summary: dict[str, Any] = {"pairs": dict(Counter(p.kind for p in pairs)), "rejected": rejected}
    first_step, held_out = 0, {}
    for name in comparisons.HALVES:
        training, unseen = comparisons.half(pairs, name, cfg.eval_fraction)
        model = roles.trained(ctx, start(ctx), head="score", name=name)
        steps = train(ctx, model, name, training, first_step)
        replica = roles.replica(ctx, model)
        began, scorer = time.monotonic(), ctx.scorer(replica.model if replica else model)
        results = held_out_results(ctx, name, scorer, unseen)
        work = ctx.work(time.monotonic() - began)
        summary[name] = {"trained_on": dict(Counter(p.kind for p in training)), "steps": steps}
        summary[name] |= roles.sizes(model) | results
        shown = {f"{kind}_{m}": row[m] for kind, row in results.items() for m in ("accuracy", "ece", "brier")}
        held_out |= {f"{name}/held_out_{m}": value for m, value in shown.items()}
        held_out |= {f"{m}/{name}": value for m, value in work.items()}
        ctx.log.info(f"{name}: trained on {in_words(summary[name]['trained_on'])}; held out: {in_words(shown)}")
        # transformers pools the last token that is not the padding token
        roles.export(ctx, model, name, renderer.tokenizer, summary[name], pad_token_id=renderer.tokenizer.pad_id)
        del model, replica, scorer  # before the next one is loaded and trained
        first_step += steps
    ctx.log.truncate("pm", first_step)
    ctx.log.metrics("pm", first_step, held_out)
    ctx.run.finish("pm", list(OUTPUTS), summary)


def train(ctx: Context, model: Model, name: str, pairs: list[Pair], first_step: int) -> int:
    """Fit one preference model; returns its number of steps."""
    cfg = ctx.config.pm

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        chosen = [pairs[i] for i in items]
        packed = pack([ids for p in chosen for ids in (p.ids_a, p.ids_b)], ctx.device)
        prob_a = torch.tensor([p.prob_a for p in chosen], device=ctx.device)
        weights = torch.tensor([p.weight for p in chosen], device=ctx.device)
        return losses.preference_loss(model, packed, prob_a, weights, scale)

    task = Task(
        name, [p.tokens for p in pairs], [p.weight for p in pairs], loss, [1.0] * len(pairs),
        ("loss", "accuracy", "margin"),
    )  # fmt: skip
    settings = FitSettings.of(ctx.config, cfg, cfg.batch_pairs)
    return fit(
        model, task, settings, stage="pm", state_dir=ctx.run.state_dir(name), log=ctx.log, dist=ctx.dist,
        first_step=first_step,
    )  # fmt: skip


def held_out_results(ctx: Context, name: str, scorer: Scorer, pairs: list[Pair]) -> dict[str, dict[str, Any]]:
    """Accuracy and calibration on comparisons of prompts that the model has not seen, by kind. Collective."""
    sequences = [ids for p in pairs for ids in (p.ids_a, p.ids_b)]
    groups = [n // 2 for n in range(len(sequences))]
    scores = measure.scores(ctx, f"{name}: held out", scorer, sequences, groups)
    margins = [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    return comparisons.agreement_by_kind(margins, pairs)
