"""Readers of other people's files: prompts, comparisons, labels, HHH questions. JSONL, optionally gzipped.

Accepted prompt rows: `prompt` (text, a Human/Assistant transcript, or a list of turns), chat `messages`, or hh-rlhf
`chosen` / `rejected` transcripts (each human turn of a dialogue is one prompt, paper §3.2). A line that is not JSON or
a damaged archive stops the run; a row of the wrong shape is rejected with its line and the reason, and more than
`max_bad_fraction` of those stop the run too.
"""

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cai_fast.errors import InputError
from cai_fast.inputs import HALF_A_PAIR, is_text, parse_json, require_file
from cai_fast.records import Prompt, Turn, content_id

_ROLES = {"human": "human", "user": "human", "prompter": "human", "assistant": "assistant", "gpt": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Rejected(NamedTuple):
    """A row that was not used: its line (from 1) and why."""

    line: int
    reason: str


class Preference(NamedTuple):
    """A comparison from a file: prob_a = P(response_a is better); `line` from 1."""

    turns: tuple[Turn, ...]
    response_a: str
    response_b: str
    prob_a: float
    line: int = 0


class Question(NamedTuple):
    """A multiple-choice question of the evals; the last three only where the row has texts."""

    prompt: str
    correct: str
    incorrect: tuple[str, ...]
    turns: tuple[Turn, ...] | None = None
    response_correct: str | None = None
    response_incorrect: str | None = None


class BadRow(Exception):
    """A row of the wrong shape; its message is the reason."""


def lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number, parsed JSON) of every non-blank line; InputError on a damaged file."""
    path = require_file(path)
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, parse_json(line, f"{path}, line {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip file after line {number} ({error}); fetch it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _rows(path: str | Path, parse: Callable[[Any], list], max_bad_fraction: float) -> tuple[list, list[Rejected]]:
    """(line, result) of all results of `parse`, plus the rejected rows."""
    good: list = []
    rejected: list[Rejected] = []
    total = 0
    for number, row in lines(path):
        total += 1
        try:
            good += [(number, item) for item in parse(row)]
        except BadRow as reason:
            rejected.append(Rejected(number, str(reason)))
    if not total:
        raise InputError(f"{path}: the file is empty; expected one JSON object a line")
    if len(rejected) > max_bad_fraction * total:
        first = "; ".join(f"line {r.line}: {r.reason}" for r in rejected[:3])
        raise InputError(
            f"{path}: {len(rejected)} of {total} rows are unusable ({first}), more than the allowed "
            f"fraction {max_bad_fraction:g}; mend the file or raise data.max_bad_fraction"
        )
    return good, rejected


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    """Turns of a "\\n\\nHuman: ...\\n\\nAssistant: ..." transcript; keeps every byte but the one space after a colon.

    A trailing empty "\\n\\nAssistant:" (where the assistant is to speak) is left out.
    """
    pieces = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n"))
    if len(pieces) < 3 or pieces[0].strip():
        raise BadRow('transcript does not start with "Human:"')
    turns = [
        Turn("human" if role == "Human" else "assistant", said.removeprefix(" "))
        for role, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if turns[-1].role == "assistant" and not turns[-1].text.strip():
        turns.pop()
    return tuple(turns)


def parse_messages(messages: Any) -> tuple[Turn, ...]:
    """Turns of a list of {role, content | text}; system messages are left out (ours is pinned by the format)."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("expected a list of messages")
    turns = []
    for message in messages:
        role, text = message.get("role", message.get("from")), message.get("content", message.get("text"))
        if role == "system":
            continue
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise BadRow(f"message with role {role!r:.60} and content of type {type(text).__name__}")
        turns.append(Turn(_ROLES[role], text))
    return tuple(turns)


def _conversation(value: Any) -> tuple[Turn, ...]:
    """Text, transcript or messages -> turns."""
    if isinstance(value, str):
        return parse_dialogue(value) if value.lstrip("\n").startswith("Human:") else (Turn("human", value),)
    return parse_messages(value)


def _check(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Turns that alternate, begin and end with the human, none blank."""
    if not turns or turns[-1].role != "human":
        raise BadRow("the conversation does not end with a human turn")
    if any(turn.role != ("human", "assistant")[index % 2] for index, turn in enumerate(turns)):
        raise BadRow("human and assistant do not alternate, human first")
    if not all(turn.text.strip() for turn in turns):
        raise BadRow("an empty turn")
    if not all(is_text(turn.text) for turn in turns):
        raise BadRow(HALF_A_PAIR)
    return turns


def _without_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def _prompts_of(row: Any) -> list[tuple[Turn, ...]]:
    """Every prompt that a row holds."""
    if not isinstance(row, dict):
        raise BadRow(f"expected an object, found {type(row).__name__}")
    if "prompt" in row:
        return [_check(_without_answer(_conversation(row["prompt"])))]
    if "messages" in row:
        return [_check(_without_answer(parse_messages(row["messages"])))]
    if "chosen" in row:
        turns = _check(_without_answer(_conversation(row["chosen"])))
        return [turns[:end] for end in range(1, len(turns) + 1, 2)]
    raise BadRow(f"no field prompt, messages or chosen; found {', '.join(map(str, row)) or 'none'}")


def encode_split(key: str, eval_fraction: float) -> str:
    """ "eval" for `eval_fraction` of all keys, by hash: a key stays on its side whatever else the file holds."""
    digest = hashlib.blake2b(b"split:" + key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") < eval_fraction * 2**64 else "train"


def read_prompts(
    path: str | Path, kind: str, *, max_bad_fraction: float = 0.05, eval_fraction: float = 0.0
) -> tuple[list[Prompt], list[Rejected]]:
    """Distinct prompts of a file in its order, and the rejected rows.

    The split goes by the first human turn, so that all prompts of one dialogue are on one side.
    """
    found, rejected = _rows(path, _prompts_of, max_bad_fraction)
    prompts = {}
    for _, turns in found:
        key = content_id(kind, turns)
        if key not in prompts:
            split = encode_split(turns[0].text, eval_fraction)
            prompts[key] = Prompt(key, kind, turns, Path(path).name, split)
    return list(prompts.values()), rejected


def _answer(turns: tuple[Turn, ...]) -> str:
    if not turns or turns[-1].role != "assistant" or not turns[-1].text.strip():
        raise BadRow("a dialogue without a final assistant turn")
    return turns[-1].text


def _preference_of(row: Any) -> list[Preference]:
    if not isinstance(row, dict):
        raise BadRow(f"expected an object, found {type(row).__name__}")
    if "chosen" in row and "rejected" in row:
        if isinstance(row["chosen"], str) and "prompt" in row:  # bare answers next to their prompt
            turns = _check(_without_answer(_conversation(row["prompt"])))
            better, worse = row["chosen"], row["rejected"]
        else:
            chosen, rejected = _conversation(row["chosen"]), _conversation(row["rejected"])
            better, worse = _answer(chosen), _answer(rejected)
            turns = _check(chosen[:-1])
            if turns != rejected[:-1]:
                raise BadRow("chosen and rejected answer different conversations")
        answers, prob_a = (better, worse), 1.0
    elif "prob_a" in row:
        turns = _check(_without_answer(_conversation(row.get("turns", row.get("prompt")))))
        answers, prob_a = (row.get("response_a"), row.get("response_b")), row["prob_a"]
    else:
        raise BadRow("neither chosen and rejected nor prob_a")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise BadRow("a missing or empty response")
    if not all(map(is_text, answers)):
        raise BadRow(HALF_A_PAIR)
    return [Preference(turns, *answers, _probability(prob_a))]


def _probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise BadRow(f"prob_a must be in [0, 1], found {value!r:.60}")
    return float(value)


def read_comparisons(path: str | Path, *, max_bad_fraction: float = 0.05) -> tuple[list[Preference], list[Rejected]]:
    """Preferences of a file: chosen/rejected (prob_a = 1) or response_a, response_b, prob_a with prompt or turns."""
    found, rejected = _rows(path, _preference_of, max_bad_fraction)
    return [row._replace(line=number) for number, row in found], rejected


def read_labels(path: str | Path, *, max_bad_fraction: float = 0.0) -> dict[str, float]:
    """Labels made elsewhere: rows with comparison_id and prob_a -> {comparison_id: prob_a}."""

    seen: set[str] = set()

    def parse(row: Any) -> list[tuple[str, float]]:
        if not isinstance(row, dict) or not isinstance(row.get("comparison_id"), str):
            raise BadRow("no comparison_id")
        label = row["comparison_id"], _probability(row.get("prob_a"))
        if label[0] in seen:
            raise BadRow(f"a second label for comparison {label[0]!r:.60}")
        seen.add(label[0])
        return [label]

    found, _ = _rows(path, parse, max_bad_fraction)
    return dict(row for _, row in found)


def read_hhh(path: str | Path) -> list[Question]:
    """The questions of an HHH-style file: prompt, corrects, incorrects and, if there, both full dialogues."""

    def parse(row: Any) -> list[Question]:
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise BadRow("no prompt")
        correct, incorrect = row.get("corrects"), row.get("incorrects")
        if not isinstance(correct, list) or len(correct) != 1 or not isinstance(incorrect, list) or not incorrect:
            raise BadRow("expected one string in corrects and at least one in incorrects")
        both = [row[name] for name in ("text_correct", "text_incorrect") if name in row]
        texts = [row["prompt"], *correct, *incorrect, *both]
        if not all(isinstance(text, str) and text.strip() for text in texts) or len(both) == 1:
            raise BadRow("a text is missing, empty or no string")
        if not all(map(is_text, texts)):
            raise BadRow(HALF_A_PAIR)
        if not both:
            return [Question(row["prompt"], correct[0], tuple(incorrect))]
        better, worse = map(parse_dialogue, both)
        if better[:-1] != worse[:-1]:
            raise BadRow("text_correct and text_incorrect answer different conversations")
        return [Question(row["prompt"], correct[0], tuple(incorrect), better[:-1], _answer(better), _answer(worse))]

    return [question for _, question in _rows(path, parse, 0.0)[0]]
