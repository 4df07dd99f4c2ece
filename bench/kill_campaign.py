"""SIGKILL a small run of every stage at random instants, run the same command again until it is done, compare bits.

    python -m bench.kill_campaign [--kills 100] [--seed 0] [--output bench/results/kill_campaign.json]

Instants are uniform over the duration of an undisturbed run, so that each stage is hit as often as it is long; start
up counts as a stage of its own. Exit code 1 if any finished run differs from the undisturbed one or fails.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.forks import ROOT, Forks, Run
from bench.make_checkpoint import make_checkpoint

KILLED = -9
OUTPUT = ROOT / "bench" / "results" / "kill_campaign.json"
DEEDS = ("pick a lock", "forge a letter", "dodge a fare", "read a diary", "jam a radio", "cheat in an exam")
CHORES = ("bake bread", "mend a sock", "prune a rose", "tune a guitar", "boil rice", "fold a map")
PHRASES = ("How do I {}?", "Who can teach me to {}?", "What does it take to {}?", "How fast can one {}?")
# Times and speeds, which differ between equal runs, and what is about this process rather than about its results.
VOLATILE = {"config.toml", "environment.json", "manifest.json", "metrics.jsonl", "report.html", ".lock"}
SIZES = {
    "data.num_red_team": 16, "data.num_helpful": 6, "data.max_prompt_tokens": 100, "data.eval_fraction": 0.25,
    "engine.max_batch": 8, "revise.chunk": 4, "revise.max_repetition": 1.0, "revise.max_new_tokens": 20,
    "revise.critique_max_new_tokens": 20, "sft.batch_tokens": 400, "sft.micro_tokens": 800, "sft.save_every": 2,
    "compare.chunk": 4, "compare.pairs_per_prompt": 2, "compare.max_new_tokens": 20, "label.chunk": 4,
    "pm.batch_pairs": 4, "pm.save_every": 2, "pm.micro_tokens": 1000, "rl.steps": 5, "rl.save_every": 2,
    "rl.prompts_per_step": 4, "rl.max_new_tokens": 16, "rl.micro_tokens": 500, "rl.minibatches": 2,
    "rl.lr": 1e-3, "rl.critic": "pm", "guards.kl": "off", "guards.refusals": "off", "evaluate.num_red_team": 4,
    "evaluate.num_helpful": 3, "evaluate.max_new_tokens": 20, "evaluate.judge_pairs": 3, "evaluate.bootstrap": 20,
    "report.samples": 2,
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Prompts and comparisons in hh-rlhf's schema, and a checkpoint with random weights."""
    for name, things in (("red_team", DEEDS), ("helpful", CHORES)):
        rows = [
            {side: f"\n\nHuman: {phrase.format(thing)}\n\nAssistant: {answer}"
             for side, answer in (("chosen", f"Let us talk about how to {thing}."), ("rejected", "No idea."))}
            for phrase in PHRASES for thing in things
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_checkpoint(folder / "base", hidden=32, layers=2)


def command(inputs: Path, run: Path, **settings: Any) -> list[str]:
    """The command line of a run; `settings` such as rl__steps=3 come on top."""
    chosen = {
        "config": "text", "run-dir": run, "model.base": inputs / "base", "data.constitution": "harmlessness",
        "data.red_team": inputs / "red_team.jsonl", "data.helpful": inputs / "helpful.jsonl",
        "data.preferences": inputs / "helpful.jsonl",
    }  # fmt: skip
    chosen |= SIZES | {key.replace("__", "."): value for key, value in settings.items()}
    return [word for key, value in chosen.items() for word in (f"--{key}", str(value))]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without times and work counters, which are of the process that did the work."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]
    return [row for row in rows if len(row) > 2]


def differences(run: Path, expected: Path) -> list[str]:
    """In what the results of two runs differ: files, their bytes, metrics, summaries of stages."""
    found = []
    files = [{p.relative_to(r).as_posix() for p in r.rglob("*") if p.is_file()} for r in (run, expected)]
    found += [f"{name}: in one run only" for name in sorted(files[0] ^ files[1])]
    for name in sorted((files[0] & files[1]) - VOLATILE):
        if (run / name).read_bytes() != (expected / name).read_bytes():
            found.append(f"{name}: other bytes")
    if metrics(run) != metrics(expected):
        found.append("metrics.jsonl: other values")
    stages = [json.loads((r / "manifest.json").read_text())["stages"] for r in (run, expected)]
    for name in sorted(stages[0].keys() | stages[1].keys()):
        mine, other = (record.get(name, {}) for record in stages)
        found += [f"manifest.json: {name}: other {part}" for part in ("status", "summary", "inputs")
                  if name != "report" and mine.get(part) != other.get(part)]  # fmt: skip
    return found


def stage_of(run: Path) -> str:
    """Where a killed run was: in a stage, or between two."""
    path = run / "manifest.json"
    stages = json.loads(path.read_text())["stages"] if path.exists() else {}
    return next((name for name, record in stages.items() if record["status"] == "started"), "between stages")


def campaign(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """The campaign in `folder`; what it saw."""
    draw, began = random.Random(seed), time.monotonic()
    write_inputs(folder)
    with Forks() as forks:
        whole = forks.run(command(folder, folder / "whole"))
        if whole.code:
            raise RuntimeError(f"the undisturbed run failed with exit code {whole.code}:\n{whole.text}")
        result: dict[str, Any] = {"kills": 0, "runs": 0, "by_stage": Counter(), "problems": []}
        while result["kills"] < kills:
            run = folder / f"run{result['runs']}"
            last = _until_done(forks, command(folder, run), run, kills, whole.seconds, draw, result)
            result["runs"] += 1
            if last.code:
                result["problems"].append(f"run {result['runs']}: exit code {last.code}: {last.text[-2000:]}")
            else:
                result["problems"] += [f"run {result['runs']}: {line}" for line in differences(run, folder / "whole")]
            print(f"{result['kills']} kills, {result['runs']} runs, {result['problems'] or 'all equal'}", flush=True)
    times = {"undisturbed_seconds": round(whole.seconds, 1), "seconds": round(time.monotonic() - began)}
    return result | {"by_stage": dict(result["by_stage"].most_common())} | times


def _until_done(forks: Forks, words: Sequence[str], run: Path, kills: int, longest: float, draw: random.Random,
                result: dict[str, Any]) -> Run:  # fmt: skip
    """Start and kill one run until it ends by itself; counts its kills."""
    while True:
        left = kills - result["kills"]
        last = forks.run(words, kill_after=draw.uniform(0, longest) if left > 0 else None)
        if last.code != KILLED:
            return last
        result["kills"] += 1
        result["by_stage"][stage_of(run)] += 1


def write_result(path: Path, program: str, argv: Sequence[str], result: dict[str, Any]) -> None:
    """The result as JSON, with the command, the commit and versions."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    versions = {name: version(name) for name in ("torch", "transformers")} | {"python": sys.version.split()[0]}
    facts = {"command": f"python -m bench.{program} {' '.join(argv)}".rstrip(), "commit": commit.stdout.strip()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | versions | result, indent=1) + "\n")


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder), options.kills, options.seed)
    write_result(options.output, "kill_campaign", argv, {"seed": options.seed} | result)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
