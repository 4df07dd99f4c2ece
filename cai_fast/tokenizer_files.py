"""A tokenizer folder through transformers, whatever is wrong with its files turned into one InputError."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from cai_fast.errors import InputError
from cai_fast.inputs import kind, parse_json, read_bytes, read_json

# What libraries raise where a tokenizer's files or its chat template hold values of other types than they expect.
WRONG = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RecursionError, TypeError,
         ValueError)  # fmt: skip
MOST_TOKENS = 2**24  # the library walks from 0 to the highest id whenever it writes a vocabulary
_OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


def open_folder(path: Path) -> Any:
    """The transformers tokenizer of a local folder; nothing is downloaded, no code of the folder is run."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind(path) != "folder":
        raise InputError(f"{path}: no such folder; expected a Hugging Face checkpoint on this machine")
    _check_backend(path / "tokenizer.json")
    for name in _OTHERS:
        if kind(path / name) and not isinstance(read_json(path / name), dict):
            raise InputError(f"{path / name}: expected a JSON object")
    try:
        wrapped = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except WRONG as error:
        raise InputError(f"{path}: cannot load the tokenizer: {str(error):.300}") from error
    if not isinstance(wrapped, PreTrainedTokenizerFast):
        raise InputError(f"{path}: not a fast tokenizer ({type(wrapped).__name__})")
    return wrapped


def _check_backend(file: Path) -> None:
    """Refuse a tokenizer.json for which the library would raise a bare Exception, or abort."""
    data = read_bytes(file, "a fast tokenizer (tokenizers library)")
    tree = parse_json(data, file)
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise InputError(f"{file}: not a tokenizer; expected an object with a model")
    _check_merges(file, tree["model"])
    for part in _parts(tree.get("normalizer"), "normalizers"):
        if "precompiled_charsmap" in part and not _is_charsmap(part["precompiled_charsmap"]):
            raise InputError(f"{file}: the precompiled_charsmap of the normalizer is damaged")
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except ValueError as error:
        raise InputError(f"{file}: not a tokenizer ({str(error):.300})") from error
    if (highest := max(backend.get_vocab().values(), default=0)) >= MOST_TOKENS:
        raise InputError(f"{file}: a token with the id {highest}; expected ids below {MOST_TOKENS}")
    name, model = type(backend.model).__name__, backend.model
    lacks = name in ("WordLevel", "WordPiece") and model.token_to_id(model.unk_token) is None
    if lacks or (name == "Unigram" and tree["model"].get("unk_id") is None):
        raise InputError(f"{file}: the {name} model has no token for what it does not know (unk)")
    for part in _parts(tree.get("post_processor"), "processors"):
        for piece in (*part.get("single", []), *part.get("pair", [])):
            token = piece.get("SpecialToken", {}).get("id")
            if token is not None and token not in part["special_tokens"]:
                raise InputError(f"{file}: post_processor adds {token!r:.60}, which is not in its special_tokens")


def _parts(part: Any, name: str) -> Iterator[dict[str, Any]]:
    """A normalizer or post-processor, and those that it consists of, listed under `name`."""
    if isinstance(part, dict):
        yield part
        inner = part.get(name)
        for other in inner if isinstance(inner, list) else []:
            yield from _parts(other, name)


def _check_merges(file: Path, model: dict[str, Any]) -> None:
    """The library cuts the prefix off the second half of every merge, whether it is there or not."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if isinstance(prefix, str) and prefix and isinstance(merges, list):
        halves = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        for half in (pair[1] for pair in halves if isinstance(pair, list) and len(pair) == 2):
            if isinstance(half, str) and not half.startswith(prefix):
                raise InputError(
                    f"{file}: the merge with {half!r:.60} does not begin with continuing_subword_prefix {prefix!r:.60}"
                )


def _is_charsmap(text: Any) -> bool:
    """Whether this is base64 of a trie's size in bytes, the trie, and UTF-8 text, as the library unpacks it."""
    try:
        data = base64.b64decode(text, validate=True)
        size = int.from_bytes(data[:4], "little")
        data[4 + size :].decode()
    except (TypeError, ValueError):
        return False
    return size % 4 == 0 and 4 <= 4 + size <= len(data)


def generation_stops(folder: Path) -> list[int]:
    """The end-of-sequence ids of generation_config.json; none without that file."""
    path = folder / "generation_config.json"
    if not kind(path):
        return []
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(settings).__name__}")
    found = settings.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for index in ids:
        if type(index) is not int or not 0 <= index < 2**31:
            raise InputError(f"{path}: eos_token_id {index!r:.60}; expected token ids")
    return ids
