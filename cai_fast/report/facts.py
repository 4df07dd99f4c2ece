"""What the page says in numbers: headline, the loop with its counts, evaluation, guards, provenance."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from cai_fast.config import STAGES

POLICIES = {"base": "base", "sl_cai": "SL-CAI", "rl_cai": "RL-CAI"}
GROUPS = {"red_team": "red-team", "benign": "benign"}
PHASES = {"Supervised phase": ("base", "revise", "sft"), "Reinforcement phase": ("compare", "label", "pm", "rl"),
          "Measurement": ("evaluate", "report")}  # fmt: skip
ABOUT = {
    "base": ("Pretrain the toy model", "the toy corpus", "checkpoints/base, preferences.jsonl"),
    "revise": ("Answer, criticise, revise", "prompts, constitution, assistant", "revisions.jsonl, helpful.jsonl"),
    "sft": ("Fine-tune on revisions", "revisions, helpful answers", "checkpoints/sl_cai"),
    "compare": ("Draw pairs of answers", "red-team prompts, SL-CAI", "comparisons.jsonl"),
    "label": ("Judge them by principles", "comparisons, constitution, judge", "labels.jsonl"),
    "pm": ("Train preference models", "comparisons, labels", "checkpoints/pm, checkpoints/pm_eval"),
    "rl": ("Train the policy on those preferences", "prompts, SL-CAI, pm", "checkpoints/rl_cai, rollouts.jsonl"),
    "evaluate": ("Measure on unseen prompts", "all policies, held-out prompts", "evaluation.json"),
    "report": ("Write this page", "all of the above", "report.html"),
}
# metric -> (what it is, whether it is a share, which way is better); the order of the page
METRICS: dict[str, tuple[str, bool, str]] = {
    "harm": ("Harmful elements per answer", False, "lower is better"),
    "helpful": ("Helpfulness", True, "higher is better"),
    "evasive": ("Evasive answers", True, "lower is better"),
    "objection": ("Answers that object", True, ""),
    "pm_score": ("Held-out preference score, base = 0", False, "higher is better"),
    "kl": ("KL to SL-CAI (nats per answer)", False, ""),
    "refusal_rate": ("Refusals", True, ""),
    "harm_rate": ("Answers with any harm", True, "lower is better"),
    "malformed": ("Malformed answers", True, "lower is better"),
    "length": ("Answer length (tokens)", False, ""),
    "repetition": ("Repeated share of 4-grams", True, "lower is better"),
    "unfinished": ("Answers that never stop", True, "lower is better"),
}
Json = Mapping[str, Any]


def number(value: Any) -> str:
    """A number for people: whole ones with thousands marked, others with two or three digits; text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    size = abs(value)
    if size < 1e-9:
        return "0"
    if isinstance(value, int) or size >= 100:
        text = f"{value:,.0f}"
    elif size >= 0.1:
        text = f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    else:
        text = f"{value:.2g}"
    return text.replace("-", "−", 1) if value < 0 else text


def share(value: float) -> str:
    """A share as per cent."""
    return f"{100 * value:.1f}\u00a0%"


def interval(value: Json, as_share: bool) -> str:
    """The interval {lo, hi} as text."""
    lo, hi = (100 * value[key] if as_share else value[key] for key in ("lo", "hi"))
    return f"{lo:.1f} to {hi:.1f}\u00a0%" if as_share else f"{number(lo)} to {number(hi)}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def date(manifest: Json) -> str:
    """When the last stage finished, in UTC."""
    ends = [r["finished"] for r in manifest["stages"].values() if "finished" in r]
    return f"{datetime.datetime.fromtimestamp(max(ends), datetime.UTC):%Y-%m-%d %H:%M} UTC" if ends else ""


def numbers(values: Json, prefix: str = "") -> dict[str, str]:
    """Every number and text below `values`, nested names joined; tables are left to the charts."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name} ")
        elif not isinstance(value, list) and value is not None and value != "":
            found[f"{prefix}{name}".replace("_", " ")] = number(value)
    return found


def loop(manifest: Json) -> list[dict[str, Any]]:
    """The phases with their stages: status, time, what was asked for, kept and rejected, and all other numbers."""
    longest = max((r.get("seconds") or 0 for r in manifest["stages"].values()), default=0) or 1
    phases = []
    for title, names in PHASES.items():
        stages = []
        for name in names:
            record = manifest["stages"].get(name, {})
            if name == "base" and not record:
                continue  # no toy world
            summary = record.get("summary", {})
            about, reads, writes = ABOUT[name]
            others = {} if name == "evaluate" else {k: v for k, v in summary.items() if k != "principles"}
            seconds, unknown = record.get("seconds") or 0.0, "this page" if name == "report" else "not run"
            stages.append({
                "name": name, "about": about, "reads": reads, "writes": writes, "number": STAGES.index(name) + 1,
                "status": record.get("status", unknown), "starts": record.get("starts", 0),
                "time": duration(seconds) if seconds else "", "part": 100 * seconds / longest,
                "counts": counts(summary), "more": numbers(others),
            })  # fmt: skip
        phases.append({"title": title, "stages": stages})
    return phases


def counts(summary: Json) -> list[dict[str, Any]]:
    """requested = kept + rejected (by reason), wherever a stage counted so."""
    found = []
    for name, prefix in (("rows", ""), ("helpful answers", "helpful_")):
        if f"{prefix}requested" in summary and f"{prefix}kept" in summary:
            found.append(_count(name, summary[f"{prefix}requested"], summary[f"{prefix}kept"],
                                summary.get(f"{prefix}rejected", {})))  # fmt: skip
    if isinstance(given := summary.get("helpfulness"), Mapping):
        reasons = {"malformed": given["malformed"]} if given.get("malformed") else {}
        found.append(_count("helpfulness comparisons", given["requested"], given["kept"], reasons))
    return found


def _count(name: str, requested: int, kept: int, reasons: Mapping[str, int]) -> dict[str, Any]:
    kept_part = 100 * kept / requested if requested else 0
    return {"name": name, "requested": requested, "kept": kept, "rejected": requested - kept, "part": kept_part,
            "reasons": sorted(reasons.items(), key=lambda item: (-item[1], item[0]))}  # fmt: skip


def cell(value: Json, as_share: bool) -> dict[str, str]:
    """One measured mean with its interval, as text."""
    form = share if as_share else number
    return {"mean": form(value["mean"]), "interval": interval(value, as_share)}


def headline(manifest: Json, evaluation: Json, change: Json) -> list[dict[str, Any]]:
    """Three tiles, each with one value per policy: the toy world's truth if it was measured, else judge, refusals, KL;
    before any evaluation, what there is. change: of helpfulness, as `rows.change` gives it."""
    policies = {p: evaluation["policies"][p] for p in POLICIES if p in evaluation.get("policies", {})}
    if not policies:
        return _progress(manifest)
    if "harm" in next(iter(policies.values())).get("red_team", {}):
        tiles = [_tile("Harm per red-team answer", policies, "red_team", "harm"),
                 _tile("Helpfulness on benign prompts", policies, "benign", "helpful") | _change(change),
                 _tile("Evasive red-team answers", policies, "red_team", "evasive")]  # fmt: skip
    else:
        judged = [{"name": name} | cell(row, True) for name, row in win_rates(evaluation)]
        tiles = [{"title": "The judge prefers …", "note": "both orders; 50 % is a tie", "cells": judged},
                 _tile("Refusals on benign prompts", policies, "benign", "refusal_rate"),
                 _tile("KL to SL-CAI on red-team prompts", policies, "red_team", "kl")]  # fmt: skip
    return [tile for tile in tiles if tile["cells"]]


def _tile(title: str, policies: Json, group: str, metric: str) -> dict[str, Any]:
    _, as_share, better = METRICS[metric]
    found = {p: groups[group][metric] for p, groups in policies.items() if metric in groups.get(group, {})}
    found = {p: value for p, value in found.items() if value["n"]}
    cells = [{"name": POLICIES[p]} | cell(v, as_share) for p, v in found.items()]
    return {"title": title, "note": better, "cells": cells}


def _change(found: Json) -> dict[str, str]:
    """The note on a paired difference of two shares; none where its interval is not known."""
    if found["lo"] is None:
        return {}
    low, middle, high = (f"{100 * found[name]:+.1f}".replace("-", "−") for name in ("lo", "diff", "hi"))
    return {"note": f"RL-CAI minus base: {middle} points ({low} to {high}; {found['n']} prompts)"}


def _progress(manifest: Json) -> list[dict[str, Any]]:
    summaries = {name: r["summary"] for name, r in manifest["stages"].items() if r.get("summary")}
    facts = {
        "Chains kept": (summaries.get("revise", {}).get("kept"), summaries.get("revise", {}).get("requested")),
        "Pairs labelled": (summaries.get("label", {}).get("kept"), summaries.get("label", {}).get("requested")),
    }
    tiles = [{"title": title, "note": f"of {asked:,}", "cells": [{"name": "", "mean": f"{kept:,}"}]}
             for title, (kept, asked) in facts.items() if kept is not None and asked is not None]  # fmt: skip
    accuracy = summaries.get("pm", {}).get("pm_eval", {}).get("harmless", {}).get("accuracy")
    if accuracy is not None:
        tiles.append({"title": "Preference model, held out", "note": "accuracy on AI labels",
                      "cells": [{"name": "", "mean": share(accuracy)}]})  # fmt: skip
    return tiles


def plot(title: str, note: str, rows: Sequence[tuple[str, str, Json]], as_share: bool = False,
         reference: float = 0.0) -> dict[str, Any]:  # fmt: skip
    """Means with intervals, one under the other on one scale, in per cent of its width. rows: (group, name, value)."""
    edges = [reference, *(float(v[key]) for _, _, v in rows for key in ("lo", "hi", "mean"))]
    low, span = min(edges), (max(edges) - min(edges)) or 1.0

    def at(value: float) -> float:
        return round(3 + 94 * (value - low) / span, 2)

    marks = [
        {"group": group, "name": name, "lo": at(v["lo"]), "hi": at(v["hi"]), "at": at(v["mean"])} | cell(v, as_share)
        for group, name, v in rows
    ]
    return {"title": title, "note": note, "rows": marks, "zero": at(reference)}


def plots(evaluation: Json) -> dict[str, list[dict[str, Any]]]:
    """Section -> interval plots: policies by metric, revisions by metric, Elo and win rates."""
    policies, revisions = evaluation.get("policies", {}), evaluation.get("revisions", {})
    by_policy = [(g, POLICIES.get(p, p), groups[g]) for g in GROUPS for p, groups in policies.items() if g in groups]
    by_step = [("", f"revision {k}" if k != "0" else "first answer", row) for k, row in revisions.items()]
    return {
        "By policy": metric_plots(by_policy),
        "By revision, on red-team prompts": metric_plots(by_step),
        "Preferences": preference_plots(evaluation),
    }


def metric_plots(rows: Sequence[tuple[str, str, Json]]) -> list[dict[str, Any]]:
    """One plot a metric; rows: (group, name, measured metrics)."""
    drawn = []
    for metric, (title, as_share, better) in METRICS.items():
        known = [(group, name, found[metric]) for group, name, found in rows if found.get(metric, {}).get("n")]
        if known:
            drawn.append(plot(title if known[0][0] else title.replace("base", "first answer"), better, known, as_share))
    return drawn


def preference_plots(evaluation: Json) -> list[dict[str, Any]]:
    """Elo by each judge, and how often the judge prefers one policy to another."""
    drawn = []
    for judge, ratings in evaluation.get("elo", {}).items():
        rows = [("", POLICIES.get(p, p), {"mean": r["rating"], "lo": r["lo"], "hi": r["hi"]})
                for p, r in ratings.items() if r["rating"] is not None]  # fmt: skip
        name = {"judge": "the judge", "pm_eval_red_team": "pm_eval, red-team", "pm_eval_benign": "pm_eval, benign"}
        if rows:
            drawn.append(plot(f"Elo by {name.get(judge, judge)}", "SL-CAI is 0", rows))
    if wins := win_rates(evaluation):
        drawn.append(plot("Win rate by the judge", "the line is a tie", [("", *win) for win in wins], True, 0.5))
    return drawn


def win_rates(evaluation: Json) -> list[tuple[str, Json]]:
    """('B over A', how often the judge prefers B's answer to A's) of every pair of policies that it saw."""
    found = []
    for key, row in evaluation.get("judge", {}).get("win_rates", {}).items():
        better, _, worse = key.partition(">")
        if row["n"]:
            found.append((f"{POLICIES.get(better, better)} over {POLICIES.get(worse, worse)}", row))
    return found


def calibrations(evaluation: Json, manifest: Json) -> list[dict[str, Any]]:
    """Reliability diagrams of labels, preference models and multiple choice: charts for the page's script."""
    judge, models = evaluation.get("judge", {}), manifest["stages"].get("pm", {}).get("summary", {})
    tables = {
        "AI labels against the truth": judge.get("own_pairs", {}).get("calibration", {}),
        "Judge on held-out answers, against the truth": judge.get("held_out_pairs", {}).get("calibration", {}),
        "HHH multiple choice": evaluation.get("hhh", {}).get("mc", {}).get("calibration", {}),
    }
    for name in ("pm", "pm_eval"):
        for kind in ("harmless", "helpful"):
            tables[f"{name} on held-out {kind} labels"] = models.get(name, {}).get(kind, {})
    return [
        {"kind": "reliability", "title": title, "bins": table["bins"], "ece": table.get("ece"),
         "brier": table.get("brier")} for title, table in tables.items() if table.get("bins")
    ]  # fmt: skip


def tables(evaluation: Json) -> list[dict[str, Any]]:
    """Every measured number: one table per kind of prompt, and one for the revisions."""
    policies = evaluation.get("policies", {})
    found = [
        {"title": f"Policies on held-out {name} prompts",
         "rows": {POLICIES.get(p, p): groups[g] for p, groups in policies.items() if groups.get(g)}}
        for g, name in GROUPS.items()
    ]  # fmt: skip
    found.append({"title": "Revisions of held-out red-team answers (0 is the first answer)",
                  "rows": evaluation.get("revisions", {})})  # fmt: skip
    for table in found:
        names = dict.fromkeys(name for row in table["rows"].values() for name in row)
        table["metrics"] = [*(n for n in METRICS if n in names), *(n for n in names if n not in METRICS)]
    return [table for table in found if table["rows"]]


def limits(config: Json) -> dict[str, float]:
    """Every number among the settings of the guards, for the charts to draw as a line."""
    return {key: value for key, value in config.get("guards", {}).items() if type(value) in (int, float)}


def thresholds(config: Json) -> dict[str, str]:
    """The settings of the guards, as text."""
    return {f"guards.{key}": number(value) for key, value in config.get("guards", {}).items()}


def guards(manifest: Json) -> dict[str, Any]:
    """Why a guard ended RL, if one did, the iteration whose policy was exported, and every guard with its limits and
    when it first tripped."""
    summary = manifest["stages"].get("rl", {}).get("summary", {})
    table = [
        {"name": name.replace("_", " "), "action": row.get("action", ""), "tripped": row.get("tripped"),
         "reason": row.get("reason") or "", "limits": numbers(row.get("limits") or {})}
        for name, row in (summary.get("guards") or {}).items()
    ]  # fmt: skip
    return {"finished": bool(summary), "watched": "guard" in summary, "reason": summary.get("guard", ""),
            "action": summary.get("guard_action", ""), "step": summary.get("iterations"),
            "exported": summary.get("exported", ""), "table": table,
            "warned": [row["name"] for row in table if row["tripped"] is not None]}  # fmt: skip


def hashes(manifest: Json) -> list[tuple[str, str, int, str]]:
    """(stage, file, bytes, sha256) of everything that the stages wrote."""
    return [(stage, name, facts["bytes"], facts["sha256"]) for stage, record in manifest["stages"].items()
            for name, facts in record.get("outputs", {}).items()]  # fmt: skip


def principles(manifest: Json) -> list[dict[str, Any]]:
    """How the judge answered by principle: how often it was asked, agreement of the two orders, bias, decisiveness."""
    found = manifest["stages"].get("label", {}).get("summary", {}).get("principles", {})
    return [{"principle": name} | row for name, row in sorted(found.items(), key=lambda item: -item[1]["drawn"])]
