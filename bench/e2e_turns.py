"""Two programs in turns: the peer's own training loop sets the pace, and after each of its steps ours does the same
work. What is compared is a pair of neighbouring steps on the same tokens, so that a slow minute slows both."""

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.e2e_load import Work
from bench.measure import synchronize

TOLERANCE = {"cpu": 2e-4, "cuda": 2e-2}
"""How far results may lie apart: losses relatively, probabilities absolutely. fp32 on both sides of a CPU with other
orders of summation and a few optimizer steps; bf16 on a GPU, which the sides round at other places."""


class Done(NamedTuple):
    """What a side says it did in one step."""

    tokens: int
    """Tokens that a loss was computed on, or that were sampled, or that were asked about."""
    loss: float | None = None
    probabilities: list[float] | None = None


class Seconds(NamedTuple):
    wall: float
    cpu: float


Step = Callable[[Work], Done]


class Clock:
    """Wall time and this process's CPU time between `start` and `stop`; waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        synchronize(self.device)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Seconds:
        synchronize(self.device)
        return Seconds(time.perf_counter() - self._wall, time.process_time() - self._cpu)


class Differs(Exception):
    """The two sides did not do the same work."""


@dataclass
class Turns:
    """Called by the peer at the end of each of its steps; `ours` then takes its turn, outside the peer's time.

    The first `warmup` pairs are checked, not timed. Without `ours` only the peer is there (its memory is wanted).
    """

    device: torch.device
    warmup: int
    rounds: int
    ours: Step | None = None
    floor: Step | None = None
    """The bare matrix products of a work; they take a third turn."""
    works: list[Work] = field(default_factory=list)
    peer_seconds: list[Seconds] = field(default_factory=list)
    our_seconds: list[Seconds] = field(default_factory=list)
    floor_seconds: list[Seconds] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Relative difference of the losses, or largest one of probabilities, of every pair."""
    memory: "Memory | None" = None

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)

    @property
    def steps(self) -> int:
        """How many the peer must do."""
        return self.warmup + self.rounds

    def start(self) -> None:
        """The peer is about to take its first step."""
        self.clock.start()

    def __call__(self, work: Work, theirs: Done) -> None:
        taken, number = self.clock.stop(), len(self.works)
        if number >= self.steps:
            return
        self.works.append(work)
        turns = [(self.ours, self.our_seconds), (self.floor, self.floor_seconds)]
        for step, seconds in turns:
            if step is None:
                continue
            if hasattr(step, "prepare"):
                step.prepare(work)  # what a stage does once, before its first step
            self.clock.start()
            mine = step(work)
            own = self.clock.stop()
            if step is self.ours:
                self.gaps += compare(mine, theirs, TOLERANCE[self.device.type])
            if number >= self.warmup:
                seconds.append(own)
        if number >= self.warmup:
            self.tokens.append(theirs.tokens)
            self.peer_seconds.append(taken)
        if number == self.warmup - 1 and self.memory is not None:
            self.memory.reset()
        self.clock.start()


def compare(mine: Done, theirs: Done, tolerance: float) -> list[float]:
    """The gap between both results, if they can be compared; Differs where the work was not the same, or the gap is
    above the tolerance."""
    if mine.tokens != theirs.tokens:
        raise Differs(f"expected equal work, found {mine.tokens} tokens on our side and {theirs.tokens} on the peer's")
    gaps = []
    if mine.loss is not None and theirs.loss is not None:
        gaps.append(abs(mine.loss - theirs.loss) / max(abs(theirs.loss), 1e-12))
        if not gaps[-1] <= tolerance:
            raise Differs(f"expected equal losses, found {mine.loss} on our side and {theirs.loss} on the peer's")
    if mine.probabilities is not None and theirs.probabilities is not None:
        pairs = zip(mine.probabilities, theirs.probabilities, strict=True)
        gaps.append(max(abs(a - b) for a, b in pairs))
        if not gaps[-1] <= tolerance:
            raise Differs(f"expected equal probabilities, found a difference of {gaps[-1]}")
    return gaps


def ratios(peer: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as long the peer takes: the median, the least and the greatest of neighbouring steps."""
    each = [a / b for a, b in zip(peer, ours, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def rate(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Tokens a second over all steps."""
    return sum(tokens) / sum(seconds)


class Memory:
    """The most memory of this process since `reset`, in MiB: resident on a CPU, allocated by torch on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = resident("VmRSS")
        """Resident before the first model was made: what the imports take."""

    def reset(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts afresh

    def peak(self) -> dict[str, float]:
        if self.device.type == "cuda":
            return {"peak": torch.cuda.max_memory_allocated(self.device) / 2**20, "imports": 0.0}
        return {"peak": resident("VmHWM"), "imports": self.before}


def resident(name: str) -> float:
    """A field of this process's status in MiB; where there is none, the greatest resident size so far."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    found = [int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":")]
    return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(turns: Turns) -> dict[str, Any]:
    """Numbers of one stage."""
    sides = {"peer": turns.peer_seconds, "ours": turns.our_seconds, "floor": turns.floor_seconds}
    wall = {name: [s.wall for s in seconds] for name, seconds in sides.items()}
    cpu = {name: [s.cpu for s in seconds] for name, seconds in sides.items()}
    own = cpu if turns.device.type == "cpu" else wall  # CPU time does not count the turns of other processes
    return {
        "tokens": turns.tokens,
        "tokens/s": {name: rate(turns.tokens, seconds) for name, seconds in wall.items()},
        "seconds": wall,
        "cpu seconds": cpu,
        "ratio": ratios(wall["peer"], wall["ours"]),
        "ratio of cpu time": ratios(cpu["peer"], cpu["ours"]),
        "floor ratio": ratios(wall["peer"], wall["floor"]),
        "share of floor": ratios(own["floor"], own["ours"])["median"],
        "largest gap": max(turns.gaps, default=None),
        "checked": len(turns.works),
    }
