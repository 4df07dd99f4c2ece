"""The engine: continuous batching, prefix handles and scoring on the trainer's own model instance."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from cai_fast.engine import scoring
from cai_fast.engine.attend import BLOCK
from cai_fast.engine.cache import PageUse, SlotCache, round_up
from cai_fast.engine.graphs import BURST, Graphs, batch_bucket, context_bucket
from cai_fast.engine.pages import plan_cache
from cai_fast.engine.prefix import Prefix
from cai_fast.engine.request_queue import Request, make_requests
from cai_fast.engine.requests import Completion, Sampling, Tree
from cai_fast.engine.rows import Ended, Rows, Watch
from cai_fast.engine.state import DecodeState
from cai_fast.engine.stops import Decodes, StopStrings
from cai_fast.engine.trunk import Trunk
from cai_fast.errors import InputError
from cai_fast.model import Model

Progress = Callable[[int, Completion], None]


class Engine:
    """Generates and scores with `model`, at most `max_batch` requests of `max_len` tokens at a time.

    deterministic: on a CPU every GEMM has a number of rows at which a row's bits do not depend on it and attention runs
    on aligned blocks, so that on one machine a request's tokens and log-probs are bitwise the same alone, in any batch
    or order, and with any `max_batch`; on a GPU every pass of `generate` has one shape, fixed by `max_batch` and
    `prefill_tokens` (scores and log-probs of given responses are not covered there).
    `prefill_tokens` bounds one prefill or scoring pass, `tokenizer` is needed for stop strings only, `counters` adds
    up work since the engine was made. longest_first: start the requests that may last longest first, so that none is
    left running alone; else in their order.
    page_size: tokens a page of the KV cache, 0 = one slot of max_len a request; by default 0 on CPU and for models with
    a shorter sliding window, 64 on CUDA. num_pages: by default what max_batch requests of max_len need, on CUDA at most
    half of the free memory. Requests wait while pages are short; InputError if one of max_len would never fit.
    pipelined (by default on CUDA): decode steps are replayed from CUDA graphs, one per bucket of rows and of positions,
    and queued in bursts, whose flags are read when the next burst is under way.
    shared_decode: rows behind one handle of 512 tokens or more attend to it together; by default where that has been
    measured to be faster: with slots on a CPU, not (yet) with pages.
    `watch`, if set, is called with a request's index and its new tokens while it goes on.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_len: int,
        max_batch: int = 64,
        deterministic: bool = True,
        prefill_tokens: int = 8192,
        tokenizer: Decodes | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        longest_first: bool = True,
        pipelined: bool | None = None,
        shared_decode: bool | None = None,
    ) -> None:
        limit = model.config.max_position_embeddings
        if max_batch < 1 or prefill_tokens < 1 or not 1 <= max_len <= limit:
            raise InputError(
                f"engine: max_batch {max_batch} and prefill_tokens {prefill_tokens} must be >= 1, and "
                f"max_len {max_len} between 1 and the model's {limit} positions"
            )
        weight = model.lm_head_weight.detach()
        self.model, self.max_batch, self.max_len, self.prefill_tokens = model, max_batch, max_len, prefill_tokens
        self.deterministic, self.longest_first = deterministic, longest_first
        self._trunk = Trunk(model, deterministic, prefill_tokens)
        self._plan = plan_cache(
            model.config,
            weight,
            rows=max_batch,
            max_len=max_len,
            page_size=page_size,
            num_pages=num_pages,
            fixed=deterministic,
            shared_decode=shared_decode,
        )
        self.watch: Watch | None = None
        self._stops = None if tokenizer is None else StopStrings(tokenizer, model.config.vocab_size)
        self._slots = round_up(max_batch, BLOCK)  # rows of the decode state: every padded batch fits
        self._cu = torch.arange(self._slots + 1, dtype=torch.int32, device=weight.device)
        self._epoch = 0
        self._pipelined = weight.is_cuda if pipelined is None else pipelined
        self._graphs, self._state = Graphs(weight.device), None
        # Of the prompt that was divided between two admissions: what is alike, its last hidden state, its requests.
        self._open: tuple[Hashable, Tensor, set[int]] | None = None

    @cached_property
    def _cache(self) -> SlotCache:
        """Made when something is generated: an engine that only scores needs none."""
        return self._plan()

    def _forget(self, version: tuple[int, ...]) -> None:
        if "_cache" in self.__dict__:
            self._cache.forget(version)

    @property
    def counters(self) -> dict[str, int]:
        """trunk_tokens, padding_tokens, prompt_tokens (asked for), prefill_tokens (computed for them),
        generated_tokens, head_rows, kv_bytes read, host_syncs."""
        return self._trunk.counters

    @property
    def pages(self) -> PageUse:
        """Pages of the KV cache: total, in use, shared, peak; zeros where the cache has slots. Makes the cache."""
        self._cache.forget(self._version())
        return self._cache.usage()

    def invalidate(self) -> None:
        """Declare that the model's weights changed: every prefix handle made so far becomes an error."""
        self._epoch += 1
        self._forget(self._version())

    def _version(self) -> tuple[int, ...]:
        """The model's, changes with `invalidate` and with every in-place update of a parameter that autograd counts."""
        return (id(self.model), self._epoch, *(p._version for p in self.model.parameters()))

    def _check_prefixes(self, prefixes: Sequence[Prefix | None]) -> None:
        version = self._version()
        self._forget(version)
        if any(prefix is not None and prefix.version != version for prefix in prefixes):
            raise InputError("engine: a prefix handle was made with other weights or by another engine; make it again")

    def prefix(self, token_ids: Sequence[int], *, after: Prefix | None = None) -> Prefix:
        """Compute a prompt prefix once; the handle serves `generate` and `score` until the weights change.

        after: a handle that the tokens follow; the new one shares its keys.
        """
        return self.prefixes([token_ids], [after])[0]

    @torch.no_grad()
    def prefixes(self, token_ids: Sequence[Sequence[int]], after: Sequence[Prefix | None]) -> list[Prefix]:
        """As `prefix`, for several at a time."""
        self._check_prefixes(after)
        begins = [Prefix((), (), None, self._version()) if handle is None else handle for handle in after]
        for tokens, begin in zip(token_ids, begins, strict=True):
            if not 0 < len(tokens) <= self.max_len - len(begin):
                raise InputError(
                    f"engine: a prefix has 1 to max_len {self.max_len} tokens, found {len(tokens)} after {len(begin)}"
                )
        made: list[Prefix] = []
        for group in scoring.bins([len(tokens) for tokens in token_ids], self.prefill_tokens):
            new = [token_ids[i] for i in group]
            hidden, kvs = self._trunk.collect(new, [list(begins[i].stretches) for i in group])
            self.counters["prefill_tokens"] += hidden.shape[0]
            ends = hidden[self._trunk.tensor([len(tokens) for tokens in new]).cumsum(0) - 1]
            for i, kv, end in zip(group, kvs, ends, strict=True):
                tokens, stretches = (*begins[i].token_ids, *token_ids[i]), (*begins[i].stretches, kv)
                made.append(Prefix(tokens, stretches, end.clone(), begins[i].version))
        return made

    @torch.no_grad()
    def score(
        self,
        items: Sequence[Tree | Sequence[int]],
        option_ids: Tensor | Sequence[Sequence[int]],
        *,
        prefix: Prefix | None = None,
        return_mass: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities [B, K], normalised over K options, of the first token after each prompt or tree leaf.

        items: prompts (token ids) or trees, whose leaves count in depth-first order; option_ids [K, G]: the token
        variants of an option, -1 = absent. With return_mass also [B]: the options' share of the full vocabulary.
        """
        self._check_prefixes([prefix])
        return scoring.score(
            self._trunk,
            items,
            torch.as_tensor(option_ids),
            prefix,
            max_len=self.max_len,
            max_tokens=self.prefill_tokens,
            return_mass=return_mass,
        )

    @torch.no_grad()
    def logprobs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[list[float]]:
        """Log-probability of every response token after its prompt, by the trainer's packed forward.

        On a GPU the head is the tiled one, whose last bits may differ from those of the trainer's losses.
        """
        return scoring.logprobs(self._trunk, prompts, responses, temperature, max_tokens=self.prefill_tokens)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        keys: Sequence[int] | None = None,
        prefix: Prefix | Sequence[Prefix | None] | None = None,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in the order of the prompts; a prompt is `prefix.token_ids + prompt`.

        keys (63-bit; default: the prompt's index) and the token's index in the response decide all randomness.
        Equal prompts that follow each other are prefilled once. progress(index, completion) is called as they finish.
        With `keep` every completion that took a token has a handle for prompts that continue it, made by a copy of its
        keys (see Prefix for the memory): of the prompt and of all tokens of the response but the last, or, where
        `deterministic`, of the prompt alone: a key computed in decoding has other last bits than one from a prefill.
        """
        queue = requests = make_requests(
            prompts, sampling, keys, prefix, self.max_len, self.model.config.vocab_size, self._stops is not None
        )
        self._check_prefixes([r.prefix for r in requests])
        self.counters["prompt_tokens"] += sum(r.length for r in queue if r.sampling.max_new_tokens)
        done: dict[int, Completion] = {}

        def finish(completions: list[tuple[int, Completion]]) -> None:
            for index, completion in completions:
                done[index] = completion
                self.counters["generated_tokens"] += len(completion.token_ids)
                if progress is not None:
                    progress(index, completion)

        finish([(r.index, Completion([], [], "length")) for r in queue if r.sampling.max_new_tokens == 0])
        # Taken from the end. Equal prompts stay together.
        queue = [r for r in queue if r.sampling.max_new_tokens][:: 1 if self.longest_first else -1]
        if self.longest_first:
            queue.sort(key=lambda r: r.total)
        if queue:
            self._state = self._state_for([r.sampling for r in queue])
            try:
                self._run(queue, finish, requests if keep else None)
            finally:
                self._open = None
                self._cache.clear()
                self._cache.vacate(slice(0, self.max_batch))
                self._state.end(slice(0, self._slots))
        return [done[i] for i in range(len(prompts))]

    def _run(
        self, queue: list[Request], finish: Callable[[list[tuple[int, Completion]]], None],
        kept_of: list[Request] | None,
    ) -> None:  # fmt: skip
        """Admit requests from the queue's end and decode until all have finished; `kept_of`: all requests by their
        index, if handles are to be kept."""
        rows = Rows(self._cache, self._state, [r.sampling for r in queue], self._stops, self.watch)
        version = self._addresses(), self._state.version
        limit = self.max_batch
        while queue or len(rows):
            ready: list[Request] = []
            patience = min(max(1, limit // 8), len(queue))  # free rows worth a prefill
            if queue and (not len(rows) or limit - len(rows) >= patience):
                ready = self._reserve(queue, rows)
                # Where pages ran short, the next try waits until some of the rows have left.
                limit = min(self.max_batch, len(rows) + len(ready)) if queue else self.max_batch
                if not ready and not len(rows):
                    raise RuntimeError(f"engine: no request runs and pages are short: {self._cache.usage()}")
            if ready:
                self._admit(rows, ready, queue[-1] if queue else None)
            elif self._pipelined:
                for _ in range(min(BURST, rows.left())):
                    self._replay(rows, version)
            else:
                self._decode(rows)
            self.counters["host_syncs"] += 1  # the flags; counts, tokens and log-probs of rows that ended
            last = not rows.left()
            if flagged := rows.look(wait=last):
                self.counters["host_syncs"] += 3
                ended = rows.ended(flagged)
                kept = {} if kept_of is None else self._kept(rows, ended, kept_of)
                finish([(i, replace(c, kept=kept[i]) if kept else c) for i, c in rows.leave(ended)])
            if last and len(rows):
                raise RuntimeError(f"engine: {len(rows)} rows go on beyond their token limit")

    def _state_for(self, samplings: list[Sampling]) -> DecodeState:
        """The decode state, made anew only where the last one is too small: graphs hold its addresses."""
        # Graphs are for a whole stage: room for any response, and for some more stop tokens than the first calls have.
        most = self.max_len if self._pipelined else max(s.max_new_tokens for s in samplings)
        ends = max(len(s.stop_token_ids) for s in samplings)
        if self._state is None or not self._state.serves(most, ends):
            ends = round_up(max(1, ends), 4) if self._pipelined else max(1, ends)
            return DecodeState(self._slots, most, ends, self._trunk.device, pipelined=self._pipelined)
        return self._state

    def _addresses(self) -> tuple[int, ...]:
        """Where the weights are; an update in place leaves them there."""
        return tuple(p.data_ptr() for p in self.model.parameters()) if self._pipelined else ()

    def _reserve(self, queue: list[Request], rows: Rows) -> list[Request]:
        """Take requests from the queue's end for the rows behind the active ones, while there are rows and room."""
        start = len(rows)
        # Rows with the prompt that was divided between the last admission and this one still have its keys.
        first: dict[Hashable, int] = {}
        if self._open is not None:
            alike, _, same = self._open
            first |= [(alike, row) for row, index in rows.requests() if index in same][:1]
        ready: list[Request] = []
        while queue and start + len(ready) < self.max_batch:
            r, row = queue[-1], start + len(ready)
            twin = first.setdefault(r.alike, row)
            r.twin = twin if twin < row else None
            if not self._cache.reserve(row, r.total, r.length, r.prefix, r.twin):
                break
            ready.append(queue.pop())
        return ready

    def _kept(self, rows: Rows, ended: list[Ended], requests: list[Request]) -> dict[int, Prefix]:
        """Handles of the rows that are about to leave, by request."""
        kept, version = {}, self._version()
        for one in ended:
            request = requests[rows.active[one.row].request]
            before = request.length - len(request.prompt)
            drawn = [] if self.deterministic else one.tokens[:-1]  # the last one was never an input
            tokens = [*request.prompt, *drawn]
            own = self._cache.read(one.row, before, request.length + len(drawn)).clone()
            shared = request.prefix or Prefix((), (), None, version)
            kept[request.index] = Prefix((*shared.token_ids, *tokens), (*shared.stretches, own), None, version)
        return kept

    def _admit(self, rows: Rows, requests: list[Request], following: Request | None) -> None:
        """Prefill requests into their rows and sample their first tokens; equal prompts are computed once."""
        at = rows.join(
            [r.index for r in requests],
            [r.sampling for r in requests],
            [r.length for r in requests],
            [r.key for r in requests],
        )
        self._cache.seat(at)
        unique = [n for n, r in enumerate(requests) if r.twin is None]
        # The last row is for those that continue a prompt whose end is known from the last admission.
        hidden = self._cache.kv.new_zeros(len(requests) + 1, self.model.config.hidden_size)
        if self._open is not None:
            hidden[-1] = self._open[1]
        for group in scoring.bins([len(requests[n].prompt) for n in unique], self.prefill_tokens):
            members = [unique[g] for g in group]
            ends = self._prefill([requests[n] for n in members], [at.start + n for n in members])
            hidden.index_copy_(0, self._trunk.tensor(members), ends)
        sources = []
        for n, r in enumerate(requests):
            sources.append(n if r.twin is None else r.twin - at.start if r.twin >= at.start else len(requests))
            if r.twin is not None:
                self._cache.share(at.start + n, r.twin, r.length)
        states = hidden.index_select(0, self._trunk.tensor(sources))
        rows.emit(at, self._trunk.logits(states, self._slots))
        self._open = None
        if following is not None and following.alike == requests[-1].alike:
            same = {r.index for r in requests if r.alike == following.alike}
            self._open = following.alike, states[-1].clone(), same

    def _prefill(self, requests: list[Request], rows: list[int]) -> Tensor:
        """Write the prompts' keys and values into their rows -> [n, H]: what predicts each first token."""
        prompts, prefixes = [r.prompt for r in requests], [r.prefix for r in requests]
        for row, prefix in zip(rows, prefixes, strict=True):
            if prefix is not None:
                self._cache.fill(row, prefix)
        if not any(prompts):
            return torch.stack([prefix.last_hidden for prefix in prefixes])
        trunk = self._trunk
        where = trunk.tensor([row for row, prompt in zip(rows, prompts, strict=True) for _ in prompt])
        index = self._cache.index(
            where, trunk.tensor([position for r in requests for position in range(r.length - len(r.prompt), r.length)])
        )
        contexts = [[] if prefix is None else list(prefix.stretches) for prefix in prefixes]
        hidden = trunk.packed(prompts, contexts, lambda layer, k, v: self._cache.write(layer, index, k, v))
        self.counters["prefill_tokens"] += hidden.shape[0]
        return trunk.last(hidden, [len(prompt) for prompt in prompts], prefixes)

    def _decode(self, rows: Rows) -> None:
        """One more token for every active row."""
        count, width = len(rows), self._cache.width(rows.width())
        padded = self._trunk.rows(count) if self._trunk.device.type == "cpu" or not self.deterministic else self._slots
        rows.emit(slice(0, count), self._forward(rows.state, count, padded, width))
        self._count_step(rows, count, padded, width)

    def _replay(self, rows: Rows, version: tuple) -> None:
        """The same from a graph, whose rows and positions may be more than are needed."""
        count, cache = len(rows), self._cache
        batch, width = self.max_batch, cache.width(self.max_len)
        if not self.deterministic:
            batch, width = batch_bucket(count, batch), context_bucket(cache.width(rows.width()), width)
        shape = batch, width, cache.variant, rows.state.truncates
        self._graphs.run(shape, version, partial(self._step, rows.state, batch, width))
        self._count_step(rows, count, batch, width)

    def _step(self, state: DecodeState, batch: int, width: int) -> None:
        """What is captured: no host read, nothing that depends on the requests but through tensors."""
        state.advance(slice(0, batch), self._forward(state, batch, batch, width))

    def _forward(self, state: DecodeState, count: int, rows: int, width: int) -> Tensor:
        return self._trunk.decode(state.token, state.position, self._cache, count, rows, width, self._cu)[:count]

    def _count_step(self, rows: Rows, count: int, padded: int, width: int) -> None:
        """Count the work of a step for `count` rows in a batch of `padded`."""
        cached = (rows.cached() if self._cache.ragged else count * width) + rows.common()
        self.counters["kv_bytes"] += cached * self._cache.bytes_per_token
        self.counters["trunk_tokens"] += count
        self.counters["padding_tokens"] += padded - count
        self.counters["head_rows"] += count
        rows.step += 1
