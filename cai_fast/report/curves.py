"""The curves of metrics.jsonl: which are drawn together, under which name, with which limit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POINTS = 400  # of a curve; a longer one keeps the lowest and the highest value of each piece
Points = list[tuple[int, float | None]]

# Section -> title, metrics, setting that limits them. What is in none of these is drawn by itself.
PANELS: dict[str, list[tuple[str, tuple[str, ...], str]]] = {
    "Supervised fine-tuning": [
        ("Loss (nats per token)", ("sft/loss",), ""),
        ("Gradient norm", ("sft/grad_norm",), ""),
    ],
    "Preference models": [
        ("Loss", ("pm/loss", "pm_eval/loss"), ""),
        ("Accuracy on the batch", ("pm/accuracy", "pm_eval/accuracy"), ""),
        ("Margin between the two answers", ("pm/margin", "pm_eval/margin"), ""),
    ],
    "Reinforcement learning": [
        ("Reward and preference scores", ("rl/reward", "rl/score", "rl/pm_eval"), ""),
        ("Loss on comparisons", ("rl/loss",), ""),
        ("Accuracy of the implicit reward on the batch", ("rl/accuracy",), ""),
        ("KL to SL-CAI (nats per answer)", ("rl/kl", "rl/kl_exact"), "max_kl"),
        ("Entropy (nats per token)", ("rl/entropy",), "min_entropy"),
        ("Answer length (tokens)", ("rl/length",), ""),
        ("Refusals", ("rl/refusal_rate", "rl/refusal_rate_red_team", "rl/refusal_rate_helpful"), "max_refusal_rate"),
        ("Repeated share of 4-grams", ("rl/repetition",), ""),
        ("Clipped share of tokens", ("rl/clipfrac",), ""),
        ("Explained variance of the critic", ("rl/explained_variance",), ""),
    ],
    "Guards": [
        ("Gain since the start (deviations)", ("rl/pm_gain", "rl/pm_eval_gain"), ""),
        ("Gain of pm beyond that of pm_eval", ("rl/pm_divergence",), "max_divergence"),
        ("KL, times that of the last iterations", ("rl/kl_jump",), "max_kl_jump"),
        ("Entropy, times that of SL-CAI", ("rl/entropy_share",), "min_entropy_share"),
        ("Length, times longer or shorter", ("rl/length_change",), "max_length_change"),
        ("Slope of the score on length", ("rl/length_slope",), "max_length_slope"),
        ("Rise of boilerplate (share of tokens)", ("rl/boilerplate_rise",), "max_boilerplate_rise"),
        ("Gap between engine and trainer (nats)", ("rl/logprob_gap",), "max_logprob_gap"),
    ],
    "Everything else": [],
}


def read_points(path: Path) -> dict[str, Points]:
    """metric -> points (step, value) in the order of the file; nan is None. A torn last line is left out."""
    points: dict[str, Points] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row.items():
            if "/" in name and (value is None or type(value) in (int, float)):
                shared = name.startswith("perf/") and "/" not in name[5:]  # several stages write it
                points.setdefault(f"{row['stage']}: {name}" if shared else name, []).append((row["step"], value))
    return points


def panels(points: Mapping[str, Points], limits: Mapping[str, float]) -> dict[str, list[dict[str, Any]]]:
    """Section -> charts {title, x, series [{name, points}], limits [{name, y}]} of what there is."""
    found: dict[str, list[dict[str, Any]]] = {}
    rest = dict(points)
    for section, charts in PANELS.items():
        for title, names, limit in charts:
            series = {name: rest.pop(name) for name in names if name in rest}
            if any(value is not None for line in series.values() for _, value in line):
                bounds = [{"name": limit, "y": limits[limit]}] if limits.get(limit) else []
                found.setdefault(section, []).append(chart(title, series, bounds))
    for name, line in sorted(rest.items()):
        section = "Guards" if name.startswith("rl/guard") else "Everything else"
        if any(value is not None for _, value in line) and (len(line) > 1 or section == "Guards"):
            found.setdefault(section, []).append(chart(name, {name: line}, []))
    return found


def single(points: Mapping[str, Points]) -> dict[str, float]:
    """The metrics that were measured once."""
    return {name: line[0][1] for name, line in sorted(points.items()) if len(line) == 1 and line[0][1] is not None}


def chart(title: str, series: Mapping[str, Points], limits: list[dict[str, Any]]) -> dict[str, Any]:
    """One chart of lines over steps."""
    lines = [
        {"name": name, "points": [[x, None if y is None else float(f"{y:.6g}")] for x, y in thinned(line)]}
        for name, line in series.items()
    ]
    return {"kind": "lines", "title": title, "x": "step", "series": lines, "limits": limits}


def thinned(line: Points, count: int = POINTS) -> Points:
    """At most `count` points: of every piece of the line its lowest and its highest, so that no spike is lost; the
    first and the last one stay."""
    if len(line) <= count:
        return line
    pieces = count // 2 - 1
    kept = {0, len(line) - 1}
    for piece in range(pieces):
        inside = range(piece * len(line) // pieces, (piece + 1) * len(line) // pieces)
        known = [i for i in inside if line[i][1] is not None] or [inside[0]]
        kept |= {min(known, key=lambda i: line[i][1] or 0.0), max(known, key=lambda i: line[i][1] or 0.0)}
    return [line[i] for i in sorted(kept)]
