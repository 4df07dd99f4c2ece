"""What a device gives a plan: speed, pages of the KV cache, and how long an engine's work takes on it.

A packed pass takes 2 operations a weight and token (6 in training). A decode step reads every weight once, or is bound
by the product of the rows with the weights, and reads the keys and values of every row: the floor of engine speed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cai_fast.config_sections import EngineConfig
from cai_fast.distributed import PEAK_FLOPS
from cai_fast.engine.cache import WIDTH_STEP, round_up
from cai_fast.engine.pages import CUDA_PAGE, POOL_SHARE
from cai_fast.model import ModelConfig
from cai_fast.workload import Phase, Work

# Bytes per second from and to memory, from the data sheets.
PEAK_BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "GH200": 4.0e12, "A100": 2.04e12, "L40S": 8.64e11}
PACKED_SHARE, DECODE_SHARE = 0.4, 0.6  # of the peaks that packed passes reach, and of its floor's speed that decoding
MEASURED_S = 0.05  # for each of two numbers


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second at best, and where these numbers come from."""

    flops: float
    bandwidth: float
    source: str

    def packed(self, operations: float) -> float:
        """Seconds of training, scoring or prefill."""
        return operations / (self.flops * PACKED_SHARE)

    def decode(self, steps: float, weights: float, operations: float, cached: float) -> float:
        """Seconds of `steps` that each read `weights` bytes for `operations`, and of reading `cached` bytes in all."""
        floor = steps * max(weights / self.bandwidth, operations / self.flops) + cached / self.bandwidth
        return floor / DECODE_SHARE

    def __str__(self) -> str:
        return (
            f"Speed: {self.flops / 1e12:.3g} TFLOP/s and {self.bandwidth / 1e9:.4g} GB/s, {self.source}.\n"
            f"Time assumes {PACKED_SHARE:.0%} of that in packed passes and {DECODE_SHARE:.0%} in decoding."
        )


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Speeds of a GPU by its name; of another device as measured, in a tenth of a second."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [part for part in PEAK_FLOPS if part in name]
    if known:
        part = max(known, key=len)  # GH200 is no H200
        return Rates(PEAK_FLOPS[part], PEAK_BANDWIDTH[part], f"the data sheet of {part}")
    size = 4096 if device.type == "cuda" else 512
    a, b, c = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    product = _fastest(lambda: torch.mm(a, b, out=c), device)
    source = torch.zeros(2**26 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    where = f"measured just now on {name or 'this CPU'} by a product of {size} x {size} matrices and a copy"
    return Rates(2 * size**3 / product, 2 * source.nbytes / copy, where)


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
