"""Training state on disk: one TrainState, whole or absent, as safetensors and JSON.

A step is written to a temporary folder, fsynced, described by a manifest of hashes and renamed; only then are older
steps removed. So a kill or a full disk at any instant leaves the last complete step, and a damaged one is passed over.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cai_fast.errors import InputError
from cai_fast.files import fsync_dir, hash_file

STEP = re.compile(r"step_(\d+)(?:\.(\d+))?")
DTYPES = {  # names of the safetensors format
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass
class TrainState:
    """All that a trainer needs to go on bit for bit. Every field round-trips, whatever is added here.

    Any nesting of dict, list, tuple, tensor, str, int, float, bool, None can be stored.
    """

    step: int = 0  # finished steps
    epoch: int = 0
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)  # optimizer.state_dict(), or several by name
    extra: dict[str, Any] = field(default_factory=dict)  # KL coefficient, running sums, ...
    tensors: dict[str, Tensor] = field(default_factory=dict)


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a state must hold; what is frozen comes from where it was loaded."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy back what `trained` gave."""
    parameters = trained(module)
    if different := sorted(parameters.keys() ^ tensors.keys()):
        raise InputError(f"a training state has other parameters ({', '.join(different[:3])}); use --restart-from")
    for name, p in parameters.items():
        p.copy_(tensors[name])


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON tree in which tensors are replaced by their names and types that JSON would lose are tagged."""
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES:
            raise TypeError(f"TrainState.{name}: cannot store {value.dtype}")
        while name in tensors:  # {"a.b": x} beside {"a": {"b": y}}
            name += "'"
        tensors[name] = value
        return {"__tensor__": name}
    if isinstance(value, dict):
        items = [[k, _encode(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        plain = all(isinstance(k, str) and not k.startswith("__") for k in value)
        if not all(isinstance(k, str | int) for k in value):
            raise TypeError(f"TrainState.{name}: keys must be str or int")
        return dict(items) if plain else {"__items__": items}
    if isinstance(value, list | tuple):
        encoded = [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return encoded if isinstance(value, list) else {"__tuple__": encoded}
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(f"TrainState.{name}: cannot store a {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(_decode(v, tensors) for v in value["__tuple__"])
    return {k: _decode(v, tensors) for k, v in value.get("__items__", value.items())}


def _write(path: Path, chunks: Any) -> dict[str, Any]:
    """Write, fsync and hash in one pass; returns the manifest's entry."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _safetensors(tensors: dict[str, Tensor]) -> Any:
    """The file's bytes, one tensor at a time: the library's own writer copies all, and hides ENOSPC in its error."""
    header, offset = {}, 0
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # keeps all of them aligned
    for name, t in tensors.items():
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for t in tensors.values():
        yield memoryview(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _steps(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, attempt, path) of the renamed steps, oldest first."""
    if not folder.is_dir():
        return []
    matches = [(STEP.fullmatch(p.name), p) for p in folder.iterdir()]
    return sorted((int(m[1]), int(m[2] or 0), p) for m, p in matches if m)


def save(folder: str | os.PathLike[str], state: TrainState, keep: int = 1) -> Path:
    """Write folder/step_N, then prune to the `keep` newest. Call on rank 0 only. Needs room for one more step."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.tmp"):
        shutil.rmtree(left)
    # A step saved twice gets a new name: replacing the old folder would leave an instant with neither.
    attempts = [a for s, a, _ in _steps(folder) if s == state.step]
    final = folder / (f"step_{state.step}.{max(attempts) + 1}" if attempts else f"step_{state.step}")
    temporary = final.with_name(final.name + ".tmp")
    tensors: dict[str, Tensor] = {}
    tree = {f.name: _encode(getattr(state, f.name), f.name, tensors) for f in fields(state)}
    try:
        temporary.mkdir()
        manifest = {
            "tensors.safetensors": _write(temporary / "tensors.safetensors", _safetensors(tensors)),
            "state.json": _write(temporary / "state.json", [json.dumps(tree).encode()]),
        }
        _write(temporary / "manifest.json", [json.dumps(manifest).encode()])
        fsync_dir(temporary)
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk should get the failed attempt's bytes back
    fsync_dir(folder)
    others = [path for _, _, path in _steps(folder) if path != final]
    for old in others[: len(others) + 1 - keep] if len(others) >= keep else []:
        shutil.rmtree(old)
    return final


def _damage(step: Path) -> str | None:
    """What is wrong with a step's files, or None."""
    try:
        manifest = json.loads((step / "manifest.json").read_bytes())
        for name, facts in manifest.items():
            if (step / name).stat().st_size != facts["bytes"] or hash_file(step / name) != facts["sha256"]:
                return f"{name} does not match its hash"
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None


def latest(folder: str | os.PathLike[str]) -> TrainState | None:
    """The newest step whose hashes hold, on the CPU; None if there is none. Damaged steps are named in a warning."""
    for _, _, step in reversed(_steps(Path(folder))):
        problem = _damage(step)
        if problem:
            logging.getLogger(__name__).warning("%s: damaged checkpoint passed over: %s", step, problem)
            continue
        tree = json.loads((step / "state.json").read_bytes())
        known = {f.name for f in fields(TrainState)}
        if set(tree) != known:
            names = ", ".join(sorted(set(tree) ^ known))
            raise InputError(f"{step}: written by another version (fields {names} differ); use --restart-from")
        tensors = load_file(step / "tensors.safetensors")
        return TrainState(**{name: _decode(value, tensors) for name, value in tree.items()})
    return None
