"""Files that are whole or absent: atomic writes and content hashes. Imports nothing from the package."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def fsync_dir(folder: str | os.PathLike[str]) -> None:
    """Make renames, creations and deletions inside `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: str | os.PathLike[str], data: bytes | str | Iterable[bytes]) -> None:
    """Replace `path` by `data`, or by its parts; at any instant the file holds all of the old or of the new content.

    What a kill leaves is PATH.tmp, which the next attempt overwrites.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    data = data.encode() if isinstance(data, str) else data
    try:
        with open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk should get the failed attempt's bytes back
    fsync_dir(path.parent)


def hash_file(path: str | os.PathLike[str]) -> str:
    """sha256 of the content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
