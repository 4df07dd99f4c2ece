"""FIGURES.md from the figures' results; equal results give an equal page."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE.parent / "FIGURES.md", HERE.parent / "results" / "figures"
ORDER = ("revisions", "principles", "critique", "labels", "elo", "soft_hard", "weight", "frontier", "algorithms")
HEAD = """# The paper's experiments on the toy world

Made by `python -m bench.figures` from `bench/results/figures/*.json`; do not edit. A verdict is what the rule beside
it says of the numbers; a rule that was changed after a first look at them is named in its section. A value is the mean
over seeds, with a 95 % interval by bootstrap over seeds and, within each, prompts; the seeds' own values stand beside
it. With three seeds that is rough: of findings that are not there 3 in 100 would pass for reproduced where answers to
prompts differ most, but 1 in 8 where seeds do. The toy world is a model of 0.5 M weights in a language of 300 words:
that a trend shows or fails to show here says how this program behaves, and little about large models."""


def texts() -> dict[str, dict[str, str]]:
    """The words of every figure."""
    return tomllib.loads((HERE / "texts.toml").read_text())


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results that there are, in the order of the page."""
    paths = [folder / f"{name}.json" for name in ORDER]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def page(results: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    words = texts()
    lines = [HEAD, "", "| figure | reproduced | not reproduced | not testable here |", "|---|---|---|---|"]
    for result in results:
        counts = [sum(c["verdict"] == v for c in result["claims"])
                  for v in ("reproduced", "not reproduced", "not testable here")]  # fmt: skip
        name = result["figure"]
        lines.append(f"| [{words[name]['title']}](#{name}) | " + " | ".join(map(str, counts)) + " |")
    for result in results:
        lines += ["", *section(result, words[result["figure"]])]
    return "\n".join(lines) + "\n"


def section(result: dict[str, Any], words: dict[str, str]) -> list[str]:
    """One figure."""
    name = result["figure"]
    lines = [f'## <a id="{name}"></a>{words["title"]}', "", f"**The paper:** {words['paper'].strip()}", "",
             f"**Here:** {words['ours'].strip()}", "",
             *([f"![{words['title']}](results/figures/{name}.svg)", ""] if result["panels"] else []),
             "| finding | verdict | value | seeds | rule |", "|---|---|---|---|---|"]  # fmt: skip
    lines += [row(claim) for claim in result["claims"]]
    if result.get("ended"):
        lines += ["", f"Ended by a guard before the last iteration: {'; '.join(result['ended'])}."]
    if words["note"].strip():
        lines += ["", words["note"].strip()]
    made = result["environment"]
    where = (f"jobs done at commit {', '.join(result['commits'])}, evaluated at {made['commit']}, {made['date'][:10]}, "
             f"torch {made['versions']['torch']}")  # fmt: skip
    seeds = ", ".join(map(str, result["seeds"]))
    return [*lines, "", f"`{result['command']}`, seeds {seeds}, {where}; all numbers: `results/figures/{name}.json`."]


def row(claim: dict[str, Any]) -> str:
    """A line of the table of findings."""
    found = claim.get("estimate")
    value = f"{found['mean']:.3g} ({found['lo']:.3g} to {found['hi']:.3g})" if found else ""
    seeds = " / ".join(f"{seed['mean']:.3g}" for seed in found["seeds"]) if found else ""
    return f"| {claim['claim']} | **{claim['verdict']}** | {value} | {seeds} | {claim['rule']} |"
