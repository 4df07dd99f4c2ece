"""A chart of measured contests: how long each contestant takes, in units of ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from bench.contest import OURS

MARKERS = "osD^vPX<>h*"


def _relative(result: dict[str, Any], name: str) -> float:
    return result["contestants"][name]["median"] / result["contestants"][OURS]["median"]


def draw(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """One line per contest, one mark per contestant at time / our time; equal numbers give an equal SVG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    results = [r for r in results if OURS in r["contestants"]][::-1]
    units = {r["baseline"] for r in results}
    names = sorted({name for r in results for name in r["contestants"]} - {OURS} - units)
    with matplotlib.rc_context({"svg.hashsalt": "cai_fast", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.32 * len(results)), layout="constrained")
        floors = [(_relative(r, r["baseline"]), y) for y, r in enumerate(results)]
        axes.scatter(
            *zip(*floors, strict=True), marker="|", color="gray", label="bare matrix products, or a copy", s=120
        )
        for number, name in enumerate(names):
            points = [(_relative(r, name), y) for y, r in enumerate(results) if name in r["contestants"]]
            axes.scatter(
                *zip(*points, strict=True), marker=MARKERS[number % len(MARKERS)], color=f"C{number}", label=name,
                s=34, zorder=3,
            )  # fmt: skip
        axes.axvline(1, color="black", linewidth=1.2, label=f"{OURS} = 1")
        axes.set_yticks(range(len(results)), [f"{r['op']}, {r['size']}" for r in results])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("time / our time (right of the line: slower than cai_fast)")
        axes.grid(axis="x", which="both", linewidth=0.3)
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
