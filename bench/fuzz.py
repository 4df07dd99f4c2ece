"""Feed broken files and command lines to everything that reads a user's input.

    python -m bench.fuzz [--cases 10000] [--seed 0] [--only TARGET ...] [--output bench/results/fuzz.json]

A reader may take what it is given or answer with one InputError that names the file or the setting; an other exception,
a message without a name, a message of pages, or half a minute of silence is a problem. Exit code 1 if there is any.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from bench.kill_campaign import write_result
from bench.mutations import Special

LIMIT = 30  # seconds
LONGEST = 3000  # characters of a message
OUTPUT = Path(__file__).resolve().parent / "results" / "fuzz.json"


class Target(NamedTuple):
    """Something that reads input: `read(folder)` finds the broken `file` in its copy of the `seed` folder.

    With an empty `file` there is none: `read` gets what was drawn. A message may name one of `names` instead of the
    file.
    """

    seed: Path
    file: str
    broken: st.SearchStrategy[Any]
    read: Callable[[Any], Any]
    names: tuple[str, ...] = ()


class Hang(BaseException):
    """A reader that takes too long."""


class Problem(AssertionError):
    """A reader that answers in another way than with a result or one clear InputError."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises Hang, also out of a blocked system call, after LIMIT seconds."""

    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def place(target: Target, drawn: Any, folder: Path) -> Any:
    """What `read` gets: a fresh copy of the seed folder with the broken file, or the drawn thing itself."""
    if not target.file:
        return drawn
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(target.seed, folder)
    path = folder / target.file
    path.unlink(missing_ok=True)
    if isinstance(drawn, Special):
        drawn.make(path)
    else:
        path.write_bytes(drawn)
    return folder


def judge(target: Target, drawn: Any, folder: Path) -> str:
    """ "read" or "refused"; raises Problem."""
    from cai_fast.errors import InputError

    given_to = place(target, drawn, folder)
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(given_to)
    except InputError as error:
        message = str(error)
        if len(message) > LONGEST:
            raise Problem(f"a message of {len(message)} characters: {message[:200]}") from error
        names = (Path(target.file).name, *target.names) if target.file else target.names
        if not any(name in message for name in names):
            raise Problem(f"a message that names none of {names}: {message[:300]}") from error
        return "refused"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a library may raise anything, and a panic of Rust is no Exception
        trace, last = error.__traceback__, None
        while trace is not None:
            last, trace = trace, trace.tb_next
        where = f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last else ""
        raise Problem(f"{type(error).__name__}: {str(error)[:200]} at {where}") from error
    return "read"


def run(target: Target, cases: int, seed: int, *, collect: bool = False) -> Counter[str]:
    """About `cases` cases, the same for the same seed: how often each outcome came.

    A problem is raised with its smallest example, or with `collect` counted under its message.
    """
    outcomes: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    @hypothesis_seed(seed)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn=target.broken)
    def feed(drawn: Any) -> None:
        try:
            outcomes[judge(target, drawn, folder / "case")] += 1
        except Problem as problem:
            if not collect:
                raise
            outcomes[str(problem)] += 1

    try:
        feed()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without what libraries, some of them not in Python, print about broken files."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def campaign(folder: Path, cases: int, seed: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Every target with its share of the cases; what came out."""
    from bench.fuzz_targets import targets

    chosen = {name: target for name, target in targets(folder).items() if not only or name in only}
    result: dict[str, Any] = {"cases": 0, "targets": {}, "problems": []}
    for name, target in chosen.items():
        with silenced():
            outcomes = run(target, -(-cases // len(chosen)), seed, collect=True)
        problems = {text: count for text, count in outcomes.items() if text not in ("read", "refused")}
        counts = {"cases": outcomes.total(), "read": outcomes["read"], "refused": outcomes["refused"]}
        result["targets"][name] = counts
        result["cases"] += counts["cases"]
        result["problems"] += [f"{name}: {text} ({count} times)" for text, count in problems.items()]
        print(name, counts, *problems, sep="\n    " if problems else " ", flush=True)
    return result


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder), options.cases, options.seed, options.only)
    write_result(options.output, "fuzz", argv, {"seed": options.seed} | result)
    print(f"{result['cases']} cases, {len(result['problems'])} problems")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
