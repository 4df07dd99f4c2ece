"""Training state on disk: each TrainState is whole or absent, as safetensors shards and JSON.

torch.distributed.checkpoint plans which rank writes what and fits what is read to other shards; its own storage would
pickle, so the files are written here, with the headers that its HuggingFaceStorageReader reads.
A step is written to a temporary folder, fsynced, described by a manifest of hashes and renamed; only then are older
steps removed. So a kill or a full disk at any instant leaves the last complete step, and a damaged one is passed over.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from cai_fast.distributed import Distributed
from cai_fast.errors import InputError
from cai_fast.files import fsync_dir, hash_file

STEP = re.compile(r"step_(\d+)(?:\.(\d+))?")
DTYPES = {  # names of the safetensors format
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass
class TrainState:
    """All that a trainer needs to go on bit for bit. Every field round-trips, whatever is added here."""

    step: int = 0  # finished steps
    epoch: int = 0
    extra: dict[str, Any] = field(default_factory=dict)  # KL coefficient, running sums, ...; JSON values
    tensors: dict[str, Tensor] = field(default_factory=dict)  # plain or DTensor; "model.…", "optimizer.…/exp_avg"


@dataclass
class Saved(TrainState):
    """A state on disk; its tensors are on the meta device: names, types and global shapes without values."""

    folder: Path = Path()


class Checkpoints:
    """The TrainStates in `folder`; a context manager. All methods are collective, with the same arguments everywhere.

    keep: complete steps that stay; one more while it is written. background: `save` returns once the tensors are
    copied, and a thread writes, whose failure the next call raises. All ranks must see the same folder.
    """

    def __init__(self, folder: str | os.PathLike[str], dist: Distributed, *, keep: int = 1, background: bool = True):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.dist, self.keep, self.background = Path(folder), dist, keep, background
        # A group of its own, since the thread's collectives must not mix with those of the training.
        self._group = torch_dist.new_group(backend="gloo", timeout=dist.timeout) if dist.world > 1 else None
        self._options = {"process_group": self._group, "no_dist": self._group is None}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        # Said whenever no process group is used, which is on purpose here.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

    def save(self, state: TrainState) -> None:
        """Write folder/step_N, then prune. A failure on one rank is raised on all of them.

        Raises OSError (disk full, ...) of this write, or of the one before if that was in the background; TypeError
        for what cannot be stored. Needs room for one more step and, in the background, CPU memory for this rank's part.
        """
        for name, tensor in state.tensors.items():
            if tensor.dtype not in DTYPES:
                raise TypeError(f"TrainState.tensors: cannot store {tensor.dtype} ({name})")
        tree = {f.name: getattr(state, f.name) for f in fields(TrainState) if f.name != "tensors"}
        for name, value in tree.items():
            _check_json(value, name)
        writer = _Writer(self.folder, json.loads(json.dumps(tree)), self.dist.rank, self.keep)
        self.wait()
        tensors = _share(state.tensors, self.dist)
        if not self.background:
            self._write(writer, tensors)
            return
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self._pending = self._thread.submit(self._write, writer, copies)

    def _write(self, writer: "_Writer", tensors: dict[str, Tensor]) -> None:
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with _failure_of_any_rank():
                dcp.save(tensors, storage_writer=writer, planner=planner, **self._options)
        finally:
            if self.dist.is_main:  # a full disk should get the failed attempt's bytes back
                shutil.rmtree(writer.temporary, ignore_errors=True)

    def wait(self) -> None:
        """Until the last `save` is complete; raises what it failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self, folder: Path | None = None) -> Saved | None:
        """The newest step, here or in a folder of copies, whose hashes hold; None if there is none. Damaged steps are
        named in a warning.

        Raises InputError for a state of another version.
        """
        self.wait()
        folder = folder or self.folder
        found = self.dist.on_main(lambda: _newest(folder))
        if found is None:
            return None
        name, tree = found
        types = {n: torch.empty(size, dtype=BY_NAME[dtype], device="meta") for n, (dtype, size) in tree["tensors"]}
        return Saved(**(tree | {"tensors": types}), folder=folder / name)

    def copy(self, step: int, folder: Path) -> None:
        """Keep a step in another folder too, instead of what is there. Hard links: it takes no room until the step is
        pruned here."""
        self.wait()
        self.dist.on_main(lambda: _copy(max(found for found in _steps(self.folder) if found[0] == step)[2], folder))

    def load(self, saved: Saved, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place, plain or DTensor, whatever the number of ranks was; each rank reads its shards only.

        Raises InputError if their names, shapes or types are not those of `saved`.
        """
        for name in sorted(saved.tensors.keys() | tensors.keys()):
            kinds = [_kind(known.get(name)) for known in (saved.tensors, tensors)]
            if kinds[0] != kinds[1]:
                message = f"tensor {name}: expected {kinds[1]}, found {kinds[0]}; use --restart-from"
                raise InputError(f"{saved.folder}: {message}")
        reader = dcp.HuggingFaceStorageReader(str(saved.folder))
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        targets = {name: tensor.detach() for name, tensor in tensors.items()}
        with torch.no_grad(), _failure_of_any_rank():
            dcp.load(targets, storage_reader=reader, planner=planner, **self._options)

    def close(self) -> None:
        """Wait, as `wait` does, and give the process group back."""
        self.wait()
        self._thread.shutdown()
        if self._group is not None:
            torch_dist.destroy_process_group(self._group)
            self._group = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        self._thread.shutdown()  # a state that is being written is worth the wait, whatever has happened
        if self._pending is not None and (failure := self._pending.exception()) is not None:
            logging.getLogger(__name__).warning("%s: state not saved: %s", self.folder, failure)


class _Writer(dcp.StorageWriter):
    """Storage of DCP: each rank writes folder/step_N.tmp/shard-R.safetensors, the coordinator all that follows."""

    def __init__(self, folder: Path, tree: dict[str, Any], rank: int, keep: int) -> None:
        self.folder, self.tree, self.rank, self.keep = folder, tree, rank, keep
        self.temporary = folder / f"step_{tree['step']}.tmp"

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Before any rank writes: a new folder."""
        if is_coordinator:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.tmp"):
                shutil.rmtree(left)
            self.temporary.mkdir()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """This rank's shards in one file; each result carries the manifest's entry of that file."""
        results = []
        if plan.items:
            name = f"shard-{self.rank}.safetensors"
            entry = _write(self.temporary / name, _safetensors(plan.items, planner))
            results = [WriteResult(item.index, entry["bytes"], (name, entry)) for item in plan.items]
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Once all ranks have written, on the coordinator: describe, rename, prune."""
        manifest = dict(result.storage_data for of_rank in results for result in of_rank)
        types = [(n, (DTYPES[m.properties.dtype], list(m.size))) for n, m in metadata.state_dict_metadata.items()]
        tree = self.tree | {"tensors": types}
        manifest["state.json"] = _write(self.temporary / "state.json", [json.dumps(tree).encode()])
        _write(self.temporary / "manifest.json", [json.dumps(manifest).encode()])
        fsync_dir(self.temporary)
        # A step saved twice gets a new name: replacing the old folder would leave an instant with neither.
        step = self.tree["step"]
        attempts = [a for s, a, _ in _steps(self.folder) if s == step]
        final = self.folder / (f"step_{step}.{max(attempts) + 1}" if attempts else f"step_{step}")
        os.rename(self.temporary, final)
        fsync_dir(self.folder)
        others = [path for _, _, path in _steps(self.folder) if path != final]
        for old in others[: max(0, len(others) + 1 - self.keep)]:
            shutil.rmtree(old)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do, as in the two methods below: a writer writes one step, as DCP's planner plans it."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See `reset`."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See `reset`."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by DCP itself."""
        return False


@contextmanager
def _failure_of_any_rank() -> Iterator[None]:
    """Raise the first rank's own error instead of the exception in which DCP hands it to all ranks."""
    try:
        yield
    except CheckpointException as failed:
        error, _ = failed.failures[min(failed.failures)]
        raise error from failed


def _share(tensors: dict[str, Tensor], dist: Distributed) -> dict[str, Tensor]:
    """What this rank copies and writes: its shards, and of the tensors that all ranks hold about an equal part."""
    share, loads = {}, [0] * dist.world
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        owner = dist.rank
        if not isinstance(tensor, DTensor):
            owner = loads.index(min(loads))
            loads[owner] += tensor.nbytes
        if owner == dist.rank:
            share[name] = tensor.detach()
    return share


def _check_json(value: Any, name: str) -> None:
    """TypeError naming the place of a value that would not come back from JSON as it was."""
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"TrainState.{name}: keys must be str, got {key!r}")
            _check_json(item, f"{name}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_json(item, f"{name}.{i}")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"TrainState.{name}: cannot store a {type(value).__name__}")


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "no such tensor"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _write(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
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


def _safetensors(items: list[WriteItem], planner: SavePlanner) -> Iterator[Any]:
    """The file's bytes, one tensor at a time: the library's own writer copies all, and hides ENOSPC in its error."""
    items = sorted(items, key=lambda item: -item.tensor_data.properties.dtype.itemsize)  # keeps all of them aligned
    offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in items}
    if len(offsets) != len(items):
        raise ValueError("a rank holds several shards of one tensor, which this format cannot name")
    # Keys and versions as HuggingFaceStorageReader wants them.
    about = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for item in items:
        dtype, shape, start = item.tensor_data.properties.dtype, list(item.tensor_data.chunk.sizes), end
        end += item.tensor_data.chunk.sizes.numel() * dtype.itemsize
        header[item.index.fqn] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for item in items:
        tensor = planner.resolve_data(item).detach().cpu().contiguous()
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _steps(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, attempt, path) of the renamed steps, oldest first."""
    if not folder.is_dir():
        return []
    matches = [(STEP.fullmatch(p.name), p) for p in folder.iterdir()]
    return sorted((int(m[1]), int(m[2] or 0), p) for m, p in matches if m)


def _copy(step: Path, folder: Path) -> None:
    """Make `step` the only one in `folder`, which has none or one at every instant."""
    final, temporary = folder / step.name, folder / f"{step.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    if not final.exists():
        shutil.copytree(step, temporary, copy_function=_link)
        fsync_dir(temporary)
        os.rename(temporary, final)
        fsync_dir(folder)
    for _, _, other in _steps(folder):
        if other != final:
            shutil.rmtree(other)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copyfile(source, target)  # a file system without links
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _damage(step: Path) -> str | None:
    """What is wrong with a step's files, or None."""
    try:
        manifest = json.loads((step / "manifest.json").read_bytes())
        for name, facts in ({"state.json": None} | manifest).items():
            if (step / name).stat().st_size != facts["bytes"] or hash_file(step / name) != facts["sha256"]:
                return f"{name} does not match its hash"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return str(error)
    except (ValueError, TypeError, KeyError) as error:
        return f"manifest.json: {error}"
    return None


def _newest(folder: Path) -> list[Any] | None:
    """[name, content of state.json] of the newest undamaged step."""
    for _, _, step in reversed(_steps(folder)):
        problem = _damage(step)
        if problem:
            logging.getLogger(__name__).warning("%s: damaged checkpoint passed over: %s", step, problem)
            continue
        tree = json.loads((step / "state.json").read_bytes())
        known = {f.name for f in fields(TrainState)}
        if set(tree) != known:
            names = ", ".join(sorted(set(tree) ^ known))
            raise InputError(f"{step}: written by another version (fields {names} differ); use --restart-from")
        return [step.name, tree]
    return None
