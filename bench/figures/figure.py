"""What a figure is, and how the figures' charts are drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from bench.figures.graph import Job
from bench.figures.world import Results, World

NAMES = {
    "harm": "harmful phrases per answer", "helpful": "steps of the task covered", "evasive": "refusals",
    "objection": "objects", "malformed": "malformed", "pm_eval": "held-out PM score", "pm": "score of RL's own PM",
    "kl": "KL to SL-CAI (nats)",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """The jobs that it needs of each seed's world, and what it makes of their results:

    {panels: {title: panel}, claims: [claim]}. Its words are in texts.toml.
    """

    name: str
    jobs: Callable[[World], list[Job]]
    evaluate: Callable[[Sequence[Results]], dict[str, Any]]


def panel(x: str, y: str, lines: Mapping[str, Sequence[tuple[Any, dict[str, Any]]]], **more: Any) -> dict[str, Any]:
    """One chart: lines through (x, estimate)."""
    return {"x": x, "y": y, "lines": {name: [list(point) for point in points] for name, points in lines.items()}} | more


def draw(title: str, panels: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Panels side by side: means over seeds with their intervals, each seed as a small dot; equal numbers give an equal
    file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "cai_fast", "font.size": 8, "svg.fonttype": "none"}):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(3.6 * columns, 2.9 * rows), layout="constrained", squeeze=False
        )
        for axes, (name, chart) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, name, chart)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        figure.suptitle(title)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _panel(axes: Any, name: str, chart: dict[str, Any]) -> None:
    words = any(isinstance(point[0], str) for line in chart["lines"].values() for point in line)
    places: dict[Any, float] = {}
    for number, (label, line) in enumerate(chart["lines"].items()):
        at = [places.setdefault(x, len(places)) if words else x for x, _ in line]
        at = [x + 0.08 * number for x in at] if words else at
        values = [estimate["mean"] for _, estimate in line]
        spread = [
            [max(0.0, v - e["lo"]) for v, (_, e) in zip(values, line, strict=True)],
            [max(0.0, e["hi"] - v) for v, (_, e) in zip(values, line, strict=True)],
        ]
        axes.errorbar(at, values, yerr=spread, color=f"C{number}", marker="o", markersize=3.5, capsize=2, linewidth=1,
                      linestyle="none" if words else "-", label=label)  # fmt: skip
        for x, (_, estimate) in zip(at, line, strict=True):
            dots = [seed["mean"] for seed in estimate["seeds"]]
            axes.plot([x] * len(dots), dots, ".", color=f"C{number}", markersize=2.5, alpha=0.5)
    if words:
        axes.set_xticks(range(len(places)), list(places), rotation=30, ha="right")
    if chart.get("log"):
        axes.set_xscale("log")
    if chart.get("diagonal"):
        axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle="--")
    axes.set_xlabel(chart["x"])
    axes.set_ylabel(chart["y"])
    axes.set_title(name)
    axes.grid(linewidth=0.3)
    if len(chart["lines"]) > 1:
        axes.legend(fontsize=6)
