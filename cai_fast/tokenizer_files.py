"""A tokenizer folder through transformers, whatever is wrong with its files turned into one InputError."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from cai_fast.errors import InputError
from cai_fast.inputs import kind, read_bytes, read_json

# What libraries raise where a tokenizer's files or its chat template hold values of other types than they expect.
WRONG = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RecursionError, TypeError,
         ValueError)  # fmt: skip
_OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


def open_folder(path: Path) -> Any:
    """The transformers tokenizer of a local folder; nothing is downloaded, no code of the folder is run."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind(path) != "folder":
        raise InputError(f"{path}: no such folder; expected a Hugging Face checkpoint on this machine")
    file = path / "tokenizer.json"
    data = read_bytes(file, "a fast tokenizer (tokenizers library)")
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)  # where transformers lets a bare Exception through
    except ValueError as error:
        raise InputError(f"{file}: not a tokenizer ({str(error):.300})") from error
    for template in _templates(json.loads(backend.to_str())["post_processor"]):
        for piece in (*template["single"], *template["pair"]):
            name = piece.get("SpecialToken", {}).get("id")
            if name is not None and name not in template["special_tokens"]:  # the library would abort
                raise InputError(f"{file}: post_processor adds {name!r:.60}, which is not in its special_tokens")
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


def _templates(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The parts of a post-processor that add special tokens."""
    if step is not None:
        yield from [step] if step["type"] == "TemplateProcessing" else []
        for part in step.get("processors", []):
            yield from _templates(part)


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
