"""One rank of tests/test_heartbeat.py: python heart_worker.py ACTION FOLDER, with torchrun's environment."""

import itertools
import os
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import sharded
import torch.distributed as torch_dist

from cai_fast import distributed, fit, heartbeat, train
from cai_fast.errors import InputError


def stall() -> None:
    """Rank 1 sleeps in its sample until somebody has noticed, then for ever; rank 0 waits, and gives up."""
    heartbeat.INTERVAL = 0.05
    d = distributed.init("cpu", timeout_s=2, stall_s=1)
    d.barrier()
    heartbeat.at("rl: sampling", "prompt p17")
    if d.rank == 1:
        while d.heartbeat._reported < 0:
            time.sleep(0.01)
        threading.Event().wait()
    d.barrier()


def hang(folder: Path) -> None:
    """Rank 1 sleeps for ever before a pass of a sharded model, for which rank 0 waits in the middle of its own."""
    heartbeat.INTERVAL = 0.05
    d = distributed.init("cpu", timeout_s=3)
    calls, together = itertools.count(1), fit.together

    def counted(sharded_model: bool) -> AbstractContextManager[None]:
        if next(calls) == 4 and d.rank == 1:
            threading.Event().wait()
        return together(sharded_model)

    fit.together = counted
    sharded.sft(folder, d)


def lose(how: str, folder: Path) -> int:
    """Rank 1 ends in one of several ways while rank 0 waits for it."""

    def run(cfg: Any, dist: distributed.Distributed) -> None:
        heartbeat.at("sft", f"step {dist.rank + 12}")
        dist.barrier()
        if dist.rank == 1:
            time.sleep(heartbeat.INTERVAL * 1.5)  # until it is known where this rank is
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"bug": KeyError("planted"), "input": InputError("only rank 1 sees this")}[how]
        dist.barrier()

    train._run = run
    distributed.Distributed.on_main = lambda self, work: []  # nothing to check
    return train.main(["--run-dir", str(folder)])


def leave() -> None:
    """Everything is done, while a thread is still in a call of the communication library."""
    d = distributed.init("cpu")
    own = torch_dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def go_on() -> None:
        while True:
            own.add("x", 1)

    threading.Thread(target=go_on, daemon=True).start()
    d.barrier()
    distributed.shutdown()
    print("all is done")
    train._end(0)


if __name__ == "__main__":
    if sys.argv[1] == "leave":
        leave()
    elif sys.argv[1] == "stall":
        stall()
    elif sys.argv[1] == "hang":
        hang(Path(sys.argv[2]))
    else:
        sys.exit(lose(sys.argv[1], Path(sys.argv[2])))
