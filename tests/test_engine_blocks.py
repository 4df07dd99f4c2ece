"""Shared-prefix decode on a CPU: rows behind one prefix, attended to as a block, give what separate rows give."""

import random
from collections.abc import Sequence

import pytest
import torch
from test_engine import CONFIG, VOCAB, engine, make_model, some_prompts
from test_engine_pages import assert_close

from cai_fast.engine import Engine, Sampling, blocks
from cai_fast.engine.blocks import Blocks, block_attention
from cai_fast.engine.cache import SlotCache
from cai_fast.model import Model, ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = [[(7 * i + i // 5 + n) % VOCAB for i in range(40 + 9 * n)] for n in range(3)]  # three shared prefixes


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes of 20 tokens are long enough to be shared."""
    monkeypatch.setattr(blocks, "MIN_SHARED", 20)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1), (48, 1)])
def test_block_attention_equals_fp64(heads: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    for n, keys in ((1, 1), (3, 40), (33, 100), (70, 517)):
        q = torch.randn(n, heads[0], 16, generator=g)
        k, v = torch.randn(2, heads[1], keys, 16, generator=g)
        out, lse = block_attention(q, k, v)
        wide = [x.double().repeat_interleave(heads[0] // heads[1], 0) for x in (k, v)]
        score = torch.einsum("nhd,hkd->nhk", q.double(), wide[0]) * 0.25
        assert (out - torch.einsum("nhk,hkd->nhd", score.softmax(-1), wide[1])).abs().max() <= 2e-6
        assert (lse - score.logsumexp(-1)).abs().max() <= 4e-6
        for row in (0, n - 1):
            alone = block_attention(q[row : row + 1], k, v)
            assert torch.equal(alone[0][0], out[row]) and torch.equal(alone[1][0], lse[row])


def mixed() -> tuple[list[list[int]], list[int], list[Sampling]]:
    """Prompts, the shared prefix of each (-1: none), and how each is drawn."""
    prompts = [*some_prompts(30, longest=30), [], [5], [5]]
    which = [i % 4 - 1 if p else 0 for i, p in enumerate(prompts)]
    return prompts, which, [Sampling(max_new_tokens=1 + 7 * i % 23, stop_token_ids=(3,)) for i in range(33)]


def run(runner: Engine, order: Sequence[int]) -> list:
    prompts, which, sampling = mixed()
    handles = [None, *(runner.prefix(tokens) for tokens in LONG)]
    chosen = [handles[which[i] + 1] for i in order]
    return runner.generate([prompts[i] for i in order], [sampling[i] for i in order], keys=order, prefix=chosen)


def check(model: Model, want: list) -> None:
    """What the planted faults below must fail."""
    prompts, which, _ = mixed()
    whole = [[*([], *LONG)[n + 1], *prompt] for n, prompt in zip(which, prompts, strict=True)]
    found = run(engine(model, max_batch=7), range(33))
    assert_close(model, whole, found, want)
    order = list(range(33))
    random.Random(1).shuffle(order)
    assert run(engine(model, max_batch=20), order) == [found[i] for i in order]
    runner = engine(model)
    assert [run(runner, [i])[0] for i in (0, 30, 1)] == [found[i] for i in (0, 30, 1)]
    assert which[1] >= 0 and not runner._cache.blocks and not runner._cache.blocks.skip.any()
    for pipelined in (False, True):
        runner = engine(model, max_batch=5, deterministic=False, pipelined=pipelined)
        runner._cache.kv.fill_(1e30)
        assert_close(model, [whole[i] for i in order], run(runner, order), [want[i] for i in order])
    assert not runner._cache.blocks and not runner._cache.common()


@pytest.fixture(scope="module")
def apart(model: Model) -> list:
    """The same without handles."""
    prompts, which, sampling = mixed()
    whole = [[*([], *LONG)[n + 1], *prompt] for n, prompt in zip(which, prompts, strict=True)]
    return engine(model).generate(whole, sampling)


def test_rows_behind_shared_prefixes_in_any_company(model: Model, apart: list, small: None) -> None:
    check(model, apart)


def test_rows_that_left_write_to_nobody(model: Model, small: None) -> None:
    """Empty rows of a replayed batch: a long row without prefix, right before rows that stood behind one."""
    outcomes = []
    for options in ({}, {"pipelined": True, "deterministic": False}):
        runner = engine(model, max_len=200, max_batch=8, longest_first=False, **options)
        handle = runner.prefix(LONG[0])
        sampling = [Sampling(max_new_tokens=n, temperature=0) for n in (90, 15, *[2] * 6)]
        prompts = [[7], [i % VOCAB for i in range(180)], *[[8 + i] for i in range(6)]]
        prefixes = [handle, None, *[handle] * 6]
        outcomes.append([c.token_ids for c in runner.generate(prompts, sampling, prefix=prefixes)])
    assert outcomes[0] == outcomes[1]


def test_kept_keys_go_on_behind_the_same_block(model: Model, small: None) -> None:
    runner, sampling = engine(model, deterministic=False), Sampling(max_new_tokens=12)
    handle, prompts = runner.prefix(LONG[0]), some_prompts(9, longest=20)
    first = runner.generate(prompts, sampling, prefix=handle, keep=True)
    for done, prompt in zip(first, prompts, strict=True):
        assert done.kept.stretches[0] is handle.stretches[0] is done.kept.cut(len(done.kept) - 3).stretches[0]
        tokens = [*LONG[0], *prompt, *done.token_ids[:-1]]
        want = engine(model).prefix(tokens).kv
        assert (done.kept.kv - want).abs().max() <= 1e-5 * want.abs().max()
    kept = [done.kept.cut(len(done.kept) - 3) for done in first]
    before = dict(runner.counters)
    found = runner.generate([[1, 2]] * 9, sampling, prefix=kept)
    whole = [[*k.token_ids, 1, 2] for k in kept]
    assert_close(model, whole, found, engine(model).generate(whole, sampling))
    # Two buckets of 32 own positions for each of nine rows, and the block once, in each of eleven steps.
    token = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    read = (runner.counters["kv_bytes"] - before["kv_bytes"]) / token
    assert 11 * len(LONG[0]) < read <= 11 * (len(LONG[0]) + 9 * 64)


def test_short_prefixes_and_sliding_windows_are_not_shared(model: Model) -> None:
    runner = engine(model, max_len=700)
    assert blocks.shared_stretch(runner.prefix([1] * (blocks.MIN_SHARED - 1))) is None
    assert blocks.shared_stretch(runner.prefix([1] * blocks.MIN_SHARED)) is not None
    assert runner._cache.shares
    windowed = make_model(ModelConfig(**{**vars(CONFIG), "sliding_window": 24, "model_type": "mistral"}))
    assert not engine(windowed)._cache.shares


def merge_without_weights(self: Blocks, layer: int, q: torch.Tensor, own: torch.Tensor, lse: torch.Tensor) -> object:
    return MERGE(self, layer, q, own, lse * 0)


def first_block_for_all(self: Blocks, row: int, stretch: torch.Tensor | None) -> None:
    JOIN(self, row, None if stretch is None else next(iter(self._of.values()), stretch))


def stale_groups(self: Blocks, row: int, stretch: torch.Tensor | None) -> None:
    groups = self._groups
    JOIN(self, row, stretch)
    self._groups = groups


MERGE, JOIN, FILL = Blocks.merge, Blocks.join, SlotCache.fill
FAULTS = {
    "the block is left out": (Blocks, "merge", lambda self, layer, q, own, lse: own),
    "the parts have equal weight": (Blocks, "merge", merge_without_weights),
    "all rows stand behind one block": (Blocks, "join", first_block_for_all),
    "who stands where is not renewed": (Blocks, "join", stale_groups),
    "rows do not move": (Blocks, "move", lambda self, hole, tail: None),
    "rows that left keep their offset": (SlotCache, "vacate", lambda self, rows: None),
    "rows that left stay": (Blocks, "leave", lambda self, rows: None),
    "the next layer's block": (Blocks, "merge", lambda self, layer, *rest: MERGE(self, (layer + 1) % 2, *rest)),
    "the block counts as own positions": (Blocks, "skipped", lambda self, row: 0),
    "a row's bits depend on how many there are": (blocks, "QUERIES", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(
    model: Model, apart: list, small: None, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    where, name, value = FAULTS[fault]
    if name == "QUERIES":
        monkeypatch.setattr(blocks, "block_attention", unpadded)
    else:
        monkeypatch.setattr(where, name, value)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        check(model, apart)


def unpadded(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As many query rows as there are, and no more."""
    out, lse = blocks.sdpa_lse(*(x.transpose(0, 1)[None] if x is q else x[None] for x in (q, keys, values)))
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)
