"""Charts of the report as inline SVG, drawn with matplotlib."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

STYLE = {"svg.hashsalt": "cai_fast", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}  # fmt: skip
Series = Sequence[tuple[float, float]]


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element; the same bytes for the same data."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def lines(title: str, series: Mapping[str, Series], xlabel: str, ylabel: str = "") -> str:
    """One line per series of (x, y) points."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.subplots()
        for name, points in series.items():
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.4)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if len(series) > 1:
            axes.legend(frameon=False)
    return _svg(figure)


def intervals(title: str, rows: Mapping[str, Mapping[str, Any]], ylabel: str, *, line: bool = False) -> str:
    """Means with their 95 % intervals; rows[name] = {mean, lo, hi}. Bars, or with `line` points joined in order."""
    names = list(rows)
    means = [row["mean"] for row in rows.values()]
    errors = [[row["mean"] - row["lo"] for row in rows.values()], [row["hi"] - row["mean"] for row in rows.values()]]
    errors = [[max(0.0, value) for value in side] for side in errors]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.subplots()
        if line:
            axes.errorbar(range(len(names)), means, yerr=errors, marker="o", capsize=3)
        else:
            axes.bar(range(len(names)), means, yerr=errors, capsize=4, width=0.6, color="#5b7fb9")
        axes.set_xticks(range(len(names)), names)
        axes.set(title=title, ylabel=ylabel)
    return _svg(figure)


def reliability(title: str, bins: Sequence[Mapping[str, float]]) -> str:
    """Predicted probability against how often it came true; the area of a point is its share of the data."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], linestyle="--", color="gray", linewidth=1)
        total = sum(row["n"] for row in bins) or 1
        axes.scatter([row["mean_prob"] for row in bins], [row["frequency"] for row in bins],
                     s=[20 + 400 * row["n"] / total for row in bins], alpha=0.7)  # fmt: skip
        axes.set(title=title, xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    return _svg(figure)
