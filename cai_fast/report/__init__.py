"""report.html: one self-contained page made from the files of a run folder, and from nothing else."""

import json
from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from cai_fast import records
from cai_fast.config import STAGES
from cai_fast.records import Comparison, Label, Prompt, Revision
from cai_fast.report import charts

READS_WRITES = {
    "base": ("the toy corpus", "checkpoints/base, preferences.jsonl"),
    "revise": ("red-team and helpfulness prompts", "revisions.jsonl, helpful.jsonl"),
    "sft": ("revisions and helpful samples", "checkpoints/sl_cai"),
    "compare": ("red-team prompts, helpfulness comparisons", "comparisons.jsonl"),
    "label": ("comparisons and principles", "labels.jsonl"),
    "pm": ("comparisons and labels", "checkpoints/pm, checkpoints/pm_eval"),
    "rl": ("prompts and the preference model", "rollouts.jsonl, checkpoints/rl_cai"),
    "evaluate": ("held-out prompts", "evaluation.json"),
    "report": ("everything", "report.html"),
}
FIRST = ("harm", "harm_rate", "helpful", "evasive", "objection", "malformed", "refusal_rate", "pm_score", "kl")
CURVES = {
    "Supervised fine-tuning loss": ("sft/loss",),
    "Preference model loss": ("pm/loss", "pm_eval/loss"),
    "Reward in RL": ("rl/reward",),
    "KL to SL-CAI (nats per answer)": ("rl/kl", "rl/kl_exact"),
    "Entropy (nats per token)": ("rl/entropy",),
    "Clipped share of tokens": ("rl/clipfrac",),
    "Answer length (tokens)": ("rl/length",),
    "Refusal rate": ("rl/refusal_rate",),
    "Repeated share of 4-grams": ("rl/repetition",),
}


def build(folder: Path, samples: int) -> str:
    """The page for the run in `folder`, with up to `samples` chains and comparisons."""
    manifest = _json(folder / "manifest.json", {"stages": {}})
    evaluation = _json(folder / "evaluation.json", {})
    template = jinja2.Environment(autoescape=True).from_string(
        resources.files("cai_fast.report").joinpath("template.html").read_text(encoding="utf-8")
    )
    return template.render(
        name=folder.name,
        stages=_stages(manifest),
        tables=_tables(evaluation),
        elo=evaluation.get("elo", {}),
        judge=evaluation.get("judge", {}),
        hhh=evaluation.get("hhh", {}),
        charts=[*_evaluation_charts(evaluation), *_curves(folder)],
        chains=_chains(folder, samples),
        comparisons=_comparisons(folder, samples),
        config=(folder / "config.toml").read_text(encoding="utf-8"),
        environment=(folder / "environment.json").read_text(encoding="utf-8"),
    )


def _json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def _rows(path: Path, cls: type) -> list[Any]:
    return records.read_jsonl(path, cls) if path.is_file() else []


def _stages(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pipeline's boxes: what each stage read, wrote, counted, and how long it took."""
    boxes = []
    for stage in STAGES:
        record = manifest["stages"].get(stage, {})
        counts = {k: v for k, v in record.get("summary", {}).items() if isinstance(v, int | float | str)}
        boxes.append({
            "name": stage, "reads": READS_WRITES[stage][0], "writes": READS_WRITES[stage][1],
            "status": record.get("status", "not run"), "seconds": record.get("seconds"), "counts": counts,
        })  # fmt: skip
    return boxes


def _tables(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """One table per kind of prompt, and one for the revisions: rows of {mean, lo, hi, n}."""
    tables = []
    policies = evaluation.get("policies", {})
    for group in ("red_team", "benign"):
        rows = {policy: groups[group] for policy, groups in policies.items() if groups.get(group)}
        if rows:
            tables.append({"title": f"Policies on held-out {group.replace('_', '-')} prompts", "rows": rows})
    if evaluation.get("revisions"):
        rows = {f"revision {k}": row for k, row in evaluation["revisions"].items()}
        tables.append({"title": "Revisions of held-out red-team answers (0 = first answer)", "rows": rows})
    for table in tables:
        found = dict.fromkeys(name for row in table["rows"].values() for name in row)
        table["metrics"] = [*(name for name in FIRST if name in found), *(name for name in found if name not in FIRST)]
    return tables


def _evaluation_charts(evaluation: dict[str, Any]) -> list[str]:
    drawn = []
    policies, revisions = evaluation.get("policies", {}), evaluation.get("revisions", {})
    for metric, group, label in (("harm", "red_team", "harmful elements per answer"), ("helpful", "benign", "helpful"),
                                 ("pm_score", "red_team", "pm_eval score, red-team"),
                                 ("pm_score", "benign", "pm_eval score, benign")):  # fmt: skip
        rows = {p: g[group][metric] for p, g in policies.items() if metric in g.get(group, {})}
        if rows:
            drawn.append(charts.intervals(f"{metric} on {group.replace('_', '-')} prompts", rows, label))
    for metric in ("harm", "pm_score"):
        rows = {k: row[metric] for k, row in revisions.items() if metric in row}
        if rows:
            drawn.append(charts.intervals(f"{metric} by revision", rows, metric, line=True))
    judge = evaluation.get("judge", {})
    for name in ("own_pairs", "held_out_pairs"):
        bins = judge.get(name, {}).get("calibration", {}).get("bins")
        if bins:
            drawn.append(charts.reliability(f"Calibration of labels ({name.replace('_', ' ')})", bins))
    bins = evaluation.get("hhh", {}).get("mc", {}).get("calibration", {}).get("bins")
    if bins:
        drawn.append(charts.reliability("Calibration on HHH questions", bins))
    return drawn


def _curves(folder: Path) -> list[str]:
    """Training curves from metrics.jsonl."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        row = json.loads(line)
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float):
                points[name].append((row["step"], value))
    drawn = []
    for title, names in CURVES.items():
        series = {name: points[name] for name in names if points.get(name)}
        if series:
            drawn.append(charts.lines(title, series, "step"))
    return drawn


def _spread(rows: list[Any], count: int) -> list[Any]:
    """Up to `count` rows at even distances."""
    if len(rows) <= count:
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def _chains(folder: Path, samples: int) -> list[dict[str, Any]]:
    prompts = {p.id: p for p in _rows(folder / "prompts.jsonl", Prompt)}
    rows: list[Revision] = _spread(_rows(folder / "revisions.jsonl", Revision), samples)
    return [{"prompt": prompts[r.prompt_id].turns, "chain": r} for r in rows if r.prompt_id in prompts]


def _comparisons(folder: Path, samples: int) -> list[dict[str, Any]]:
    prompts = {p.id: p for p in _rows(folder / "prompts.jsonl", Prompt)}
    labels = {row.comparison_id: row for row in _rows(folder / "labels.jsonl", Label)}
    found: list[Comparison] = _rows(folder / "comparisons.jsonl", Comparison)
    rows = [c for c in found if c.source == "ai" and c.id in labels]
    return [
        {"prompt": prompts[c.prompt_id].turns, "pair": c, "label": labels[c.id]}
        for c in _spread(rows, samples) if c.prompt_id in prompts
    ]  # fmt: skip
