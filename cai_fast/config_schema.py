"""What a setting is: its default, range, meaning and source, and the checks of a section of settings."""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable
from typing import Any, ClassVar, get_args, get_origin

from cai_fast.errors import InputError
from cai_fast.inputs import is_text

SCHEDULES = ("constant", "linear", "cosine")  # of learning rates


def opt(
    default: Any,
    doc: str,
    *,
    lo: float | None = None,
    hi: float | None = None,
    choices: tuple[str, ...] = (),
    source: str = "",
    work: bool = False,
) -> Any:
    """A setting: `lo` and `hi` are inclusive; `choices` are the words a text value may be."""
    metadata = {"doc": doc, "lo": lo, "hi": hi, "choices": choices, "source": source, "work": work}
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?', X being the known name most like `name`."""
    return f" Did you mean {difflib.get_close_matches(name[:80], known, n=1, cutoff=0.0)[0]!r}?"


class Section:
    """Base of all sections: checks types and ranges, and remembers which fields were read (see `config.unread`)."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = check_value(f"{self.section}.{key_of(field.name)}", vars(self)[field.name], field)
            object.__setattr__(self, field.name, value)
        self.check_together(types.SimpleNamespace(**vars(self)))
        object.__setattr__(self, "_reads", set())

    def check_together(self, s: types.SimpleNamespace) -> None:
        """Rules between the fields of this section (`s` holds them; reading it is not recorded)."""

    def __getattribute__(self, name: str) -> Any:
        reads = object.__getattribute__(self, "__dict__").get("_reads")
        if reads is not None and name in object.__getattribute__(self, "__dataclass_fields__"):
            reads.add(name)
        return object.__getattribute__(self, name)

    def values(self) -> dict[str, Any]:
        """Key -> value of every setting, as written in TOML; not recorded as a read."""
        return {key_of(f.name): vars(self)[f.name] for f in dataclasses.fields(self)}


def key_of(attribute: str) -> str:
    """Name of a field as the user writes it: `from_` is `from`."""
    return attribute.rstrip("_")


def describe_type(field: dataclasses.Field) -> str:
    """What a value may be, for messages and --help: 'a number in [0, 1]', 'one of both, random'."""
    meta, parts = field.metadata, []
    for kind in _kinds(field.type):
        if kind is bool:
            parts.append("true or false")
        elif kind is str:
            parts.append("one of " + ", ".join(meta["choices"]) if meta["choices"] else "text")
        elif kind in (int, float):
            parts.append(("a whole number" if kind is int else "a number") + _range(meta))
        else:
            item = "text" if get_args(kind)[0] is str else "numbers"
            parts.append(f"a list of {item}" + _range(meta))
    return " or ".join(parts)


def check_value(name: str, value: Any, field: dataclasses.Field) -> Any:
    """The value in the field's type, or InputError: no silent conversions except int -> float and list -> tuple."""
    if isinstance(value, list):
        value = tuple(value)
    for kind in _kinds(field.type):
        converted = _convert(value, kind)
        if converted is not None and _allowed(converted, field.metadata):
            return converted
    hint = ""
    if isinstance(value, str) and field.metadata["choices"]:
        hint = nearest(value, field.metadata["choices"])
    raise InputError(f"{name} must be {describe_type(field)}. Got {_show(value)}.{hint}")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _convert(value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return None
        items = tuple(_convert(item, get_args(kind)[0]) for item in value)
        return None if None in items else items
    if type(value) is int and abs(value) >= 2**63 or type(value) is str and not is_text(value):
        return None
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else None


def _allowed(value: Any, meta: Any) -> bool:
    if isinstance(value, str):
        return not meta["choices"] or value in meta["choices"]
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, bool | str):
            continue
        too_low = meta["lo"] is not None and number < meta["lo"]
        too_high = meta["hi"] is not None and number > meta["hi"]
        if not math.isfinite(number) or too_low or too_high:
            return False
    return True


def _range(meta: Any) -> str:
    lo, hi = meta["lo"], meta["hi"]
    if lo is not None and hi is not None:
        return f" in [{lo:g}, {hi:g}]"
    return f" >= {lo:g}" if lo is not None else f" <= {hi:g}" if hi is not None else ""


def _show(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else f"{value!r:.80}"
