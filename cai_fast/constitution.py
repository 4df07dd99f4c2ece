"""Constitutions: principles, few-shot examples and the prompt format; loading, checking, hashing, drawing.

A constitution is a bundled name, a TOML file (see constitutions/harmlessness.toml), or a folder with the five JSON
files that the paper's authors published (schemas: `_from_paper`).
"""

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from cai_fast.errors import InputError
from cai_fast.readers import BadRow, parse_dialogue
from cai_fast.records import Turn, content_id

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
class Constitution:
    """Principles with the few-shot examples and the format that go with them."""

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
        return content_id(self.principles, self.few_shot_critique, self.few_shot_comparison, self.few_shot_cot,
                          self.format)

    def principles_for(self, phase: Phase) -> tuple[Principle, ...]:
        """The principles that can be drawn in `phase`, in file order."""
        return tuple(principle for principle in self.principles if principle.serves(phase))

    def draw(self, phase: Phase, key: int) -> Principle:
        """One principle by weight; a pure function of `key`, so draws are independent and with replacement."""
        candidates = self.principles_for(phase)
        if not candidates:
            raise InputError(f"constitution {self.name!r} has no principle for the {phase} phase; add one with "
                             + ("critique_request and revision_request" if phase == "critique" else "comparison"))
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
    path = Path(spec)
    if path.is_dir():
        return _from_paper(path)
    if path.is_file():
        return _from_toml(path.read_bytes(), str(path))
    bundled = {entry.name.removesuffix(".toml"): entry for entry in resources.files("cai_fast.constitutions").iterdir()
               if entry.name.endswith(".toml")}
    if str(spec) not in bundled:
        near = difflib.get_close_matches(str(spec), bundled, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown constitution {str(spec)!r}: {hint}expected one of {', '.join(sorted(bundled))}, "
                         "a TOML file, or a folder with the paper's JSON files")
    return _from_toml(bundled[str(spec)].read_bytes(), f"constitution {spec}")


def _from_toml(data: bytes, where: str) -> Constitution:
    try:
        tree = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not valid TOML: {error}") from error
    _known(tree, ("constitution", "principle", "few_shot", "format"), where)
    head = _build(_Head, tree.get("constitution", {}), f"{where}: [constitution]")
    if not isinstance(rows := tree.get("principle", []), list) or not rows:
        raise InputError(f"{where}: no [[principle]]; expected at least one")
    principles = [_build(Principle, row, f"{where}: principle {number}") for number, row in enumerate(rows, 1)]
    _check_principles(principles, where)
    few_shot = _table(tree.get("few_shot", {}), f"{where}: [few_shot]")
    _known(few_shot, ("critique", "comparison", "cot"), f"{where}: [few_shot]")

    def examples(phase: str, cls: type) -> tuple:
        return tuple(_example(cls, row, f"{where}: few_shot.{phase} {number}")
                     for number, row in enumerate(few_shot.get(phase, []), 1))

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
    for key in set(table) - set(known):
        near = difflib.get_close_matches(key, known, 1) or known
        raise InputError(f"{where}: unknown key {key!r}; did you mean {' or '.join(near)}?")


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
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise InputError(f"{where}: {f.name} must be a positive number, found {value!r}")
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
        raise InputError(f"{where}: answer must be A or B, found {example.answer!r}")
    return example


def _check_principles(principles: list[Principle], where: str) -> None:
    seen = set()
    for principle in principles:
        name = f"{where}: principle {principle.id!r}"
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
        raise InputError(f"{where}: kind must be one of {', '.join(KINDS)}, found {result.kind!r}")
    if len(result.options) != 2 or not all(option.strip() for option in result.options):
        raise InputError(f"{where}: options must be two non-empty strings")
    templates = TEMPLATES | OPTIONAL_TEMPLATES
    if result.kind != "custom":
        if given := sorted(set(table) & set(templates)):
            raise InputError(f"{where}: {given[0]!r} is for kind = \"custom\", but kind is {result.kind!r}")
        return result
    for name, allowed in templates.items():
        template = getattr(result, name)
        if name in TEMPLATES and not template:
            raise InputError(f"{where}: kind = \"custom\" lacks the template {name!r}")
        found = re.findall(r"\{(\w+)\}", template)
        for placeholder in allowed:
            if template and found.count(placeholder) != 1:
                raise InputError(f"{where}: template {name!r} must hold {{{placeholder}}} once, found {template!r}")
        if unknown := set(found) - {*allowed, "eos"}:
            raise InputError(f"{where}: template {name!r} has the unknown placeholder {{{unknown.pop()}}}; "
                             f"known: {', '.join((*allowed, 'eos'))}")
    if result.revision.split("{critique}")[0].rstrip() != result.critique.rstrip():
        raise InputError(f"{where}: template 'revision' must begin with template 'critique', then {{critique}}")
    return result


def _unwrap(text: Any, before: str, after: str, where: str) -> str:
    """The inner part of a published string; the wrapping belongs to the format, which puts the same bytes back."""
    if not isinstance(text, str) or not text.startswith(before) or not text.endswith(after):
        raise InputError(f"{where}: expected a string that begins with {before!r} and ends with {after!r}, "
                         f"found {text!r:.80}")
    return text[len(before): len(text) - len(after)]


_STEPS = re.compile(r"\n\n(CritiqueRequest|Critique|RevisionRequest|Revision): ")
_COT = re.compile(
    r"\n*Human: Consider the following conversation between [^\n]*:(?P<turns>.*)\n\n\{\}"
    r"\n \(A\) \[\[\[(?P<a>.*?)\]\]\]\n \(B\) \[\[\[(?P<b>.*?)\]\]\]"
    r"\n\nAssistant: Let's think step by step:(?P<reasoning>.*)\n\nHuman:\nSo the answer is: \((?P<answer>[AB])\)",
    re.DOTALL,
)


def _paper_critique(raw: Any, where: str) -> CritiqueExample:
    pieces = _STEPS.split(raw) if isinstance(raw, str) else []
    if pieces[1::2] != ["CritiqueRequest", "Critique", "RevisionRequest", "Revision"]:
        raise InputError(f"{where}: expected a transcript with CritiqueRequest, Critique, RevisionRequest, Revision")
    turns = _dialogue(pieces[0], where)
    if turns[-1].role != "assistant":
        raise InputError(f"{where}: the conversation must end with the assistant's response")
    return CritiqueExample(turns[:-1], turns[-1].text, pieces[2], pieces[4], pieces[6],
                           pieces[8].removesuffix("\n\nHuman:"), raw)


def _paper_cot(row: Any, where: str) -> CotExample:
    raw = row.get("prompt") if isinstance(row, dict) else None
    match = _COT.fullmatch(raw) if isinstance(raw, str) else None
    if match is None or raw.count("{}") != 1:
        raise InputError(f"{where}: expected a CoT comparison with one {{}} slot, two [[[responses]]] and an answer")
    text = re.sub(r"\n\n([HA]):", lambda m: {"H": "\n\nHuman:", "A": "\n\nAssistant:"}[m[1]], match["turns"])
    return CotExample(_dialogue(text, where), match["a"], match["b"], match["reasoning"].strip(), match["answer"], raw)


def _paper_comparison(row: Any, where: str) -> ComparisonExample:
    try:
        (better,), (worse,) = row["corrects"], row["incorrects"]
        return ComparisonExample(_dialogue(row["prompt"], where), better, worse)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: expected {{prompt, corrects: [one], incorrects: [one]}} ({error})") from error


def _dialogue(text: str, where: str) -> tuple[Turn, ...]:
    try:
        return parse_dialogue(text)
    except BadRow as error:
        raise InputError(f"{where}: {error}") from error


def _from_paper(folder: Path) -> Constitution:
    """The published files: instructions {key: {prompt: [str], edit_request: str}}, few-shot transcripts [str],
    comparison principles [str], comparison examples [{prompt, corrects, incorrects}], CoT examples [{prompt}]."""
    base = folder / "prompts" if (folder / "prompts").is_dir() else folder

    def read(name: str, kind: type) -> Any:
        path = base / f"{name}.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected the folder of the paper's JSON files")
        try:
            value = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        if isinstance(value, kind) and value:
            return value
        raise InputError(f"{path}: expected a non-empty {'object' if kind is dict else 'list'}")

    principles = []
    for key, value in read("CritiqueRevisionInstructions", dict).items():
        where = f"{base}/CritiqueRevisionInstructions.json: {key}"
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), list) or len(value["prompt"]) != 1:
            raise InputError(f"{where}: expected {{prompt: [one string], edit_request: string}}")
        principles.append(Principle(
            key, _unwrap(value["prompt"][0], "\n\nCritiqueRequest: ", "\n\nCritique:", where),
            _unwrap(value.get("edit_request"), "\n\nRevisionRequest: ", "\n\nRevision:", where)))  # fmt: skip
    for number, text in enumerate(read("RLMadisonInstructions", list)):
        where = f"{base}/RLMadisonInstructions.json: item {number}"
        principles.append(Principle(f"comparison{number}", comparison=_unwrap(text, "\n", " Options:", where)))

    def examples(name: str, parse: Any) -> tuple:
        return tuple(parse(row, f"{base}/{name}.json: item {number}") for number, row in enumerate(read(name, list)))

    return Constitution(
        "paper", "published", f"the paper's published prompts, read from {folder}", tuple(principles),
        examples("CritiqueRevisionFewShotPrompts", _paper_critique),
        examples("RLMadisonFewShotPrompts", _paper_comparison),
        examples("RLMadisonPrecogFewShotPrompts", _paper_cot), Format(kind="paper"),
    )  # fmt: skip
