"""A chart of the end-to-end comparison: how many times as long the peer takes for the same step, and what bounds it."""

from pathlib import Path
from typing import Any

import matplotlib


def draw(result: dict[str, Any], peer: str, path: Path) -> None:
    """One bar a stage: the median ratio with its least and greatest, and the ratio of bare matrix products."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = {name: found for name, found in result["stages"].items() if "failed" not in found}
    rows, ratios = range(len(stages)), [found["ratio"] for found in stages.values()]
    medians = [r["median"] for r in ratios]
    spread = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
    with matplotlib.rc_context({"svg.hashsalt": "cai_fast", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.42 * len(stages)), layout="constrained")
        axes.barh(rows, medians, xerr=spread, height=0.6, color="C0", ecolor="black", capsize=3, label="cai_fast")
        floors = [found["floor ratio"]["median"] for found in stages.values()]
        axes.scatter(floors, rows, marker="|", s=200, color="C3", label="the bare matrix products", zorder=3)
        for row, found in enumerate(stages.values()):
            memory = found["memory MiB"]
            if "failed" not in memory["ours"] and "failed" not in memory["peer"]:
                saved = f"memory {memory['ours']['peak']:.0f} against {memory['peer']['peak']:.0f} MiB"
                axes.annotate(saved, (0.03, row), color="white", va="center", fontsize=7)
        axes.axvline(1, color="black", linewidth=1.2)
        axes.set_yticks(rows, list(stages))
        axes.invert_yaxis()
        axes.set_xlabel(f"time of {peer} / our time for the same step on the same tokens (right of the line: faster)")
        axes.set_title(f"{result['device']}, {result['preset']} model")
        axes.grid(axis="x", linewidth=0.3)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
