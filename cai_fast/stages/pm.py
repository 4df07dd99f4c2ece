"""Stage pm: two preference models, `pm` for RL and `pm_eval` for guards and reports, on disjoint comparisons.

Paper §4.1-4.2: AI harmlessness labels and human helpfulness comparisons together, cross-entropy with soft targets,
score at an end-of-context token. A comparison goes to a model, and within it to training or to the held-out part, by
a hash of its conversation's first turn, so no prompt is on two sides.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cai_fast import elo, losses, measure, pipeline, readers, records, roles
from cai_fast.batching import pack
from cai_fast.errors import InputError
from cai_fast.fit import FitSettings, Task, fit
from cai_fast.model import Model, ModelConfig
from cai_fast.model.hf import read_config
from cai_fast.pipeline import Context
from cai_fast.prompts import fit_turns
from cai_fast.records import Label, Turn
from cai_fast.scorer import Scorer
from cai_fast.tokenizer import Renderer, Tokenizer

MODELS = ("pm", "pm_eval")
OUTPUTS = ("checkpoints/pm", "checkpoints/pm_eval")
KINDS = ("harmless", "helpful")


@dataclass(frozen=True)
class Pair:
    """One comparison in token ids."""

    kind: str
    turns: tuple[Turn, ...]
    ids_a: list[int]
    ids_b: list[int]
    prob_a: float
    weight: float

    @property
    def tokens(self) -> int:
        return len(self.ids_a) + len(self.ids_b)

    def side(self, eval_fraction: float) -> tuple[str, bool]:
        """(which model it belongs to, whether it is held out): a function of the conversation's first turn."""
        first = self.turns[0].text
        name = "pm_eval" if readers.encode_split("pm:" + first, 0.5) == "eval" else "pm"
        return name, readers.encode_split("held out:" + first, eval_fraction) == "eval"


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on."""
    files = ["prompts.jsonl", "comparisons.jsonl", "labels.jsonl", "tokens/comparisons.safetensors"]
    return ctx.inputs("pm", files=files, roles=[start(ctx)])


def start(ctx: Context) -> str:
    """The role of the model that training starts from: SL-CAI, where preference models are adapters on it."""
    return "sl_cai" if ctx.config.lora.rank else "pm_init"


def run(ctx: Context) -> None:
    """Write checkpoints/pm and checkpoints/pm_eval."""
    cfg, renderer = ctx.config.pm, ctx.renderer(start(ctx))
    helpful, rejected = helpful_pairs(ctx, renderer)
    if not helpful and not cfg.harmless_only:
        raise InputError(
            "pm: no helpfulness comparison to train on; a preference model without any teaches refusals. Give "
            "--data.preferences FILE, or --pm.harmless_only true to do it all the same."
        )
    if renderer.tokenizer.eoc_id in renderer.tokenizer.stop_ids:
        ctx.log.warn("pm: the tokenizer has no reserved token to end a context with; scores are read at a second EOS")
    if cfg.harmless_only:
        helpful = []
    pairs = harmless_pairs(ctx, renderer) + helpful
    summary: dict[str, Any] = {"pairs": dict(Counter(p.kind for p in pairs)), "rejected": rejected}
    first_step, held_out = 0, {}
    for name in MODELS:
        mine = [(p, held_out) for p in pairs for side, held_out in [p.side(cfg.eval_fraction)] if side == name]
        training = [p for p, held_out in mine if not held_out and p.weight > 0]
        if not training:
            raise InputError(f"pm: no comparison left to train {name} on ({len(pairs)} in all); give more prompts")
        model = roles.trained(ctx, start(ctx), head="score", name=name)
        steps = train(ctx, model, name, training, first_step)
        replica = roles.replica(ctx, model)
        began, scorer = time.monotonic(), ctx.scorer(replica.model if replica else model)
        results = held_out_results(ctx, name, scorer, [p for p, held_out in mine if held_out])
        work = ctx.work(time.monotonic() - began)
        summary[name] = {"trained_on": dict(Counter(p.kind for p in training)), "steps": steps}
        summary[name] |= roles.sizes(model) | results
        shown = {f"{kind}_{m}": row[m] for kind, row in results.items() for m in ("accuracy", "ece", "brier")}
        held_out |= {f"{name}/held_out_{m}": value for m, value in shown.items()}
        held_out |= {f"{m}/{name}": value for m, value in work.items()}
        ctx.log.info(f"{name}: trained on {summary[name]['trained_on']}, held out: {shown}")
        # transformers pools the last token that is not the padding token
        roles.export(ctx, model, name, renderer.tokenizer, summary[name], pad_token_id=renderer.tokenizer.pad_id)
        del model, replica, scorer  # before the next one is loaded and trained
        first_step += steps
    ctx.log.truncate("pm", first_step)
    ctx.log.metrics("pm", first_step, held_out)
    ctx.run.finish("pm", list(OUTPUTS), summary)


def harmless_pairs(ctx: Context, renderer: Renderer) -> list[Pair]:
    """The AI-labelled comparisons, with the responses' own token ids where the tokenizer is SL-CAI's."""
    turns = {p.id: p.turns for p in pipeline.load_prompts(ctx)}
    labels = {row.comparison_id: row.prob_a for row in records.read_jsonl(ctx.run.path("labels.jsonl"), Label)}
    tokens = records.read_tokens(ctx.run.path("tokens", "comparisons.safetensors"))
    if Tokenizer.load(ctx.folder("base")).hash != renderer.tokenizer.hash:
        tokens = {}
    pairs = []
    for row in pipeline.load_comparisons(ctx):
        if row.kind != "harmless" or row.split != "train" or row.id not in labels:
            continue
        said = turns[row.prompt_id]
        if tokens:
            a, b = (tokens[f"{row.id}/{side}"][0] for side in "ab")
        else:
            a, b = renderer.response_ids(row.response_a), renderer.response_ids(row.response_b)
        ids = renderer.preference(said, a), renderer.preference(said, b)
        pairs.append(Pair("harmless", said, *ids, labels[row.id], ctx.config.pm.harmless_weight))
    return pairs


def helpful_pairs(ctx: Context, renderer: Renderer) -> tuple[list[Pair], dict[str, int]]:
    """The helpfulness comparisons, and counts of those left out by reason."""
    data = ctx.config.data
    labels = {row.comparison_id: row.prob_a for row in records.read_jsonl(ctx.run.path("labels.jsonl"), Label)}
    rows = [row for row in pipeline.load_comparisons(ctx) if row.kind == "helpful"]
    pairs, over_long, held_out = [], 0, 0
    limit = ctx.config.model.max_len or ModelConfig.from_hf(read_config(ctx.folder(start(ctx)))).max_position_embeddings
    for row in rows:
        if row.split == "eval":
            held_out += 1
            continue
        said = tuple(Turn(**turn) for turn in row.provenance["turns"])
        turns = fit_turns(said, renderer, data.max_prompt_tokens, data.drop_oldest_turns)
        if turns is not None:
            ids = [renderer.preference(turns, renderer.response_ids(r)) for r in (row.response_a, row.response_b)]
        if turns is None or max(map(len, ids)) > limit:
            over_long += 1
            continue
        pairs.append(Pair("helpful", said, *ids, labels[row.id], ctx.config.pm.helpful_weight))
    if over_long > data.max_bad_fraction * len(rows):
        raise InputError(
            f"pm: {over_long} of {len(rows)} helpfulness comparisons have a prompt longer than data.max_prompt_tokens "
            f"= {data.max_prompt_tokens} or more than {limit} tokens in all; data.max_bad_fraction allows fewer"
        )
    return pairs, {"over_long": over_long, "held_out": held_out}


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
    results = {}
    for kind in KINDS:
        chosen = [(margin, p.prob_a) for margin, p in zip(margins, pairs, strict=True) if p.kind == kind]
        if chosen:
            results[kind] = agreement(*map(list, zip(*chosen, strict=True)))
    return results


def agreement(margins: list[float], prob_a: list[float]) -> dict[str, Any]:
    """How score differences fit soft labels: accuracy where the label takes a side, and calibration (paper Fig. 9).

    Calibration counts every pair from both sides: files of chosen and rejected answers have the better one first.
    """
    predicted = [0.5 * (1.0 + math.tanh(m / 2)) for m in margins]  # the logistic function, safe for any m
    sided = [float((m > 0) == (p > 0.5)) if m else 0.5 for m, p in zip(margins, prob_a, strict=True) if p != 0.5]
    result = {"accuracy": fmean(sided) if sided else None, "sided": len(sided), "count": len(margins)}
    return result | elo.calibration(predicted + [1.0 - p for p in predicted], prob_a + [1.0 - p for p in prob_a])
