"""Broken files, drawn by hypothesis: valid JSON, JSONL and TOML changed in their structure, their text, or their bytes.

A strategy of this module draws bytes, or a `Special` for what is no regular file at all.
"""

import copy
import gzip
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

# Values that stand in the text as they are: json.dumps and a TOML writer would not write them.
JSON_FRAGMENTS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 400, "[" * 3000 + "]" * 3000,
                  '{"a":' * 3000 + "1" + "}" * 3000, '"\\ud800"', '"\\u0000"', '{"a": 1, "a": 2}', "nul", "'a'", "01",
                  "", '"' + "x" * 20000 + '"', '"a\nb"', "1.5e", "[1,]", "2" * 19, "1e-400")  # fmt: skip
TOML_FRAGMENTS = ("nan", "inf", "-inf", "1e999", "9" * 5000, "9" * 400, "-" + "9" * 30, "[" * 3000 + "]" * 3000,
                  "1979-05-27T07:32:00Z", "00:32:00.999999", '"\\u0000"', '"\\ud800"', '"""a\nb"""', "'''x'''", "{}",
                  "{a = 1, a = 2}", "[[1], [2]]", "true", "-1", "0", "1.5", '""', '"' + "x" * 20000 + '"', "0x10",
                  "1_0", "[]", '["a", 1]', "{a = {b = 1}}", '"../../x"', '"\\u007f"', "2" * 19, "[true]",
                  '"nearly"')  # fmt: skip
BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\r\n", b"{", b"}", b"[", b'"', b"\\", b"#",
         b"=", b"\x7f", b" " * 5000, b"[" * 5000, b"\xf4\x90\x80\x80", "é".encode("latin-1"), b",",
         b"\x1f\x8b")  # fmt: skip
SPECIALS = ("absent", "folder", "pipe", "loop", "dangling link")
_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(), st.sampled_from(["", "a", "0", "\0", "\ud800", "é\u2028", "<eos>", "../x", "/", "x" * 300]),
    st.text(max_size=8),
)  # fmt: skip
VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


class Special(NamedTuple):
    """Something that is no regular file; one of SPECIALS."""

    what: str

    def make(self, path: Path) -> None:
        """Put it at `path`, where nothing is."""
        if self.what == "folder":
            path.mkdir()
        elif self.what == "pipe":
            os.mkfifo(path)
        elif self.what == "loop":
            path.symlink_to(path)
        elif self.what == "dangling link":
            path.symlink_to(path.with_name("nowhere"))


def places(value: Any, widest: int = 12) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value, of wide containers the first few."""
    keys = list(value)[:widest] if isinstance(value, dict) else range(min(len(value), widest))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key], widest)


DEEDS = ("drop", "drop", "retype", "retype", "retype", "other", "other", "nest", "rename", "twice", "fragment")
CHANGES = st.sampled_from([1, 1, 1, 2, 3])


@st.composite
def json_text(draw: Callable[[Any], Any], value: Any) -> str:
    """The text of a JSON value after a change or a few."""
    root = {"": copy.deepcopy(value)}
    raw: dict[str, str] = {}
    for number in range(draw(CHANGES)):
        spots = list(places(root))
        owner, key = draw(st.sampled_from(spots))
        deed = draw(st.sampled_from(DEEDS))
        named = isinstance(owner, dict) and owner is not root
        if deed == "drop" and owner is not root:
            del owner[key]
        elif deed == "rename" and named:
            owner[draw(st.sampled_from([key + "x", key[:-1], key.upper(), "\0", "x" * 5000]))] = owner.pop(key)
        elif deed == "twice" and named:
            owner[key + "@@"] = draw(VALUES)
        elif deed == "fragment":
            owner[key] = f"@@{number}"
            raw[f'"@@{number}"'] = draw(st.sampled_from(JSON_FRAGMENTS))
        elif deed == "nest":
            owner[key] = draw(st.sampled_from([[owner[key]], {"a": owner[key]}, [[[owner[key]]]]]))
        elif deed == "other":
            other, name = draw(st.sampled_from(spots))
            owner[key] = copy.deepcopy(other[name])
        else:
            owner[key] = draw(VALUES)
    text = json.dumps(root[""], ensure_ascii=draw(st.booleans()))
    for mark, fragment in raw.items():
        text = text.replace(mark, fragment)
    return text.replace("@@", "")


@st.composite
def toml_text(draw: Callable[[Any], Any], text: str) -> str:
    """A TOML text of one setting or header a line, after a change of lines or a few."""
    lines = text.splitlines()
    for _ in range(draw(CHANGES)):
        at = draw(st.integers(0, len(lines) - 1)) if lines else 0
        line = lines[at] if lines else ""
        key, equals, value = line.partition("=")
        deed = draw(
            st.sampled_from(["value", "value", "other", "other", "drop", "drop", "twice", "rename", "header", "insert"])
        )
        if deed == "value" and equals:
            lines[at] = f"{key}= {draw(st.sampled_from(TOML_FRAGMENTS))}"
        elif deed == "other" and equals:
            lines[at] = f"{key}={draw(st.sampled_from(lines)).partition('=')[2]}"
        elif deed == "drop" and lines:
            del lines[at]
        elif deed == "twice":
            lines.insert(draw(st.integers(0, len(lines))), line)
        elif deed == "rename" and equals:
            lines[at] = (
                f"{draw(st.sampled_from([key + 'x', key[:-1], 'x' * 5000, 'a.b.c', '.'.join('a' * 2000)]))}={value}"
            )
        elif deed == "header":
            header = draw(
                st.sampled_from(["[x]", "[[x]]", "[]", "[rl]", "[[rl]]", "[rl.x]", "[principle]", "[[format]]"])
            )
            lines.insert(at, header)
        else:
            lines.insert(at, f"{draw(st.sampled_from(['seed', 'x', 'extends', 'stages', '', 'rl.x']))} = "
                         f"{draw(st.sampled_from(TOML_FRAGMENTS))}")  # fmt: skip
    return "\n".join(lines) + "\n"


@st.composite
def damaged(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """`data` after a change of bytes or a few."""
    for _ in range(draw(CHANGES)):
        deed = draw(st.sampled_from(["cut", "insert", "insert", "flip", "crlf", "empty", "wide", "again"]))
        at = draw(st.integers(0, len(data)))
        if deed == "cut":
            data = data[:at]
        elif deed == "insert":
            data = data[:at] + draw(st.sampled_from(BYTES)) + data[at:]
        elif deed == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif deed == "crlf":
            data = data.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n"])))
        elif deed == "empty":
            data = draw(st.sampled_from([b"", b"\n", b" ", b"null", b"\xef\xbb\xbf"]))
        elif deed == "wide":
            data = data.decode("utf-8", "replace").encode(
                draw(st.sampled_from(["utf-16", "utf-32", "latin-1"])), "replace"
            )
        else:
            data += data
    return data


def _with_damage(text: st.SearchStrategy[str], good: bytes) -> st.SearchStrategy[bytes | Special]:
    """Mostly changed text, sometimes changed bytes of the text or of the good file, sometimes no file."""
    changed = text.map(lambda drawn: drawn.encode("utf-8", "surrogatepass"))
    special = st.sampled_from(SPECIALS).map(Special)
    rare = st.one_of(changed.flatmap(damaged), damaged(good), damaged(good), special)
    return st.integers(0, 3).flatmap(lambda turn: changed if turn else rare)


def broken_json(value: Any) -> st.SearchStrategy[bytes | Special]:
    """A JSON file that was `value`."""
    anything = VALUES.map(lambda drawn: json.dumps(drawn))
    text = st.integers(0, 7).flatmap(lambda turn: json_text(value) if turn else anything)
    return _with_damage(text, json.dumps(value, indent=1).encode())


def broken_toml(text: str) -> st.SearchStrategy[bytes | Special]:
    """A TOML file that was `text`."""
    return _with_damage(toml_text(text), text.encode())


def broken_rows(rows: Sequence[Any], zipped: bool = False) -> st.SearchStrategy[bytes | Special]:
    """A JSONL file that held `rows`, gzipped or not; a damaged archive too."""
    changed = st.integers(0, len(rows) - 1).flatmap(
        lambda at: json_text(rows[at]).map(
            lambda text: "\n".join([*map(json.dumps, rows[:at]), text, *map(json.dumps, rows[at + 1 :])]) + "\n"
        )
    )
    others = st.lists(VALUES.map(json.dumps), max_size=3).map(lambda texts: "\n".join(texts))
    text = st.integers(0, 7).flatmap(lambda turn: changed if turn else others)
    plain = _with_damage(text, "".join(json.dumps(row) + "\n" for row in rows).encode())
    if not zipped:
        return plain
    packed = plain.map(lambda data: data if isinstance(data, Special) else gzip.compress(data, mtime=0))
    return st.one_of(packed, packed.flatmap(lambda data: st.just(data) if isinstance(data, Special) else damaged(data)))
