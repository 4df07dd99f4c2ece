"""Processes that are the ranks of a test: started with torchrun's environment, or by torchrun itself."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds, far more than anything here lasts


class Ended(NamedTuple):
    """Exit code and all that was printed."""

    code: int
    text: str


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Process:
    """A command whose output goes to a file; started in a session of its own. A context manager: killed at its end."""

    def __init__(self, words: Sequence[Any], **environment: str) -> None:
        self.output = tempfile.TemporaryFile("w+", errors="replace")
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment
        self.process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=env, stdout=self.output,
                                        stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    def wait(self) -> Ended:
        """How it ended."""
        code = self.process.wait(LIMIT)
        self.output.seek(0)
        return Ended(code, self.output.read())

    def workers(self) -> dict[int, int]:
        """Rank -> process of the workers of this torchrun."""
        found, pid = {}, self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            try:
                pairs = [p.partition("=") for p in Path(f"/proc/{child}/environ").read_text().split("\0")]
            except (FileNotFoundError, ProcessLookupError):
                continue
            values = {name: value for name, _, value in pairs}
            if "TORCHELASTIC_RESTART_COUNT" in values:
                found[int(values["RANK"])] = int(child)
        return found

    def until(self, ready: Callable[[], Any]) -> Any:
        """Wait for something true; the process must be running."""
        end = time.monotonic() + LIMIT
        while not (value := ready()):
            assert self.process.poll() is None, self.wait().text
            assert time.monotonic() < end, "it never happened"
            time.sleep(0.01)
        return value

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        for pid in [*(self.workers().values() if self.process.poll() is None else ()), self.process.pid]:
            if self.process.poll() is None:
                os.kill(pid, 9)
        self.process.wait()
        self.output.close()


def start(words: Sequence[Any], world: int = 2) -> list[Process]:
    """`python WORDS` as ranks 0 to world - 1."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [Process(words, RANK=str(rank), **common) for rank in range(world)]


def torchrun(flags: Sequence[Any], words: Sequence[Any]) -> Process:
    """`torchrun FLAGS train.py WORDS`."""
    return Process(["-m", "torch.distributed.run", *flags, "cai_fast/train.py", *words])
