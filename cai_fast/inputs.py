"""Files that a user supplies, read so that whatever is wrong with one is an InputError naming file and place."""

import errno
import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from cai_fast.errors import InputError

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_DIGITS = re.compile(r"\d{4300,}")  # Python reads no longer whole number from text
HALF_A_PAIR = "half a surrogate pair (an escape such as \\ud800), which is no text"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def kind(path: str | Path) -> str:
    """ "file", "folder", "special" (a pipe, a device) or "" for nothing; InputError where the system will not say."""
    try:
        mode = Path(path).stat().st_mode
    except ValueError:  # a NUL byte or a lone surrogate, which no name holds
        return ""
    except OSError as error:
        if error.errno in _ABSENT:
            return ""
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "special"


def require_file(path: str | Path, expected: str = "") -> Path:
    """`path`, which is a regular file: it is read more than once, and a pipe would be waited for."""
    found = kind(path)
    if found == "file" and not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(f"{path}: cannot be read: {os.strerror(errno.EACCES)}")
    if found == "file":
        return Path(path)
    wrong = {"": "no such file", "folder": "a folder", "special": "no regular file"}[found]
    raise InputError(f"{path}: {wrong}; expected {expected}" if expected else f"{path}: {wrong}")


def read_bytes(path: str | Path, expected: str = "") -> bytes:
    """The content of a file; `expected` says what it should have been where it is none."""
    path = require_file(path, expected)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def is_text(value: Any) -> bool:
    """Whether `value` is a string that can be written as UTF-8."""
    return isinstance(value, str) and not _LONE_SURROGATE.search(value)


def parse_json(data: bytes, where: str | Path) -> Any:
    """The value of a JSON document (UTF-8, a byte-order mark allowed). NaN and Infinity are not JSON."""
    try:
        text = data.decode("utf-8-sig")
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise InputError(f"{where}: not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({_reason(error, data)})") from error


def parse_toml(data: bytes, where: str | Path) -> dict[str, Any]:
    """The tables of a TOML document (UTF-8, a byte-order mark allowed)."""
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise InputError(f"{where}: not TOML that can be read: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{where}: not valid TOML ({_reason(error, data)})") from error


def read_json(path: str | Path, expected: str = "") -> Any:
    """The value of a JSON file, all of whose strings are text."""
    data = read_bytes(path, expected)
    value = parse_json(data, path)
    try:
        whole = b"\\u" not in data or is_text(json.dumps(value, ensure_ascii=False))
    except RecursionError as error:
        raise InputError(f"{path}: not JSON that can be read: nested too deeply") from error
    if not whole:
        raise InputError(f"{path}: {HALF_A_PAIR}")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _reason(error: ValueError, data: bytes) -> str:
    """What a parser found, with the line where it does not say so."""
    if isinstance(error, json.JSONDecodeError | tomllib.TOMLDecodeError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    text = data.decode("utf-8-sig")
    if long := _DIGITS.search(text):
        return f"line {text.count(chr(10), 0, long.start()) + 1}: a number of {len(long[0])} digits"
    return str(error)
