"""Where this process is, told to the other ranks, so that a stalled or lost rank can be named.

The work only says where it is (`at`, `beat`, `waiting`: an assignment each). A thread publishes that in the ranks'
store, prints one table when this rank has stood still for long, and ends the process when it has waited too long for
the others.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as torch_dist

INTERVAL = 2.0  # seconds between publications
GRACE = 1.0  # seconds for other ranks to say that they have lost somebody too
FAILED = 1  # the exit code after a timeout; torchrun restarts after it


class Place(NamedTuple):
    """What a process does ("rl: sampling"), with which sample or step, and when it last moved."""

    phase: str
    item: str
    since: float  # time.monotonic()
    waiting: bool = False  # in a collective call, for the other ranks
    calls: int = 0  # collective calls begun so far: the same on all ranks, but for those behind

    def __str__(self) -> str:
        return f"{self.phase}, {self.item}" if self.item else self.phase


_here: list[Place] = [Place("start", "", time.monotonic())]  # replaced as a whole, so that the thread needs no lock


def at(phase: str, item: str | int = "") -> None:
    """This process now does `phase` with `item`: an id, "step 3", ..."""
    _here[0] = Place(phase, str(item), time.monotonic(), calls=_here[0].calls)


def beat() -> None:
    """This process has moved on within its place."""
    _here[0] = _here[0]._replace(since=time.monotonic())


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around a collective call, or a pass of a sharded model, which consists of them."""
    place = _here[0]
    _here[0] = place._replace(since=time.monotonic(), waiting=True, calls=place.calls + 1)
    try:
        yield
    finally:
        _here[0] = _here[0]._replace(since=time.monotonic(), waiting=False)


class Heartbeat:
    """The thread of one rank. `store`: a connection of its own (an operation on a connection blocks the next one), or
    None in a world of one. `stall_s`, `timeout_s`: as in the configuration's section parallel; 0: never."""

    def __init__(
        self, rank: int, world: int, store: torch_dist.Store | None, stall_s: float, timeout_s: float
    ) -> None:  # fmt: skip
        self.rank, self.world, self.store, self.stall_s, self.timeout_s = rank, world, store, stall_s, timeout_s
        self._reported = -1.0  # `since` of the place that was reported as stalled
        self._gone = ""
        self._heard: dict[int, tuple[str, float]] = {}  # by rank: its last record, and when this rank first read it
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        beat()
        self._publish()
        self._thread.start()

    def stop(self, last_words: str = "") -> None:
        """End the thread, which must not outlive the interpreter; `last_words`: why this rank leaves the others. A
        second call changes nothing."""
        self._end.set()
        self._thread.join(GRACE + INTERVAL)
        if self._thread.is_alive():
            self.store = None  # its connection is stuck
        if last_words and not self._gone:
            self._gone = last_words
            self._publish()

    def _run(self) -> None:
        while not self._end.wait(INTERVAL):
            self._publish()
            place = _here[0]
            still = time.monotonic() - place.since
            if still >= min(self.stall_s or math.inf, self.timeout_s or math.inf) / 2:
                self.ranks()  # so that it is known since when they say the same
            if self.timeout_s and place.waiting and still >= self.timeout_s:
                self._give_up(place, still)
            if self.stall_s and still >= self.stall_s and place.since != self._reported and self._report():
                self._reported = place.since

    def _record(self) -> dict[str, Any]:
        place = _here[0]
        still = time.monotonic() - place.since
        return place._asdict() | {"still": still, "gone": self._gone}

    def _publish(self) -> None:
        store = self.store  # which `stop` may take away
        if store is not None:
            with contextlib.suppress(torch_dist.DistError):  # slow or gone: it is tried again
                store.set(f"heartbeat/{self.rank}", json.dumps(self._record()))

    def ranks(self) -> list[dict[str, Any]]:
        """What each rank last published, with "still" brought up to now; {} of one that has not begun or of all others
        where the store is gone. A rank that can no longer publish has stood still since this one has known its record:
        the clocks of several machines are not compared."""
        store, records = self.store, []
        for rank in range(self.world):
            if rank == self.rank:
                records.append(self._record())
                continue
            known, since = self._heard.get(rank, ("", 0.0))
            text, key = known, f"heartbeat/{rank}"
            if store is not None:
                try:
                    text = store.get(key).decode() if store.check([key]) else ""
                except torch_dist.DistError:  # slow or gone: what is known stays
                    store = None
            if text != known:
                since = time.monotonic()
                self._heard[rank] = text, since
            record = json.loads(text) if text else {}
            records.append(record | {"still": record["still"] + time.monotonic() - since} if record else {})
        return records

    def _first(self, name: str) -> bool:
        """Is this the first rank to ask? Of several that notice the same, one speaks."""
        store = self.store
        if store is None:
            return True
        try:
            return store.add(f"heartbeat/{name}", 1) == 1
        except torch_dist.DistError:
            return True

    def _report(self) -> bool:
        """The table of all ranks, printed by whichever rank notices first; False if this rank rightly waits for one
        that moves on."""
        records = self.ranks()
        at_work = [r for r in records if not r.get("waiting")]
        still = [r for r in at_work or records if not r or r["still"] >= self.stall_s]
        if not still:
            return False
        if self._first(f"stall/{still[0].get('since')}"):
            lines = [f"warning: no progress for {self.stall_s:g} s"]
            lines += [f"  rank {rank:<4} {_describe(record)}" for rank, record in enumerate(records)]
            _say("\n".join(lines))
        return True

    def _give_up(self, place: Place, still: float) -> None:
        """End this process: the others may never come."""
        if self._first("timeout"):
            _say(f"error: rank {self.rank} has waited {still:.0f} s for the other ranks in {place}; never arrived: "
                 f"{self._absent()}. This is longer than parallel.timeout_s = {self.timeout_s:g}.")  # fmt: skip
        self._gone = "has waited too long for the others"
        self._publish()
        os._exit(FAILED)

    def _absent(self) -> str:
        ranks = list(enumerate(self.ranks()))
        absent = [(n, r) for n, r in ranks if not r.get("waiting")]
        most = max(r.get("calls", 0) for _, r in ranks)
        absent = absent or [(n, r) for n, r in ranks if r["calls"] < most]
        return ", ".join(f"rank {n} ({_describe(r)})" for n, r in absent) or "none, all ranks wait in the same call"

    def lost(self) -> str:
        """After a collective call has failed: which ranks are gone, as far as that is known, and where they were.

        Waits a moment for the ranks that have lost somebody too, so that those that say nothing remain.
        """
        self.stop("lost another rank")
        deadline = time.monotonic() + GRACE
        while True:
            records = list(enumerate(self.ranks()))
            gone = [(n, r) for n, r in records if r.get("gone") not in ("", None, "lost another rank")]
            silent = [(n, r) for n, r in records if n != self.rank and not r.get("gone")]
            if gone or len(silent) <= 1 or time.monotonic() >= deadline:
                break
            time.sleep(GRACE / 10)
        return ", ".join(f"rank {n} ({r.get('gone') or _describe(r)})" for n, r in gone or silent) or "an unknown rank"


def _describe(record: dict[str, Any]) -> str:
    if not record:
        return "not heard from"
    if record["gone"]:
        return record["gone"]
    place = Place(record["phase"], record["item"], record["since"])
    return f"{place}: {'waiting for others' if record['waiting'] else 'at work'} for {record['still']:.0f} s"


def here() -> str:
    """Where this process is, in words."""
    return str(_here[0])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
