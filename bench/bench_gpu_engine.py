"""python -m bench.bench_gpu_engine [--minutes 10] [--shapes 1b,8b] [--out DIR] [--only TEXT]: the engine on one GPU.

Models of the real shapes with random bf16 weights, made on the GPU. Decoding: milliseconds a step, sampling included,
over the engine's own loop. Generation: tokens a second against transformers' continuous batching on the same tensors.
Judging: comparisons a second behind a few-shot block against left-padded batches of whole questions. Times are set in
relation to the least that the device needs (shapes.py), speeds of peers to ours. Every measurement is printed and saved
as soon as it is made. Without a GPU: one line, exit code 0; --shapes tiny tries the program itself, on any device.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.contest import FAILURES
from bench.engine_work import TINY, Load, Parts, Place, Result, decoding, judging, throughput
from bench.environment import RESULTS, environment
from bench.shapes import SHAPES, ceilings

KINDS: dict[str, Callable[[Place], Parts]] = {"decode": decoding, "judging": judging, "throughput": throughput}
ORDER = ("decode 1b", "decode 8b", "judging 8b", "throughput 1b", "throughput 8b", "judging 1b")
"""The most important first."""


def section(name: str, device: torch.device) -> Parts:
    """The measurements of one section, each made when it is asked for."""
    kind, shape = name.split()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    load = TINY if shape == "tiny" else Load()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as in training, for all contestants
    return KINDS[kind](Place(SHAPES[shape], load, device, dtype, ceilings(device, dtype)))


def sections(shapes: list[str], device: torch.device) -> dict[str, Callable[[], Parts]]:
    """Every section of these shapes by name."""
    names = [name for name in (*ORDER, *(f"{kind} tiny" for kind in KINDS)) if name.split()[1] in shapes]
    return {name: partial(section, name, device) for name in names}


def guarded(work: Callable[[], Parts]) -> Parts:
    """The measurements of a section; if it cannot go on, say for want of memory for its model, the last one says so."""
    try:
        yield from work()
    except FAILURES as error:
        yield "the section", {"failed": f"{type(error).__name__}: {error}"[:300]}


def line(name: str, found: Result) -> str:
    """A measurement for a person."""
    cells = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()]
    return f"{name}: {', '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_gpu_engine", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no measurement after this time")
    parser.add_argument("--shapes", default="1b,8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--out", type=Path, help="folder for the JSON file (default: bench/results, on a GPU)")
    parser.add_argument("--only", default="", help="sections whose name contains this text")
    options = parser.parse_args()
    shapes = options.shapes.split(",")
    if unknown := set(shapes) - set(SHAPES):
        parser.error(f"unknown shape {min(unknown)!r}; shapes: {', '.join(SHAPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and shapes != ["tiny"]:
        print("bench.bench_gpu_engine: no CUDA GPU here, nothing to measure.")
        return
    chosen = {name: work for name, work in sections(shapes, device).items() if options.only in name}
    run(chosen, device, options.out or (RESULTS if device.type == "cuda" else None), 60 * options.minutes)


def run(chosen: dict[str, Callable[[], Parts]], device: torch.device, folder: Path | None, seconds: float) -> None:
    """Print and save the measurements of these sections one by one, until the time is used up."""
    report = {**environment(), "kind": device.type, "goals": "for an H200", "sections": {}}
    if device.type == "cpu":
        report["device"] = "cpu"
    deadline = time.monotonic() + seconds
    for name, work in chosen.items():
        parts = report["sections"][name] = {}
        if time.monotonic() < deadline:
            print(f"\n# {name}", flush=True)
            for part, found in guarded(work):
                parts[part] = found
                print(line(part, found), flush=True)
                save(report, folder)
                if time.monotonic() > deadline:
                    break


def save(report: Result, folder: Path | None) -> None:
    """What is known so far, in a file that is this run's."""
    if folder is not None:
        name = f"gpu-engine-{report['device']}-{report['commit']}-{report['date']}".replace(" ", "_").replace(":", "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
