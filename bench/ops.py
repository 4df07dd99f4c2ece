"""python -m bench.ops [--scale cpu|gpu] [--only TEXT] [--seconds S] [--out DIR] [--no-compile]: every operation of
cai_fast.kernels against what else there is, as a table, a JSON file and a chart.

On a GPU `python -m bench.gpu_suite` measures the same and more, after checking correctness.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import ops_block, ops_decode, ops_head, ops_preference
from bench.chart import draw
from bench.contest import Contest, measure, table
from bench.environment import RESULTS, environment

GROUPS = {"head": ops_head, "preference": ops_preference, "decode": ops_decode, "block": ops_block}


def contests(scale: str, device: torch.device, *, compile: bool = True) -> Iterator[Contest]:
    """All contests at the sizes of `scale`, made one after the other, so that only one's data are in memory."""
    for group in GROUPS.values():
        yield from group.contests(scale, device, compile=compile)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.partition("\n\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--scale", choices=("tiny", "cpu", "gpu"), default="gpu" if on_gpu else "cpu",
        help="sizes; tiny only tries the machinery, its times say nothing",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="contests whose name contains this text")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per contest, after the first calls")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the chart")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it compiles for minutes)")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads, the same for all; more than the free cores mislead"
    )
    options = parser.parse_args()
    if options.threads < 1 or not options.seconds >= 0:
        parser.error(f"--threads must be >= 1 and --seconds >= 0, got {options.threads} and {options.seconds}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as in training, for all contestants
    device = torch.device("cuda" if on_gpu else "cpu")
    report = {**environment(), "scale": options.scale, "contests": []}
    part = "" if (options.scale, options.only) == ("gpu" if on_gpu else "cpu", "") else "-part"  # never over the whole
    path = options.out / f"ops-{report['device'] if on_gpu else 'cpu'}{part}.json".replace(" ", "_")
    seen: list[str] = []
    for contest in contests(options.scale, device, compile=not options.no_compile):
        seen.append(contest.name)
        if options.only.lower() not in contest.name.lower():
            continue
        report["contests"].append(measure(contest, device, options.seconds))
        print(table(report["contests"][-1]), flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # survives an interruption
    if not report["contests"]:
        parser.error(f"no contest's name contains {options.only!r}; there are: {', '.join(seen)}")
    where = report["device"] if on_gpu else f"{report['device']}, {options.threads} thread(s)"
    title = f"{where}, torch {report['versions']['torch']}, {report['date'][:10]}, commit {report['commit']}"
    draw(report["contests"], title, path.with_suffix(".svg"))
    print(f"\n{path}\n{path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
