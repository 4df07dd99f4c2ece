"""What a machine gives a plan: memory, speed, pages of the KV cache, and how long an engine's work takes on it.

The machine is this one, or the GPUs that `hardware` names, whose numbers come from tables: no GPU is needed then.

A packed pass takes 2 operations a weight and token (6 in training). A decode step reads every weight once, or is bound
by the product of the rows with the weights, and reads the keys and values of every row: the floor of engine speed.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cai_fast import distributed
from cai_fast.config_schema import nearest
from cai_fast.config_sections import EngineConfig, HardwareConfig
from cai_fast.distributed import PEAK_FLOPS
from cai_fast.engine.cache import WIDTH_STEP, round_up
from cai_fast.engine.pages import CUDA_PAGE, POOL_SHARE
from cai_fast.errors import InputError
from cai_fast.model import ModelConfig
from cai_fast.workload import Phase, Work

# Bytes per second from and to memory, from the data sheets.
PEAK_BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "GH200": 4.0e12, "A100": 2.04e12, "L40S": 8.64e11}
MEMORY = {"B200": 178, "H200": 139, "H100": 79, "GH200": 94, "A100": 79, "L40S": 44}  # GiB, as PyTorch reports it
# What packed passes reach of the highest speed of products, and decoding of its floor's: of a data sheet's numbers, and
# of measured ones, which are lower.
PACKED_SHARE, DECODE_SHARE = 0.4, 0.6
PACKED_OF_MEASURED, DECODE_OF_MEASURED = 0.5, 0.65
MEASURED_S = 0.05  # for each of two numbers


@dataclass(frozen=True)
class Machine:
    """Equal devices, one a rank."""

    kind: str
    """cuda or cpu."""
    count: int
    memory: int
    """Bytes of one device: of a CPU's memory, the rank's share."""
    name: str = ""
    """Key of the tables, where the machine is only assumed."""

    def __str__(self) -> str:
        what = self.name or {"cuda": "GPU of this machine", "cpu": "process on this machine"}[self.kind]
        assumed = ", assumed" if self.name else ""
        return f"{self.count} x {what}, {self.memory / 2**30:.3g} GiB each{assumed}"


def machine(hardware: HardwareConfig, device: str) -> Machine:
    """What a run with `model.device` = device has here, or what is assumed; InputError for a GPU in no table."""
    started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    count, here = hardware.count or started, hardware.count or distributed.ranks_on_node()
    if hardware.gpu:
        if hardware.gpu not in MEMORY:
            known = ", ".join(sorted(MEMORY))
            raise InputError(
                f"hardware.gpu = {hardware.gpu!r} is in no table.{nearest(hardware.gpu, MEMORY)} Known: {known}."
            )
        if device == "cpu":
            raise InputError(f"hardware.gpu = {hardware.gpu} and model.device = cpu exclude each other: leave one out.")
        return Machine("cuda", count, MEMORY[hardware.gpu] * 2**30, hardware.gpu)
    if device != "cpu" and torch.cuda.is_available():
        return Machine("cuda", count, torch.cuda.mem_get_info()[1])
    return Machine("cpu", count, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here)


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second at best, where these numbers come from, and the shares of them to expect."""

    flops: float
    bandwidth: float
    source: str
    packed_share: float = PACKED_SHARE
    decode_share: float = DECODE_SHARE

    def packed(self, operations: float) -> float:
        """Seconds of training, scoring or prefill."""
        return operations / (self.flops * self.packed_share)

    def decode(self, steps: float, weights: float, operations: float, cached: float) -> float:
        """Seconds of `steps` that each read `weights` bytes for `operations`, and of reading `cached` bytes in all."""
        floor = steps * max(weights / self.bandwidth, operations / self.flops) + cached / self.bandwidth
        return floor / self.decode_share

    def __str__(self) -> str:
        return (
            f"Speed: {self.flops / 1e12:.3g} TFLOP/s and {self.bandwidth / 1e9:.4g} GB/s, {self.source}.\n"
            f"Time assumes {self.packed_share:.0%} of that in packed passes and {self.decode_share:.0%} in decoding, "
            "and nothing for the exchange between ranks."
        )


def sheet(name: str) -> Rates:
    """Speeds of a GPU that is not here."""
    return Rates(PEAK_FLOPS[name], PEAK_BANDWIDTH[name], f"from the data sheet of {name}, not measured")


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Speeds of a device that is here, as measured in a tenth of a second; of a known GPU at most the data sheet's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    size = 4096 if device.type == "cuda" else 512
    # Not constants: a GPU draws less power for them and runs faster.
    a, b, c = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
    product = _fastest(lambda: torch.mm(a, b, out=c), device)
    source = torch.zeros(2**26 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    flops, bandwidth = 2 * size**3 / product, 2 * source.nbytes / copy
    where = f"measured just now on {name or 'this CPU'} by a product of {size} x {size} matrices and a copy"
    part = max((part for part in PEAK_FLOPS if part in name), key=len, default="")  # GH200 is no H200
    if part:
        flops, bandwidth = min(flops, PEAK_FLOPS[part]), min(bandwidth, PEAK_BANDWIDTH[part])
        where += f" (data sheet: {PEAK_FLOPS[part] / 1e12:.3g} and {PEAK_BANDWIDTH[part] / 1e9:.4g})"
    return Rates(flops, bandwidth, where, PACKED_OF_MEASURED, DECODE_OF_MEASURED)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes at best."""
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < MEASURED_S:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True)
class Pool:
    """The KV cache of one engine."""

    paged: bool
    pages: int
    """Slots, where not `paged`."""
    size: int
    """Tokens a page."""
    page_bytes: int
    rows: int
    """Requests at once, at most."""
    shared: int = 0
    """Pages full of few-shot blocks, held once for all requests."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, with the one that padding rows write to."""
        return (self.pages + self.paged) * self.page_bytes

    def own(self, tokens: int, block: int) -> int:
        """Pages that a request of `tokens` needs besides the full ones of its few-shot block."""
        return -(-tokens // self.size) - block // self.size

    def running(self, phase: Phase) -> int:
        """Requests of a phase that run at once; at least one."""
        fit = (self.pages - self.shared) // self.own(phase.tokens, phase.block) if self.paged else self.rows
        return max(1, min(self.rows, phase.at_once, fit))

    def used(self, work: Work) -> int:
        """Pages in use at once, at most: those of the blocks, and of as many requests as run."""
        own = [self.running(p) * self.own(p.tokens, p.block) for p in work.phases if p.requests]
        return min(self.pages, self.shared + max(own, default=0))


def token_bytes(model: ModelConfig, width: int) -> int:
    """Bytes of the keys and values of one token."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * width


def page_size(engine: EngineConfig, model: ModelConfig, room: int, cuda: bool) -> int:
    """Tokens a page of an engine for requests of `room`; 0: it has slots. As `engine.pages.plan_cache` decides."""
    if engine.page_size >= 0:
        return engine.page_size
    windowed = model.max_window is not None and model.max_window < room
    return CUDA_PAGE if cuda and not windowed else 0


def pool(engine: EngineConfig, model: ModelConfig, width: int, work: Work, free: int | None) -> Pool:
    """The cache of one engine for `work`. free: bytes of the GPU that are not taken when it is made; None on a CPU."""
    rows, per_token = engine.max_batch, token_bytes(model, width)
    if not work.phases:  # an engine that only scores has no cache
        return Pool(False, 0, 1, per_token, rows)
    size = page_size(engine, model, work.room, free is not None)
    if not size:
        positions = round_up(work.room, WIDTH_STEP)
        return Pool(False, rows, positions, positions * per_token, rows)
    count = rows * -(-work.room // size)
    if engine.num_pages:
        count = engine.num_pages
    elif free is not None:
        count = min(count, max(0, int(POOL_SHARE * free)) // (size * per_token))
    shared = sum(block // size for block in work.blocks) if any(phase.block for phase in work.phases) else 0
    return Pool(True, count, size, size * per_token, rows, shared)


def seconds(work: Work, cache: Pool, params: int, width: int, rate: Rates) -> float:
    """Time of an engine's work with a model of `params` weights of `width` bytes."""
    total = rate.packed(2 * params * work.prefill)
    per_token = cache.page_bytes // cache.size
    for phase in work.phases:
        total += _decode_seconds(phase, cache, params, width, per_token, rate)
    return total


def _decode_seconds(phase: Phase, cache: Pool, params: int, width: int, per_token: int, rate: Rates) -> float:
    running = cache.running(phase)
    sampled = phase.requests * phase.new
    cached = sampled * (phase.context + phase.new / 2) * per_token
    return rate.decode(sampled / running, params * width, 2 * params * running, cached)
