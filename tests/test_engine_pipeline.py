"""Pipelined decoding: steps that are replayed and queued ahead give what steps one by one give."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from replayed import Recorder, recording
from test_engine import Letters, engine, make_model, some_prompts
from test_engine_pages import SHARED, Cancelled, assert_close, assert_empty, workload

from cai_fast.engine import Completion, Engine, Sampling, graphs, rows, state
from cai_fast.engine.graphs import Graphs, batch_bucket, context_bucket
from cai_fast.engine.pages import PagedCache
from cai_fast.model import Model, lora

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Model:
    model = make_model()
    model.rope_tables(torch.tensor([1023]))  # on a GPU the table is whole from the start
    return model


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The steps recorded in a test, in place of CUDA graphs."""
    recorders: list[Recorder] = []
    monkeypatch.setattr(graphs, "capture", recording(recorders))
    return recorders


def queued(model: Model, **options: object) -> Engine:
    return engine(model, **{"pipelined": True, "deterministic": False, "tokenizer": Letters(), **options})


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_queued_steps_give_what_single_steps_give(
    model: Model, made: list[Recorder], page_size: int, deterministic: bool
) -> None:
    prompts, sampling = workload()
    want = engine(model, tokenizer=Letters()).generate(prompts, sampling)
    runner = queued(model, page_size=page_size, max_batch=11, deterministic=deterministic)
    for _ in range(2):  # the second time everything is replayed
        found = runner.generate(prompts, sampling)
        assert_close(model, prompts, found, want)
    assert {c.finish_reason for c in found} == {"stop", "length"} and [] in [c.token_ids for c in found]
    batches = {shape[0] for shape in runner._graphs._replays}
    assert {11} <= batches <= ({11} if deterministic else {1, 2, 4, 8, 11})
    assert len(made) == len(runner._graphs._replays) and (deterministic or len(batches) > 1)
    if page_size:
        assert_empty(runner)
        assert (runner._cache.table == runner._cache.trash).all()
    assert (runner._state.flags == state.STOPPED).all() and not runner._state.position.any()


def test_laws_differ_between_rows_and_calls(model: Model, made: list[Recorder]) -> None:
    prompts, runner = some_prompts(24), queued(model, page_size=16)
    laws = [(0.0, 0, 1.0), (0.6, 5, 1.0), (1.0, 0, 0.8), (1.0, 0, 1.0), (1.3, 7, 0.9)]
    for chosen in (laws, laws[3:4], laws[:2], laws):
        sampling = [Sampling(*chosen[i % len(chosen)], max_new_tokens=12) for i in range(24)]
        assert_close(model, prompts, runner.generate(prompts, sampling), engine(model).generate(prompts, sampling))


def test_graphs_serve_a_whole_stage(model: Model, made: list[Recorder]) -> None:
    runner, prompts = queued(model, page_size=16, deterministic=True), some_prompts(12)
    calls = [
        Sampling(max_new_tokens=9),
        Sampling(max_new_tokens=60, top_p=0.9),
        Sampling(max_new_tokens=20, stop_strings=("ax",), stop_token_ids=(3, 4)),
        Sampling(max_new_tokens=30, stop_strings=("b", "ax"), top_k=7),
    ]
    for sampling in calls:
        runner.generate(prompts, sampling)
    known = len(made)
    for _ in range(2):
        for sampling in calls:
            runner.generate(prompts, sampling)
    assert known <= 2 and len(made) == 2  # with and without truncation


def test_fixed_shapes_give_equal_bits_in_any_company(model: Model, made: list[Recorder]) -> None:
    prompts, sampling = workload()
    sampling = [replace(s, top_p=0.9) if i % 4 == 1 else s for i, s in enumerate(sampling)]
    runner = queued(model, page_size=16, deterministic=True)
    whole = runner.generate(prompts, sampling)
    order = list(range(40))
    random.Random(1).shuffle(order)
    for part in (order, order[:9], [7], [39]):
        found = runner.generate([prompts[i] for i in part], [sampling[i] for i in part], keys=part)
        assert found == [whole[i] for i in part]
    assert runner.counters["padding_tokens"] > 0


def test_a_weight_update_in_place_needs_no_new_graph(made: list[Recorder]) -> None:
    model, sampling = make_model(), Sampling(temperature=0, max_new_tokens=40)
    model.rope_tables(torch.tensor([1023]))
    runner, prompts = queued(model, page_size=16), some_prompts(5)
    first = runner.generate(prompts, sampling)
    count = len(made)
    model.load_state_dict(make_model(seed=1).state_dict())
    assert runner.generate(prompts, sampling) == engine(model).generate(prompts, sampling) != first
    assert len(made) == count
    model.lm_head.weight = torch.nn.Parameter(make_model(seed=2).lm_head.weight.detach().clone())  # it moved
    assert runner.generate(prompts, sampling) == engine(model).generate(prompts, sampling)
    assert len(made) > count


def test_adapters_are_part_of_a_graph(made: list[Recorder]) -> None:
    model, sampling, prompts = make_model(), Sampling(temperature=0, max_new_tokens=40), some_prompts(5)
    model.rope_tables(torch.tensor([1023]))
    lora.add_adapters(model, 4, 8.0, ("q_proj", "v_proj", "down_proj"), 0)
    up = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(up) == 6
    runner, seen, count = queued(model, page_size=16), [], 0
    for step in range(3):
        seen.append(runner.generate(prompts, sampling))
        assert seen[-1] == engine(lora.merge(model)).generate(prompts, sampling)
        count = count or len(made)
        assert len(made) == count
        with torch.no_grad():
            for p in up:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
    assert seen[0] != seen[1] != seen[2]


def test_longer_responses_and_new_stop_strings_make_new_graphs(model: Model, made: list[Recorder]) -> None:
    runner, prompts = queued(model, page_size=16), some_prompts(12)
    single = engine(model, tokenizer=Letters())
    for options in (
        {"max_new_tokens": 20},
        {"max_new_tokens": 30, "stop_token_ids": (3, 5)},
        {"max_new_tokens": 30, "stop_strings": ("ax",)},
        {"max_new_tokens": 30, "stop_strings": ("\nb", "yc")},
        {"max_new_tokens": 30, "stop_strings": ("ax",)},
        {"max_new_tokens": 20},
    ):
        sampling = Sampling(**options)
        assert_close(model, prompts, runner.generate(prompts, sampling), single.generate(prompts, sampling))


def test_stop_strings_found_late_cut_the_response(model: Model, made: list[Recorder]) -> None:
    prompts, stops = some_prompts(60), ("ax", "\nb", "zzzz", "yc:")
    sampling = [Sampling(max_new_tokens=60, stop_strings=stops if i % 3 else ()) for i in range(60)]
    want = engine(model, tokenizer=Letters()).generate(prompts, sampling)
    found = queued(model).generate(prompts, sampling)
    assert_close(model, prompts, found, want)
    assert sum(c.finish_reason == "stop" for c in found) > 10


def test_kept_keys_end_where_the_response_was_cut(model: Model) -> None:
    sampling, prompts = Sampling(max_new_tokens=40, stop_strings=("a", "x"), stop_token_ids=(3,)), some_prompts(20)
    runner = queued(model, page_size=16)
    handle = runner.prefix(SHARED)
    for prompt, done in zip(prompts, runner.generate(prompts, sampling, prefix=handle, keep=True), strict=True):
        tokens = [*SHARED, *prompt, *done.token_ids[:-1]]
        assert list(done.kept.token_ids) == tokens
        want = engine(model).prefix(tokens).kv
        assert (done.kept.kv - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_host_looks_once_a_burst_and_little_is_wasted(model: Model) -> None:
    runner, prompts = queued(model, max_batch=16), some_prompts(16, longest=9)
    found = runner.generate(prompts, [Sampling(max_new_tokens=100, stop_token_ids=(3,)) for _ in prompts])
    longest, drawn = max(len(c.token_ids) for c in found), sum(len(c.token_ids) for c in found)
    work = runner.counters
    looks = 2 + -(-longest // graphs.BURST) + rows.LAG
    assert looks <= work["host_syncs"] <= 4 * looks < longest  # three more where somebody has ended
    most = (1 + rows.LAG) * graphs.BURST
    assert drawn - 16 < work["trunk_tokens"] - work["prefill_tokens"] <= drawn + most * 16
    exact = queued(model, max_batch=16)
    exact.generate(prompts, Sampling(max_new_tokens=30))  # ends known in advance cost nothing
    assert exact.counters["trunk_tokens"] - exact.counters["prefill_tokens"] == 16 * 29


def test_cancelled_calls_leave_a_clean_engine(model: Model) -> None:
    runner, prompts = queued(model, page_size=16), some_prompts(20)
    sampling = [Sampling(max_new_tokens=9 + i) for i in range(20)]

    def cancel(index: int, completion: Completion) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        runner.generate(prompts, sampling, progress=cancel)
    assert_empty(runner)
    assert_close(model, prompts, runner.generate(prompts, sampling), engine(model).generate(prompts, sampling))


def test_buckets_cover_every_size() -> None:
    for limit in (1, 5, 64, 512, 1000):
        sizes = [batch_bucket(count, limit) for count in range(1, limit + 1)]
        assert all(count <= size <= limit for count, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
        assert len(set(sizes)) <= 32
    for limit in (64, 512, 5000):
        widths = [context_bucket(width, limit) for width in range(1, limit + 1)]
        assert all(width <= size <= limit for width, size in enumerate(widths, 1)) and len(set(widths)) <= 5


def test_a_graph_runs_plainly_once_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def capture(step: object, device: torch.device, pool: object) -> object:
        seen.append("capture")
        return lambda: seen.append("replay")

    monkeypatch.setattr(graphs, "capture", capture)
    kept = Graphs(torch.device("cpu"))
    for version in (1, 1, 1, 2, 2):
        kept.run("shape", version, lambda: seen.append("step"))
    assert seen == ["step", "capture", "replay", "replay", "step", "capture", "replay"]


def stopping() -> tuple[list[list[int]], list[Sampling]]:
    """A workload in which many responses end with a stop string."""
    prompts, sampling = workload()
    return prompts, [replace(s, stop_strings=("ax", "b", "\n") if s.stop_strings else ()) for s in sampling]


@pytest.fixture(scope="module")
def single(model: Model) -> list[Completion]:
    """What single steps give for it."""
    return engine(model, tokenizer=Letters()).generate(*stopping())


def check(model: Model, want: list[Completion]) -> None:
    """What the planted faults below must fail."""
    prompts, sampling = stopping()
    runner = queued(model, page_size=16, max_batch=7)
    for _ in range(2):
        assert_close(model, prompts, runner.generate(prompts, sampling), want)
    assert_empty(runner)
    assert (runner._cache.table == runner._cache.trash).all() and (runner._state.flags == state.STOPPED).all()


FAULTS = {
    "an ended row goes on": (state, "ENDED", 0),
    "flags of moved rows go to who sits there now": (rows.Rows, "_post", None),
    "stop strings are looked for at the end only": (rows.Rows, "_stop", None),
    "the flag of a stop string stays away": (state, "LOOK", 0),
    "rows that left go on": (state.DecodeState, "end", None),
    "rows that left keep their pages in the table": (PagedCache, "vacate", None),
    "the last row of a batch is left out": (Engine, "_step", None),
}


def post_rows(self: rows.Rows) -> None:
    self._posted.append(([h.request for h in self.active][::-1], self.state.flags[: len(self.active)].clone(), None))


def stop_at_end(self: rows.Rows, row: int, tokens: Sequence[int]) -> int:
    strings = self.active[row].sampling.stop_strings
    return len(tokens) if self.stops.found(strings, list(tokens)) else 0


REPLACEMENTS = {
    "_post": post_rows,
    "_stop": stop_at_end,
    "end": lambda self, rows: None,
    "vacate": lambda self, rows: None,
    "_step": lambda self, state, batch, width: STEP(self, state, batch - 1, width),
}
STEP = Engine._step


def test_the_check_of_planted_faults_passes_without_one(
    model: Model, single: list[Completion], made: list[Recorder]
) -> None:
    assert {c.finish_reason for c in single[::3]} == {"stop", "length"}
    check(model, single)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(
    model: Model, single: list[Completion], made: list[Recorder], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    where, name, value = FAULTS[fault]
    monkeypatch.setattr(where, name, REPLACEMENTS.get(name, value))
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        check(model, single)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_on_a_gpu_give_what_single_steps_give(model: Model) -> None:
    prompts, sampling = workload()
    cuda = make_model().to("cuda")
    runner = engine(cuda, tokenizer=Letters(), deterministic=False)
    want = engine(cuda, tokenizer=Letters(), deterministic=False, pipelined=False).generate(prompts, sampling)
    for _ in range(3):
        found = runner.generate(prompts, sampling)
        assert [c.finish_reason for c in found] == [c.finish_reason for c in want]
        same = sum(a.token_ids == b.token_ids for a, b in zip(found, want, strict=True))
        assert same >= 38  # a rounding may decide a draw
    assert runner._graphs._replays
