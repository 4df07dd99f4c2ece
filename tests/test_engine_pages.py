"""The paged cache: outputs as from slots, sharing, waiting for pages, invalidation, and nothing left behind."""

import gc
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import pytest
import torch
from test_engine import CONFIG, VOCAB, Letters, engine, make_model, replay, some_prompts

from cai_fast.engine import Completion, Engine, Prefix, Sampling, pages
from cai_fast.engine.cache import SlotCache
from cai_fast.engine.pages import PagedCache
from cai_fast.errors import InputError
from cai_fast.model import Model, ModelConfig

SIZES = [1, 16, 64]
SHARED = [(7 * i + i // 5) % VOCAB for i in range(45)]  # with pages of 16: two full ones and a partial one


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def audit(runner: Engine) -> None:
    """Every page is free or held exactly as often as its count says, and the table says what the host knows."""
    cache = runner._cache
    held = Counter(chain(*cache._rows.values(), *(pages for _, _, pages in cache._prefixes.values())))
    assert [held[page] for page in range(len(cache._refs))] == cache._refs
    assert sorted([*cache._free, *held]) == list(range(len(cache._refs)))
    for row, owned in cache._rows.items():
        assert cache.table[row, : len(owned)].tolist() == owned


def assert_empty(runner: Engine) -> None:
    audit(runner)
    use = runner.pages
    assert (use.in_use, use.shared) == (0, 0) and len(runner._cache._free) == use.total
    assert not runner._cache._rows and not any(runner._cache._refs)


def workload(count: int = 40) -> tuple[list[list[int]], list[Sampling]]:
    """Prompts of one token and more, some of them equal; lengths, laws and stops differ."""
    prompts = some_prompts(count - count // 4, longest=60)
    prompts = [*prompts, *prompts[: count // 4 - 2], [4], [4]]
    sampling = [
        Sampling(
            max_new_tokens=i % 31,
            stop_token_ids=(3,),
            stop_strings=("ax", "\nb") if i % 3 == 0 else (),
            temperature=(1.0, 0.6)[i % 5 == 0],
        )
        for i in range(count)
    ]
    return prompts, sampling


def assert_close(model: Model, prompts: Sequence[list[int]], found: list[Completion], want: list[Completion]) -> None:
    """Same tokens and ends; log-probs within 1e-5 of the largest logit (at the lowest temperature used)."""
    for prompt, a, b in zip(prompts, found, want, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        if a.token_ids:
            scale = replay(model, prompt, a.token_ids).abs().max() / 0.6
            assert (torch.tensor(a.logprobs) - torch.tensor(b.logprobs)).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("size", SIZES)
def test_pages_give_what_slots_give_in_any_batch(model: Model, size: int) -> None:
    prompts, sampling = workload()
    want = engine(model, tokenizer=Letters()).generate(prompts, sampling)
    assert {c.finish_reason for c in want} == {"stop", "length"} and [] in [c.token_ids for c in want]

    def run(order: Sequence[int], **options: object) -> list[Completion]:
        runner = engine(model, tokenizer=Letters(), page_size=size, **options)
        found = runner.generate([prompts[i] for i in order], [sampling[i] for i in order], keys=order)
        assert_empty(runner)
        return found

    whole = run(range(40))
    assert_close(model, prompts, whole, want)
    order = list(range(40))
    random.Random(1).shuffle(order)
    assert run(order, max_batch=5, prefill_tokens=50) == [whole[i] for i in order]
    assert run(order, num_pages=-(-160 // size)) == [whole[i] for i in order]
    assert [run([i], max_batch=1)[0] for i in (0, 7, 39)] == [whole[i] for i in (0, 7, 39)]
    fast = run(order, deterministic=False)
    assert_close(model, [prompts[i] for i in order], fast, [want[i] for i in order])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1, 45, 64, 130])
def test_prefix_pages_change_nothing(model: Model, size: int, length: int) -> None:
    shared, rest = [(7 * i + i // 5) % VOCAB for i in range(length)], [*some_prompts(10, longest=20), [], []]
    slots, runner = engine(model, max_len=200), engine(model, max_len=200, page_size=size, max_batch=5)
    sampling = Sampling(max_new_tokens=20)
    want = slots.generate(rest, sampling, prefix=slots.prefix(shared))
    plain = runner.generate([shared + prompt for prompt in rest], sampling)
    assert_empty(runner)
    handle = runner.prefix(shared)
    found = runner.generate(rest, sampling, prefix=handle)
    audit(runner)
    assert runner.pages.in_use == length // size
    mixed = runner.generate([rest[0], shared + rest[1]], sampling, prefix=[handle, None])
    for other in (found, plain, mixed):
        count = len(other)
        assert_close(model, [shared + prompt for prompt in rest[:count]], other, want[:count])


@pytest.mark.parametrize("size", SIZES)
def test_a_row_reads_as_the_prefill_of_its_tokens(model: Model, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    runner, rest = engine(model, page_size=size), [[5] * 9, [6] * 30, [5] * 9]
    whole = [runner.prefix([*SHARED, *prompt]).kv for prompt in rest]
    read: list[torch.Tensor] = []
    watch_admission(monkeypatch, lambda e: read.extend(e._cache.read(i, 0, kv.shape[3]) for i, kv in order))
    order = list(enumerate([whole[1], whole[0], whole[0]]))  # the longest first
    runner.generate(rest, Sampling(max_new_tokens=2), prefix=runner.prefix(SHARED))
    assert len(read) == 3
    for found, (_, want) in zip(read, order, strict=True):
        assert (found - want).abs().max() <= 1e-5 * want.abs().max()


def watch_admission(monkeypatch: pytest.MonkeyPatch, note: Callable[[Engine], None]) -> None:
    """Call `note` after every admission to pages."""
    original = Engine._admit

    def admit(self: Engine, *arguments: object) -> object:
        flagged = original(self, *arguments)
        if isinstance(self._cache, PagedCache):
            audit(self)
            note(self)
        return flagged

    monkeypatch.setattr(Engine, "_admit", admit)


def test_samples_of_one_prompt_share_its_full_pages(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    watch_admission(monkeypatch, lambda e: seen.append((e._cache.usage().in_use, e._cache.usage().shared)))
    for length, full in ((40, 2), (48, 3), (7, 0)):
        prompt, sampling = [i % VOCAB for i in range(length)], Sampling(max_new_tokens=30)
        runner = engine(model, page_size=16)
        found = runner.generate([prompt] * 8, sampling)
        own = -(-(length + 30) // 16) - full
        assert seen.pop() == (full + 8 * own, full) and not seen
        assert runner.counters["prefill_tokens"] == length and runner.pages.peak == full + 8 * own
        assert_close(model, [prompt] * 8, found, engine(model).generate([prompt] * 8, sampling))
        assert len({tuple(c.token_ids) for c in found}) > 4
        assert_empty(runner)


def test_prefix_pages_live_once_and_as_long_as_the_handle(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    watch_admission(monkeypatch, lambda e: seen.append((e._cache.usage().in_use, e._cache.usage().shared)))
    runner, sampling = engine(model, page_size=16), Sampling(max_new_tokens=10)
    handle, second = runner.prefix(SHARED), runner.prefix(SHARED[:20])
    assert runner.pages.in_use == 0  # made on first use
    rest = some_prompts(6, longest=9)
    assert len({tuple(p) for p in rest}) == 6
    first = runner.generate(rest, sampling, prefix=handle)
    own = sum(-(-(45 + len(p) + 10) // 16) - 2 for p in rest)
    assert seen == [(2 + own, 2)] and runner.pages[1:3] == (2, 0)
    assert runner.generate(rest, sampling, prefix=handle) == first and seen[1] == seen[0]
    runner.generate(rest[:1], sampling, prefix=second)
    assert runner.pages.in_use == 3
    del handle
    gc.collect()
    assert runner.pages.in_use == 1
    del second
    gc.collect()
    assert_empty(runner)


def test_prefix_pages_are_remade_after_a_weights_change() -> None:
    changed, sampling = make_model(), Sampling(max_new_tokens=10, temperature=0)
    runner = engine(changed, page_size=16)
    handle = runner.prefix(SHARED)
    before = runner.generate([[1]], sampling, prefix=handle)
    assert runner.pages.in_use == 2
    runner.invalidate()
    assert_empty(runner)
    with pytest.raises(InputError, match="other weights"):
        runner.generate([[1]], sampling, prefix=handle)
    handle = runner.prefix(SHARED)
    assert runner.generate([[1]], sampling, prefix=handle) == before and runner.pages.in_use == 2
    changed.load_state_dict(make_model(seed=1).state_dict())
    assert_empty(runner)  # noticed without `invalidate`
    after = runner.generate([[1]], sampling, prefix=runner.prefix(SHARED))
    assert after != before
    assert_close(changed, [[*SHARED, 1]], after, engine(changed).generate([[*SHARED, 1]], sampling))


def test_unused_prefixes_make_room_for_requests(model: Model) -> None:
    runner = engine(model, page_size=16, num_pages=10, max_batch=4)
    handles = [runner.prefix([i] * 80) for i in range(3)]  # five pages each
    sampling, want = Sampling(max_new_tokens=20), []
    for _ in range(2):
        found = [runner.generate([[5]] * 3, sampling, prefix=handle) for handle in handles]
        assert runner.pages.in_use in (5, 10)
        audit(runner)
        want = want or found
        assert found == want
    full = runner.generate([[1] * 140], sampling)  # ten pages: no prefix can stay
    assert runner.pages.in_use == 0 and full == engine(model, page_size=16).generate([[1] * 140], sampling)


def test_admission_waits_for_pages(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    active: list[int] = []
    watch_admission(monkeypatch, lambda e: active.append(len(e._cache._rows)))
    prompts, sampling = some_prompts(12, longest=20), Sampling(max_new_tokens=60)
    runner = engine(model, page_size=16, num_pages=11, max_len=80)
    found = runner.generate(prompts, sampling)
    assert max(active) == 2 and runner.pages.peak <= 11  # 4 or 5 pages each, though there are 16 rows
    monkeypatch.undo()
    assert found == engine(model, page_size=16, max_len=80).generate(prompts, sampling)
    assert_empty(runner)


def test_bytes_read_are_those_of_each_rows_own_positions(model: Model) -> None:
    runner = engine(model, page_size=16)
    runner.generate([[5] * 9, [6] * 30], [Sampling(max_new_tokens=4), Sampling(max_new_tokens=2)])
    token = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    assert runner.counters["kv_bytes"] == (10 + 11 + 12 + 31) * token


def test_no_and_empty_requests_need_no_page(model: Model) -> None:
    runner = engine(model, page_size=16)
    assert runner.generate([], Sampling()) == []
    assert runner.generate([[5], [6]], Sampling(max_new_tokens=0)) == [Completion([], [], "length")] * 2
    assert runner.pages == (160, 0, 0, 0)


def test_what_does_not_fit_is_refused_upfront(model: Model) -> None:
    with pytest.raises(InputError, match=r"9 pages of 16 tokens .* max_len 160, which needs 10"):
        engine(model, page_size=16, num_pages=9)
    with pytest.raises(InputError, match="page_size -1"):
        engine(model, page_size=-1)
    assert type(engine(model)._cache) is SlotCache and type(engine(model, page_size=0)._cache) is SlotCache
    windowed = make_model(replace(CONFIG, sliding_window=24, model_type="mistral"))
    with pytest.raises(InputError, match="sliding window"):
        engine(windowed, page_size=16)
    prompts, sampling = some_prompts(3, longest=10), Sampling(max_new_tokens=10)
    assert len(engine(windowed, page_size=16, max_len=24).generate(prompts, sampling)) == 3  # the window sees all


def test_gpu_pages_are_what_free_memory_holds(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        device = type("Device", (), {"type": "cuda"})

        def element_size(self) -> int:
            return 4

    def made(free: int, **options: object) -> object:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
        given = {
            "rows": 8,
            "max_len": 640,
            "page_size": None,
            "num_pages": None,
            "fixed": False,
            "shared_decode": None,
        } | options
        return pages.plan_cache(CONFIG, Cuda(), **given)()

    monkeypatch.setattr(pages, "PagedCache", lambda config, count, size, like, **more: (count, size))
    page = 64 * 2 * 2 * 2 * 16 * 4
    assert made(2**40) == (80, 64)
    assert made(2 * 33 * page - 2000) == (33, 64)
    assert made(2**40, page_size=16) == (320, 16)
    with pytest.raises(InputError, match=r"9 pages of 64 tokens \(0.0312 MiB each\)"):
        made(2 * 10 * page - 2001)


TINY = ModelConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    max_position_embeddings=64,
)


class Cancelled(Exception):
    """What a caller raises to end a `generate` call early."""


@pytest.mark.parametrize("pipelined", [False, True])
def test_ten_thousand_requests_and_cancellations_leave_no_page_behind(pipelined: bool) -> None:
    rng, model = random.Random(0), make_model(TINY)
    runner = Engine(model, max_batch=128, max_len=24, page_size=4, num_pages=500, pipelined=pipelined)
    handles: list[Prefix | None] = [None, *(runner.prefix([i] * n) for i, n in enumerate((3, 4, 9)))]
    prompts = [[rng.randrange(16) for _ in range(rng.randint(1, 7))] for _ in range(5_000)]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    sampling = [
        Sampling(max_new_tokens=rng.randint(0, 8), stop_token_ids=tuple(rng.sample(range(16), rng.randint(0, 2))))
        for _ in prompts
    ]
    prefixes = [rng.choice(handles) for _ in prompts]
    found: dict[int, Completion] = {}
    start, cancelled = 0, 0
    while start < 10_000:
        part = slice(start, start + 1_000)
        last = rng.randint(100, 900) if rng.random() < 0.5 else None

        def progress(index: int, completion: Completion, start: int = start, last: int | None = last) -> None:
            found[start + index] = completion
            if last is not None and len(found) >= start + last:
                raise Cancelled

        options = {"keys": range(10_000)[part], "prefix": prefixes[part], "progress": progress}
        try:
            runner.generate(prompts[part], sampling[part], **options)
        except Cancelled:
            cancelled += 1
            audit(runner)
            last = None
            options["progress"] = lambda i, c, start=start: found.update({start + i: c})
            runner.generate(prompts[part], sampling[part], **options)
        audit(runner)
        assert not runner._cache._rows and runner.pages[1:3] == (sum(len(p) // 4 for p in handles[1:]), 0)
        start += 1_000
    assert cancelled >= 2 and len(found) == 10_000
    assert runner.pages.peak > 400
    for i in range(0, 10_000, 997):
        assert runner.generate([prompts[i]], sampling[i], keys=[i], prefix=prefixes[i]) == [found[i]]
    del handles, prefixes, options
    gc.collect()
    assert_empty(runner)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_pages_on_a_gpu_give_what_slots_on_the_cpu_give(model: Model) -> None:
    prompts, sampling = workload()
    runner = engine(make_model().to("cuda"), tokenizer=Letters())
    assert type(runner._cache) is PagedCache and runner._cache.page_size == 64
    found = runner.generate(prompts, sampling)
    want = engine(model, tokenizer=Letters()).generate(prompts, sampling)
    # Another device's rounding may turn a draw that is nearly tied.
    same = [i for i in range(40) if found[i].token_ids == want[i].token_ids]
    assert len(same) >= 36
    assert_close(model, [prompts[i] for i in same], [found[i] for i in same], [want[i] for i in same])
    assert_empty(runner)
