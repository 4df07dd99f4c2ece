"""The JSON files that the paper's authors published, as a constitution whose prompts have the very bytes of theirs."""

import re
from pathlib import Path
from typing import Any

from cai_fast.constitution import ComparisonExample, Constitution, CotExample, CritiqueExample, Format, Principle
from cai_fast.errors import InputError
from cai_fast.inputs import kind, read_json
from cai_fast.readers import BadRow, parse_dialogue
from cai_fast.records import Turn


def _unwrap(text: Any, before: str, after: str, where: str) -> str:
    """The inner part of a published string; the wrapping belongs to the format, which puts the same bytes back."""
    if not isinstance(text, str) or not text.startswith(before) or not text.endswith(after):
        raise InputError(
            f"{where}: expected a string that begins with {before!r} and ends with {after!r}, found {text!r:.80}"
        )
    return text[len(before) : len(text) - len(after)]


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
    if not turns or turns[-1].role != "assistant":
        raise InputError(f"{where}: the conversation must end with the assistant's response")
    return CritiqueExample(
        turns[:-1], turns[-1].text, pieces[2], pieces[4], pieces[6], pieces[8].removesuffix("\n\nHuman:"), raw
    )


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
        texts = [row["prompt"], better, worse]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{where}: expected {{prompt, corrects: [one], incorrects: [one]}} ({error})") from error
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: prompt, corrects and incorrects must hold strings, found {texts!r:.80}")
    return ComparisonExample(_dialogue(row["prompt"], where), better, worse)


def _dialogue(text: str, where: str) -> tuple[Turn, ...]:
    try:
        return parse_dialogue(text)
    except BadRow as error:
        raise InputError(f"{where}: {error}") from error


def read_folder(folder: Path) -> Constitution:
    """The published files: instructions {key: {prompt: [str], edit_request: str}}, few-shot transcripts [str],
    comparison principles [str], comparison examples [{prompt, corrects, incorrects}], CoT examples [{prompt}]."""
    base = folder / "prompts" if kind(folder / "prompts") == "folder" else folder

    def read(name: str, shape: type) -> Any:
        path = base / f"{name}.json"
        value = read_json(path, "the folder of the paper's JSON files")
        if isinstance(value, shape) and value:
            return value
        raise InputError(f"{path}: expected a non-empty {'object' if shape is dict else 'list'}")

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
