"""Runs of train.py in processes that can be killed, each forked from one parent that has imported everything.

Importing PyTorch takes longer than a small run does, so a hundred kills would be a hundred imports. The parent only
imports: it computes nothing and so has no threads that a fork could lose.
"""

import gc
import importlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
POLL, STARTER_POLL = 0.002, 0.02  # seconds
SIGNALS = {"kill": signal.SIGKILL, "torn": signal.SIGKILL, "term": signal.SIGTERM}


@dataclass(frozen=True)
class Fault:
    """At its `call`-th call (from 1) of `target`, "module:Class.function", the process signals itself.

    how: "kill" before the call; "term" before the call, which then goes on; "torn" after half a line, for a target
    that is a method of Journal.
    """

    target: str
    call: int = 1
    how: str = "kill"


@dataclass(frozen=True)
class Run:
    """How a run ended: exit code (-9: killed), all it printed, and how long it took."""

    code: int
    text: str
    seconds: float


class Forks:
    """The parent process; a context manager. One run at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-m", "bench.forks"], cwd=ROOT, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def run(self, words: Sequence[str], *, fault: Fault | None = None, kill_after: float | None = None,
            program: str = "cai_fast.train") -> Run:  # fmt: skip
        """`main(WORDS)` of a module, train.py's by default, in a process of its own, with a fault built in or killed
        after some seconds."""
        with tempfile.NamedTemporaryFile("r", suffix=".log", encoding="utf-8", errors="replace") as output:
            job = {"words": list(words), "fault": fault and asdict(fault), "after": kill_after, "output": output.name,
                   "program": program}  # fmt: skip
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the process that starts runs has ended (exit code {self.process.wait()})")
            return Run(text=output.read(), **json.loads(answer))

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def arm(fault: Fault) -> None:
    """Build the fault into this process."""
    module, _, path = fault.target.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == fault.call:
            if fault.how == "torn":
                args[0]._file.write(b'{"id": "torn')
            os.kill(os.getpid(), SIGNALS[fault.how])
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def _child(job: dict[str, Any], replies: int) -> None:
    """Become the run; never returns."""
    os.close(replies)
    os.setpgid(0, 0)  # a Ctrl-C at the terminal is for the campaign
    output = os.open(job["output"], os.O_WRONLY | os.O_TRUNC)
    for stream, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(source, stream)
    if job["fault"]:
        arm(Fault(**job["fault"]))
    try:
        code = importlib.import_module(job["program"]).main(job["words"])
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking down the interpreter with all its imports would last longer than many a run


def _wait(pid: int, after: float | None, began: float) -> int:
    """The child's exit code, negative for a signal; kills it `after` so many seconds. Without that, a child whose
    starter is gone, which closes this process's stdin, is told to stop."""
    while after is not None and time.monotonic() - began < after:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL)
    while after is None and not select.select([sys.stdin], [], [], STARTER_POLL)[0]:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
    os.kill(pid, signal.SIGTERM if after is None else signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve() -> None:
    """Start the runs that stdin asks for, one JSON object a line, and answer each with one line."""
    from cai_fast import config

    for name in ("train", "pipeline", "preflight", *(f"stages.{stage}" for stage in config.STAGES)):
        importlib.import_module(f"cai_fast.{name}")
    for name in ("AutoTokenizer", "LlamaConfig", "PreTrainedTokenizerFast"):
        getattr(importlib.import_module("transformers"), name)  # which is when transformers imports it
    gc.freeze()  # else a child's first garbage collection copies the parent's memory
    replies = os.dup(1)
    for line in sys.stdin:
        job, began = json.loads(line), time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(job, replies)
        code = _wait(pid, job["after"], began)
        os.write(replies, (json.dumps({"code": code, "seconds": time.monotonic() - began}) + "\n").encode())


if __name__ == "__main__":
    serve()
