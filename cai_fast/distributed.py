"""Ranks: process group, reductions, a shared work counter, and the agreement to stop.

The only reader of torchrun's environment. With one process there is no process group and every call is local, so
`python cai_fast/train.py` needs no environment. Methods marked "collective" must be called by all ranks.
"""

import json
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as torch_dist

# Now, because its functions have for a default the group that exists at its import. PyTorch imports it sooner or later;
# a group kept like that outlives `shutdown` with its threads, and these may abort the process at its very end.
import torch.distributed.nn
from torch import Tensor

from cai_fast.errors import InputError
from cai_fast.heartbeat import Heartbeat, here, waiting

TIMEOUT_S = 3600  # longer than any work that only rank 0 does (hashing or saving a checkpoint)
MARGIN = timedelta(seconds=60)  # by which a collective call outlasts the heartbeat, which knows what to say
POLL = 0.05  # seconds
# What gloo, NCCL and the store say when another process is gone.
LOST = re.compile(r"connection (closed|reset|refused|was likely closed)|broken pipe|timed? ?out|remote process|aborted|"
                  r"failed to recv", re.IGNORECASE)  # fmt: skip
GRAD_BUCKET = 64 * 2**20  # elements
# Dense bf16 operations per second, from the data sheets.
PEAK_FLOPS = {"B200": 2.25e15, "H200": 9.89e14, "H100": 9.89e14, "GH200": 9.89e14, "A100": 3.12e14, "L40S": 3.62e14}

_signals: dict[str, int] = {}  # the last stop signal received by this process; written by the handler only
_joined: list["Distributed"] = []  # what `init` made and `shutdown` ends


class Stopped(SystemExit):
    """Raised by a stage at a safe point after SIGTERM or Ctrl-C, once its state is on disk. Exit code 143."""

    def __init__(self, message: str = "stopped by a signal; run the same command again to continue"):
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        return self.message


class RankLost(RuntimeError):
    """Another rank is gone, so this one cannot go on. The message names it, as far as it is known."""


@dataclass
class Distributed:
    """This process among `world` processes. `device` is where its model lives. `store` is for this attempt of the
    ranks; `launch` outlives the restarts of one torchrun."""

    rank: int
    world: int
    device: torch.device
    store: torch_dist.Store | None = None
    launch: torch_dist.Store | None = None
    heartbeat: Heartbeat | None = None
    timeout: timedelta = timedelta(seconds=TIMEOUT_S) + MARGIN  # of collective calls
    counters: dict[str, int] = field(default_factory=dict)
    names: int = 0  # given by `fresh`

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Collective."""
        self.all_reduce(torch.zeros(1))  # on the CPU: a NCCL barrier would have to guess the device

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Collective: `sum`, `max` or `min` over ranks, in place; returns the tensor."""
        reduce_op = {"sum": torch_dist.ReduceOp.SUM, "max": torch_dist.ReduceOp.MAX, "min": torch_dist.ReduceOp.MIN}[op]
        if self.world > 1:
            with waiting():
                torch_dist.all_reduce(tensor, op=reduce_op)
        return tensor

    def all_reduce_sum(self, values: Any) -> Any:
        """Collective: sum of floats in fp64, given and returned as a dict (same keys on all ranks) or a list."""
        if isinstance(values, dict):
            names = sorted(values)  # ranks may have inserted the keys in different orders
            sums = dict(zip(names, self.all_reduce_sum([values[name] for name in names]), strict=True))
            return {name: sums[name] for name in values}
        return self.all_reduce(torch.tensor([float(v) for v in values], dtype=torch.float64)).tolist()

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Collective: `value` of rank `src` (JSON only; other ranks' argument is ignored)."""
        if self.world == 1:
            return json.loads(json.dumps(value))  # the same conversions (tuple to list) as with more ranks
        data = json.dumps(value).encode() if self.rank == src else b""
        size = torch.tensor([len(data)])
        with waiting():
            torch_dist.broadcast(size, src)
            buffer = torch.zeros(int(size), dtype=torch.uint8)
            if self.rank == src:
                buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            torch_dist.broadcast(buffer, src)
        return json.loads(buffer.numpy().tobytes())

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Collective: run `work` on rank 0 and give its JSON result, InputError or Stopped to every rank."""
        if self.world == 1:
            return work()
        return _results([self.broadcast_object(_outcome(work) if self.is_main else {})])[0]

    def gather_objects(self, work: Callable[[], Any]) -> list[Any]:
        """Collective: run `work` on every rank and give all JSON results, by rank, to every rank; or an InputError or
        Stopped of one of them, so that no rank waits for one that has given up."""
        data = json.dumps(_outcome(work)).encode()
        sizes = self.all_reduce_sum([len(data) if rank == self.rank else 0 for rank in range(self.world)])
        buffers = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
        buffers[self.rank][: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if self.world > 1:
            with waiting():
                torch_dist.all_gather(buffers, buffers[self.rank].clone())
        return _results([json.loads(b[: int(n)].numpy().tobytes()) for b, n in zip(buffers, sizes, strict=True)])

    def share(self, count: int, work: Callable[[int], Any]) -> list[Any]:
        """Collective: `work(number)` for number = 0 ... count - 1, each done by the rank that is free first; all JSON
        results in the order of the numbers, on every rank.

        After an InputError of one rank or a stop signal nobody begins another number, and all ranks raise: that
        error, or Stopped.
        """
        name = self.fresh("share")

        def mine() -> list[tuple[int, Any]]:
            done = []
            try:
                while (number := self.next_item(name)) < count:
                    done.append((number, work(number)))
                    if stop_requested():
                        break
            finally:
                self.add(name, count)  # whoever leaves early leaves nothing for the others
            return done

        found = dict(item for by_rank in self.gather_objects(mine) for item in by_rank)
        if self.stop_agreed():
            raise Stopped
        if missing := [number for number in range(count) if number not in found]:
            raise RuntimeError(f"{len(missing)} of {count} shared pieces of work were lost, e.g. number {missing[0]}")
        return [found[number] for number in range(count)]

    def fresh(self, name: str) -> str:
        """A name for a counter that was never used; ranks that ask equally often get the same one."""
        self.names += 1
        return f"{name}/{self.names}"

    def next_item(self, name: str) -> int:
        """0, 1, 2, ... over all ranks together; not collective. Use a new `name` for every list of work items."""
        return self.add(name, 1) - 1

    def add(self, name: str, count: int) -> int:
        """The new value of a counter that all ranks share, `count` more than it was; not collective."""
        if self.store is not None:
            return self.store.add(f"cai_fast/{name}", count)
        self.counters[name] = self.counters.get(name, 0) + count
        return self.counters[name]

    def first(self, name: str) -> bool:
        """Is this the first rank that asks for `name`? Not collective; for what one rank should do or say."""
        try:
            return self.add(f"first/{name}", 1) == 1
        except torch_dist.DistError:  # the store is gone: nobody else will speak either
            return True

    def done_before(self, name: str) -> bool:
        """Has an attempt before this one, of the same torchrun, called `mark_done`? Not collective."""
        if self.launch is None:
            return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        return self.launch.check([f"cai_fast/done/{name}"])

    def mark_done(self, name: str) -> None:
        """Later attempts of the same torchrun need not do this again."""
        if self.launch is not None:
            self.launch.set(f"cai_fast/done/{name}", "")

    def lost(self, error: RuntimeError) -> str:
        """If `error` is that another rank is gone: one line saying which, as far as that is known; else nothing."""
        text = " ".join(str(error).split())
        if self.heartbeat is None or not LOST.search(text):
            return ""
        if not isinstance(error, torch_dist.DistError) and "gloo" not in text.lower():
            return ""
        place = here()
        return f"rank {self.rank} lost {self.heartbeat.lost()}; it was itself in {place} ({text[:200]})"

    def all_reduce_grads(self, grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        """Collective: sums of the params' gradients over ranks (loss scales are global, so the sum is the gradient).

        Summed in fp32 whatever their types; fp32 ones are overwritten. A rank without a gradient counts as zero; one
        that no rank has stays None, because an optimizer treats None and zero differently (weight decay). In a world
        of one the gradients come back as they are.
        """
        if self.world == 1:
            return list(grads)
        used = self.all_reduce(torch.tensor([g is not None for g in grads], dtype=torch.uint8), "max").tolist()
        result: list[Tensor | None] = [None] * len(used)
        pending = [i for i, flag in enumerate(used) if flag]
        while pending:
            bucket, elements = [], 0
            while pending and elements < GRAD_BUCKET:
                elements += params[pending[0]].numel()
                bucket.append(pending.pop(0))
            for i in bucket:
                given = grads[i]
                result[i] = torch.zeros_like(params[i], dtype=torch.float32) if given is None else given.float()
            flat = self.all_reduce(torch.cat([result[i].reshape(-1) for i in bucket]))
            for i, summed in zip(bucket, flat.split([params[i].numel() for i in bucket]), strict=True):
                result[i].copy_(summed.view_as(result[i]))
        return result

    def stop_agreed(self) -> bool:
        """Collective: has any rank been asked to stop? With one process this reads a flag."""
        if self.world == 1:
            return stop_requested()
        return bool(self.all_reduce(torch.tensor([int(stop_requested())]), "max").item())


def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
    """The result of `work`, or how it ended, as JSON."""
    try:
        return {"result": work()}
    except InputError as error:
        return {"error": str(error)}
    except Stopped as stop:
        return {"stopped": stop.message}


def _results(outcomes: list[dict[str, Any]]) -> list[Any]:
    """The ranks' results, or the first error of any of them, raised on each."""
    for outcome in outcomes:
        if "error" in outcome:
            raise InputError(outcome["error"])
    for outcome in outcomes:
        if "stopped" in outcome:
            raise Stopped(outcome["stopped"])
    return [outcome["result"] for outcome in outcomes]


def init(device: str = "auto", *, timeout_s: int = TIMEOUT_S, stall_s: int = 0) -> Distributed:
    """Join torchrun's processes, or be a world of one. `device`: auto, cpu, cuda. Others: see `Heartbeat`."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device)
    timeout = timedelta(seconds=timeout_s)
    # torchrun hosts a store that outlives its workers. Without it rank 0 is the host, and no restart sees the old one.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    launch = _connect(timeout, host=rank == 0 and not hosted) if world > 1 or hosted else None
    dist = Distributed(rank, world, place, launch=launch if hosted else None, timeout=timeout + MARGIN)
    if world > 1:
        attempt = f"cai_fast/{_attempt(launch, rank, world, timeout_s)}"
        dist.store = torch_dist.PrefixStore(attempt, launch)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        torch_dist.init_process_group(
            backend, store=dist.store, rank=rank, world_size=world, timeout=dist.timeout
        )  # fmt: skip
    own = torch_dist.PrefixStore(attempt, _connect(MARGIN)) if world > 1 else None
    dist.heartbeat = Heartbeat(rank, world, own, stall_s, timeout_s)
    _joined.append(dist)
    return dist


def ranks_on_node() -> int:
    """How many processes torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _device(device: str) -> torch.device:
    """The device that `model.device` means on this rank."""
    use_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if not use_cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"model.device = {device}: this machine has no usable CUDA GPU; use auto or cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise InputError(f"local rank {index} has no GPU: {torch.cuda.device_count()} found; lower --nproc-per-node")
    place = torch.device("cuda", index)
    torch.cuda.set_device(place)
    # Partial sums of a long reduction, such as the head's over the vocabulary, stay in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return place


def _connect(timeout: timedelta, host: bool = False) -> torch_dist.TCPStore:
    """A connection to the ranks' store, which this process makes if it is the `host`."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch_dist.TCPStore(address, port, is_master=host, timeout=timeout, wait_for_workers=False)


def _attempt(store: torch_dist.Store, rank: int, world: int, timeout_s: float) -> str:
    """Collective: a name for this attempt of the ranks; the store may hold keys of earlier ones.

    torchrun's count of restarts is no such name: with several nodes it may differ between them. So rank 0 makes one
    up, and answers every other rank that uses it; a rank that has read the name of a dead rank 0 gets no answer.
    """
    give_up = time.monotonic() + timeout_s

    def wait(key: str) -> None:
        if time.monotonic() > give_up:
            raise TimeoutError(f"rank {rank} of {world} has waited {timeout_s:g} s for the others to start ({key})")
        time.sleep(POLL)

    own = uuid.uuid4().hex
    if rank == 0:
        store.set("cai_fast/attempt", own)
        for other in range(1, world):
            key = f"cai_fast/{own}/rank {other}"
            while not store.check([key]):
                wait(key)
            store.set(f"cai_fast/{own}/{store.get(key).decode()}", "")
        return own
    while True:
        name = store.get("cai_fast/attempt").decode()
        store.set(f"cai_fast/{name}/rank {rank}", own)
        if store.check([f"cai_fast/{name}/{own}"]):
            return name
        wait(f"cai_fast/{name}/rank 0")


def training_mfu(parameters: float, tokens_per_s: float, dist: Distributed) -> dict[str, float]:
    """{"perf/mfu": share of the GPUs' dense bf16 peak that 6 operations per parameter and token are}; {} if unknown."""
    name = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    return {} if peak is None else {"perf/mfu": 6.0 * parameters * tokens_per_s / (peak * dist.world)}


def shutdown(error: BaseException | None = None) -> None:
    """Leave the other ranks. `error`: why, if not because all is done, in which case this is collective."""
    while _joined:
        dist = _joined.pop()
        why = "" if error is None else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        dist.heartbeat.stop(why)
        if dist.world > 1:
            try:
                if error is None:
                    dist.barrier()  # a rank that leaves early may take the store with it
            finally:
                torch_dist.destroy_process_group()


def _on_signal(number: int, frame: FrameType | None) -> None:
    _signals["stop"] = number
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C interrupts at once


def install_signal_handlers() -> None:
    """SIGTERM and the first Ctrl-C only set a flag; stage loops look at it through `stop_agreed`."""
    _signals.clear()
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)


def stop_requested() -> bool:
    """Has this process received a stop signal?"""
    return "stop" in _signals


def global_moments(values: Tensor, weights: Tensor | None, dist: Distributed) -> tuple[Tensor, Tensor]:
    """Collective: weighted mean and population variance over all ranks, as fp64 scalars.

    values[N], weights[N] (None = ones); N may differ between ranks and be 0. Two passes, so that a mean far from zero
    costs the variance no digits.
    """
    x = values.detach().double()
    w = torch.ones_like(x) if weights is None else weights.detach().double()
    total, count = dist.all_reduce(torch.stack([(w * x).sum(), w.sum()])).unbind()
    count = count.clamp_min(torch.finfo(torch.float64).tiny)  # no weight anywhere: mean 0, variance 0
    mean = total / count
    variance = dist.all_reduce((w * (x - mean).square()).sum()) / count
    return mean, variance
