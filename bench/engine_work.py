"""What an engine does on one GPU, and what a peer does on the same tensors: decode steps, generation, judging.

A measurement is a dict of numbers; a section yields them one by one, the most important first. What cannot be measured
here says why in its place, and the others go on.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.bench_engine import BATCHING, batching_manager, prompts_of, serve
from bench.bench_feedback import STRAIGHT, Question, flat, straightforward, tree_tokens, trees
from bench.contest import FAILURES
from bench.measure import synchronize
from bench.shapes import Ceilings, Shape, decode_floor, pass_seconds, random_model, twin
from cai_fast.engine import Engine, Sampling
from cai_fast.engine.rows import Rows
from cai_fast.model import Model

Result = dict[str, Any]
Parts = Iterator[tuple[str, Result]]
"""(name of a measurement, what it found), one by one."""
OPTIONS = (5, 6)  # the two answer tokens
GLUE = 12  # tokens between the last response and the answer
UNSETTLED = 4  # decode steps from the first one, or one that was captured, that do not count


@dataclass(frozen=True)
class Load:
    """How much of everything."""

    batches: tuple[int, ...] = (256, 512, 64)
    """Rows at once, the most important first."""
    cached: int = 512
    """Tokens of a row in the middle of the steps that count."""
    shared: int = 2304
    own: int = 400
    """Tokens of a few-shot block, and of a row behind it."""
    steps: int = 48
    page: int = 64
    prompt: int = 256
    new: int = 256
    judged: tuple[tuple[int, int, int], ...] = ((1, 64, 4), (16, 8, 1))
    """(principles, comparisons that we judge, that the peer does)."""
    lengths: tuple[int, int, int] = (190, 150, 38)
    """Mean tokens of a conversation, a response and a principle: with two responses and the glue 540."""
    questions: int = 8
    """The peer's batch: with the block some 23,000 tokens."""


TINY = Load(
    batches=(4, 2), cached=24, shared=512, own=24, steps=6, page=16, prompt=8, new=10, judged=((1, 4, 2), (3, 2, 1)),
    lengths=(20, 14, 6), questions=4,
)  # fmt: skip


class Place(NamedTuple):
    """Where and what is measured."""

    shape: Shape
    load: Load
    device: torch.device
    dtype: torch.dtype
    limits: Ceilings

    def model(self) -> Model:
        return random_model(self.shape.config, self.device, self.dtype)

    def engine(self, model: Model, rows: int, length: int, kind: type[Engine], shared: int = 0, **options: Any) -> Any:
        """An engine with pages for `rows` requests of `length` tokens, of which `shared` are the same. (By default it
        takes half of the memory at most, which need not be enough.)"""
        page = self.load.page
        each, together = -(-length // page), shared // page
        return kind(
            model, max_batch=rows, max_len=length, page_size=page, num_pages=together + rows * (each - together),
            deterministic=False, **options,
        )  # fmt: skip


def attempt(work: Callable[[], Result]) -> Result:
    """What `work` returns, or why it failed; what it held on the device is free again."""
    try:
        return work()
    except FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0][:300]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds, result)."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


class Step(NamedTuple):
    """A decode step as it was queued."""

    rows: int
    cached: int
    """Tokens of all rows, the newest included."""
    known: bool
    """The shape had a graph, or needs none."""
    end: Any


class TimedEngine(Engine):
    """Notes when each decode step ends: on a GPU by an event behind it, which keeps nobody waiting."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[Step] = []

    def _replay(self, rows: Rows, version: tuple) -> None:
        self._noted(rows, partial(super()._replay, rows, version))

    def _decode(self, rows: Rows) -> None:
        self._noted(rows, partial(super()._decode, rows))

    def _noted(self, rows: Rows, step: Callable[[], None]) -> None:
        before, cached = self._shapes(), rows.cached()
        step()
        if self._trunk.device.type == "cuda":
            end: Any = torch.cuda.Event(enable_timing=True)
            end.record()
        else:
            end = time.perf_counter()
        self.steps.append(Step(len(rows), cached, before == self._shapes(), end))

    def _shapes(self) -> tuple[int, int]:
        return len(self._graphs._warm), len(self._graphs._replays)

    def times(self) -> tuple[list[float], float]:
        """(milliseconds from the end of the step before to its own, of each step that counts; tokens cached, mean)."""
        synchronize(self._trunk.device)
        new = [0, *(i for i, step in enumerate(self.steps) if not step.known)]
        counted = [i for i in range(len(self.steps)) if all(not i - UNSETTLED <= j <= i for j in new)]
        found = [_milliseconds(self.steps[i - 1].end, self.steps[i].end) for i in counted]
        return found, statistics.fmean(self.steps[i].cached for i in counted)


def _milliseconds(begin: Any, end: Any) -> float:
    return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)


def decode_step(place: Place, model: Model, rows: int, length: int, *, shared: int = 0, **options: Any) -> Result:
    """A step of `rows` rows with `length` tokens each on average, behind `shared` more that are the same for all."""
    load, vocab = place.load, model.config.vocab_size
    new = load.steps + UNSETTLED + 3
    prompt = length - load.steps // 2 - UNSETTLED - 2
    engine = place.engine(model, rows, shared + prompt + new, TimedEngine, shared, **options)
    block = engine.prefix(prompts_of([shared], vocab, 9)[0]) if shared else None
    # Without graphs nothing tells which steps compile a kernel for a new shape: the second run needs none.
    for _ in range(1 if options["pipelined"] else 2):
        engine.steps.clear()
        engine.generate(prompts_of([prompt] * rows, vocab), Sampling(max_new_tokens=new), prefix=block)
    times, cached = engine.times()
    assert {step.rows for step in engine.steps} == {rows}, "rows came or went between the steps"
    mean, different = statistics.fmean(times), cached - (rows - 1) * shared
    floor = decode_floor(model.config, rows, different, place.limits, place.dtype.itemsize)
    return {
        "ms": mean, "median ms": statistics.median(times), "slowest ms": max(times), "steps": len(times),
        "tokens/s": 1e3 * rows / mean, "cached a row": cached / rows, "floor ms": floor.total,
        "share of floor": floor.total / mean, "floor: weights ms": floor.weights,
        "floor: products ms": floor.products, "floor: cache ms": floor.cached,
    }  # fmt: skip


def decoding(place: Place) -> Parts:
    """Decode steps: the goal first, then rows behind a few-shot block, other batches, and steps without graphs."""
    load, model = place.load, place.model()
    first = load.batches[0]

    def part(rows: int, length: int, **options: Any) -> Result:
        return attempt(partial(decode_step, place, model, rows, length, **options))

    goal = part(first, load.cached, pipelined=True)
    if place.shape.step_ms and "ms" in goal:
        goal |= {"goal ms": place.shape.step_ms, "reached": goal["ms"] <= place.shape.step_ms}
    yield f"batch {first}", goal
    for on in (False, True):
        name = f"batch {first}, {load.own} behind {load.shared} shared, shared_decode {'on' if on else 'off'}"
        yield name, part(first, load.own, shared=load.shared, shared_decode=on, pipelined=True)
    for rows in load.batches[1:]:
        yield f"batch {rows}", part(rows, load.cached, pipelined=True)
    for rows in (first, load.batches[-1]):
        yield f"batch {rows}, graphs off", part(rows, load.cached, pipelined=False)


def generated(place: Place, rows: int, seconds: float) -> Result:
    """Tokens a second, and as a share of what the decode steps allow, without and with the pass over the prompts."""
    load, config = place.load, place.shape.config
    cached = rows * (load.prompt + load.new / 2)
    step = decode_floor(config, rows, cached, place.limits, place.dtype.itemsize).total / 1e3
    decode = (load.new - 1) * step  # the prompts' pass makes the first token
    prompts, made = pass_seconds(config, rows * load.prompt, place.limits), rows * load.new
    return {
        "tokens/s": made / seconds, "seconds": seconds, "share of decode floor": decode / seconds,
        "share of floor": (prompts + decode) / seconds, "floor: decode tokens/s": made / decode,
        "floor: tokens/s": made / (prompts + decode),
    }  # fmt: skip


def generate(place: Place, model: Model, rows: int) -> Result:
    """Ours: all rows start together and take the same number of tokens."""
    load = place.load
    engine = place.engine(model, rows, load.prompt + load.new, Engine, pipelined=True)
    prompts = prompts_of([load.prompt] * rows, model.config.vocab_size)
    # One row of full length makes the buffers as large as they get; a few steps of all rows capture their graph.
    engine.generate(prompts, [Sampling(max_new_tokens=load.new if i == 0 else 4) for i in range(rows)])
    seconds, done = timed(lambda: engine.generate(prompts, Sampling(max_new_tokens=load.new)), place.device)
    assert {len(c.token_ids) for c in done} == {load.new}
    return generated(place, rows, seconds)


def generate_peer(place: Place, theirs: Any, rows: int) -> Result:
    """transformers' continuous batching; its cache and graphs are made before, and a few requests have gone ahead."""
    load = place.load
    # Different prompts: it keeps the blocks of those it has seen.
    first, prompts = (prompts_of([load.prompt] * rows, place.shape.config.vocab_size, seed) for seed in (1, 0))
    with batching_manager(theirs, load.new) as manager:
        serve(manager, first, [4] * rows)
        seconds, _ = timed(lambda: serve(manager, prompts, [load.new] * rows), place.device)
    return generated(place, rows, seconds)


def compared(mine: Result, peer: Result, rate: str) -> Result:
    """The peer's measurement with our rate in units of its."""
    both = rate in mine and rate in peer
    return peer | ({"our rate over its": mine[rate] / peer[rate]} if both else {})


def throughput(place: Place) -> Parts:
    """Generation by us, then on the same tensors by the peer."""
    model, mine = place.model(), {}
    for rows in place.load.batches:
        mine[rows] = attempt(partial(generate, place, model, rows))
        yield f"batch {rows}", mine[rows]
    for rows in place.load.batches:
        found = attempt(lambda rows=rows: generate_peer(place, twin(model), rows))
        yield f"batch {rows}, {BATCHING}", compared(mine[rows], found, "tokens/s")


def ragged(mean: int, count: int, seed: int) -> list[int]:
    """Lengths as texts have them: log-normal around `mean`, at least 4."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(0.5).exp()
    return (drawn / drawn.mean() * mean).round().clamp_min(4).long().tolist()


class Asked(NamedTuple):
    """Comparisons to judge and the principles to judge them by: random tokens, random lengths."""

    comparisons: list[Question]
    principles: list[list[int]]

    @classmethod
    def draw(cls, load: Load, vocab: int, comparisons: int, principles: int, seed: int) -> "Asked":
        conversation, response, principle = load.lengths
        glue = prompts_of([GLUE], vocab, seed)[0]
        talks = prompts_of(ragged(conversation, comparisons, seed), vocab, seed + 1)
        answers = prompts_of(ragged(response, 2 * comparisons, seed + 2), vocab, seed + 3)
        made = [Question(talk, answers[2 * i : 2 * i + 2], glue) for i, talk in enumerate(talks)]
        return cls(made, prompts_of(ragged(principle, principles, seed + 4), vocab, seed + 5))


def judge(place: Place, model: Model, principles: int, comparisons: int) -> tuple[Result, Tensor]:
    """Ours: (comparisons a second, log-probs). What is timed has other lengths than what went before, as in life."""
    load, vocab = place.load, model.config.vocab_size
    engine = Engine(model, max_batch=1, max_len=model.config.max_position_embeddings, deterministic=False)
    block, options = engine.prefix(prompts_of([load.shared], vocab, 9)[0]), torch.tensor(OPTIONS)[:, None]

    def work(asked: Asked) -> Tensor:
        return engine.score(trees(*asked, False), options, prefix=block).cpu()

    first, asked = (Asked.draw(load, vocab, comparisons, principles, seed) for seed in (20, 10))
    work(first)
    seconds, logprobs = timed(lambda: work(asked), place.device)
    tokens = sum(tree_tokens(tree) for tree in trees(*asked, False))
    floor = pass_seconds(model.config, tokens, place.limits)
    return {
        "comparisons/s": comparisons / seconds, "seconds": seconds, "floor: comparisons/s": comparisons / floor,
        "share of floor": floor / seconds, "tokens a comparison": tokens / comparisons,
    }, logprobs  # fmt: skip


def judge_peer(place: Place, theirs: Any, principles: int, comparisons: int, drawn: int) -> tuple[Result, Tensor]:
    """The first of the `drawn` comparisons as whole questions in left-padded batches, as `judge`."""
    load, vocab = place.load, place.shape.config.vocab_size
    block, score = prompts_of([load.shared], vocab, 9)[0], straightforward(theirs, load.questions)

    def work(asked: Asked) -> Tensor:
        prompts = [block + prompt for prompt in flat(asked.comparisons[:comparisons], asked.principles, False)]
        return score((prompts, []))["logprob"]

    first, asked = (Asked.draw(load, vocab, drawn, principles, seed) for seed in (20, 10))
    work(first)
    seconds, logprobs = timed(lambda: work(asked), place.device)
    return {"comparisons/s": comparisons / seconds, "seconds": seconds}, logprobs


def judging(place: Place) -> Parts:
    """Comparisons by one principle, then by several, each in both orders; then the same by the peer."""
    model, mine, logprobs = place.model(), {}, {}

    def ours(principles: int, comparisons: int) -> Result:
        found, logprobs[principles] = judge(place, model, principles, comparisons)
        return found

    def peer(principles: int, drawn: int, comparisons: int) -> Result:
        found, values = judge_peer(place, twin(model), principles, comparisons, drawn)
        if principles in logprobs:
            found["largest difference"] = (logprobs[principles][: len(values)] - values).abs().max().item()
        return found

    for principles, comparisons, _ in place.load.judged:
        found = mine[principles] = attempt(partial(ours, principles, comparisons))
        goal = place.shape.comparisons
        if goal and principles == 1 and "comparisons/s" in found:
            found |= {"goal comparisons/s": goal, "reached": found["comparisons/s"] >= goal}
        yield f"{principles} x 2 questions", found
    for principles, drawn, comparisons in place.load.judged:
        found = attempt(partial(peer, principles, drawn, comparisons))
        yield f"{principles} x 2 questions, {STRAIGHT}", compared(mine[principles], found, "comparisons/s")
