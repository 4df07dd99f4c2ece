"""TrainStates of two gloo ranks: sharded files, other numbers of ranks at loading, failures of one rank."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tiny import alone, tiny_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cai_fast import checkpoint
from cai_fast.batching import pack
from cai_fast.checkpoint import Checkpoints, TrainState
from cai_fast.distributed import Distributed
from cai_fast.model import Model
from cai_fast.optim import Optimizer

WORLD = 2


def uneven() -> torch.nn.Module:
    """bf16, with rows that two ranks cannot share evenly, and a parameter of which one rank has nothing."""
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Linear(7, 1)).to(torch.bfloat16)


def tensors_of(model: torch.nn.Module, optimizer: Optimizer, prefix: str = "") -> dict[str, Tensor]:
    tensors = {f"{prefix}model.{name}": p for name, p in model.named_parameters()}
    return tensors | {f"{prefix}optimizer.{name}": t for name, t in optimizer.state_dict().items()}


def build(shard: Callable[[torch.nn.Module], Any], value: float = 0.0) -> tuple[Model, Optimizer, dict[str, Tensor]]:
    """An fp32 and a bf16 model with optimizers, and a plain tensor of all ranks; `value` fills all state."""
    model, half = tiny_model(), uneven()
    for part in (*model.model.layers, model, half):
        shard(part)
    optimizer = Optimizer.adamw(model.named_parameters(), 0.01, weight_decay=0.1)
    tensors = tensors_of(model, optimizer) | tensors_of(half, Optimizer.adamw(half.named_parameters(), 0.01), "half.")
    tensors["plain"] = torch.zeros(3, dtype=torch.int64)
    if value:
        for t in tensors.values():
            local(t).fill_(value)
    return model, optimizer, tensors


def local(t: Tensor) -> Tensor:
    return (t.to_local() if isinstance(t, DTensor) else t).detach()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the global values. Collective."""
    full = {}
    for name, t in tensors.items():
        exact = t.detach().to(torch.int32 if t.dtype == torch.int16 else t.dtype)  # gloo gathers no int16
        exact = exact.full_tensor() if isinstance(exact, DTensor) else exact
        full[name] = exact.to(t.dtype, copy=True).contiguous()
    return full


def step(model: Model, optimizer: Optimizer, number: int) -> None:
    batch = pack([[(number + i * i) % 64 for i in range(10)]])
    model(batch, loss=lambda hidden, weight: hidden.square().mean() + weight.square().mean()).backward()
    optimizer.step()


def join(rank: int, folder: str) -> Distributed:
    torch.set_num_threads(1)
    store = torch_dist.FileStore(f"{folder}/store", WORLD)
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    return Distributed(rank, WORLD, torch.device("cpu"), store)


def resharding(rank: int, folder: str) -> None:
    """Train and save on two ranks, go on; load what one process saved, and what these two ranks did."""
    dist = join(rank, folder)
    model, optimizer, tensors = build(fully_shard)
    for number in range(2):
        step(model, optimizer, number)
    for name, t in tensors.items():
        if name.startswith("half.") or name == "plain":
            local(t).copy_(torch.arange(local(t).numel()).view(local(t).shape) + 10 * rank * isinstance(t, DTensor))
    before, moved = whole(tensors), threading.Event()
    real = checkpoint._write
    checkpoint._write = lambda *arguments: (moved.wait(60), real(*arguments))[1]
    with Checkpoints(f"{folder}/two", dist) as states:
        states.save(TrainState(2, 1, {"kl": 0.5}, tensors))
        for number in range(2, 5):  # with collectives of its own while the thread is in the middle of its
            step(model, optimizer, number)
            dist.barrier()
        after = whole(tensors)
        moved.set()
        saved = states.latest()
        assert (saved.step, saved.epoch, saved.extra) == (2, 1, {"kl": 0.5})
        model, optimizer, tensors = build(fully_shard, 9.0)
        states.load(saved, tensors)
    assert same(whole(tensors), before)
    for number in range(2, 5):
        step(model, optimizer, number)
    assert same(whole(tensors), after) and not same(before, after)
    with Checkpoints(f"{folder}/one", dist) as states:
        tensors = build(fully_shard, 9.0)[2]
        states.load(states.latest(), tensors)
    loaded = whole(tensors)
    if rank == 0:
        save_file(before, f"{folder}/before")
        save_file(loaded, f"{folder}/loaded")
    torch_dist.destroy_process_group()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.distributed
def test_states_move_between_one_and_two_ranks(tmp_path: Path) -> None:
    expected = build(lambda part: None, 3.0)[2]
    with Checkpoints(tmp_path / "one", alone()) as states:
        states.save(TrainState(tensors=expected))
    mp.spawn(resharding, (str(tmp_path),), nprocs=WORLD)
    assert same(load_file(tmp_path / "loaded"), whole(expected))
    with Checkpoints(tmp_path / "two", alone()) as states:
        tensors = build(lambda part: None, 9.0)[2]
        states.load(states.latest(), tensors)
    assert same(whole(tensors), load_file(tmp_path / "before"))
    shards = [load_file(tmp_path / "two" / "step_2" / f"shard-{rank}.safetensors") for rank in range(WORLD)]
    total = sum(t.nbytes for t in tensors.values())
    for shard in shards:
        assert sum(t.nbytes for t in shard.values()) < 0.6 * total, "each rank writes its own part only"
    assert sum(t.nbytes for shard in shards for t in shard.values()) == total, "nothing is written twice"


def failing(rank: int, folder: str) -> None:
    """Rank 1's disk is full at one of the writes, rank 0's at another; at last rank 1 is killed in a write."""
    dist = join(rank, folder)
    tensors = {f"{name}.{r}": torch.ones(5) for r in range(WORLD) for name in "ab"}
    written = {}
    for background in (False, True):
        root = Path(folder) / str(background)
        states = Checkpoints(root, dist, background=background)
        real_write = states._write
        states._write = lambda writer, share, real=real_write: (written.update(share), real(writer, share))[1]
        states.save(TrainState(1, tensors=tensors))
        states.wait()
        assert len(written) == 2, "copied is only what is written here"
        for broken, name in ((1, "shard-1.safetensors"), (0, "shard-0.safetensors"), (0, "manifest.json")):
            real = checkpoint._write

            def write(path: Path, chunks: Any, here: bool = rank == broken, bad: str = name, to: Any = real) -> Any:
                if here and path.name == bad:
                    path.write_bytes(b"half")
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                return to(path, chunks)

            checkpoint._write = write
            with pytest.raises(OSError, match=f"No space left.*{name}") as error:
                states.save(TrainState(2, tensors=tensors))
                states.wait()
            assert error.value.errno == errno.ENOSPC
            checkpoint._write = real
            assert states.latest().step == 1
            assert [p.name for p in root.iterdir()] == ["step_1"]
            dist.barrier()
        states.save(TrainState(3, tensors=tensors))
        states.close()
        assert [p.name for p in root.iterdir()] == ["step_3"]
        dist.barrier()
    states = Checkpoints(f"{folder}/True", dist, background=True)
    if rank == 1:
        checkpoint._write = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    states.save(TrainState(4, tensors=tensors))
    with pytest.raises(RuntimeError):
        states.wait()
    assert [p.name for p in Path(f"{folder}/True").iterdir()] == ["step_3"]


@pytest.mark.distributed
def test_a_full_disk_or_a_kill_on_one_rank_is_an_error_on_both(tmp_path: Path) -> None:
    ranks = [mp.get_context("spawn").Process(target=failing, args=(rank, str(tmp_path))) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, -signal.SIGKILL]
