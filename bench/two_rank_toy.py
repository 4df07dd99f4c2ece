"""The whole toy world on two ranks and on one, from the same pretrained base: the same within the noise of seeds.

    python -m bench.two_rank_toy FOLDER [--output bench/results/two_rank_toy.json]

Runs the default demo in FOLDER/one and FOLDER/two (a finished run there is only read). Whatever is generated before the
first training on two ranks must have equal bytes; each number of the final evaluation may differ by no more than two
seeds do: the 95 % prediction interval (Student's t) from those in bench/results/toy_bounds.json. Exit code 1 if not.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from bench import kill_campaign, toy_bounds, two_ranks
from bench.forks import ROOT

OUTPUT = ROOT / "bench" / "results" / "two_rank_toy.json"
SEEDS = ROOT / "bench" / "results" / "toy_bounds.json"
STUDENT = 4.303  # 97.5 % quantile with the two degrees of freedom of three seeds
BEFORE = ("prompts.jsonl", "revisions.jsonl", "helpful.jsonl", "tokens/revisions.safetensors")


def measure(folder: Path) -> dict[str, Any]:
    """Both runs' numbers with the spread between seeds; "problems" is empty if all is well."""
    problems = []
    for ranks, name in ((1, "one"), (2, "two")):
        if not toy_bounds.finished(folder / name):
            code, text = two_ranks.torchrun(ranks, ["--run-dir", str(folder / name)])
            if code:
                raise RuntimeError(f"{name}: exit code {code}\n{text[-3000:]}")
    for file in BEFORE:
        if (folder / "one" / file).read_bytes() != (folder / "two" / file).read_bytes():
            problems.append(f"{file} differs")
    known = json.loads(SEEDS.read_text())["seeds"].values()
    one, two = (numbers(folder / name) for name in ("one", "two"))
    result = {}
    for name in one:
        noise = STUDENT * 2**0.5 * stdev([seed[name]["value"] for seed in known])
        result[name] = {"one": one[name], "two": two[name], "two_seeds_differ_by": round(noise, 4)}
        if abs(one[name] - two[name]) > noise:
            problems.append(f"{name}: {one[name]} on one rank, {two[name]} on two, more than {noise:.4f} apart")
    return {"problems": problems, "numbers": result}


def numbers(folder: Path) -> dict[str, float]:
    """What `toy_bounds` says of a run, bar times and the control experiment, which is another run."""
    rows = toy_bounds.bounds(folder, folder)
    return {name: row["value"] for name, row in rows.items() if "permuted" not in name and "seconds" not in name}


def main(argv: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    result = measure(arguments.folder)
    kill_campaign.write_result(arguments.output, "two_rank_toy", ["FOLDER"], result)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
