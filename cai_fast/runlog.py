"""What a run tells its user: metrics.jsonl, progress with rate and ETA, and messages on stderr, from rank 0."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm

from cai_fast.distributed import Distributed
from cai_fast.errors import InputError
from cai_fast.files import write_atomic
from cai_fast.inputs import kind, parse_json, read_bytes
from cai_fast.sinks import Sink

PLAIN_INTERVAL = 10.0  # seconds between progress lines when stderr is not a terminal
BAR_INTERVAL = 0.1  # and between changes of the bar when it is


def truncate_metrics(path: str | os.PathLike[str], stages: Collection[str], step: int = 0) -> None:
    """Drop the lines of `stages` with step >= `step`: the resumed run will write them again."""
    path = Path(path)
    if not kind(path):
        return
    old, kept = read_bytes(path), []
    for number, line in enumerate(old.splitlines(keepends=True), 1):
        try:
            row = parse_json(line, path)
        except InputError:  # torn by a kill or a full disk
            continue
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or type(row.get("step")) is not int:
            raise InputError(f"{path}, line {number}: expected an object with stage and step; remove the line")
        if line.endswith(b"\n") and (row["stage"] not in stages or row["step"] < step):
            kept.append(line)
    if b"".join(kept) != old:
        write_atomic(path, b"".join(kept))


class Mean:
    """Named means kept as (sum, count), so that ranks and microbatches of unequal size combine exactly."""

    def __init__(self) -> None:
        self.totals: dict[str, list[Any]] = {}

    def add(self, name: str, total: float | Tensor, count: float | Tensor = 1) -> None:
        """Add a sum over `count` things. Tensors stay on their device until `reduce`: no synchronisation here."""
        entry = self.totals.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + (total.detach().double() if isinstance(total, Tensor) else total)
        entry[1] = entry[1] + (count.detach().double() if isinstance(count, Tensor) else count)

    def reduce(self, dist: Distributed) -> dict[str, float]:
        """Collective (same names on all ranks): the global means; nothing counted gives nan. Starts afresh."""
        local = {f"{name}/{part}": float(v) for name, e in self.totals.items() for part, v in enumerate(e)}
        sums, names = dist.all_reduce_sum(local), list(self.totals)
        self.totals = {}
        return {n: sums[f"{n}/0"] / sums[f"{n}/1"] if sums[f"{n}/1"] else math.nan for n in names}


class Progress:
    """A tqdm bar on a terminal, otherwise a plain line at most every 10 s; silent on other ranks.

    Asked whenever something is shown: `done`, for the units that all ranks have done since the start, where others
    work on them too, and `tokens`, for the tokens that this process has computed so far.
    """

    def __init__(self, total: int, desc: str, unit: str, *, initial: int = 0, file: TextIO | None = None,
                 clock: Callable[[], float] = time.monotonic, done: Callable[[], int] | None = None,
                 tokens: Callable[[], int] | None = None):  # fmt: skip
        self.total, self.desc, self.unit, self.count, self.initial = total, desc, unit, initial, initial
        self.file, self.clock, self.done, self.tokens = file, clock, done, tokens
        self.started = self.printed = clock()
        self.tokens_before = 0 if tokens is None else tokens()
        self.note = ""
        self.shown = -1  # count in the last line
        self.bar: tqdm[Any] | None = None
        if file is not None and file.isatty():  # shown as often as it is told to
            self.bar = tqdm(total=total, desc=desc, unit=" " + unit, initial=initial, file=file, dynamic_ncols=True,
                            miniters=0, mininterval=0)  # fmt: skip

    def update(self, n: int = 1, **values: float | str) -> None:
        """`n` more are done; `values` are shown behind (loss, reward, ...)."""
        self.count += n
        if values:
            self.note = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        self.tick()

    def tick(self) -> None:
        """Show how far things are, if it is time to. Cheap, so that whoever works on a long unit can call it often."""
        interval = PLAIN_INTERVAL if self.bar is None else BAR_INTERVAL
        if self.file is not None and self.clock() - self.printed >= interval:
            self._show()

    def _show(self) -> None:
        self.printed = self.clock()
        elapsed = self.printed - self.started
        if self.done is not None:
            self.count = self.initial + self.done()
        notes = [self.note] * bool(self.note)
        if self.tokens is not None and elapsed > 0 and (tokens := self.tokens() - self.tokens_before) > 0:
            where = "" if self.done is None else " on this rank"
            notes.insert(0, f"{tqdm.format_sizeof(tokens / elapsed)} tokens/s{where}")
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(notes), refresh=False)
            self.bar.update(self.count - self.bar.n)
            return
        if self.count == self.shown == self.total:
            return  # stage rl samples once more after its last step
        self.shown = self.count
        rate = (self.count - self.initial) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self.desc}: {self.count}/{self.total} {self.unit}"]
        if rate > 0:
            parts.append(f"{rate:.3g}/s" if rate < 1000 else f"{tqdm.format_sizeof(rate)}/s")
        if self.count == self.total:
            parts.append(f"took {tqdm.format_interval(elapsed)}")
        elif rate > 0:
            parts.append(f"ETA {tqdm.format_interval((self.total - self.count) / rate)}")
        print(", ".join(parts + notes), file=self.file, flush=True)

    def close(self) -> None:
        if self.file is not None:
            self._show()
        if self.bar is not None:
            self.bar.close()
        self.file = self.bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class RunLog:
    """metrics.jsonl at `path`, copies of it in `sinks`, and messages on stderr. Only the main rank writes anything."""

    def __init__(self, path: str | os.PathLike[str], is_main: bool = True, sinks: Sequence[Sink] = ()):
        self.path, self.is_main, self.sinks = Path(path), is_main, sinks
        self.started = time.monotonic()
        if is_main:
            truncate_metrics(self.path, ())  # drops a torn last line, to which the next one would be glued

    def metrics(self, stage: str, step: int, values: Mapping[str, float | Tensor]) -> None:
        """One line {stage, step, time, name: value, ...}; values that JSON cannot hold (nan, inf) become null."""
        if not self.is_main:
            return
        row: dict[str, Any] = {"stage": stage, "step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            number = value.item() if isinstance(value, Tensor) else value
            row[name] = number if not isinstance(number, float) or math.isfinite(number) else None
        with open(self.path, "a", encoding="utf-8") as file:  # opened anew, because truncation replaces the file
            file.write(json.dumps(row) + "\n")
        for sink in self.sinks:
            sink.add(row)

    def truncate(self, stage: str, step: int) -> None:
        """On resume: forget what this stage logged from `step` on."""
        if self.is_main:
            truncate_metrics(self.path, (stage,), step)
            for sink in self.sinks:
                sink.truncate(stage, step)

    def close(self) -> None:
        """Finish the copies; the file is complete after every line."""
        for sink in self.sinks:
            sink.close()

    def progress(
        self, total: int, desc: str, unit: str = "it", *, initial: int = 0, done: Callable[[], int] | None = None,
        tokens: Callable[[], int] | None = None,
    ) -> Progress:  # fmt: skip
        """Progress of `total` units of which `initial` were done before this process started; see `Progress`."""
        file = sys.stderr if self.is_main else None
        return Progress(total, desc, unit, initial=initial, file=file, done=done, tokens=tokens)

    def info(self, message: str) -> None:
        if self.is_main:  # tqdm.write keeps an open progress bar below the message
            tqdm.write(f"[{tqdm.format_interval(time.monotonic() - self.started)}] {message}", file=sys.stderr)

    def warn(self, message: str) -> None:
        self.info(f"warning: {message}")


def in_words(values: Mapping[str, Any]) -> str:
    """A summary as a log line says it: {"kept_rows": 2, "rejected": {"long": 1}} is "kept rows 2, rejected (long 1)".

    Floats have four digits; empty tables are left out.
    """
    return ", ".join(f"{name.replace('_', ' ')} {_spoken(value)}" for name, value in values.items() if value != {})


def _spoken(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({in_words(value)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
