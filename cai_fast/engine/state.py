"""What the device knows of the requests in flight, and what a decode step does to it: no host read, fixed addresses."""

from collections.abc import Sequence
from itertools import count as counting
from typing import NamedTuple

import torch
from torch import Tensor

from cai_fast import kernels
from cai_fast.engine.requests import Sampling
from cai_fast.engine.stops import StopStrings

STOPPED, FULL, LOOK = 1, 2, 4  # flags of a row: stop token; token limit; a stop string may have ended
ENDED = STOPPED | FULL
TABLES = 8  # sets of stop strings that there is room for at first

_serial = counting()  # of tensors that captured steps may hold


class Law(NamedTuple):
    """The distribution a token is drawn from, as `kernels.sample_tokens` names it."""

    temperature: float
    top_k: int
    top_p: float

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


def law(sampling: Sampling) -> Law:
    """The law of one request."""
    return Law(sampling.temperature, sampling.top_k, sampling.top_p)


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values; a GPU copies it when its turn comes, and the host does not wait."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class DecodeState:
    """Tensors with one row a slot; rows 0..n-1 are active, without holes.

    pipelined: steps are queued before the host has seen what the last ones did. Then flags stay, a row that has ended
    stands still, rows beyond the active ones count as ended, and a row's law and key are read from the device; else
    noise is made when a request joins, and rows of one law are drawn in one call.
    """

    def __init__(self, slots: int, most: int, ends: int, device: torch.device, *, pipelined: bool) -> None:
        """most: new tokens of the longest response; ends: stop tokens of a request at most."""
        self.pipelined, self.most, self.ends, self.device = pipelined, most, ends, device
        self.truncates, self.version = False, next(_serial)
        self.groups: dict[tuple[str, ...], int] = {}  # stop strings -> row of `tables`; 0: none
        self.tables: Tensor | None = None

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.token, self.position, self.count = zeros(slots), zeros(slots), zeros(slots)
        self.limit, self.group, self.stop_ids = zeros(slots), zeros(slots), zeros(slots, ends)
        # A row that stands still writes behind its end, hence one more column.
        self.out_token = zeros(slots, most + pipelined)
        self.out_logprob = zeros(slots, most + pipelined, dtype=torch.float32)
        if pipelined:
            self.flags, self.key, self.top_k = zeros(slots).fill_(STOPPED), zeros(slots), zeros(slots)
            self.temperature, self.top_p = (torch.ones(slots, dtype=torch.float64, device=device) for _ in range(2))
            extra = [self.flags, self.key, self.temperature, self.top_k, self.top_p]
        else:
            # All noise of a response is made when it joins: philox once a request, not once a token.
            self.uniform = zeros(slots, most, dtype=torch.float64)
            self._noise = torch.arange(most, device=device)
            extra = [self.uniform]
        self._all = [self.token, self.position, self.count, self.limit, self.group, self.stop_ids, self.out_token,
                     self.out_logprob, *extra]  # fmt: skip

    def serves(self, most: int, ends: int) -> bool:
        """Whether there is room for responses of `most` tokens and `ends` stop tokens."""
        return most <= self.most and ends <= self.ends

    def prepare(self, samplings: Sequence[Sampling], stops: StopStrings | None) -> None:
        """Make tables for the stop strings that are new."""
        self.truncates = any(law(s).truncates for s in samplings)
        new = sorted({s.stop_strings for s in samplings if s.stop_strings} - set(self.groups))
        if stops is None or not (new or self.pipelined):
            return
        self.groups |= {strings: len(self.groups) + 1 + i for i, strings in enumerate(new)}
        if self.tables is None or len(self.tables) <= len(self.groups):
            rows = max(TABLES, 2 * len(self.groups))
            tables = torch.zeros(rows, stops.vocab_size, dtype=torch.bool, device=self.device)
            if self.tables is not None:
                tables[: len(self.tables)] = self.tables
            self.tables, self.version = tables, next(_serial)
        for strings in new:
            self.tables[self.groups[strings]] = stops.table(strings).to(self.device)

    def put(self, at: slice, samplings: Sequence[Sampling], prompts: Sequence[int], keys: Sequence[int]) -> None:
        """Begin rows `at` with requests whose prompts have so many tokens."""
        ids = [[*s.stop_token_ids, *[-1] * (self.ends - len(s.stop_token_ids))] for s in samplings]
        groups = [self.groups.get(s.stop_strings, 0) for s in samplings]
        # The newest cached position is the prompt's last; `advance` moves on by one.
        table = [[p - 1, s.max_new_tokens, g, *i] for p, s, g, i in zip(prompts, samplings, groups, ids, strict=True)]
        values = to_device(table, torch.int64, self.device)
        self.position[at], self.limit[at], self.group[at] = values[:, 0], values[:, 1], values[:, 2]
        self.stop_ids[at] = values[:, 3:]
        self.count[at] = 0
        key = to_device(keys, torch.int64, self.device)
        if self.pipelined:
            laws = to_device([law(s) for s in samplings], torch.float64, self.device)
            self.temperature[at], self.top_k[at], self.top_p[at] = laws[:, 0], laws[:, 1].long(), laws[:, 2]
            self.key[at], self.flags[at] = key, 0
        else:
            most = max(s.max_new_tokens for s in samplings)
            self.uniform[at, :most] = kernels.philox_uniform(key[:, None], self._noise[:most])

    def advance(self, at: slice, logits: Tensor, laws: Sequence[tuple[Law, Tensor | None]] = ()) -> Tensor:
        """One token more for rows `at` from `logits [rows, V]`; returns their flags.

        laws: unless pipelined, the laws of the rows and, of several, the rows (from 0) of each.
        """
        count, where = self.count[at], self.count[at][:, None]
        if not self.pipelined:
            uniform = self.uniform[at].gather(1, where)[:, 0]
            token, logprob = _draw(logits, count, uniform, laws)
            self.token[at] = token
            self.out_token[at].scatter_(1, where, token[:, None])
            self.out_logprob[at].scatter_(1, where, logprob[:, None])
            count += 1
            self.position[at] += 1
            return self._flags(at, token)
        flags = self.flags[at]
        live = flags & ENDED == 0
        token, logprob = kernels.sample_tokens(
            logits, self.key[at], count, temperature=self.temperature[at], top_k=self.top_k[at],
            top_p=self.top_p[at], truncate=self.truncates,
        )  # fmt: skip
        token = torch.where(live, token, self.token[at])
        self.token[at] = token
        self.out_token[at].scatter_(1, where, token[:, None])
        self.out_logprob[at].scatter_(1, where, logprob[:, None])
        count += live
        self.position[at] += live
        flags |= self._flags(at, token) * live
        return flags

    def _flags(self, at: slice, token: Tensor) -> Tensor:
        flags = (self.stop_ids[at] == token[:, None]).any(1).to(torch.int64) * STOPPED
        flags += (self.count[at] >= self.limit[at]) * FULL
        if self.tables is not None:
            flags += self.tables[self.group[at], token] * LOOK
        return flags

    def move(self, holes: list[int], tails: list[int]) -> None:
        """Row `tails[i]` becomes row `holes[i]`."""
        to, source = (to_device(rows, torch.int64, self.device) for rows in (holes, tails))
        for state in self._all:
            state.index_copy_(0, to, state.index_select(0, source))

    def end(self, rows: slice) -> None:
        """Nobody is in these rows any more."""
        if self.pipelined:
            self.flags[rows], self.position[rows], self.count[rows] = STOPPED, 0, 0


def _draw(
    logits: Tensor, count: Tensor, uniform: Tensor, laws: Sequence[tuple[Law, Tensor | None]]
) -> tuple[Tensor, Tensor]:
    """(token, log-prob) of every row. One call for each law: how a row is drawn must not depend on what else is in the
    batch, not even by rounding."""
    if len(laws) == 1:
        return kernels.sample_tokens(logits, count, count, uniform=uniform, **laws[0][0]._asdict())
    token, logprob = torch.empty_like(count), torch.empty_like(uniform, dtype=torch.float32)
    for one, rows in laws:
        part = count[rows]
        drawn, value = kernels.sample_tokens(logits[rows], part, part, uniform=uniform[rows], **one._asdict())
        token.index_copy_(0, rows, drawn)
        logprob.index_copy_(0, rows, value)
    return token, logprob
