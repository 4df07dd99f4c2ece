"""Prefill behind chains of shared stretches in parts: parts by segments, merged, equal the whole."""

import pytest
import torch
from test_engine import VOCAB, engine, make_model, some_prompts
from test_engine_pages import assert_close

from cai_fast.engine import Engine, Sampling, token_tree
from cai_fast.engine.attend import ChainAttend
from cai_fast.model import Model
from cai_fast.model.attention import attention_lse, segments

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def chained(model: Model, **options: object) -> Engine:
    runner = engine(model, **options)
    runner._trunk.chained = True
    return runner


@pytest.mark.parametrize("causal", [True, False])
def test_segments_by_hand(causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q_lens = [3, 1, 7]
    k_lens = q_lens if causal else [5, 2, 1]
    q = torch.randn(11, 4, 8, generator=g)
    k, v = torch.randn(2, sum(k_lens), 2, 8, generator=g)
    out, lse = attention_lse(q, k, v, segments(q_lens, CPU), segments(k_lens, CPU), causal=causal)
    row = 0
    for n, (first, count) in zip(q_lens, zip((0, k_lens[0], sum(k_lens[:2])), k_lens, strict=True), strict=True):
        for i in range(n):
            seen = slice(first, first + (i + 1 if causal else count))
            for head in range(4):
                score = (k[seen, head // 2].double() @ q[row, head].double()) * 8**-0.5
                assert abs(score.logsumexp(0) - lse[row, head]) < 1e-5
                assert (score.softmax(0) @ v[seen, head // 2].double() - out[row, head]).abs().max() < 1e-5
            row += 1


def test_trees_and_prefixes_score_as_separate_prompts(model: Model) -> None:
    options, runner = torch.arange(VOCAB)[:, None], chained(model)
    block = [(5 * i + 1) % VOCAB for i in range(40)]
    prompts = [
        [*talk, *principle, *order]
        for talk in ([3] * 20, [*range(30)])
        for principle in some_prompts(3, longest=20)
        for order in ([7] * 18, [9])
    ]
    tree, order = token_tree(prompts)
    want = engine(model).score([[*block, *p] for p in prompts], options)
    handle = runner.prefix(block[17:], after=runner.prefix(block[:17]))
    found = runner.score([tree], options, prefix=handle)[order]
    apart = runner.score(prompts, options, prefix=handle)
    assert (found - want).abs().max() <= 1e-5 * want.abs().max() and (
        apart - want
    ).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("page_size", [0, 16])
def test_generation_behind_kept_keys(model: Model, page_size: int) -> None:
    runner, sampling = chained(model, page_size=page_size, prefill_tokens=60), Sampling(max_new_tokens=9)
    handle, prompts = runner.prefix([(5 * i + 1) % VOCAB for i in range(40)]), [*some_prompts(9, longest=30), []]
    first = runner.generate(prompts, sampling, prefix=handle, keep=True)
    whole = [[*handle.token_ids, *p] for p in prompts]
    assert_close(model, whole, first, engine(model).generate(whole, sampling))
    kept = [done.kept for done in first]
    again = [[*k.token_ids, 1, 2] for k in kept]
    assert_close(
        model, again, runner.generate([[1, 2]] * 10, sampling, prefix=kept), engine(model).generate(again, sampling)
    )


def check(model: Model) -> None:
    test_trees_and_prefixes_score_as_separate_prompts(model)
    test_generation_behind_kept_keys(model, 16)


def causal_everywhere(*arguments: object, causal: bool) -> object:
    return LSE(*arguments, causal=False)


LSE, CALL = attention_lse, ChainAttend.__call__
FAULTS = {
    "own tokens see what follows": ("attention_lse", causal_everywhere),
    "parts have equal weight": (
        "attention_lse",
        lambda *a, causal: (LSE(*a, causal=causal)[0], LSE(*a, causal=causal)[1] * 0),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(model: Model, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    from cai_fast.engine import attend

    name, value = FAULTS[fault]
    monkeypatch.setattr(attend, name, value)
    with pytest.raises(AssertionError):
        check(model)


@pytest.mark.parametrize("fault", ["a depth is left out", "heads change places"])
def test_planted_fault_in_the_depths_is_noticed(model: Model, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def call(self: ChainAttend, *arguments: object) -> object:
        if fault == "a depth is left out":
            self.depths = self.depths[:-1]
        else:
            self.depths = [([kv.roll(1, 2) for kv in kvs], *rest) for kvs, *rest in self.depths]
        return CALL(self, *arguments)

    monkeypatch.setattr(ChainAttend, "__call__", call)
    with pytest.raises(AssertionError):
        check(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_segments_on_a_gpu(causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q_lens, k_lens = [3, 100, 7], [3, 100, 7] if causal else [50, 2, 300]
    q = torch.randn(sum(q_lens), 8, 64, generator=g).bfloat16()
    k, v = torch.randn(2, sum(k_lens), 2, 64, generator=g).bfloat16()
    parts = segments(q_lens, CPU), segments(k_lens, CPU)
    want = attention_lse(q.float(), k.float(), v.float(), *parts, causal=causal)
    cuda = torch.device("cuda")
    found = attention_lse(q.cuda(), k.cuda(), v.cuda(), segments(q_lens, cuda), segments(k_lens, cuda), causal=causal)
    assert (found[0].cpu().float() - want[0]).abs().max() <= 2e-2
    assert (found[1].cpu() - want[1]).abs().max() <= 2e-3
