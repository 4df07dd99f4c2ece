"""python -m bench.gpu_suite [--minutes 8] [--out DIR] [--only NAME]: what a GPU has to tell us, as one JSON file.

Every section runs in a process of its own, because a CUDA error spoils its process, and in the order of importance
until the time is used up. Without a GPU: one line, exit code 0.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "transformers", "flash-attn", "liger-kernel")
SECTION_SECONDS = 150
MARK = "RESULT "


def sections() -> dict[str, Callable[[], dict[str, object]]]:
    """Name -> work, in the order of importance."""
    from bench import gpu_heads
    from bench.gpu_questions import QUESTIONS

    device = torch.device("cuda")
    shapes = {f"head H{w} V{v}": lambda w=w, v=v: gpu_heads.heads(w, v, device) for w, v in gpu_heads.HEADS}
    return {
        "fp32 output": lambda: gpu_heads.fp32_output(device),
        **QUESTIONS,
        **shapes,
        "small operations": lambda: gpu_heads.small_operations(device),
    }


def environment() -> dict[str, object]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_section(name: str, seconds: float) -> dict[str, object]:
    """One section in its own process: its result, or {"error": the end of what it printed}."""
    command = [sys.executable, "-m", "bench.gpu_suite", "--only", name]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:.0f} s"}
    result = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not result:
        return {"error": (done.stderr or done.stdout)[-2000:]}
    return {**json.loads(result[-1].removeprefix(MARK)), "wall seconds": round(time.monotonic() - start, 1)}


def show(name: str, result: dict[str, object]) -> None:
    print(f"\n## {name}")
    for key, value in result.items():
        print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting sections after this time")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON file")
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
    name = f"{report['device']}-{report['commit']}-{report['date']}".replace(" ", "_").replace(":", "")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    deadline = time.monotonic() + 60 * options.minutes
    for section in sections():
        left = deadline - time.monotonic()
        result = run_section(section, min(left, SECTION_SECONDS)) if left > 15 else {"skipped": "time used up"}
        report["sections"][section] = result
        show(section, result)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # what is known survives an interruption
    print(f"\n{path}")


if __name__ == "__main__":
    main()
