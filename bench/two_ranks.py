"""The small run of every stage on one rank and on two, started by torchrun: what is equal, and how equal.

    python -m bench.two_ranks [--output bench/results/two_ranks.json]

Everything generated before RL must have equal bytes; training sums gradients in another order, so weights and metrics
may differ by rounding. The run on two ranks is also stopped by SIGTERM and killed on the way, and must end as the
undisturbed one on two ranks. Exit code 1 if not.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import kill_campaign
from bench.forks import ROOT

OUTPUT = ROOT / "bench" / "results" / "two_ranks.json"
GENERATED = ("prompts.jsonl", "revisions.jsonl", "helpful.jsonl", "comparisons.jsonl", "labels.jsonl",
             "tokens/revisions.safetensors", "tokens/comparisons.safetensors")  # fmt: skip
MODELS = ("sl_cai", "pm", "pm_eval", "rl_cai")
TOLERANCE = 1e-4
# A step takes several micro-batches, so that both ranks get some.
SPLIT = {"sft__micro_tokens": 200, "pm__micro_tokens": 300, "rl__micro_tokens": 200}


def torchrun(
    ranks: int, words: Sequence[str], *, signals: int = 0, ready: Callable[[], bool] = bool
) -> tuple[int, str]:
    """Exit code and output of `torchrun train.py WORDS`; sends `signals` once `ready()`, SIGKILL to every process."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    line += ["cai_fast/train.py", *words]  # standalone: on a free port, whoever else runs torchrun here
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        while signals and process.poll() is None and not ready():
            time.sleep(0.02)
        if signals == signal.SIGKILL and process.poll() is None:
            for child in _children(process.pid):
                os.kill(child, signals)
        if signals and process.poll() is None:
            process.send_signal(signals)
        code = process.wait()
        output.seek(0)
        return code, output.read()


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def model_gap(a: Path, b: Path) -> float:
    """Largest absolute difference of two checkpoints' weights."""
    from safetensors.torch import load_file

    mine, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return max(float((mine[name] - other[name]).abs().max()) for name in mine)


def metric_gap(a: Path, b: Path) -> float:
    """Largest difference of two runs' metrics, relative above 1; infinite where one lacks a value of the other."""
    mine, other = kill_campaign.metrics(a), kill_campaign.metrics(b)
    if [row.keys() for row in mine] != [row.keys() for row in other]:
        return math.inf
    pairs = [(x[name], y[name]) for x, y in zip(mine, other, strict=True) for name in x]
    numbers = [(v, w) for v, w in pairs if isinstance(v, float) and isinstance(w, float)]
    same = all(v == w for v, w in pairs if not (isinstance(v, float) and isinstance(w, float)))
    return max(abs(v - w) / max(1.0, abs(v)) for v, w in numbers) if same else math.inf


def measure(folder: Path) -> dict[str, Any]:
    """All runs, in `folder`, and what was seen; "problems" is empty if all is well."""
    kill_campaign.write_inputs(folder)
    one, two, broken = folder / "one", folder / "two", folder / "broken"
    problems = []
    for ranks, run in ((1, one), (2, two)):
        code, text = torchrun(ranks, kill_campaign.command(folder, run, **SPLIT))
        if code:
            raise RuntimeError(f"{ranks} ranks: exit code {code}:\n{text}")
    rows = {name: (one / name).read_bytes() == (two / name).read_bytes() for name in GENERATED}
    problems += [f"{name}: other bytes on two ranks" for name, same in rows.items() if not same]
    gaps = {name: model_gap(one / "checkpoints" / name, two / "checkpoints" / name) for name in MODELS}
    gaps["metrics"] = metric_gap(one, two)
    problems += [f"{name}: differs by {gap}" for name, gap in gaps.items() if not gap <= TOLERANCE]
    words = kill_campaign.command(folder, broken, **SPLIT)
    for number, name in ((signal.SIGTERM, "revise.[0-9]*.jsonl"), (signal.SIGKILL, "label.[0-9]*.jsonl"),
                         (signal.SIGTERM, "pm.state"), (signal.SIGKILL, "rl.state")):  # fmt: skip
        code, text = torchrun(2, words, signals=number, ready=lambda name=name: _begun(broken, name))
        said = text.count("Stopped by a signal")
        if code == 0 or said != (number == signal.SIGTERM):
            problems.append(
                f"{signal.Signals(number).name} at {name}: exit code {code}, said {said} times: {text[-500:]}"
            )
    code, text = torchrun(2, words)
    problems += [f"after the kills: exit code {code}: {text[-500:]}"] if code else []
    problems += [] if code else [f"after the kills: {line}" for line in kill_campaign.differences(broken, two)]
    return {"equal_bytes": rows, "largest_difference": gaps, "tolerance": TOLERANCE, "problems": problems}


def _begun(run: Path, name: str) -> bool:
    """Has the run written something that matches `name` in its journal folder?"""
    return any(path.is_dir() or path.stat().st_size for path in (run / "journal").glob(name))


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    kill_campaign.write_result(options.output, "two_ranks", argv, result)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
