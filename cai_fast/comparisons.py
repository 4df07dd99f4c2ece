"""Comparisons in token ids, as preference models and DPO are trained on them: AI-labelled and helpfulness ones.

A comparison belongs to the model `pm` or to `pm_eval`, and is trained on or held out, by a hash of its conversation's
first turn, so no prompt is on two sides. DPO trains on what `pm` does, so that `pm_eval` can judge its answers.
"""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cai_fast import elo, measure, pipeline, readers, records
from cai_fast.batching import Example
from cai_fast.errors import InputError
from cai_fast.model import ModelConfig
from cai_fast.model.hf import read_config
from cai_fast.pipeline import Context
from cai_fast.prompts import fit_turns
from cai_fast.records import Label, Turn
from cai_fast.tokenizer import Renderer, Tokenizer

HALVES = ("pm", "pm_eval")
KINDS = ("harmless", "helpful")
FILES = ("prompts.jsonl", "comparisons.jsonl", "labels.jsonl", "tokens/comparisons.safetensors")
SAMPLES = 1000  # of the bootstrap; a constant, because no stage that trains depends on the settings of evaluate


@dataclass(frozen=True)
class Pair:
    """One comparison. ids_a, ids_b: conversation, answer with its stop token, end-of-context token."""

    kind: str
    turns: tuple[Turn, ...]
    ids_a: list[int]
    ids_b: list[int]
    prob_a: float
    weight: float
    asked: int
    """Tokens of the conversation."""

    @property
    def tokens(self) -> int:
        """Of both sequences."""
        return len(self.ids_a) + len(self.ids_b)

    def side(self, eval_fraction: float) -> tuple[str, bool]:
        """(which model it belongs to, whether it is held out): a function of the conversation's first turn."""
        first = self.turns[0].text
        name = "pm_eval" if readers.encode_split("pm:" + first, 0.5) == "eval" else "pm"
        return name, readers.encode_split("held out:" + first, eval_fraction) == "eval"

    def examples(self) -> tuple[Example, Example]:
        """Both answers as a language model's targets: without the end-of-context token."""
        a, b = (
            Example(side, ids[: self.asked], ids[self.asked : -1])
            for side, ids in (("a", self.ids_a), ("b", self.ids_b))
        )
        return a, b


def load(ctx: Context, role: str) -> tuple[list[Pair], dict[str, int]]:
    """All comparisons that may be trained on, in the tokens of the model in `role`, and counts of helpfulness
    comparisons left out by reason; InputError if there are none of these and `pm.harmless_only` is off."""
    cfg, renderer = ctx.config.pm, ctx.renderer(role)
    helpful, rejected = helpful_pairs(ctx, renderer, role)
    if not helpful and not cfg.harmless_only:
        raise InputError(
            "No helpfulness comparison to train on; training without any teaches refusals. Give "
            "--data.preferences FILE, or --pm.harmless_only true to do it all the same."
        )
    return harmless_pairs(ctx, renderer) + ([] if cfg.harmless_only else helpful), rejected


def half(pairs: list[Pair], name: str, eval_fraction: float) -> tuple[list[Pair], list[Pair]]:
    """(those that model `name` is trained on, those held out to measure it); InputError if nothing is left."""
    mine = [(p, held_out) for p in pairs for side, held_out in [p.side(eval_fraction)] if side == name]
    training = [p for p, held_out in mine if not held_out and p.weight > 0]
    if not training:
        raise InputError(f"No comparison left to train {name} on ({len(pairs)} in all); give more prompts")
    return training, [p for p, held_out in mine if held_out]


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
        asked = len(renderer.dialogue(said))
        pairs.append(Pair("harmless", said, *ids, labels[row.id], ctx.config.pm.harmless_weight, asked))
    return pairs


def helpful_pairs(ctx: Context, renderer: Renderer, role: str) -> tuple[list[Pair], dict[str, int]]:
    """The helpfulness comparisons that fit the model in `role`, and counts of those left out by reason."""
    data = ctx.config.data
    labels = {row.comparison_id: row.prob_a for row in records.read_jsonl(ctx.run.path("labels.jsonl"), Label)}
    rows = [row for row in pipeline.load_comparisons(ctx) if row.kind == "helpful"]
    pairs, over_long, held_out = [], 0, 0
    limit = ctx.config.model.max_len or ModelConfig.from_hf(read_config(ctx.folder(role))).max_position_embeddings
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
        asked = len(renderer.dialogue(turns))
        pairs.append(Pair("helpful", said, *ids, labels[row.id], ctx.config.pm.helpful_weight, asked))
    if over_long > data.max_bad_fraction * len(rows):
        raise InputError(
            f"{over_long} of {len(rows)} helpfulness comparisons have a prompt longer than data.max_prompt_tokens "
            f"= {data.max_prompt_tokens} or more than {limit} tokens in all; data.max_bad_fraction allows fewer"
        )
    return pairs, {"over_long": over_long, "held_out": held_out}


def agreement_by_kind(margins: list[float], pairs: list[Pair]) -> dict[str, dict[str, Any]]:
    """`agreement` of the score differences (a minus b) of the pairs of each kind."""
    results = {}
    for kind in KINDS:
        chosen = [
            (margin, p.prob_a, p.turns[0].text) for margin, p in zip(margins, pairs, strict=True) if p.kind == kind
        ]
        if chosen:
            results[kind] = agreement(*map(list, zip(*chosen, strict=True)))
    return results


def agreement(margins: list[float], prob_a: list[float], prompts: list[str]) -> dict[str, Any]:
    """How score differences fit soft labels: accuracy where the label takes a side, and calibration (paper Fig. 9).

    Calibration counts every pair from both sides: files of chosen and rejected answers have the better one first.
    prompts: names what is resampled for the 95 % intervals {lo, hi} of accuracy and Brier score, the first turn of each
    pair's conversation, by which pairs are held out. A calibration error is no mean of pairs and has no interval.
    """
    predicted = [0.5 * (1.0 + math.tanh(m / 2)) for m in margins]  # the logistic function, safe for any m
    sided = [float((m > 0) == (p > 0.5)) if m else 0.5 for m, p in zip(margins, prob_a, strict=True) if p != 0.5]
    result = {"accuracy": fmean(sided) if sided else None, "sided": len(sided), "count": len(margins)}
    result |= elo.calibration(predicted + [1.0 - p for p in predicted], prob_a + [1.0 - p for p in prob_a])
    asked = [name for name, p in zip(prompts, prob_a, strict=True) if p != 0.5]
    squares = [(q - p) ** 2 for q, p in zip(predicted, prob_a, strict=True)]  # the same from both sides
    return result | {"accuracy_interval": _interval(sided, asked), "brier_interval": _interval(squares, prompts)}


def _interval(values: list[float], prompts: list[str]) -> dict[str, float | None]:
    """{lo, hi}; None of a single prompt, of which every resample is the same."""
    found = measure.interval(values, prompts, SAMPLES, seed=0)
    return {end: found[end] if len(set(prompts)) > 1 else None for end in ("lo", "hi")}
