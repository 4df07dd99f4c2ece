"""Decode state of the requests in flight: tensors with one row a slot, rows 0..n-1 active, no holes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cai_fast import kernels
from cai_fast.engine.cache import SlotCache
from cai_fast.engine.requests import Completion, Sampling
from cai_fast.engine.stops import StopStrings

STOPPED, FULL, LOOK = 1, 2, 4  # flags of one step: stop token; token limit; a stop string may have ended


class _Law(NamedTuple):
    """The distribution a token is drawn from, as `kernels.sample_tokens` names it."""

    temperature: float
    top_k: int
    top_p: float


def _law(sampling: Sampling) -> _Law:
    return _Law(sampling.temperature, sampling.top_k, sampling.top_p)


@dataclass
class _Host:
    """What the host knows of an active row without reading the device."""

    request: int
    sampling: Sampling
    prompt: int  # tokens
    born: int  # step number at which its first token was sampled

    def generated(self, step: int) -> int:
        return step - self.born + 1

    def length(self, step: int) -> int:
        """Positions whose keys are cached, counting the newest token's."""
        return self.prompt + self.generated(step)


class Rows:
    """Batched sampling, stopping and compaction; no per-token Python grows with the batch."""

    def __init__(self, cache: SlotCache, slots: int, samplings: list[Sampling], stops: StopStrings | None) -> None:
        device = cache.kv.device
        self.cache, self.stops, self.step = cache, stops, 0
        self.active: list[_Host] = []
        self._reach = self._sum = 0  # positions of the longest row and of all rows, less the step number of each
        self.most = max(s.max_new_tokens for s in samplings)
        ends = max(1, max(len(s.stop_token_ids) for s in samplings))
        strings = sorted({s.stop_strings for s in samplings if s.stop_strings})
        self.groups = {stop: i + 1 for i, stop in enumerate(strings)}
        self.tables = None
        if strings and stops is not None:
            tables = [stops.table(stop) for stop in strings]
            self.tables = torch.stack([torch.zeros_like(tables[0]), *tables])

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.token, self.position, self.count = zeros(slots), zeros(slots), zeros(slots)
        self.limit, self.group, self.stop_ids = zeros(slots), zeros(slots), zeros(slots, ends)
        # All noise of a response is made when it joins: philox once a request, not once a token.
        self.uniform = zeros(slots, self.most, dtype=torch.float64)
        self.out_token, self.out_logprob = zeros(slots, self.most), zeros(slots, self.most, dtype=torch.float32)
        self._state = [
            self.token,
            self.position,
            self.count,
            self.limit,
            self.group,
            self.stop_ids,
            self.uniform,
            self.out_token,
            self.out_logprob,
        ]
        self._mixed = len({_law(s) for s in samplings}) > 1
        self._laws: tuple[slice, list[tuple[_Law, Tensor]]] | None = None  # rows of each law, until rows come or go

    def __len__(self) -> int:
        return len(self.active)

    def width(self) -> int:
        """Cached positions of the longest active row once its newest token is written."""
        return self._reach + self.step

    def cached(self) -> int:
        """Cached positions of all active rows once their newest tokens are written."""
        return self._sum + len(self.active) * self.step

    def _changed(self) -> None:
        """Renew what is derived from the set of active rows."""
        lengths = [row.length(0) for row in self.active]
        self._reach, self._sum = max(lengths, default=0), sum(lengths)
        self._laws = None

    def join(self, requests: list[int], samplings: list[Sampling], prompts: list[int], keys: list[int]) -> slice:
        """Append rows for newly prefilled requests (`prompts` in tokens); returns where they are."""
        at = slice(len(self.active), len(self.active) + len(requests))
        device, width = self.token.device, self.stop_ids.shape[1]
        self.active += [_Host(r, s, p, self.step) for r, s, p in zip(requests, samplings, prompts, strict=True)]

        def put(target: Tensor, values: list) -> None:
            target[at] = torch.tensor(values, dtype=target.dtype).to(device)

        put(self.position, [p - 1 for p in prompts])  # the newest cached position; `emit` moves on by one
        put(self.limit, [s.max_new_tokens for s in samplings])
        put(self.group, [self.groups.get(s.stop_strings, 0) for s in samplings])
        put(self.stop_ids, [list(s.stop_token_ids) + [-1] * (width - len(s.stop_token_ids)) for s in samplings])
        self.count[at] = 0
        self._changed()
        index = torch.arange(self.most, device=device)
        self.uniform[at] = kernels.philox_uniform(torch.tensor(keys, device=device)[:, None], index)
        return at

    def emit(self, at: slice, logits: Tensor) -> list[tuple[int, int]]:
        """Sample one token for the rows `at` from `logits [rows, V]`; returns (row, flags) of rows that may end."""
        count, token = self.count[at], self.token[at]
        where = count[:, None]
        logprob = self._sample(at, logits, count, self.uniform[at].gather(1, where)[:, 0])
        self.out_token[at].scatter_(1, where, token[:, None])
        self.out_logprob[at].scatter_(1, where, logprob[:, None])
        count += 1
        self.position[at] += 1
        flags = (self.stop_ids[at] == token[:, None]).any(1).to(torch.int64) * STOPPED
        flags += (count >= self.limit[at]) * FULL
        if self.tables is not None:
            flags += self.tables[self.group[at], token] * LOOK
        rows = flags.nonzero()[:, 0]  # the one host read of a step
        if rows.numel() == 0:
            return []
        return [(at.start + row, flag) for row, flag in zip(rows.tolist(), flags[rows].tolist(), strict=True)]

    def _sample(self, at: slice, logits: Tensor, count: Tensor, uniform: Tensor) -> Tensor:
        """Draw the rows' next tokens into `token`; returns their log-probs."""
        if not self._mixed:
            drawn, logprob = kernels.sample_tokens(
                logits, count, count, uniform=uniform, **_law(self.active[at.start].sampling)._asdict()
            )
            self.token[at] = drawn
            return logprob
        # One call for each law: how a row is drawn must not depend on what else is in the batch, not even by rounding.
        if self._laws is None or self._laws[0] != at:
            members: dict[_Law, list[int]] = {}
            for row, host in enumerate(self.active[at]):
                members.setdefault(_law(host.sampling), []).append(row)
            self._laws = at, [(law, torch.tensor(rows, device=count.device)) for law, rows in members.items()]
        logprob = torch.empty_like(uniform, dtype=torch.float32)
        for law, rows in self._laws[1]:
            part = count[rows]
            drawn, value = kernels.sample_tokens(logits[rows], part, part, uniform=uniform[rows], **law._asdict())
            self.token[at].index_copy_(0, rows, drawn)
            logprob.index_copy_(0, rows, value)
        return logprob

    def finished(self, flagged: list[tuple[int, int]]) -> list[tuple[int, str]]:
        """(row, finish reason) of the flagged rows that really end; checks stop strings on the host."""
        ended = []
        for row, flag in flagged:
            if flag & STOPPED or flag & LOOK and self._holds_stop(row):
                ended.append((row, "stop"))
            elif flag & FULL:
                ended.append((row, "length"))
        return ended

    def _holds_stop(self, row: int) -> bool:
        host = self.active[row]
        count, stops = host.generated(self.step), host.sampling.stop_strings
        tail = self.out_token[row, max(0, count - self.stops.tail(stops)) : count].tolist()
        return self.stops.found(stops, tail)

    def tokens(self, row: int) -> list[int]:
        """What an active row has sampled."""
        return self.out_token[row, : self.active[row].generated(self.step)].tolist()

    def leave(self, ended: list[tuple[int, str]]) -> list[tuple[int, Completion]]:
        """Take the ended rows out, move the last rows into the holes; returns (request, completion)."""
        done = []
        for row, reason in ended:
            tokens = self.tokens(row)
            logprobs = self.out_logprob[row, : len(tokens)].tolist()
            done.append((self.active[row].request, Completion(tokens, logprobs, reason)))
        gone = {row for row, _ in ended}
        left = len(self.active) - len(gone)
        holes = sorted(row for row in gone if row < left)
        tails = [row for row in range(left, len(self.active)) if row not in gone]
        self.cache.release(gone)
        for hole, tail in zip(holes, tails, strict=True):
            self.active[hole] = self.active[tail]
        if holes:
            self.cache.move(holes, tails, [self.active[tail].length(self.step) - 1 for tail in tails])
            for state in self._state:
                state[holes] = state[tails]
        del self.active[left:]
        self._changed()
        return done
