"""Typed records: what the stages exchange, one JSON object a line, plus the journal and the token side files.

Every record is a frozen dataclass that round-trips exactly through `to_json` / `from_json`; reading is strict
(a missing, unknown or wrongly typed field is an error that names file, line and field).
Text files are replaced atomically; the `Journal` is the only file that grows in place.
"""

import hashlib
import json
import os
import time
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from cai_fast.errors import InputError
from cai_fast.files import write_atomic
from cai_fast.inputs import kind, parse_json, require_file

T = TypeVar("T", bound="Record")


def content_id(*parts: Any) -> str:
    """16 hex digits of BLAKE2b over the JSON of `parts`: equal content, equal id, on every machine."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: Any) -> Any:
    """A dataclass as a dict, tuples as lists: what JSON can hold."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value` (parsed JSON) as `hint`, or InputError naming the field `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only X | None occurs
        return None if value is None else _decode(args[0], value, where)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where}: expected one of {', '.join(map(str, args))}, found {value!r:.80}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where}: expected a list, found {type(value).__name__}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise InputError(f"{where}: expected {len(args)} items, found {len(value)}")
        return tuple(_decode(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if is_dataclass(hint):
        return _decode_record(hint, value, where)
    expected = dict if origin is dict else hint
    if expected is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise InputError(f"{where}: expected {expected.__name__}, found {value!r:.80}")
    return value


def _decode_record(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {type(value).__name__}")
    hints = _hints(cls)
    if unknown := sorted(set(value) - set(hints)):
        raise InputError(f"{where}: unknown field {unknown[0]!r:.80} in {cls.__name__}; it has {', '.join(hints)}")
    decoded = {}
    for f in fields(cls):
        if f.name in value:
            decoded[f.name] = _decode(hints[f.name], value[f.name], f"{where}.{f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where}: {cls.__name__} lacks the field {f.name!r}")
    return cls(**decoded)


@dataclass(frozen=True)
class Record:
    """Base of all records: exact JSON round trip."""

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return _plain(self)

    @classmethod
    def from_json(cls: type[T], value: Any, where: str = "record") -> T:
        """The record from parsed JSON; strict, errors name `where`."""
        return _decode_record(cls, value, where)


@dataclass(frozen=True)
class Turn(Record):
    """One message of a conversation."""

    role: Literal["human", "assistant"]
    text: str


@dataclass(frozen=True)
class Prompt(Record):
    """A conversation that ends with a human turn (paper §3.2)."""

    id: str
    kind: Literal["red_team", "helpful"]
    turns: tuple[Turn, ...]
    source: str
    split: Literal["train", "eval"]


@dataclass(frozen=True)
class Round(Record):
    """One step of a chain; `critique` is empty for a direct revision."""

    principle: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Revision(Record):
    """A chain: the initial response and its successive revisions."""

    id: str
    prompt_id: str
    response: str
    rounds: tuple[Round, ...]
    kept: bool
    reject_reason: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Helpful(Record):
    """A plain sample for a helpfulness prompt."""

    id: str
    prompt_id: str
    response: str
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison(Record):
    """Two responses to one prompt; `kind` says what their label is about."""

    id: str
    prompt_id: str
    kind: Literal["harmless", "helpful"]
    source: Literal["ai", "human", "corpus"]
    response_a: str
    response_b: str
    split: Literal["train", "eval"]
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PrincipleLabel(Record):
    """One principle's view: P(response_a is better) asked in either order, already un-swapped; None = not asked."""

    principle: str
    prob_a_ab: float | None
    prob_a_ba: float | None
    cot: tuple[str, ...] = ()


@dataclass(frozen=True)
class Label(Record):
    """A soft label: prob_a = P(response_a is better), after the clamp."""

    id: str
    comparison_id: str
    prob_a: float
    per_principle: tuple[PrincipleLabel, ...] = ()
    clamp: tuple[float, float] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout(Record):
    """One RL sample; prompt_id is also the group id, `sample` its index in the group. kl in nats per response."""

    id: str
    prompt_id: str
    iteration: int
    response: str
    reward: float
    kl: float
    sample: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyAnswer(Record):
    """A policy's answer to a held-out prompt, with its own metrics."""

    id: str
    prompt_id: str
    policy: str
    response: str
    metrics: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))


def write_jsonl(path: str | Path, rows: Iterable[Record | Mapping[str, Any]]) -> None:
    """Write records (or plain dicts), one JSON object a line, atomically."""
    write_atomic(path, ((_dumps(_plain(row)) + "\n").encode() for row in rows))


def read_jsonl(path: str | Path, cls: type[T]) -> list[T]:
    """All records of a file that this program wrote; strict."""
    path = require_file(path)
    rows = []
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            where = f"{path}, line {number}"
            rows.append(cls.from_json(parse_json(line, where), where))
    return rows


class Journal:
    """Append-only JSONL that survives a kill at any byte: opening cuts off a torn last line.

    Every row reaches the operating system at once (a killed process loses nothing); fsync happens at most every
    `interval` seconds and on close (a power cut loses at most that much).
    """

    def __init__(self, path: str | Path, *, interval: float = 5.0) -> None:
        self.path = Path(path)
        self.interval = interval
        if kind(self.path) not in ("", "file"):
            raise InputError(f"{self.path}: expected a journal of this program, found no regular file; remove it")
        self.path.parent.mkdir(exist_ok=True)  # not its parents: a run folder that is gone must not come back empty
        self._file = self.path.open("ab+", buffering=0)
        self._cut_torn_line()
        self._synced = time.monotonic()

    def _cut_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        block = 1 << 16
        position = end
        while position > 0:
            start = max(0, position - block)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            self._file.truncate(position)

    def rows(self) -> list[dict[str, Any]]:
        """All rows on file, oldest first."""
        rows = []
        with self.path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                row = parse_json(line, f"{self.path} (delete it to start this stage anew), line {number}")
                if not isinstance(row, dict):
                    raise InputError(f"{self.path}, line {number}: expected an object, found {row!r:.60}; delete the "
                                     "file to start this stage anew")  # fmt: skip
                rows.append(row)
        return rows

    def append(self, row: Record | Mapping[str, Any]) -> None:
        """Add one row; on the disk within `interval` seconds of further appends, or at close."""
        data = (_dumps(_plain(row)) + "\n").encode()
        while data:  # a raw write may be partial; a full disk raises and leaves a torn line for the next opening
            data = data[self._file.write(data) :]
        if time.monotonic() - self._synced >= self.interval:
            self.sync()

    def sync(self) -> None:
        """Force everything to the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close; may be called twice."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def write_tokens(path: str | Path, rows: Mapping[str, tuple[Sequence[int], Sequence[float] | None]]) -> None:
    """Token ids and optional log-probs keyed by record id, as a safetensors file of flat arrays; atomic.

    `token_ids` int32[T], `offsets` int64[N+1], `logprobs` float32[T] (NaN where a row has none),
    `has_logprobs` uint8[N], `ids` uint8 (the ids, newline-separated UTF-8).
    """
    import numpy as np
    from safetensors.numpy import save

    tokens = [np.asarray(ids, dtype=np.int32) for ids, _ in rows.values()]
    logprobs = []
    for key, (ids, values) in rows.items():
        if "\n" in key:
            raise ValueError(f"record id {key!r} holds a newline")
        if values is not None and len(values) != len(ids):
            raise ValueError(f"{key}: {len(ids)} tokens but {len(values)} log-probs")
        logprobs.append(np.full(len(ids), np.nan, np.float32) if values is None else np.asarray(values, np.float32))
    arrays = {
        "token_ids": np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        "offsets": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        "logprobs": np.concatenate(logprobs) if logprobs else np.zeros(0, np.float32),
        "has_logprobs": np.asarray([values is not None for _, values in rows.values()], dtype=np.uint8),
        "ids": np.frombuffer("\n".join(rows).encode(), dtype=np.uint8),
    }
    Path(path).parent.mkdir(exist_ok=True)
    write_atomic(path, save(arrays))


def read_tokens(path: str | Path) -> dict[str, tuple[list[int], list[float] | None]]:
    """What `write_tokens` wrote, in its order."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read the token file ({error})") from error
    offsets = arrays["offsets"]
    if len(offsets) == 1:
        return {}
    rows = {}
    for index, key in enumerate(arrays["ids"].tobytes().decode().split("\n")):
        span = slice(offsets[index], offsets[index + 1])
        logprobs = arrays["logprobs"][span].tolist() if arrays["has_logprobs"][index] else None
        rows[key] = (arrays["token_ids"][span].tolist(), logprobs)
    return rows
