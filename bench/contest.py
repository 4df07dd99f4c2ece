"""One operation at one size: contestants that do the same work on the same inputs, measured in turn in one process.

Every contestant is timed against the baseline of the same run (bare matrix products, or a copy of the bytes that must
move), and what it returns is compared with fp64: a fast wrong answer shows.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.measure import GIGA, Times, capture, extra_memory, interleaved

Outputs = dict[str, Tensor]
"""What a contestant computed. Names that start with d_ are gradients, whose error is relative: |error| / |exact| as
vectors. The error of anything else is its largest absolute one. A name that the exact result lacks is not compared."""
Work = Callable[[Any], Outputs | None]

OURS = "cai_fast"
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, NotImplementedError)
"""What a contestant that cannot do the work here may raise; it is named and skipped, the others go on."""
FLOORS = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12)}
"""Device name -> dense bf16 FLOP/s and bytes/s that a plain matrix product and a plain copy reach."""


class Absent(Exception):
    """A contestant is not here; the message says why."""


@dataclass(frozen=True)
class Contest:
    """`inputs` rotate, so that no contestant finds the last round's data in a cache; in a round all have the same."""

    op: str
    size: str
    inputs: Sequence[Any]
    works: dict[str, Work]
    baseline: str
    """Contestant whose time is the unit of all others."""
    exact: Callable[[Any], Outputs] | None = None
    """fp64 results of an input."""
    flops: float = 0.0
    bytes: float = 0.0
    """The least floating-point operations and memory traffic of the work."""
    results: dict[str, Callable[[], Outputs]] = field(default_factory=dict)
    """Contestant that works in place -> what its first call left."""
    absent: dict[str, str] = field(default_factory=dict)
    """Contestant -> why it takes no part."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.size}"


def gather(candidates: dict[str, Callable[[], Work]]) -> tuple[dict[str, Work], dict[str, str]]:
    """(works of the candidates that are here, why the others are not)."""
    works, absent = {}, {}
    for name, make in candidates.items():
        try:
            works[name] = make()
        except Absent as why:
            absent[name] = str(why)
    return works, absent


def compiled(work: Work) -> Callable[[], Work]:
    """A candidate: `work` through torch.compile."""
    return lambda: torch.compile(work, dynamic=False)


def graphed(work: Work, example: Any) -> Callable[[], Work]:
    """A candidate: `work` on one input, replayed as a CUDA graph, without what Python and the launches take."""

    def candidate() -> Work:
        if not torch.cuda.is_available():
            raise Absent("CUDA graphs need a GPU")
        graph, _ = capture(lambda: work(example))
        return lambda _: graph.replay()

    return candidate


def copying(size: float, device: torch.device) -> Work:
    """The baseline of an operation bound by memory: a copy that moves `size` bytes, half read and half written."""
    source = torch.zeros(max(1, int(size / 2)), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def work(_: Any) -> None:
        target.copy_(source)

    return work


def exact_by_rows(
    loss: Callable[[Tensor, Tensor, slice], Outputs],
    hidden: Tensor,
    weight: Tensor,
    differentiate: str,
    rows: int = 256,
) -> Outputs:
    """fp64 results of a head operation, some rows at a time; gradients of the output named `differentiate`, if any.

    loss(hidden[n, H], weight[V, H], rows) -> outputs of these rows; scalars are summed, vectors put end to end.
    """
    wide = weight.detach().double().requires_grad_(bool(differentiate))
    parts: list[Outputs] = []
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, min(start + rows, hidden.shape[0]))
        h = hidden.detach()[part].double().requires_grad_(bool(differentiate))
        outputs = loss(h, wide, part)
        if differentiate:
            outputs[differentiate].sum().backward()
            outputs["d_hidden"] = h.grad
        parts.append({name: value.detach() for name, value in outputs.items()})
    joined = {
        name: torch.stack([p[name] for p in parts]).sum() if value.dim() == 0 else torch.cat([p[name] for p in parts])
        for name, value in parts[0].items()
    }
    return joined | ({"d_weight": wide.grad} if differentiate else {})


def errors(outputs: Outputs | None, exact: Outputs) -> dict[str, float]:
    """Error of every output that the exact result has too."""
    found = {}
    for name, value in (outputs or {}).items():
        if name not in exact:
            continue
        difference = (value.detach().double() - exact[name]).nan_to_num(math.inf)
        if name.startswith("d_"):
            found[name] = (difference.norm() / exact[name].norm().clamp_min(1e-300)).item()
        else:
            found[name] = difference.abs().max().item() if difference.numel() else 0.0
    return found


def _rotating(work: Work, inputs: Sequence[Any]) -> Callable[[], object]:
    turns = itertools.cycle(inputs)
    return lambda: work(next(turns))


def known_ceilings(device: torch.device) -> tuple[float, float] | None:
    """The entry of FLOORS for a device, None where there is none."""
    name = torch.cuda.get_device_properties(device).name if device.type == "cuda" else ""
    return next((limits for part, limits in FLOORS.items() if part in name), None)


def _floor(contest: Contest, device: torch.device) -> float | None:
    """Milliseconds that the device needs at least, None where its ceilings are not known."""
    known = known_ceilings(device)
    return max(contest.flops / known[0], contest.bytes / known[1]) * 1e3 if known else None


def measure(
    contest: Contest,
    device: torch.device,
    seconds: float,
    rounds: int = 20,
    memory: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Errors, times and (unless switched off) memory of every contestant; who fails is left out and named."""
    missing, works, found = dict(contest.absent), dict(contest.works), {}
    exact = None if contest.exact is None else contest.exact(contest.inputs[0])
    for name, work in contest.works.items():
        try:
            outputs = work(contest.inputs[0])
            outputs = contest.results[name]() if name in contest.results else outputs
        except FAILURES as error:
            missing[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            del works[name]
            continue
        found[name] = {} if exact is None else errors(outputs, exact)
    del exact
    calls = {name: _rotating(work, contest.inputs) for name, work in works.items()}
    times = interleaved(calls, device, seconds=seconds, rounds=rounds, clock=clock)
    unit, floor = times[contest.baseline].median, _floor(contest, device)
    rows = {
        name: _row(times[name], unit, floor, extra_memory(call, device) if memory else None, found[name])
        for name, call in calls.items()
    }
    return {
        "op": contest.op, "size": contest.size, "baseline": contest.baseline, "floor ms": floor,
        "GFLOP": contest.flops / GIGA, "MB": contest.bytes / 1e6, "contestants": rows, "missing": missing,
    }  # fmt: skip


def _row(
    times: Times, unit: float, floor: float | None, memory: float | None, error: dict[str, float]
) -> dict[str, Any]:
    return {
        **{name: round(getattr(times, name), 5) for name in ("median", "p10", "p90", "first")},
        "rounds": [round(value, 3) for value in times.rounds],
        "ratio": round(times.median / unit, 4),
        "share of floor": None if floor is None else round(floor / times.median, 4),
        "extra MiB": None if memory is None else round(memory, 2),
        "errors": error,
    }


def table(result: dict[str, Any]) -> str:
    """What `measure` returned, for a person."""
    lines = [
        f"\n## {result['op']}, {result['size']}   ({result['GFLOP']:.3g} GFLOP, {result['MB']:.3g} MB at least)",
        f"{'':26} {'ms':>10} {'p10':>10} {'p90':>10} {'/' + result['baseline']:>16} {'of floor':>9} "
        f"{'extra MiB':>10} {'error':>9} {'gradient':>9}",
    ]
    for name, row in result["contestants"].items():
        value = max((e for n, e in row["errors"].items() if not n.startswith("d_")), default=None)
        gradient = max((e for n, e in row["errors"].items() if n.startswith("d_")), default=None)
        lines.append(
            f"{name:26} {row['median']:10.3f} {row['p10']:10.3f} {row['p90']:10.3f} {row['ratio']:16.3f} "
            f"{_cell(row['share of floor'], '9.3f')} {_cell(row['extra MiB'], '10.1f')} {_cell(value, '9.1e')} "
            f"{_cell(gradient, '9.1e')}"
        )
    return "\n".join(lines + [f"{name:26} not measured: {why}" for name, why in result["missing"].items()])


def _cell(value: float | None, form: str) -> str:
    width = form.partition(".")[0]
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"
