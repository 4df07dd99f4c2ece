"""python -m cai_fast.report RUN: make the report of a run anew. ... RUN_A RUN_B: show what differs between two runs.

With two runs the comparison is printed, and written to --output FILE.html or FILE.json. Reads the run folders' files
alone; no model is loaded. Exit code 2 for bad input.
"""

import argparse
import sys
from pathlib import Path

import torch

from cai_fast import report
from cai_fast.distributed import Distributed
from cai_fast.errors import InputError
from cai_fast.files import write_atomic
from cai_fast.report.compare import as_json, compare
from cai_fast.report.sections import as_html, as_text, sections
from cai_fast.rundir import RunDir
from cai_fast.runfiles import RunFiles


def main(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cai_fast.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", help="a run folder (A)")
    parser.add_argument("other", nargs="?", help="another one (B), to compare with the first")
    parser.add_argument("--output", help="one run: where it goes (default RUN/report.html); two: .html or .json")
    args = parser.parse_args(argv)
    try:
        return _compare(args.run, args.other, args.output) if args.other else _rebuild(args.run, args.output)
    except InputError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2


def _rebuild(folder: str, output: str | None) -> int:
    run = RunFiles(folder)
    page = report.build(run.root, run.config.report.samples)
    if output:
        _write(output, page)
    else:
        RunDir(run.root, run.config, Distributed(0, 1, torch.device("cpu"))).rewrite("report.html", page)
    print(f"Report: {output or run.root / 'report.html'}")
    return 0


def _compare(a: str, b: str, output: str | None) -> int:
    if output and Path(output).suffix not in (".html", ".json"):
        raise InputError(f"--output {output}: expected a name that ends in .html or .json")
    result = compare(RunFiles(a), RunFiles(b))
    found = sections(result)
    print(as_text(found), end="")
    if output:
        _write(output, as_html(found) if output.endswith(".html") else as_json(result))
        print(f"\nWritten: {output}")
    return 0


def _write(path: str, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
