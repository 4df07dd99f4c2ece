"""A comparison of two runs as sections of notes and tables, printed as text or as one HTML page."""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_fast.report.page import environment, shell

WIDTH = 100  # columns of the text
FLAG = "*"


@dataclass(frozen=True)
class Details:
    """Texts that the page hides behind a click, as (label, text); the printed text leaves them out."""

    summary: str
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A heading with sentences, one table of cells, and details."""

    title: str
    notes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)


def sections(result: dict[str, Any]) -> list[Section]:
    """What `compare` found, in the order of the pipeline."""
    flags = (
        f"Differences are B minus A, with 95 % intervals by bootstrap over shared prompts; {FLAG}: excludes 0, as one "
        "in twenty does by chance. Where single prompts cannot be paired, A and B have intervals of their own; "
        f"{FLAG}: these do not overlap. Rows that are the same in both runs are only counted."
    )
    folders = [f"{side}: {folder}" for side, folder in zip("AB", result["runs"], strict=True)]
    title = Section("Two runs compared", [*folders, *result["notes"], flags])
    rows = [[row["key"], _json(row["a"]), _json(row["b"])] for row in result["settings"]]
    settings = Section("Settings", [] if rows else ["All settings are the same."], ["setting", "A", "B"], rows)
    return [
        title, settings, _constitution(result["constitution"]), *_chains(result["chains"], result["revisions"]),
        *_labels(result["labels"]), _plain("Preference models, on held-out comparisons", result["preference_models"]),
        *_behaviour(result["behaviour"]), _plain("The judge", result["judge"]),
        _plain("Elo (SL-CAI is 0)", result["elo"], "{:.0f}"),
    ]  # fmt: skip


def _changed(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows in which anything differs, and a sentence about the others."""
    rows = list(rows)
    moved = [row for row in rows if row["diff"] or row["lo"] or row["hi"]]
    same = len(rows) - len(moved)
    return moved, [f"{same} of {len(rows)} rows are the same in both runs."] if same else []


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "–" if value is None else form.format(value)


def _interval(ends: dict[str, Any] | None, form: str) -> str:
    return f"{_number(ends['lo'], form)} to {_number(ends['hi'], form)}" if ends else "–"


def _paired(row: dict[str, Any]) -> list[str]:
    """Cells of a difference: A, B, B - A, interval, flag, n."""
    interval = _interval(row if row["lo"] is not None else None, "{:+.3f}")
    mark = FLAG if row["flag"] else ""
    return [_number(row["a"]), _number(row["b"]), _number(row["diff"], "{:+.3f}"), interval, mark, str(row["n"])]


PAIRED = ["A", "B", "B - A", "95 % interval", "", "n"]


def _plain(title: str, rows: list[dict[str, Any]], form: str = "{:.3f}") -> Section:
    """A table of numbers that are no pairs: with the interval of each side."""
    names = list(rows[0])[:2] if rows else []
    signed = form.replace(":", ":+")
    moved, same = _changed(rows)
    cells = [
        [row[names[0]], row[names[1]], _number(row["a"], form), _interval(row["a_interval"], form),
         _number(row["b"], form), _interval(row["b_interval"], form), _number(row["diff"], signed),
         FLAG if row["flag"] else ""]
        for row in moved
    ]  # fmt: skip
    columns = [*names, "A", "95 % interval", "B", "95 % interval", "B - A", ""]
    return Section(title, same if rows else ["Nothing that both runs measured."], columns, cells)


def _constitution(found: dict[str, Any]) -> Section:
    a, b = found["a"], found["b"]
    notes = [f"A: {a['name']} ({a['hash']}); B: {b['name']} ({b['hash']})"]
    if a["hash"] == b["hash"]:
        return Section("Constitution", [*notes, "The same in both runs."])
    rows = [["reworded", r["principle"], r["field"], f"- {r['a']}", f"+ {r['b']}"] for r in found["reworded"]]
    for word, sign in (("added", "+"), ("removed", "-")):
        rows += [
            [word, p["id"], name, *((f"- {p[name]}", "") if sign == "-" else ("", f"+ {p[name]}"))]
            for p in found[word] for name in ("critique_request", "revision_request", "comparison") if p[name]
        ]  # fmt: skip
    if found["other"]:
        notes.append(f"Also different: {', '.join(found['other'])}.")
    return Section("Constitution", notes, ["", "principle", "field", "A", "B"], rows)


def _chains(found: dict[str, Any], revisions: list[dict[str, Any]]) -> list[Section]:
    kept, same = found["kept"], found["same_first_answer"]
    notes = [f"{found['shared']} prompts have a chain in both runs; {found['changed']} of these chains differ."]
    if found["shared"]:
        notes.append(f"Same first answer: {same:.1%}. Kept: A {kept['a']:.1%}, B {kept['b']:.1%}.")
    for side in "ab":
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(found["rejected"][side].items()))
        notes.append(f"Rejected in {side.upper()}: {counts or 'none'}.")
    rows = [
        [str(r["round"]), str(r["n"]), *(_number(r[name]) for name in ("principle", "critique", "revision"))]
        for r in found["rounds"]
    ]
    details = []
    for one in found["examples"]:
        texts = _turns(one["prompt"])
        for side in "ab":
            texts.append((f"{side.upper()}: first answer", one[side]["response"]))
            for k, r in enumerate(one[side]["rounds"], 1):
                texts += [(f"{side.upper()}: critique {k} (principle {r['principle']})", r["critique"]),
                          (f"{side.upper()}: revision {k}", r["revision"])]  # fmt: skip
        details.append(Details(f"Prompt {one['prompt']['id']}", texts))
    columns = ["round", "chains", "same principle", "same critique", "same revision"]
    return [
        Section("Critique-revision chains", notes, columns, rows, details),
        _plain("Revisions of held-out red-team answers (0 = first answer)", revisions),
    ]


def _turns(prompt: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["text"]) for turn in prompt["turns"]]


def _labels(found: dict[str, Any]) -> list[Section]:
    only, everything, spread = found["only"], found["all"], found["spread"]
    notes = [
        f"{found['same_comparisons']} comparisons have the same prompt and texts in both runs; "
        f"{everything['changed']} of their labels differ."
    ]
    if only["a"] or only["b"]:
        notes.append(
            f"{only['a']} comparisons of A and {only['b']} of B have other texts, because the models that wrote them "
            "differ; of these only the spread of labels can be compared."
        )
    names = (("prob_a", "P(A is better)"), ("size", "size of the change"), ("flipped", "flipped"))
    rows = [["all", label, *_paired(everything[name])] for name, label in names] if found["same_comparisons"] else []
    for one in found["principles"]:
        if one["changed"]:
            rows += [[one["principle"], label, *_paired(one[name])] for name, label in names]
    asked = [[p["principle"], str(p["asked_a"]), str(p["asked_b"]), str(p["prob_a"]["n"]), str(p["changed"])]
             for p in found["principles"]]  # fmt: skip
    movers = [
        [m["comparison"]["prompt_id"], m["comparison"]["id"], _principles(m["a"]), _principles(m["b"]),
         _number(m["a"]["prob_a"]), _number(m["b"]["prob_a"]), f"{m['b']['prob_a'] - m['a']['prob_a']:+.3f}"]
        for m in found["movers"]
    ]  # fmt: skip
    details = [
        Details(f"Comparison {m['comparison']['id']}: {m['a']['prob_a']:.3f} → {m['b']['prob_a']:.3f}",
                [*_turns(m["prompt"]), ("response A", m["comparison"]["response_a"]),
                 ("response B", m["comparison"]["response_b"])])
        for m in found["movers"]
    ]  # fmt: skip
    result = [
        Section("Labels of the same comparisons", notes, ["principle", "of the label", *PAIRED], rows),
        Section("How often principles were asked about them", [], ["principle", "A", "B", "by both", "changed"], asked),
        Section("Labels that moved most", [] if movers else ["None moved."],
                ["prompt", "comparison", "principle A", "principle B", "A", "B", "B - A"], movers, details),
    ]  # fmt: skip
    if only["a"] or only["b"]:
        cells = [
            [side.upper(), str(spread[side]["n"]),
             *(_number(spread[side].get(k)) for k in ("q10", "median", "q90", "entropy"))]
            for side in "ab"
        ]  # fmt: skip
        columns = ["run", "labels", "|P - 1/2|, 10 %", "50 %", "90 %", "entropy (nats)"]
        result.append(Section("Labels of the other comparisons", [], columns, cells))
    return result


def _principles(label: dict[str, Any]) -> str:
    return ", ".join(view["principle"] for view in label["per_principle"])


def _behaviour(rows: list[dict[str, Any]]) -> list[Section]:
    scale = "pm_score is of each run's own pm_eval, relative to base; kl is to each run's own SL-CAI."
    if any(row["n"] == 0 for row in rows):
        scale += " Without an interval: the metrics of single answers were not kept; redo stage evaluate."
    found = []
    for group in dict.fromkeys(row["group"] for row in rows):
        moved, same = _changed(row for row in rows if row["group"] == group)
        cells = [[row["policy"], row["metric"], *_paired(row)] for row in moved]
        title = f"Behaviour on held-out {group.replace('_', '-')} prompts"
        found.append(Section(title, [scale, *same], ["policy", "metric", *PAIRED], cells))
    return found


def as_text(found: Sequence[Section]) -> str:
    """The sections in WIDTH columns; where a table is wider, its longest cells are wrapped."""
    lines: list[str] = []
    for section in found:
        lines += ["", section.title, "-" * len(section.title)]
        lines += [line for note in section.notes for line in textwrap.wrap(note, WIDTH) or [""]]
        if section.rows:
            lines += _table([section.columns, *section.rows])
    return "\n".join(lines[1:]) + "\n"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(1, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for n in range(max(map(len, cells))):
            parts = [cell[n] if n < len(cell) else "" for cell in cells]
            padded = (p.rjust(w) if _numeric(p) else p.ljust(w) for p, w in zip(parts, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    return lines


def _numeric(text: str) -> bool:
    return text.strip("+-–.0123456789") == ""


def as_html(found: Sequence[Section]) -> str:
    """The sections as one self-contained page."""
    body = environment().get_template("comparison.html").render(sections=found)
    links = {f"part-{n}": re.split(r",| \(", section.title)[0] for n, section in enumerate(found, 1) if n > 1}
    return shell(f"{found[0].title} – cai_fast", body, links=links)
