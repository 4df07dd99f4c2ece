"""Stage label: the feedback model's soft preference labels for the AI comparisons (paper §4.1).

One multiple-choice question per (principle, order); the label is the softmax of the two options' log-probabilities,
averaged over both orders and the drawn principles. With chain of thought the judge reasons first, the answer is
read after its text, and the label is clamped (paper §4.3). Labels made elsewhere can be imported instead.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from cai_fast import pipeline, readers, rng
from cai_fast.errors import InputError
from cai_fast.judging import Judge
from cai_fast.pipeline import Context
from cai_fast.records import Comparison, Label, content_id, write_jsonl
from cai_fast.runlog import in_words

OUTPUTS = ("labels.jsonl",)


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on."""
    imported = ctx.config.label.from_
    roles = [] if imported else ["judge"]
    return ctx.inputs("label", files=["prompts.jsonl", "comparisons.jsonl"], roles=roles) | {
        "from": pipeline.data_file_hash(imported)
    }


def run(ctx: Context) -> None:
    """Write labels.jsonl and the label statistics."""
    everything = pipeline.load_comparisons(ctx)
    comparisons = [c for c in everything if c.source == "ai"]
    if not comparisons:
        raise InputError("label: comparisons.jsonl holds no AI comparison; run stage compare with more prompts.")
    cfg = ctx.config.label
    summary: dict[str, Any] = {"requested": len(comparisons)}
    ctx.log.truncate("label", 0)  # of an attempt that was interrupted after its statistics
    if cfg.from_:
        labels, statistics = imported_labels(ctx, comparisons), {}
    else:
        turns = {p.id: p.turns for p in pipeline.load_prompts(ctx, kind="red_team")}
        by_id = {c.id: c for c in comparisons}
        judge = Judge(ctx, "judge")
        rows = pipeline.journaled(
            ctx, "label", list(by_id), cfg.chunk,
            lambda ids: judge.label([(by_id[i], turns[by_id[i].prompt_id]) for i in ids]),
        )  # fmt: skip
        labels = [Label.from_json(row["record"]) for row in rows.values()]
        statistics = label_statistics(list(rows.values()))
        summary["principles"] = principle_statistics(labels)
    if cfg.permute:
        labels = permuted(ctx, labels)
    summary["kept"] = len(labels)
    if ctx.dist.is_main:
        write_jsonl(ctx.run.path("labels.jsonl"), labels + [given(c) for c in everything if c.source != "ai"])
        statistics["entropy"] = fmean(_entropy(label.prob_a) for label in labels)
        ctx.log.metrics("label", len(labels), {f"label/{name}": value for name, value in statistics.items()})
        summary |= statistics
        ctx.log.info(f"label: {summary['kept']} of {summary['requested']} labelled, {in_words(statistics)}")
    ctx.run.finish("label", list(OUTPUTS), summary)


def imported_labels(ctx: Context, comparisons: Sequence[Comparison]) -> list[Label]:
    """Labels of label.from for exactly the comparisons of this run."""
    path = ctx.config.label.from_
    given = readers.read_labels(path)
    missing = [c.id for c in comparisons if c.id not in given]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(comparisons)} comparisons have no label, e.g. comparison_id {missing[0]}."
        )
    return [Label(content_id("label", c.id), c.id, given[c.id], provenance={"from": path}) for c in comparisons]


def given(comparison: Comparison) -> Label:
    """The label that a comparison made elsewhere came with."""
    origin = comparison.provenance
    source = {"from": origin["file"], "line": origin["line"]}
    return Label(content_id("label", comparison.id), comparison.id, origin["prob_a"], provenance=source)


def permuted(ctx: Context, labels: Sequence[Label]) -> list[Label]:
    """Control experiment: every comparison gets the prob_a of another one, so that labels carry no information."""
    order = rng.permutation(ctx.key("label/permute", "all"), len(labels))
    return [
        Label(label.id, label.comparison_id, labels[other].prob_a, label.per_principle, label.clamp,
              label.provenance | {"permuted_from": labels[other].id})
        for label, other in zip(labels, order, strict=True)
    ]  # fmt: skip


def label_statistics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Position bias |P(A first) - P(A second)|, agreement of principles and orders with the label, option mass."""
    bias, agree, orders = [], [], []
    for row in rows:
        for view in row["record"]["per_principle"]:
            ab, ba = view["prob_a_ab"], view["prob_a_ba"]
            known = [p for p in (ab, ba) if p is not None]
            agree.append(float((fmean(known) > 0.5) == (row["record"]["prob_a"] > 0.5)))
            if len(known) == 2:
                bias.append(ab - ba)
                orders.append(float((ab > 0.5) == (ba > 0.5)))
    statistics = {"option_mass": fmean(row["mass"] for row in rows), "principle_agreement": fmean(agree)}
    if bias:
        statistics |= {
            "position_bias": fmean(bias),
            "position_bias_abs": fmean(map(abs, bias)),
            "order_agreement": fmean(orders),
        }
    return statistics


def principle_statistics(labels: Sequence[Label]) -> dict[str, dict[str, float]]:
    """By principle: how often it was drawn and, over questions asked in both orders, agreement of the orders, bias
    to the first answer, and mean distance of the averaged answer from 1/2."""
    views = [view for label in labels for view in label.per_principle]
    result: dict[str, dict[str, float]] = {}
    for name in sorted({view.principle for view in views}):
        mine = [view for view in views if view.principle == name]
        both = [(v.prob_a_ab, v.prob_a_ba) for v in mine if v.prob_a_ab is not None and v.prob_a_ba is not None]
        result[name] = {"drawn": len(mine)}
        if both:
            result[name] |= {
                "order_agreement": fmean(float((ab > 0.5) == (ba > 0.5)) for ab, ba in both),
                "position_bias": fmean(ab - ba for ab, ba in both),
                "decisiveness": fmean(abs((ab + ba) / 2 - 0.5) for ab, ba in both),
            }
    return result


def _entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1.0 - p) if q > 0.0)
