"""Two runs compared: what a changed principle (or any other setting) changed, from the files of their folders alone.

Rows are joined by what they are about (prompt ids, the texts of a comparison), never by position. Where they can be,
an interval is a 95 % bootstrap over prompts of paired differences, run B minus run A, and a difference is flagged where
it excludes 0. Of other numbers each run's own interval is given, if it was kept; two that do not overlap are flagged.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np

from cai_fast.constitution import Constitution
from cai_fast.errors import InputError
from cai_fast.inputs import parse_toml, read_bytes
from cai_fast.records import Comparison, Label, PolicyAnswer, PrincipleLabel, Prompt, Revision
from cai_fast.runfiles import RunFiles

NEEDED = ("revise", "compare", "label", "pm", "evaluate")
SAMPLES = 2000  # of the bootstrap
SHOWN = 10  # examples of each kind
UNCHANGED = 1e-9  # of a probability
GROUPS = {"red_team": "red_team", "helpful": "benign"}  # kind of prompt -> name in evaluation.json
Pair = tuple[Comparison, Label]


def compare(a: RunFiles, b: RunFiles) -> dict[str, Any]:
    """Everything that differs, as JSON values; InputError where the two cannot be compared."""
    if a.root.resolve() == b.root.resolve():
        raise InputError(f"{a.root}: the same folder twice; expected two runs")
    for run in (a, b):
        for stage in NEEDED:
            run.finished(stage)
    prompts, notes = _prompts(a, b)
    evaluations = [run.json("evaluation.json") for run in (a, b)]
    return {
        "runs": [str(run.root) for run in (a, b)],
        "notes": notes,
        "settings": settings(a, b),
        "constitution": constitutions(*(run.constitution(run.constitution_hash()) for run in (a, b))),
        "chains": chains(prompts, *(run.rows("revisions.jsonl", Revision) for run in (a, b))),
        "revisions": _side_by_side(*(e["revisions"] for e in evaluations), ("revision", "metric")),
        "labels": labels(prompts, *(_labelled(run) for run in (a, b))),
        "preference_models": preference_models(*(run.finished("pm")["summary"] for run in (a, b))),
        "behaviour": behaviour(prompts, a, b, *evaluations),
        "judge": _judge(*evaluations),
        "elo": _side_by_side(*(e.get("elo", {}) for e in evaluations), ("judge", "policy"), "rating"),
    }


def paired(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable]) -> dict[str, Any]:
    """Means of two aligned lists, the mean difference b - a with its 95 % interval over clusters, and the flag.

    A single cluster has no interval, and is never flagged.
    """
    if not len(a):
        return {"a": None, "b": None, "diff": None, "lo": None, "hi": None, "n": 0, "flag": False}
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    index = np.asarray([names[c] for c in clusters])
    sums, counts = np.bincount(index, weights=y - x), np.bincount(index)
    row = {"a": float(x.mean()), "b": float(y.mean()), "diff": float((y - x).mean()), "n": len(x)}
    if len(counts) < 2:
        return row | {"lo": None, "hi": None, "flag": False}
    draw = np.random.default_rng(0).integers(0, len(counts), size=(SAMPLES, len(counts)))
    lo, hi = np.quantile(sums[draw].sum(1) / counts[draw].sum(1), [0.025, 0.975])
    return row | {"lo": float(lo), "hi": float(hi), "flag": bool(lo > 0 or hi < 0)}


def _prompts(a: RunFiles, b: RunFiles) -> tuple[dict[str, Prompt], list[str]]:
    """The prompts that both runs have, by id, and what to know about the comparison as a whole."""
    rows = [{p.id: p for p in run.rows("prompts.jsonl", Prompt)} for run in (a, b)]
    both = [i for i in rows[0] if i in rows[1]]
    shared = {i: rows[0][i] for i in both if rows[0][i].turns == rows[1][i].turns}
    if not shared:
        raise InputError(f"{a.root} and {b.root}: no prompt in common; expected runs on the same prompts")
    notes = []
    if a.config.seed != b.config.seed:
        notes.append(
            f"The seeds differ ({a.config.seed} and {b.config.seed}): every draw does too, so that differences are "
            "not due to the settings alone."
        )
    if len(shared) < max(map(len, rows)):
        cut = f", {len(both) - len(shared)} of them shortened differently" if len(both) > len(shared) else ""
        notes.append(f"Of {len(rows[0])} and {len(rows[1])} prompts {len(both)} are in both runs{cut}.")
    for run in (a, b):
        used = {run.stages[stage]["inputs"].get("constitution") for stage in NEEDED}
        if len(used) > 1:
            notes.append(f"{run.root}: its stages used {len(used)} constitutions; the newest is compared.")
    return shared, notes


def settings(a: RunFiles, b: RunFiles) -> list[dict[str, Any]]:
    """The settings that differ, as {key, a, b}."""
    flat = []
    for run in (a, b):
        tree = parse_toml(read_bytes(run.root / "config.toml"), run.root / "config.toml")
        tables = {k: v if isinstance(v, dict) else {"": v} for k, v in tree.items() if k not in ("run_dir", "preset")}
        flat.append({f"{table}.{key}".rstrip("."): v for table, keys in tables.items() for key, v in keys.items()})
    names = dict.fromkeys([*flat[0], *flat[1]])
    rows = [{"key": name, "a": flat[0].get(name), "b": flat[1].get(name)} for name in names]
    return [row for row in rows if row["a"] != row["b"]]


def constitutions(a: Constitution, b: Constitution) -> dict[str, Any]:
    """Principles added, removed and reworded, and other parts that differ."""
    old, new = ({p.id: asdict(p) for p in c.principles} for c in (a, b))
    reworded = [
        {"principle": name, "field": field, "a": old[name][field], "b": new[name][field]}
        for name in old if name in new for field in old[name] if old[name][field] != new[name][field]
    ]  # fmt: skip
    parts = ("few_shot_critique", "few_shot_comparison", "few_shot_cot", "format")
    other = [part for part in parts if getattr(a, part) != getattr(b, part)]
    common = [[name for name in mine if name in theirs] for mine, theirs in ((old, new), (new, old))]
    return {
        "a": {"name": a.name, "hash": a.hash},
        "b": {"name": b.name, "hash": b.hash},
        "added": [new[name] for name in new if name not in old],
        "removed": [old[name] for name in old if name not in new],
        "reworded": reworded,
        "other": other + (["order of the principles"] if common[0] != common[1] else []),
    }


def chains(prompts: dict[str, Prompt], a: Sequence[Revision], b: Sequence[Revision]) -> dict[str, Any]:
    """How answers, critiques and revisions of the same prompts differ: shares that are the same text in both runs."""
    other = {row.prompt_id: row for row in b}
    pairs = [(row, other[row.prompt_id]) for row in a if row.prompt_id in other and row.prompt_id in prompts]
    rounds = []
    for k in range(max((max(len(x.rounds), len(y.rounds)) for x, y in pairs), default=0)):
        both = [(x.rounds[k], y.rounds[k]) for x, y in pairs if len(x.rounds) > k and len(y.rounds) > k]
        same = {
            f: _share(getattr(x, f) == getattr(y, f) for x, y in both) for f in ("principle", "critique", "revision")
        }
        rounds.append({"round": k + 1, "n": len(both)} | same)
    changed = [(x, y) for x, y in pairs if (x.response, x.rounds) != (y.response, y.rounds)]
    changed.sort(key=lambda pair: pair[0].response != pair[1].response)  # first those that began alike
    return {
        "shared": len(pairs),
        "changed": len(changed),
        "same_first_answer": _share(x.response == y.response for x, y in pairs),
        "rounds": rounds,
        "kept": paired([x.kept for x, _ in pairs], [y.kept for _, y in pairs], [x.prompt_id for x, _ in pairs]),
        "rejected": {side: dict(Counter(r.reject_reason for r in rows if not r.kept))
                     for side, rows in (("a", a), ("b", b))},
        "examples": [{"prompt": prompts[x.prompt_id].to_json(), "a": x.to_json(), "b": y.to_json()}
                     for x, y in changed[:SHOWN]],
    }  # fmt: skip


def _share(same: Iterable[bool]) -> float | None:
    values = [float(value) for value in same]
    return fmean(values) if values else None


def _labelled(run: RunFiles) -> list[Pair]:
    found = {row.comparison_id: row for row in run.rows("labels.jsonl", Label)}
    rows = run.rows("comparisons.jsonl", Comparison)
    return [(row, found[row.id]) for row in rows if row.source == "ai" and row.id in found]


def labels(prompts: dict[str, Prompt], a: Sequence[Pair], b: Sequence[Pair]) -> dict[str, Any]:
    """Labels of the same comparison (prompt and both texts) in either run, by principle too; the spread of others."""
    waiting: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for row in b:
        waiting[_content(row)].append(row)
    same: list[tuple[Pair, Pair]] = []
    alone: list[Pair] = []
    for row in a:
        twins = waiting[_content(row)]
        if row[0].prompt_id in prompts and twins:
            same.append((row, twins.pop(0)))
        else:
            alone.append(row)
    others = [row for rows in waiting.values() for row in rows]
    moved = sorted(same, key=lambda pair: -abs(pair[1][1].prob_a - pair[0][1].prob_a))
    moved = [(x, y) for x, y in moved[:SHOWN] if abs(y[1].prob_a - x[1].prob_a) > UNCHANGED]
    return {
        "same_comparisons": len(same),
        "only": {"a": len(alone), "b": len(others)},
        "all": _changes([(x.prompt_id, p.prob_a, q.prob_a) for (x, p), (_, q) in same]),
        "principles": _by_principle(same),
        "movers": [{"prompt": prompts[x.prompt_id].to_json(), "comparison": x.to_json(),
                    "a": p.to_json(), "b": q.to_json()} for (x, p), (_, q) in moved],
        "spread": {"a": _spread([p.prob_a for _, p in alone]), "b": _spread([p.prob_a for _, p in others])},
    }  # fmt: skip


def _content(pair: Pair) -> tuple[str, str, str]:
    row = pair[0]
    return row.prompt_id, row.response_a, row.response_b


def _changes(rows: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """Of (prompt, probability in A, in B): mean change, mean size of the change, share of flipped preferences."""
    names, p, q = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    zero = [0.0] * len(rows)
    return {
        "changed": sum(abs(x - y) > UNCHANGED for x, y in zip(p, q, strict=True)),
        "prob_a": paired(p, q, names),
        "size": paired(zero, [abs(x - y) for x, y in zip(p, q, strict=True)], names),
        "flipped": paired(zero, [float((x - 0.5) * (y - 0.5) < 0) for x, y in zip(p, q, strict=True)], names),
    }


def _by_principle(same: Sequence[tuple[Pair, Pair]]) -> list[dict[str, Any]]:
    """By principle: how often either run asked it about the comparisons of both, and the change where both did."""
    asked: list[Counter[str]] = [Counter(), Counter()]
    views: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for (row, p), (_, q) in same:
        for count, label in zip(asked, (p, q), strict=True):
            count.update(view.principle for view in label.per_principle)
        for x, y in zip(p.per_principle, q.per_principle, strict=False):
            if x.principle == y.principle:
                views[x.principle].append((row.prompt_id, _view(x), _view(y)))
    names = sorted({*asked[0], *asked[1]})
    return [{"principle": n, "asked_a": asked[0][n], "asked_b": asked[1][n]} | _changes(views[n]) for n in names]


def _view(label: PrincipleLabel) -> float:
    return fmean(p for p in (label.prob_a_ab, label.prob_a_ba) if p is not None)


def _spread(probs: Sequence[float]) -> dict[str, Any]:
    """How decided labels are: |P - 1/2| at three quantiles, and the mean entropy in nats."""
    if not probs:
        return {"n": 0}
    low, middle, high = np.quantile(np.abs(np.asarray(probs) - 0.5), [0.1, 0.5, 0.9]).tolist()
    entropy = fmean(-sum(q * math.log(q) for q in (p, 1 - p) if q > 0) for p in probs)
    return {"n": len(probs), "q10": low, "median": middle, "q90": high, "entropy": entropy}


def preference_models(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracy and calibration of both runs' preference models, on the held-out comparisons of each run."""
    trees = [
        {f"{model}, {kind}": row for model in ("pm", "pm_eval") for kind, row in summary.get(model, {}).items()
         if isinstance(row, dict) and "accuracy" in row}
        for summary in (a, b)
    ]  # fmt: skip
    metrics = ("accuracy", "ece", "brier")
    picked = [
        {k: {m: {"mean": row[m]} | row.get(f"{m}_interval", {}) for m in metrics} for k, row in tree.items()}
        for tree in trees
    ]
    return _side_by_side(*picked, ("preference model", "metric"))


def behaviour(
    prompts: dict[str, Prompt], a: RunFiles, b: RunFiles, *evaluations: dict[str, Any]
) -> list[dict[str, Any]]:
    """Every metric of every policy on the held-out prompts of both runs; where a run is too old to have kept the
    metrics of single answers, the difference of the means without an interval."""
    answers = [{(r.policy, r.prompt_id): r for r in run.rows("answers.jsonl", PolicyAnswer)} for run in (a, b)]
    tables: dict[tuple[str, str, str], list[tuple[str, float, float]]] = defaultdict(list)
    for (policy, prompt), x in answers[0].items():
        y = answers[1].get((policy, prompt))
        if y is not None and prompt in prompts:
            for metric in x.metrics.keys() & y.metrics.keys():
                group = GROUPS[prompts[prompt].kind]
                tables[policy, group, metric].append((prompt, x.metrics[metric], y.metrics[metric]))
    rows = []
    for policy, groups in evaluations[0]["policies"].items():
        for group, metrics in groups.items():
            for metric, mean in metrics.items():
                row = {"policy": policy, "group": group, "metric": metric}
                if found := tables.get((policy, group, metric)):
                    names, x, y = zip(*found, strict=True)
                    rows.append(row | paired(x, y, names))
                elif other := evaluations[1]["policies"].get(policy, {}).get(group, {}).get(metric):
                    rows.append(row | _unpaired(mean["mean"], other["mean"]))
    return rows


def _unpaired(a: float | None, b: float | None) -> dict[str, Any]:
    known = a is not None and b is not None
    return {"a": a, "b": b, "diff": b - a if known else None, "lo": None, "hi": None, "n": 0, "flag": False}


def _side_by_side(a: Any, b: Any, names: tuple[str, str], value: str = "mean") -> list[dict[str, Any]]:
    """Cells {value, lo, hi} of two nested tables that both have, as rows; they are no pairs, so the difference has no
    interval: each side has its own, and the flag says that these do not overlap."""
    rows = []
    for outer, inner in [(i, j) for i in a if i in b for j in a[i] if j in b[i]]:
        cells = a[outer][inner], b[outer][inner]
        known = [c.get("lo") is not None and c.get("n") != 1 for c in cells]  # one value cannot be resampled
        intervals = [{"lo": c["lo"], "hi": c["hi"]} if k else None for c, k in zip(cells, known, strict=True)]
        row = {names[0]: outer, names[1]: inner} | _unpaired(*(c[value] for c in cells))
        rows.append(row | {"a_interval": intervals[0], "b_interval": intervals[1], "flag": _apart(*intervals)})
    return rows


def _apart(a: dict[str, float] | None, b: dict[str, float] | None) -> bool:
    """Whether two intervals are there and do not overlap. That says nothing if neither has a width, as where
    evaluate.bootstrap is 0."""
    if not a or not b or (a["lo"] == a["hi"] and b["lo"] == b["hi"]):
        return False
    return a["hi"] < b["lo"] or b["hi"] < a["lo"]


def _judge(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Win rates by the judge and, in the toy world, its accuracy on either run's own pairs."""
    tables = []
    for evaluation in (a, b):
        judge = evaluation.get("judge", {})
        accuracy = {k: judge[k]["accuracy"] for k in ("held_out_pairs", "own_pairs") if k in judge}
        tables.append({"win rate": judge.get("win_rates", {}), "judge accuracy": accuracy})
    return _side_by_side(*tables, ("measure", "of"))


def as_json(result: dict[str, Any]) -> str:
    """The comparison as a JSON document."""
    return json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
