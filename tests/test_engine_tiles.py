"""Shared-prefix decode on pages: rows behind one prefix, attended to in tiles, give what separate rows give."""

import random
from collections.abc import Sequence

import pytest
import torch
from test_engine import Letters, engine, make_model, some_prompts
from test_engine_blocks import LONG, apart, mixed, run
from test_engine_pages import assert_close, assert_empty, audit

from cai_fast import kernels
from cai_fast.engine import Engine, Sampling, pages, tiles
from cai_fast.engine.pages import PagedCache
from cai_fast.engine.tiles import Tiles
from cai_fast.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["apart"]  # a fixture


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes with 32 tokens in full pages are long enough to be shared."""
    monkeypatch.setattr(pages, "MIN_SHARED", 32)


def tiled(model: Model, **options: object) -> Engine:
    return engine(model, **{"page_size": 16, "shared_decode": True, "tokenizer": Letters(), **options})


def wholes(order: Sequence[int]) -> list[list[int]]:
    prompts, which, _ = mixed()
    return [[*([], *LONG)[which[i] + 1], *prompts[i]] for i in order]


def check(model: Model, want: list) -> None:
    """What the planted faults below must fail."""
    order = list(range(33))
    for seed, options in enumerate(({"max_batch": 7}, {"max_batch": 20, "deterministic": False}, {"pipelined": True})):
        random.Random(seed).shuffle(order)
        runner = tiled(model, **options)
        assert_close(model, wholes(order), run(runner, order), [want[i] for i in order])
        audit(runner)
        assert not runner._cache.tiles and runner._cache.tiles.again() == 0
        assert (runner._cache.tiles.tile_group == -1).all() and not runner._cache.tiles.starts.any()
        runner.invalidate()
        assert_empty(runner)


def test_rows_behind_shared_pages_in_any_company(model: Model, apart: list, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = kernels.shared_attention

    def shared(*arguments: torch.Tensor) -> object:
        calls.append(int((arguments[5] >= 0).sum()))
        return original(*arguments)

    monkeypatch.setattr(pages.kernels, "shared_attention", shared)
    check(model, apart)
    assert max(calls) >= 3


@pytest.mark.parametrize("page_size", [1, 16])
def test_bits_do_not_depend_on_company_nor_on_the_number_of_prefixes(
    model: Model, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    monkeypatch.setattr(tiles, "PREFIXES", 3)
    runner, sampling = tiled(model, page_size=page_size), Sampling(max_new_tokens=7)
    handles = [runner.prefix([i, *LONG[0]]) for i in range(6)]
    prompts, order = some_prompts(12, longest=60), list(range(12))
    whole = runner.generate(prompts, sampling, prefix=[handles[i % 6] for i in order])
    random.Random(1).shuffle(order)
    for part in (order, order[:5], [3], [11]):
        chosen = [handles[i % 6] for i in part]
        assert runner.generate([prompts[i] for i in part], sampling, keys=part, prefix=chosen) == [
            whole[i] for i in part
        ]


def test_more_prefixes_and_rows_than_tiles_hold(model: Model, apart: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PREFIXES", 2)
    monkeypatch.setattr(tiles, "ROWS", 3)
    check(model, apart)


def test_kept_keys_share_the_pages_of_their_block(model: Model) -> None:
    runner, sampling = tiled(model, deterministic=False), Sampling(max_new_tokens=12)
    handle, prompts = runner.prefix(LONG[0]), some_prompts(9, longest=20)
    first = runner.generate(prompts, sampling, prefix=handle, keep=True)
    kept = [done.kept.cut(len(done.kept) - 3) for done in first]
    whole, block = [[*k.token_ids, 1, 2] for k in kept], len(LONG[0]) // 16
    runner._cache.peak = 0
    found = runner.generate([[1, 2]] * 9, sampling, prefix=kept)
    assert_close(model, whole, found, engine(model).generate(whole, sampling))
    assert runner.pages.in_use == block and runner.pages.peak == block + sum(
        -(-(len(w) + 12) // 16) - block for w in whole
    )
    del handle, first, kept
    assert runner.pages.in_use == 0


def test_bytes_read_count_a_shared_prefix_once(model: Model) -> None:
    counts = []
    for shared in (True, False):
        runner = tiled(model, shared_decode=shared)
        runner.generate([[5], [6], [7]], Sampling(max_new_tokens=4), prefix=runner.prefix(LONG[0]))
        counts.append(runner.counters["kv_bytes"] // runner._cache.bytes_per_token)
    assert counts[1] - counts[0] == 3 * 2 * (len(LONG[0]) // 16 * 16)


def flush_late(self: Tiles) -> None:
    self._stale = not self._stale
    FLUSH(self)


def starts_too_early(self: PagedCache, rows: slice) -> None:
    SEAT(self, rows)
    self.tiles.starts.sub_(1).clamp_min_(0)


def one_group(self: Tiles) -> None:
    FLUSH(self)
    self.tile_group.clamp_max_(0)


FLUSH, SEAT, JOIN = Tiles.flush, PagedCache.seat, Tiles.join
FAULTS = {
    "changes reach the device late": (Tiles, "flush", flush_late),
    "a key counts twice": (PagedCache, "seat", starts_too_early),
    "all rows stand behind the first prefix": (Tiles, "flush", one_group),
    "rows do not move": (Tiles, "move", lambda self, hole, tail: None),
    "rows stay behind what they had": (Tiles, "join", lambda self, row, pages: pages and JOIN(self, row, pages)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(model: Model, apart: list, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    where, name, value = FAULTS[fault]
    monkeypatch.setattr(where, name, value)
    with pytest.raises((AssertionError, RuntimeError, IndexError, KeyError, ValueError)):
        check(model, apart)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tiles_in_graphs_on_a_gpu(model: Model, apart: list) -> None:
    order = list(range(33))
    runner = engine(make_model().to("cuda"), page_size=16, shared_decode=True, deterministic=False)
    for _ in range(3):
        found = run(runner, order)
        assert sum(a.token_ids == b.token_ids for a, b in zip(found, apart, strict=True)) >= 31  # rounding may decide
    assert any(variant for _, _, variant in runner._graphs._replays)
