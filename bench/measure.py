"""Timing that is fair to every contestant: interleaved rounds, rotated order, medians."""

import itertools
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

GIGA = 1e9


class Times(NamedTuple):
    """Milliseconds."""

    median: float
    p10: float
    p90: float
    first: float
    """The very first call, compilation included."""
    rounds: tuple[float, ...] = ()
    """Every round's."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cuda":
        start = clock()
        work()
        return (clock() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleaved(
    works: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 20,
    seconds: float = 4.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time the works in turn, in rotated order, for `rounds` rounds or until `seconds` are over (at least 3 rounds).

    clock: on a CPU; of works with one thread `time.process_time` does not count the turns of other processes.
    """
    firsts, samples = {}, {name: [] for name in works}
    for name, work in works.items():
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        firsts[name] = (time.perf_counter() - start) * 1e3
    names, deadline = list(works), time.perf_counter() + seconds
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(_once(works[name], device, clock))
        if number >= 2 and time.perf_counter() > deadline:
            break
    result = {}
    for name, values in samples.items():
        low, middle, high = torch.tensor(values).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        result[name] = Times(middle, low, high, firsts[name], tuple(values))
    return result


def extra_memory(work: Callable[[], object], device: torch.device) -> float | None:
    """MiB allocated at the peak of `work` beyond what is held before it, results included."""
    if device.type != "cuda":
        return _profiled_memory(work)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _profiled_memory(work: Callable[[], object]) -> float:
    """CPU: the highest sum of torch's allocations so far, from the profiler's record of each."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library reports every start and stop otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sums = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(sums, default=0) / 2**20


def capture(work: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, float]:
    """A CUDA graph of `work`, and the seconds that the capture alone took."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, start = torch.cuda.CUDAGraph(), time.perf_counter()
    with torch.cuda.graph(graph):
        work()
    return graph, time.perf_counter() - start


def summary(times: dict[str, Times]) -> dict[str, dict[str, float]]:
    return {name: {k: round(v, 4) for k, v in t._asdict().items() if k != "rounds"} for name, t in times.items()}
