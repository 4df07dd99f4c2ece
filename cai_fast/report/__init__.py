"""report.html: one self-contained page made from the files of a run folder, and from nothing else.

The same files give the same bytes. A run that is not finished, or of which files are missing, gives what there is.
"""

from pathlib import Path
from typing import Any

from cai_fast.inputs import parse_toml, read_json
from cai_fast.report import curves, facts, rows
from cai_fast.report.page import embedded, environment, shell

__all__ = ["build", "embedded", "shell"]
LINKS = {"loop": "Loop", "results": "Results", "curves": "Curves", "guards": "Guards", "chains": "Chains",
         "comparisons": "Comparisons", "answers": "Answers", "reproduce": "Reproduce"}  # fmt: skip


def build(folder: Path, samples: int) -> str:
    """The page for the run in `folder`, with up to `samples` rows of each file to browse."""
    manifest = _json(folder / "manifest.json", {"stages": {}})
    manifest["stages"].pop("report", None)  # it is at work, or about to be done again
    text = _text(folder / "config.toml")
    config = parse_toml(text.encode(), folder / "config.toml")
    charts: list[dict[str, Any]] = []  # the templates hold their places in this list
    wording = _wording(folder, manifest)
    browsers = {
        "chains": rows.chains(folder, samples),
        "comparisons": rows.comparisons(folder, samples),
        "answers": rows.answers(folder, samples),
    }
    values = {"name": folder.name, "config": config, "config_text": text, "wording": wording, "browsers": browsers,
              "environment": _text(folder / "environment.json")}  # fmt: skip
    values |= _measured(folder, manifest, charts) | _curves(folder, config, charts)
    filters = {"number": facts.number, "share": facts.share, "interval": facts.interval}
    body = environment(**filters).get_template("report.html").render(values)
    data = {"charts": charts, "principles": wording} | browsers
    return shell(f"{folder.name} – cai_fast", body, links=LINKS, data=data)


def _measured(folder: Path, manifest: dict[str, Any], charts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest and the evaluation say, for the template."""
    evaluation = _json(folder / "evaluation.json", {})
    change = rows.change(folder, "helpful", "helpful", "base", "rl_cai")
    return {
        "date": facts.date(manifest), "headline": facts.headline(manifest, evaluation, change),
        "phases": facts.loop(manifest),
        "total": facts.duration(sum(r.get("seconds") or 0 for r in manifest["stages"].values())),
        "plots": facts.plots(evaluation), "tables": facts.tables(evaluation),
        "calibrations": _places(charts, facts.calibrations(evaluation, manifest)),
        "judge": evaluation.get("judge", {}), "hhh": evaluation.get("hhh", {}),
        "principles": facts.principles(manifest), "hashes": facts.hashes(manifest),
        "guards": facts.guards(manifest),
    }  # fmt: skip


def _curves(folder: Path, config: dict[str, Any], charts: list[dict[str, Any]]) -> dict[str, Any]:
    """What metrics.jsonl holds, for the template, and the limits that were set."""
    points = curves.read_points(folder / "metrics.jsonl")
    limits = facts.limits(config)
    single = {name: facts.number(value) for name, value in curves.single(points).items()}
    panels = {name: _places(charts, found) for name, found in curves.panels(points, limits).items()}
    return {"panels": panels, "single": single, "thresholds": facts.thresholds(config)}


def _places(charts: list[dict[str, Any]], more: list[dict[str, Any]]) -> list[int]:
    """Add `more` to the charts of the page; their places."""
    charts += more
    return list(range(len(charts) - len(more), len(charts)))


def _json(path: Path, default: Any) -> Any:
    return read_json(path) if path.is_file() else default


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _wording(folder: Path, manifest: dict[str, Any]) -> dict[str, list[str]]:
    """principle -> its critique request, revision request and comparison, of the constitutions that the run used."""
    used = {record.get("inputs", {}).get("constitution") for record in manifest["stages"].values()} - {None}
    found = [_json(folder / "constitutions" / f"{name}.json", {}) for name in sorted(used)]
    return {
        p["id"]: [p["critique_request"], p["revision_request"], p["comparison"]]
        for constitution in found for p in constitution.get("principles", [])
    }  # fmt: skip
