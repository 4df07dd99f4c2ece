"""Hugging Face folders in and out: config.json and safetensors, strictly; no pickle.

A tensor that is missing, unexpected or of another shape is an error that names it. A tied output head is stored once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from cai_fast.errors import InputError
from cai_fast.inputs import kind, read_json, require_file
from cai_fast.model.config import FAMILIES, ModelConfig
from cai_fast.model.decoder import Model
from cai_fast.model.heads import init_scalar

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 * 10**9
_ROWS = 4096  # of an embedding that are compared at a time
_LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")


def load(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    head: str | None = None, new_head: int | None = None, prepare: Callable[[Model], object] | None = None,
) -> Model:  # fmt: skip
    """The model of a Hugging Face folder, in `dtype` on `device`.

    head: "lm" or "score"; None takes what config.json's `architectures` says. new_head: seed of a fresh scalar head
    (see `heads.init_scalar`) for a folder that holds a language model, when head is "score". prepare(model) is called
    while nothing is allocated yet, to shard the model: each rank then reads and holds its own rows alone.
    """
    folder = Path(path)
    raw, config = read_model_config(folder)
    declared = declared_head(raw, folder)
    head = head or declared
    with torch.device("meta"):
        model = Model(config, head).to(dtype)
    if prepare is not None:
        prepare(model)
    model.to_empty(device=device)
    fresh = {"score.weight"} if head == "score" and declared == "lm" and new_head is not None else set()
    _fill(model, folder, fresh)
    if fresh:
        weight = torch.empty(1, config.hidden_size)
        init_scalar(weight, new_head)
        with torch.no_grad():
            own_rows(model.score.weight).copy_(weight[row_range(model.score.weight)])
    model.source = folder
    return model


def row_range(parameter: Tensor) -> slice:
    """Which of a parameter's rows are on this rank: all, or its share under FSDP2 (as torch.chunk cuts them)."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    mesh, total = parameter.device_mesh, parameter.shape[0]
    size = -(-total // mesh.size())
    return slice(min(mesh.get_local_rank() * size, total), min((mesh.get_local_rank() + 1) * size, total))


def own_rows(parameter: Tensor) -> Tensor:
    """The part of a parameter that is on this rank, to be read or written in place."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def _fill(model: Model, folder: Path, fresh: set[str]) -> None:
    """Copy the folder's tensors into the model's parameters; those in `fresh` are not in the folder."""
    parameters = dict(model.named_parameters())
    wanted = set(parameters) - fresh
    missing = set(wanted)
    unexpected: list[str] = []
    tied = None
    for file, name, piece in pieces(folder):
        if name.endswith("rotary_emb.inv_freq"):  # a derived buffer that old checkpoints carry
            continue
        if name == "lm_head.weight" and (fresh or (model.head == "lm" and model.config.tie_word_embeddings)):
            tied = None if fresh else file
        elif name not in wanted:
            unexpected.append(name)
        else:
            parameter = parameters[name]
            check_piece(file, name, piece, parameter.shape)
            own_rows(parameter).copy_(piece[row_range(parameter)])
            missing.discard(name)
    check_names(folder, model.head, sorted(missing), sorted(unexpected))
    if tied is not None and not _holds(tied, "lm_head.weight", model.model.embed_tokens.weight):
        raise InputError(f"{folder}: tie_word_embeddings is true but lm_head.weight differs from the embedding")


def _holds(file: Path, name: str, parameter: Tensor) -> bool:
    """Whether the file's tensor is `parameter` [rows, columns] in its dtype; no copy of the whole is made."""
    mine, own = row_range(parameter), own_rows(parameter).detach()
    with safe_open(str(file), framework="pt") as handle:
        piece = handle.get_slice(name)
        return tuple(piece.get_shape()) == tuple(parameter.shape) and all(
            torch.equal(piece[start : min(start + _ROWS, mine.stop)].to(rows), rows)
            for start, rows in zip(range(mine.start, mine.stop, _ROWS), own.split(_ROWS), strict=True)
        )


def init_random(
    config: ModelConfig, seed: int, *, head: str = "lm", dtype: torch.dtype = torch.float32, std: float | None = None
) -> Model:
    """A new model: N(0, std²) (default: the configuration's initializer_range, else 0.02), norms 1, biases 0.

    Projections back into the residual stream are scaled by 1/sqrt(2 layers) (GPT-2).
    """
    model = Model(config, head).to(dtype)
    std = std or dict(config.kept).get("initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "score.weight":
                init_scalar(parameter, seed)
            elif name.endswith(".bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                scale = (2 * config.num_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (std * scale))
    return model


def save(
    model: Model,
    path: str | Path,
    *,
    tokenizer: Any = None,
    extra_config: dict[str, Any] | None = None,
    extra_files: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model` as a Hugging Face folder, replacing `path` only when everything is on disk.

    dtype: that of the file, default the model's own. tokenizer: saved beside it (`tokenizer.save(folder)`).
    extra_config: entries of config.json to add or replace, such as pad_token_id. Licence files of the folder that the
    model was loaded from come along, and for a language model its generation_config.json; extra_files (name -> text)
    are written over them.
    """
    path = Path(path)
    if any(name.endswith(".lora_A.weight") for name, _ in model.named_parameters()):
        raise InputError(
            f"{path}: the model has LoRA adapters, which a Hugging Face folder cannot hold. Save lora.merge(model), or "
            "the adapters alone with lora.save_adapters."
        )
    state = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in model.state_dict().items()}
    config = model.config.to_hf(model.head) | {"dtype": str(dtype or model.dtype).removeprefix("torch.")}
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_folder(partial, model, state, tokenizer, config | (extra_config or {}), extra_files or {})
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk should get the failed attempt's bytes back
    _sync(path.parent)


def _write_folder(
    folder: Path, model: Model, state: dict[str, Tensor], tokenizer: Any, config: dict[str, Any], texts: dict[str, str]
) -> None:
    """Everything that belongs into the checkpoint `folder`, forced to the disk."""
    folder.mkdir(parents=True)
    if model.source is not None and model.source.is_dir():
        patterns = (*_LICENCES, "generation_config.json") if model.head == "lm" else _LICENCES
        for file in sorted({f for pattern in patterns for f in model.source.glob(pattern) if f.is_file()}):
            shutil.copyfile(file, folder / file.name)
    if tokenizer is not None:
        tokenizer.save(folder)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    _write_json(folder / "config.json", config)
    _write_shards(folder, state)
    for file in folder.rglob("*"):
        if file.is_file():
            _sync(file)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder."""
    if kind(folder) != "folder":
        raise InputError(f"checkpoint {folder}: no such folder")
    config = read_json(folder / "config.json", "a Hugging Face checkpoint folder")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: expected a JSON object, found {type(config).__name__}")
    return config


def read_model_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The parsed config.json of a checkpoint folder, and the decoder that it describes."""
    raw = read_config(folder)
    try:
        return raw, ModelConfig.from_hf(raw)
    except InputError as error:
        raise InputError(f"{folder}/{error}") from error


def declared_head(raw: dict[str, Any], folder: Path) -> str:
    names = raw.get("architectures") or []
    prefix = FAMILIES[raw["model_type"]][0]
    if names == [prefix + "ForCausalLM"]:
        return "lm"
    if names != [prefix + "ForSequenceClassification"]:
        expected = f"[{prefix}ForCausalLM] or [{prefix}ForSequenceClassification]"
        raise InputError(f"{folder / 'config.json'}: architectures {names!r:.80}; expected {expected}")
    table = raw.get("id2label")
    labels = raw.get("num_labels") or (len(table) if isinstance(table, dict) else 0) or 2  # transformers' default
    if labels != 1:
        raise InputError(f"{folder / 'config.json'}: {labels!r:.80} labels; a preference model has num_labels = 1")
    return "score"


def pieces(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """(file, name, slice) of every tensor of a folder, one at a time; `slice[:]` reads it."""
    if kind(folder / INDEX):
        index = read_json(folder / INDEX)
        table = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(table, dict) or not table:
            raise InputError(f"{folder / INDEX}: no weight_map")
        files = sorted({folder / Path(str(file)).name[:255] for file in table.values()})
    else:
        files, table = [folder / SINGLE], None
    for file in files:
        require_file(file, f"the weights as {SINGLE} or {INDEX} with its shards")
        try:
            with safe_open(str(file), framework="pt") as handle:
                for name in handle.keys():
                    if table is None or table.get(name) == file.name:
                        yield file, name, handle.get_slice(name)
                    else:
                        raise InputError(f"{file}: tensor {name[:80]} is not listed for this file in {INDEX}")
        except SafetensorError as error:
            raise InputError(
                f"{file}: not a readable safetensors file ({str(error):.300}); is the download complete?"
            ) from error


def check_piece(file: Path, name: str, piece: Any, wanted: Sequence[int]) -> None:
    """InputError unless a tensor of a file has the shape `wanted` and a floating-point type that we read."""
    shape, kind = tuple(piece.get_shape()), piece.get_dtype()
    if shape != tuple(wanted) or kind not in ("F32", "BF16", "F16"):
        raise InputError(
            f"{file}: tensor {name} is {kind} {shape}; expected float32, bfloat16 or float16 {tuple(wanted)} "
            "(does config.json belong to these weights?)"
        )


def check_names(folder: Path, head: str, missing: list[str], unexpected: list[str]) -> None:
    if not missing and not unexpected:
        return

    def listed(names: list[str]) -> str:
        return ", ".join(name[:80] for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    parts = [f"missing tensors: {listed(missing)}"] if missing else []
    parts += [f"unexpected tensors: {listed(unexpected)}"] if unexpected else []
    raise InputError(f"checkpoint {folder} (read with a {head!r} head): {'; '.join(parts)}")


def _write_shards(folder: Path, state: dict[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_shard(shards[0], folder / SINGLE)
        return
    table = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(shard, folder / file)
        table |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in state.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})


def _write_shard(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))  # the library hides the system's error in its own
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
