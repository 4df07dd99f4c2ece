"""Content hashes of files, of models and of JSON values."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cai_fast.errors import InputError
from cai_fast.files import hash_file

REHASH_BELOW = 64 * 2**20  # bytes; larger files are hashed again only when their size or time has changed
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "vocab*", "merges*")


def files_of(path: Path) -> Iterator[Path]:
    """A file, or every file below a folder, in order."""
    yield from (p for p in sorted(path.rglob("*")) if p.is_file()) if path.is_dir() else [path]


@functools.cache
def _hash_unchanged(path: Path, size: int, mtime_ns: int) -> str:
    return hash_file(path)


def _hash(path: Path) -> str:
    """Content hash; a large file that this process has hashed is read again only if its size or time changed."""
    stat = path.stat()
    return hash_file(path) if stat.st_size < REHASH_BELOW else _hash_unchanged(path, stat.st_size, stat.st_mtime_ns)


def facts_of(path: Path) -> dict[str, Any]:
    """What the manifest knows of a file."""
    stat = path.stat()
    return {"bytes": stat.st_size, "sha256": _hash(path), "mtime_ns": stat.st_mtime_ns}


def hash_model(folder: str | os.PathLike[str]) -> str:
    """sha256 over names and contents of a model folder's configuration, weights and tokenizer files."""
    folder = Path(folder)
    found = sorted({p for pattern in MODEL_FILES for p in folder.glob(pattern) if p.is_file()})
    if not any(p.suffix == ".safetensors" for p in found):
        raise InputError(f"{folder}: expected a model folder with config.json and *.safetensors, found no weights")
    return hash_json({p.name: _hash(p.resolve()) for p in found})


def hash_json(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
