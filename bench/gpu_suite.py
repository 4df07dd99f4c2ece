"""python -m bench.gpu_suite [--minutes 8] [--out DIR] [--only NAME]: what a GPU has to tell us, as one JSON file.

Correctness first (the tests marked `gpu`), then engine, operations and single questions in the order of importance,
until the time is used up. Every section runs in a process of its own, because a CUDA error spoils its process. Without
a GPU: one line, exit code 0.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench import bench_gpu_engine
from bench.chart import draw
from bench.contest import Contest, measure, table
from bench.environment import RESULTS, ROOT, environment

SECTION_SECONDS, CHECK_SECONDS = 150, 300  # the checks compile every kernel
CONTEST_SECONDS = 4.0
MARK = "RESULT "


def check() -> dict[str, object]:
    """The tests that need a GPU: what follows means little if they fail, and says so."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr[-500:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "summary": lines[-1], "failed": failed}


def contest_section(contests: Iterable[Contest], device: torch.device) -> dict[str, object]:
    """Results by contest name; printed after each contest, so that running out of time loses none."""
    results: dict[str, object] = {}
    for contest in contests:
        results[contest.name] = measure(contest, device, CONTEST_SECONDS)
        print(MARK + json.dumps({"contests": results}), flush=True)
    return {"contests": results}


def engine_section(parts: Iterable[tuple[str, dict[str, object]]]) -> dict[str, object]:
    """The measurements of a section of bench_gpu_engine, printed as they come."""
    results: dict[str, object] = {}
    for name, found in parts:
        results[name] = found
        print(MARK + json.dumps({"parts": results}), flush=True)
    return {"parts": results}


def sections() -> dict[str, Callable[[], dict[str, object]]]:
    """Name -> work, in the order of importance."""
    from bench import ops_block, ops_decode, ops_head, ops_preference
    from bench.gpu_questions import QUESTIONS

    device = torch.device("cuda")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as in training, for all contestants

    def head(size: str, compile: bool) -> Callable[[], dict[str, object]]:
        return lambda: contest_section(ops_head.contests("gpu", device, compile=compile, sizes=[size]), device)

    measured = bench_gpu_engine.sections(["1b", "8b"], device)
    engine = [(f"engine {name}", lambda work=work: engine_section(work())) for name, work in measured.items()]
    goals, peers = dict(engine[:3]), dict(engine[3:])
    heads = {f"head {size}": head(size, " N8192" in size) for size in ops_head.SIZES["gpu"]}
    first = {name: work for name, work in heads.items() if " N8192" in name}
    groups = {"preference and gae": ops_preference, "decode": ops_decode, "block and optimizer": ops_block}
    return {
        "correctness": check,
        **goals,
        **first,
        **{n: lambda g=g: contest_section(g.contests("gpu", device), device) for n, g in groups.items()},
        **peers,
        "fp32 output": lambda: ops_head.fp32_output(device),
        **heads,
        **QUESTIONS,
    }


def run_section(name: str, seconds: float) -> dict[str, object]:
    """One section in its own process: its result, or as much as it had when the time was up, and {"error": ...}."""
    command = [sys.executable, "-m", "bench.gpu_suite", "--only", name]
    start, trouble = time.monotonic(), ""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        output = done.stdout
        if done.returncode or MARK not in output:
            trouble = (done.stderr or output)[-2000:]
    except subprocess.TimeoutExpired as stopped:
        # What a stopped process had printed comes as bytes, whatever was asked for.
        output, trouble = (stopped.stdout or b"").decode(), f"stopped after {seconds:.0f} s"
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    result = json.loads(lines[-1].removeprefix(MARK)) if lines else {}
    return {**result, **({"error": trouble} if trouble else {}), "wall seconds": round(time.monotonic() - start, 1)}


def show(name: str, result: dict[str, object]) -> None:
    print(f"\n# {name}")
    for contest in result.get("contests", {}).values():
        print(table(contest))
    for part, found in result.get("parts", {}).items():
        print(bench_gpu_engine.line(part, found))
    for key, value in result.items():
        if key not in ("contests", "parts"):
            print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting sections after this time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the chart")
    parser.add_argument("--only", help="run this section in this process and print its result")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu_suite: no CUDA GPU here, nothing to measure.")
        return
    if options.only:
        if options.only not in sections():
            parser.error(f"unknown section {options.only!r}; sections: {', '.join(sections())}")
        print(MARK + json.dumps(sections()[options.only]()))
        return
    report: dict[str, object] = {**environment(), "sections": {}}
    name = f"gpu-{report['device']}-{report['commit']}-{report['date']}".replace(" ", "_").replace(":", "")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    deadline = time.monotonic() + 60 * options.minutes
    for section in sections():
        left = deadline - time.monotonic()
        limit = CHECK_SECONDS if section == "correctness" else SECTION_SECONDS
        result = run_section(section, min(left, limit)) if left > 15 else {"skipped": "time used up"}
        report["sections"][section] = result
        show(section, result)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # what is known survives an interruption
    parts = report["sections"].values()
    drawn = [result for part in parts if "contests" in part for result in part["contests"].values()]
    draw(drawn, f"{report['device']}, {report['date'][:10]}, commit {report['commit']}", path.with_suffix(".svg"))
    print(f"\n{path}\n{path.with_suffix('.svg')}")
    if not report["sections"]["correctness"].get("passed"):
        sys.exit("bench.gpu_suite: the correctness tests did not pass: distrust the times above.")


if __name__ == "__main__":
    main()
