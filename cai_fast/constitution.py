"""Constitutions: principles, few-shot examples and the prompt format; loading, checking, hashing, drawing.

A constitution is a bundled name, a TOML file (see constitutions/harmlessness.toml), or a folder with the five JSON
files that the paper's authors published (see published.py).
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from cai_fast.errors import InputError
from cai_fast.inputs import kind, parse_toml, read_bytes
from cai_fast.records import Record, Turn, content_id

Phase = Literal["critique", "comparison"]
KINDS = ("auto", "paper", "chat", "custom")
# Placeholders of each template of a format of kind "custom"; {eos} is allowed everywhere.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "human": ("text",),
    "assistant": ("text",),
    "reply": (),
    "critique": ("conversation", "response", "critique_request"),
    "revision": ("conversation", "response", "critique_request", "critique", "revision_request"),
    "direct_revision": ("conversation", "response", "revision_request"),
    "comparison": ("conversation", "comparison", "response_a", "response_b"),
    "cot": ("conversation", "comparison", "response_a", "response_b"),
    "cot_answer": (),
}
OPTIONAL_TEMPLATES = {"end": ()} | {name: ("text",) for name in (
    "answer", "question_human", "question_assistant", "cot_human", "cot_assistant")}  # fmt: skip


@dataclass(frozen=True)
class Principle:
    """One principle; a part that is empty means that it does not serve that phase."""

    id: str
    critique_request: str = ""
    revision_request: str = ""
    comparison: str = ""
    categories: tuple[str, ...] = ()
    weight: float = 1.0

    def serves(self, phase: Phase) -> bool:
        """Whether it can be drawn in `phase`."""
        return bool(self.critique_request if phase == "critique" else self.comparison)


@dataclass(frozen=True)
class CritiqueExample:
    """A worked critique and revision. `raw` is the published transcript, used verbatim in plain-text formats."""

    turns: tuple[Turn, ...]
    response: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str
    raw: str = ""


@dataclass(frozen=True)
class ComparisonExample:
    """A worked comparison; order and principle are drawn when the few-shot block is built (paper §4.1)."""

    turns: tuple[Turn, ...]
    better: str
    worse: str


@dataclass(frozen=True)
class CotExample:
    """A comparison with written-out reasoning. `raw` is the published transcript with a {} slot for the principle."""

    turns: tuple[Turn, ...]
    response_a: str
    response_b: str
    reasoning: str
    answer: Literal["A", "B"]
    raw: str = ""


@dataclass(frozen=True)
class Format:
    """How prompts are written. Only kind "custom" brings its own templates; prompts.py holds those of the others.

    kind "auto" = the tokenizer's chat template where it has one, else the paper's plain text.
    `answer` is how a text that the model wrote stands after the words before it, `end` what closes such a text inside
    a longer context; `question_*` and `cot_*` are the turns inside a comparison and a CoT comparison (empty: as
    `human` and `assistant`).
    """

    kind: str = "auto"
    human: str = ""
    assistant: str = ""
    reply: str = ""
    critique: str = ""
    revision: str = ""
    direct_revision: str = ""
    comparison: str = ""
    cot: str = ""
    cot_answer: str = ""
    answer: str = " {text}"
    end: str = ""
    question_human: str = ""
    question_assistant: str = ""
    cot_human: str = ""
    cot_assistant: str = ""
    options: tuple[str, ...] = (" (A)", " (B)")
    stop: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    system: str = ""


@dataclass(frozen=True)
class Constitution(Record):
    """Principles with the few-shot examples and the format that go with them; as JSON the run folder keeps it."""

    name: str
    version: str
    description: str
    principles: tuple[Principle, ...]
    few_shot_critique: tuple[CritiqueExample, ...] = ()
    few_shot_comparison: tuple[ComparisonExample, ...] = ()
    few_shot_cot: tuple[CotExample, ...] = ()
    format: Format = Format()

    @cached_property
    def hash(self) -> str:
        """Identity of everything that can change a generated text (not of name, version, description)."""
        return content_id(
            self.principles, self.few_shot_critique, self.few_shot_comparison, self.few_shot_cot, self.format
        )

    def principles_for(self, phase: Phase) -> tuple[Principle, ...]:
        """The principles that can be drawn in `phase`, in file order."""
        return tuple(principle for principle in self.principles if principle.serves(phase))

    def draw(self, phase: Phase, key: int) -> Principle:
        """One principle by weight; a pure function of `key`, so draws are independent and with replacement."""
        candidates = self.principles_for(phase)
        if not candidates:
            raise InputError(
                f"constitution {self.name!r} has no principle for the {phase} phase; add one with "
                + ("critique_request and revision_request" if phase == "critique" else "comparison")
            )
        point = uniform(f"principle/{phase}", key) * sum(principle.weight for principle in candidates)
        for principle in candidates:
            point -= principle.weight
            if point < 0:
                return principle
        return candidates[-1]  # rounding of the last partial sum


@dataclass(frozen=True)
class _Head:
    name: str
    version: str
    description: str = ""


def uniform(*parts: Any) -> float:
    """Uniform in [0, 1) by hash of `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def load(spec: str | Path) -> Constitution:
    """A constitution by bundled name, TOML file, or folder of the paper's JSON; InputError names what is wrong."""
    bundled = {
        entry.name.removesuffix(".toml"): entry
        for entry in resources.files("cai_fast.constitutions").iterdir()
        if entry.name.endswith(".toml")
    }
    if str(spec) in bundled:  # also where the working directory holds something of that name: ./NAME is that
        return _from_toml(bundled[str(spec)].read_bytes(), f"constitution {spec}")
    path = Path(spec)
    found = kind(path)
    if found == "folder":
        from cai_fast.published import read_folder

        return read_folder(path)
    if found:
        return _from_toml(read_bytes(path), str(path))
    near = difflib.get_close_matches(str(spec)[:80], bundled, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(
        f"unknown constitution {str(spec)!r}: {hint}expected one of {', '.join(sorted(bundled))}, "
        "a TOML file, or a folder with the paper's JSON files"
    )


def _from_toml(data: bytes, where: str) -> Constitution:
    tree = parse_toml(data, where)
    _known(tree, ("constitution", "principle", "few_shot", "format"), where)
    head = _build(_Head, tree.get("constitution", {}), f"{where}: [constitution]")
    if not isinstance(rows := tree.get("principle", []), list) or not rows:
        raise InputError(f"{where}: no [[principle]]; expected at least one")
    principles = [_build(Principle, row, f"{where}: principle {number}") for number, row in enumerate(rows, 1)]
    _check_principles(principles, where)
    few_shot = _table(tree.get("few_shot", {}), f"{where}: [few_shot]")
    _known(few_shot, ("critique", "comparison", "cot"), f"{where}: [few_shot]")

    def examples(phase: str, cls: type) -> tuple:
        if not isinstance(rows := few_shot.get(phase, []), list):
            raise InputError(f"{where}: expected [[few_shot.{phase}]] tables, found {rows!r:.60}")
        return tuple(_example(cls, row, f"{where}: few_shot.{phase} {n}") for n, row in enumerate(rows, 1))

    return Constitution(
        head.name, head.version, head.description, tuple(principles),
        examples("critique", CritiqueExample), examples("comparison", ComparisonExample), examples("cot", CotExample),
        _format(_table(tree.get("format", {}), f"{where}: [format]"), f"{where}: [format]"),
    )  # fmt: skip


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a table")
    return value


def _known(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in sorted(set(table) - set(known)):
        near = difflib.get_close_matches(key[:80], known, 1) or known
        raise InputError(f"{where}: unknown key {key!r:.80}; did you mean {' or '.join(near)}?")


def _build(cls: type, row: Any, where: str) -> Any:
    """A flat dataclass of strings, numbers and string lists from a TOML table."""
    row = dict(_table(row, where))
    _known(row, (f.name for f in fields(cls) if f.name != "raw"), where)
    for f in fields(cls):
        if f.name not in row:
            if f.default is MISSING:
                raise InputError(f"{where}: lacks the field {f.name!r}")
            continue
        value = row[f.name]
        if f.name == "turns":
            row["turns"] = _turns(value, where)
        elif "tuple" in str(f.type):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise InputError(f"{where}: {f.name} must be a list of strings")
            row[f.name] = tuple(value)
        elif f.type is float:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e100:
                raise InputError(f"{where}: {f.name} must be a positive number, found {value!r:.60}")
            row[f.name] = float(value)
        elif not isinstance(value, str) or (f.default is MISSING and not value.strip()):
            raise InputError(f"{where}: {f.name} must be a non-empty string, found {value!r:.60}")
    return cls(**row)


def _turns(value: Any, where: str) -> tuple[Turn, ...]:
    """Alternating texts, human first and last."""
    if not isinstance(value, list) or len(value) % 2 == 0 or not all(isinstance(text, str) for text in value):
        raise InputError(f"{where}: turns must be an odd number of strings, human and assistant in turn")
    return tuple(Turn(("human", "assistant")[index % 2], text) for index, text in enumerate(value))


def _example(cls: type, row: Any, where: str) -> Any:
    if cls is CritiqueExample and isinstance(row, dict) and "revision" not in row:
        row = row | {"revision": row.get("response", "")}  # nothing to change: the revision repeats the response
    example = _build(cls, row, where)
    if cls is CotExample and example.answer not in ("A", "B"):
        raise InputError(f"{where}: answer must be A or B, found {example.answer!r:.60}")
    return example


def _check_principles(principles: list[Principle], where: str) -> None:
    seen = set()
    for principle in principles:
        name = f"{where}: principle {principle.id!r:.60}"
        if principle.id in seen:
            raise InputError(f"{name} occurs twice; ids must be distinct")
        seen.add(principle.id)
        if bool(principle.critique_request) != bool(principle.revision_request):
            missing = "revision_request" if principle.critique_request else "critique_request"
            raise InputError(f"{name} lacks the field {missing!r}: critique and revision requests come in pairs")
        if not principle.critique_request and not principle.comparison:
            raise InputError(f"{name} serves no phase: give critique_request with revision_request, or comparison")


def _format(table: dict[str, Any], where: str) -> Format:
    result = _build(Format, table, where)
    if result.kind not in KINDS:
        raise InputError(f"{where}: kind must be one of {', '.join(KINDS)}, found {result.kind!r:.60}")
    if len(result.options) != 2 or not all(option.strip() for option in result.options):
        raise InputError(f"{where}: options must be two non-empty strings")
    templates = TEMPLATES | OPTIONAL_TEMPLATES
    if result.kind != "custom":
        if given := sorted(set(table) & set(templates)):
            raise InputError(f'{where}: {given[0]!r} is for kind = "custom", but kind is {result.kind!r}')
        return result
    for name, allowed in templates.items():
        template = getattr(result, name)
        if name in TEMPLATES and not template:
            raise InputError(f'{where}: kind = "custom" lacks the template {name!r}')
        found = re.findall(r"\{(\w+)\}", template)
        for placeholder in allowed:
            if template and found.count(placeholder) != 1:
                raise InputError(
                    f"{where}: template {name!r} must hold {{{placeholder}}} once, found {template!r:.200}"
                )
        if unknown := set(found) - {*allowed, "eos"}:
            raise InputError(
                f"{where}: template {name!r} has the unknown placeholder {{{min(unknown)[:60]}}}; "
                f"known: {', '.join((*allowed, 'eos'))}"
            )
    if result.revision.split("{critique}")[0].rstrip() != result.critique.rstrip():
        raise InputError(f"{where}: template 'revision' must begin with template 'critique', then {{critique}}")
    return result
