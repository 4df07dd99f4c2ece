"""What the host knows of the requests in flight: who sits in which row, who has ended, and when it may look.

A GPU is kept busy by queueing steps before the flags of the last ones are read: `look` then returns what was posted
LAG calls before, and rows that ended meanwhile have stood still on the device.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cai_fast.engine.cache import SlotCache
from cai_fast.engine.requests import Completion, Sampling
from cai_fast.engine.state import FULL, LOOK, STOPPED, DecodeState, Law, law, to_device
from cai_fast.engine.stops import StopStrings

Watch = Callable[[int, list[int]], None]
LAG = 1  # posted flags that stay unread, when pipelined


@dataclass
class _Host:
    """What the host knows of an active row without reading the device."""

    request: int
    sampling: Sampling
    prompt: int  # tokens
    born: int  # step number at which its first token was sampled
    looked: int = 0  # tokens already searched for stop strings
    shown: int = 0  # tokens already handed to `watch`

    def generated(self, step: int) -> int:
        """Tokens it has sampled, unless it has ended before."""
        return step - self.born + 1

    def length(self, step: int) -> int:
        """Positions whose keys are cached, counting the newest token's."""
        return self.prompt + self.generated(step)


class Ended(NamedTuple):
    """A row that is about to leave."""

    row: int
    tokens: list[int]
    logprobs: list[float]
    reason: str


class Rows:
    """Admission, flags, stop strings and compaction; no per-token Python grows with the batch."""

    def __init__(
        self, cache: SlotCache, state: DecodeState, samplings: Sequence[Sampling], stops: StopStrings | None,
        watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self.watch = watch
        self.cache, self.state, self.stops, self.step = cache, state, stops, 0
        state.prepare(samplings, stops)
        self.active: list[_Host] = []
        self._reach = self._sum = 0  # positions of the longest row and of all rows, less the step number of each
        self._last = self._common = 0  # step at which the last row ends; what `common` returns
        self._only = law(samplings[0]) if len({law(s) for s in samplings}) == 1 else None
        self._laws: tuple[slice, list[tuple[Law, Tensor | None]]] | None = None  # until rows come or go
        self._flags: Tensor | None = None  # of the rows `_at`, from the last step
        self._at = slice(0)
        self._side = torch.cuda.Stream() if state.device.type == "cuda" and state.pipelined else None
        self._posted: deque[tuple[list[int], Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self.active)

    def requests(self) -> list[tuple[int, int]]:
        """(row, request) of every active row."""
        return [(row, host.request) for row, host in enumerate(self.active)]

    def width(self) -> int:
        """Own cached positions of the longest active row once its newest token is written."""
        return self._reach + self.step

    def cached(self) -> int:
        """Own cached positions of all active rows once their newest tokens are written."""
        return self._sum + len(self.active) * self.step

    def left(self) -> int:
        """Steps after which every active row has ended for sure."""
        return max(0, self._last - self.step)

    def common(self) -> int:
        """Positions that a step reads besides `cached`, for several rows."""
        return self._common

    def _changed(self) -> None:
        """Renew what is derived from the set of active rows."""
        lengths = [host.length(0) - self.cache.skipped(row) for row, host in enumerate(self.active)]
        self._reach, self._sum = max(lengths, default=0), sum(lengths)
        self._last = max((h.sampling.max_new_tokens + h.born - 1 for h in self.active), default=0)
        self._common, self._laws = self.cache.common(), None

    def join(self, requests: list[int], samplings: list[Sampling], prompts: list[int], keys: list[int]) -> slice:
        """Append rows for newly prefilled requests (`prompts` in tokens); returns where they are."""
        at = slice(len(self.active), len(self.active) + len(requests))
        self.active += [_Host(r, s, p, self.step) for r, s, p in zip(requests, samplings, prompts, strict=True)]
        self.state.put(at, samplings, prompts, keys)
        self._changed()
        return at

    def emit(self, at: slice, logits: Tensor) -> None:
        """Sample one token for the rows `at` from `logits [rows, V]`."""
        self._flags, self._at = self.state.advance(at, logits, self._laws_of(at)), at

    def _laws_of(self, at: slice) -> list[tuple[Law, Tensor | None]]:
        if self._only is not None:
            return [(self._only, None)]
        if self.state.pipelined:
            return []
        if self._laws is None or self._laws[0] != at:
            members: dict[Law, list[int]] = {}
            for row, host in enumerate(self.active[at]):
                members.setdefault(law(host.sampling), []).append(row)
            device = self.state.device
            self._laws = at, [(one, torch.tensor(rows, device=device)) for one, rows in members.items()]
        return self._laws[1]

    def look(self, wait: bool = False) -> list[tuple[int, int]]:
        """(row, flags) of rows that may have ended. Pipelined: as posted LAG calls ago, or now if it must `wait`.

        One host read; those of rows that did end come on top."""
        if self.watch is not None:
            self._show()
        if not self.state.pipelined:
            rows = self._flags.nonzero()[:, 0]
            if rows.numel() == 0:
                return []
            return [(self._at.start + r, f) for r, f in zip(rows.tolist(), self._flags[rows].tolist(), strict=True)]
        self._post()
        flagged: dict[int, int] = {}
        while len(self._posted) > (0 if wait else LAG):
            requests, flags, event = self._posted.popleft()
            if event is not None:
                event.synchronize()
                self._side.wait_event(event)
            where = {host.request: row for row, host in enumerate(self.active)}  # rows may have moved since
            for i, flag in enumerate(flags.tolist()):
                if flag and requests[i] in where:
                    row = where[requests[i]]
                    flagged[row] = flagged.get(row, 0) | flag
        return sorted(flagged.items())

    def _show(self) -> None:
        """Hand the tokens that came since the last call to `watch`. Costs a host read."""
        for host, (tokens, _) in zip(self.active, self._read([*range(len(self.active))]), strict=True):
            if len(tokens) > host.shown:
                new, host.shown = tokens[host.shown :], len(tokens)
                self.watch(host.request, new)

    def _post(self) -> None:
        flags, event = self.state.flags[: len(self.active)], None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = flags.clone()
        self._posted.append(([h.request for h in self.active], host, event))

    def ended(self, flagged: list[tuple[int, int]]) -> list[Ended]:
        """The flagged rows that really end; stop strings are looked for on the host."""
        ended = []
        for (row, flag), (tokens, logprobs) in zip(flagged, self._read([row for row, _ in flagged]), strict=True):
            cut = self._stop(row, tokens) if flag & LOOK else 0
            if cut or flag & STOPPED:
                count = cut or len(tokens)
                ended.append(Ended(row, tokens[:count], logprobs[:count], "stop"))
            elif flag & FULL:
                ended.append(Ended(row, tokens, logprobs, "length"))
        return ended

    def _read(self, rows: list[int]) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probs of rows. On a GPU beside the steps that are queued, which an ended row does not change;
        of one that goes on, what the count counts is there before it."""
        state = self.state
        with torch.cuda.stream(self._side) if self._side is not None else nullcontext():
            index = to_device(rows, torch.int64, state.device)
            counts = state.count[index].tolist()
            tokens, logprobs = (out[index, : max(counts)].tolist() for out in (state.out_token, state.out_logprob))
        return [(t[:n], p[:n]) for t, p, n in zip(tokens, logprobs, counts, strict=True)]

    def _stop(self, row: int, tokens: list[int]) -> int:
        """Number of tokens after which a stop string has ended, 0 if none has; earlier ends were looked at before."""
        host = self.active[row]
        strings = host.sampling.stop_strings
        table, tail = self.stops.table(strings), self.stops.tail(strings)
        for count in range(host.looked + 1, len(tokens) + 1):
            if table[tokens[count - 1]] and self.stops.found(strings, tokens[max(0, count - tail) : count]):
                return count
        host.looked = len(tokens)
        if self.state.pipelined:
            # What set it again meanwhile is in flags posted already, for this is queued behind them.
            self.state.flags[row] &= ~LOOK
        return 0

    def leave(self, ended: list[Ended]) -> list[tuple[int, Completion]]:
        """Take the ended rows out, move the last rows into the holes; returns (request, completion)."""
        done = [(self.active[e.row].request, Completion(e.tokens, e.logprobs, e.reason)) for e in ended]
        gone, before = {e.row for e in ended}, len(self.active)
        left = before - len(gone)
        holes = sorted(row for row in gone if row < left)
        tails = [row for row in range(left, before) if row not in gone]
        self.cache.release(gone)
        for hole, tail in zip(holes, tails, strict=True):
            self.active[hole] = self.active[tail]
        if holes:
            self.cache.move(holes, tails, [self.active[tail].length(self.step) - 1 for tail in tails])
            self.state.move(holes, tails)
        self.cache.vacate(slice(left, before))
        self.state.end(slice(left, before))
        del self.active[left:]
        self._changed()
        return done
