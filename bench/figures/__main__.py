"""The command: do the jobs, then make the figures whose jobs are done. Exit code 1 if one is missing."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench.figures
from bench.environment import environment
from bench.figures import feedback, page, ratings, reinforcement, stats, supervised
from bench.figures.figure import Figure, draw
from bench.figures.graph import Suite
from bench.figures.world import FULL, QUICK, TINY, Results, World
from cai_fast import config
from cai_fast.errors import InputError
from cai_fast.files import write_atomic
from cai_fast.pipeline import TOY

SIZES = {"full": FULL, "quick": QUICK, "tiny": TINY}
EVERY = {f.name: f for module in (supervised, feedback, ratings, reinforcement) for f in module.FIGURES}


def worlds(name: str, seeds: int, sizes: str) -> list[World]:
    """One per seed; the configuration must be usable."""
    chosen = str(Path(name).resolve()) if name.endswith(".toml") else name
    cfg = config.load(["--config", chosen])
    return [World(seed, SIZES[sizes], chosen, cfg.model.base == TOY) for seed in range(seeds)]


def make(figure: Figure, results: Sequence[Results], made: dict[str, Any], out: Path) -> dict[str, Any]:
    """Evaluate one figure and write its JSON and SVG; `made`: by which command, and where."""
    found = stats.rounded(figure.evaluate(results))
    result = {
        "figure": figure.name, **made, "seeds": [r.world.seed for r in results],
        "commits": sorted(set.union(*(r.commits(figure.jobs(r.world)) for r in results))),
        "ended": [text for r in results for job in figure.jobs(r.world) if (text := r.ended(job))],
        "claims": found["claims"], "panels": found["panels"],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    if found["panels"]:
        draw(page.texts()[figure.name]["title"], found["panels"], out / f"{figure.name}.svg")
    write_atomic(out / f"{figure.name}.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def report(result: dict[str, Any]) -> str:
    """A figure's findings as lines."""
    lines = [result["figure"]]
    for c in result["claims"]:
        seeds = [round(seed["mean"], 3) for seed in c["estimate"]["seeds"]] if "estimate" in c else ""
        lines.append(f"  {c['verdict']:18} {c['claim']} {seeds}")
    return "\n".join(lines)


def given(options: argparse.Namespace) -> str:
    """What was typed, without folders of this machine."""
    only = "" if options.only == ",".join(page.ORDER) else f" --only {options.only}"
    size = f" --{options.sizes}" if options.sizes else ""
    config = "" if options.config == TOY else f" --config {Path(options.config).name}"
    return f"python -m bench.figures{only} --seeds {options.seeds}{size}{config}"


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.figures", description=bench.figures.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", default=",".join(page.ORDER), help="figures to make")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this, less one")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="sizes", const="quick", help="at most an hour on two cores")
    size.add_argument("--tiny", action="store_const", dest="sizes", const="tiny", help="see that everything runs")
    parser.add_argument("--config", default=TOY, help="preset or TOML file")
    parser.add_argument("--folder", type=Path, default=Path("runs/figures"), help="runs and what is measured of them")
    parser.add_argument("--out", type=Path, help="folder of the figures; unless the toy world is measured in full or "
                        "--quick, a folder beside the runs, so that what FIGURES.md is made of stays")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args(argv)
    if options.out is None:
        ours = options.config == TOY and options.sizes != "tiny"
        options.out = page.RESULTS if ours else options.folder / "figures"
    if min(options.seeds, options.jobs) < 1:
        parser.error(f"--seeds and --jobs must be at least 1; got {options.seeds} and {options.jobs}")
    return parser, options


def main(argv: Sequence[str]) -> int:
    """Do what the command line says; returns the exit code."""
    parser, options = parse(argv)
    names = [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in names if name not in EVERY]:
        parser.error(f"no figure is called {unknown[0]!r}; there are {', '.join(page.ORDER)}")
    try:
        chosen = worlds(options.config, options.seeds, options.sizes or "full")
    except InputError as error:
        parser.error(str(error))
    # Before the first figure is written, which would make the checkout differ from its commit.
    made = {"command": given(options), "environment": environment()}
    suite = Suite(options.folder, made["environment"]["commit"])
    failed = suite.run([job for name in names for world in chosen for job in EVERY[name].jobs(world)], options.jobs)
    missing = 0
    for name in names:
        jobs = [job for world in chosen for job in EVERY[name].jobs(world)]
        if broken := [job.name for job in jobs if suite.result(job) is None]:
            missing += 1
            print(f"{name}: not made; {broken[0]}: {failed.get(broken[0], 'not done')}")
            continue
        try:
            print(report(make(EVERY[name], [Results(suite, world) for world in chosen], made, options.out)))
        except stats.Nothing as reason:
            missing += 1
            print(f"{name}: not made; {reason}")
    if options.out == page.RESULTS:
        write_atomic(page.PAGE, page.page(page.load()))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
