import math

import pytest
import torch
from cai_fast.kernels import philox_uniform, sample_tokens
from cai_fast.kernels.triton import sampling as kernel
from guarded import assert_as_exact_as_torch, same_under_poison
from sm90 import Case, check, compile_all
from torch import Tensor


def rows(count: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Peaked logits with a run of ties and a -inf; keys and positions that use all 64 bits."""
    logits = 3 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[:, vocab // 3 : vocab // 2] = logits[:, vocab // 3 : vocab // 3 + 1]
    logits[:, vocab // 4 : vocab // 4 + 1] = -torch.inf if vocab > 4 else 0.0
    key = torch.arange(count)
    return logits.to(dtype), key * 0x1234567890ABCD - 17, key % 3 + (key << 33)


def compare(logits: Tensor, keys: Tensor, positions: Tensor, **settings: object) -> Tensor:
    token, logprob = sample_tokens(logits, keys, positions, backend="chunked", **settings)
    ours = sample_tokens(logits, keys, positions, backend="triton", **settings)
    assert torch.equal(ours[0], token)
    torch.testing.assert_close(ours[1], logprob, atol=2e-6, rtol=0)
    return token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count,vocab", [(3, 1), (3, 2), (60, 257), (20, 1000)])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 10.0])
def test_the_same_token_as_torch(dtype: torch.dtype, count: int, vocab: int, temperature: float) -> None:
    token = compare(*rows(count, vocab, dtype), temperature=temperature)
    assert temperature < 1 or vocab < 3 or token.unique().numel() > count // 5


def test_logprob_is_as_exact_as_torch() -> None:
    logits, keys, positions = rows(30, 700)
    token, ours = sample_tokens(logits, keys, positions, backend="triton")
    plain = sample_tokens(logits, keys, positions, backend="chunked")[1]
    assert_as_exact_as_torch(ours, plain, logits.double().log_softmax(-1)[torch.arange(30), token])
    assert (ours <= 0).all()


def test_top_k_and_top_p_by_row() -> None:
    logits, keys, positions = rows(14, 300)
    top_k = torch.tensor([0, 1, 20, 55, 299, 300, 5000, 0, 0, 0, 0, 30, 60, 7])
    top_p = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1e-9, 0.3, 0.8, 0.9999, 0.6, 0.95, 0.5])
    temperature = torch.full((14,), 2.0)
    temperature[13] = 0.0
    compare(logits, keys, positions, temperature=temperature, top_k=top_k, top_p=top_p)


def test_ties_at_the_cut_go_to_the_lowest_indices() -> None:
    logits = torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125]).log().expand(9, 5)
    _, keys, positions = rows(9, 5)
    uniform = torch.linspace(0, 1 - 2**-53, 9, dtype=torch.float64)
    cut = {"uniform": uniform, "backend": "triton"}
    assert set(sample_tokens(logits, keys, positions, top_k=3, **cut)[0].tolist()) == {0, 1, 2}
    assert set(sample_tokens(logits, keys, positions, top_p=0.7, **cut)[0].tolist()) == {0, 1, 2}
    token, logprob = sample_tokens(logits, keys, positions, top_k=4, top_p=0.8, **cut)  # 0.7 of the whole
    assert set(token.tolist()) == {0, 1, 2}
    torch.testing.assert_close(logprob, torch.tensor([4 / 6, 1 / 6, 1 / 6]).log()[token])


def test_blocks_do_not_change_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, keys, positions = rows(12, 300)
    logits[0, :128] = -torch.inf  # whole blocks
    monkeypatch.setattr(kernel, "BLOCK", 64)
    compare(logits, keys, positions)
    compare(logits[:2], keys[:2], positions[:2], top_k=130, top_p=0.9)


def test_a_row_depends_on_its_key_and_position_alone() -> None:
    logits, keys, positions = rows(40, 300)
    token, logprob = sample_tokens(logits, keys, positions, backend="triton")
    for row in (0, 7, 39):
        alone = sample_tokens(logits[row : row + 1], keys[row : row + 1], positions[row : row + 1], backend="triton")
        assert alone[0].item() == token[row] and alone[1].item() == logprob[row]
    ahead = sample_tokens(logits, keys, positions, uniform=philox_uniform(keys, positions), backend="triton")
    assert torch.equal(ahead[0], token)
    assert not torch.equal(sample_tokens(logits, keys, positions + 1, backend="triton")[0], token)


def test_the_ends_of_the_unit_interval_select_possible_tokens() -> None:
    logits = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.0, 1.0, 0.0, 0.0]]).log()
    zeros = torch.zeros(2, dtype=torch.int64)
    for uniform, expected in ((1 - 2**-53, [2, 1]), (0.0, [1, 1])):
        ends = torch.full((2,), uniform, dtype=torch.float64)
        assert sample_tokens(logits, zeros, zeros, uniform=ends, backend="triton")[0].tolist() == expected


def test_greedy_ties_strides_poison_and_nan() -> None:
    logits, keys, positions = rows(4, 130)
    logits[0, [5, 77]] = 1e4
    greedy = sample_tokens(logits, keys, positions, temperature=torch.zeros(1), backend="triton")
    assert torch.equal(greedy[0], logits.argmax(-1)) and greedy[0][0] == 5 and not greedy[1].any()
    wide = torch.full((4, 400), math.nan)
    wide[:, 1:391:3] = logits
    arguments = (wide[:, 1:391:3], torch.stack((keys, keys), 1)[:, 0], positions.expand(2, 4)[1])
    strided = same_under_poison(lambda: sample_tokens(*arguments, backend="triton"))
    plain = sample_tokens(logits, keys, positions, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))
    logits[0], logits[1, 3], logits[2] = math.nan, math.nan, -torch.inf
    token, _ = sample_tokens(logits, keys, positions, backend="triton")
    assert ((token >= 0) & (token < 130)).all()
    assert sample_tokens(logits[:0], keys[:0], positions[:0], backend="triton")[0].shape == (0,)


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found are: a division by the temperature left out, 1 % of the mass, and a cut one key too low."""
    scaled = kernel._scaled
    monkeypatch.setattr(kernel, "_scaled", lambda *a: scaled(*a[:4], 1.0))
    with pytest.raises(AssertionError):
        test_the_same_token_as_torch(torch.float32, 20, 257, 10.0)
    monkeypatch.undo()
    above = kernel._above
    monkeypatch.setattr(kernel, "_above", lambda *a: [x - x // 100 for x in above(*a)])
    with pytest.raises(AssertionError):
        test_the_same_token_as_torch(torch.float32, 60, 257, 10.0)
    monkeypatch.undo()
    cut = kernel._cut
    monkeypatch.setattr(kernel, "_cut", lambda *a: (lambda key, *rest: (key - 1, *rest))(*cut(*a)))
    with pytest.raises(AssertionError):
        test_ties_at_the_cut_go_to_the_lowest_indices()


def test_sm_90(tmp_path) -> None:
    signature = {"logits": "*fp32", "keys": "*i64", "positions": "*i64", "temperatures": "*fp32", "top_ks": "*i64"}
    signature |= {"top_ps": "*i64", "token_out": "*i64", "logprob_out": "*fp32"}
    strides = ("key_stride", "position_stride", "temperature_stride", "k_stride", "p_stride")
    signature |= dict.fromkeys(("vocab", "row_stride", *strides), "i32")
    options = {"DRAWN": False, "BLOCK": kernel.BLOCK, "stride": 1}
    aligned = ("vocab", "row_stride")
    cases = [Case("sampling:_sample", signature, options | {"TRUNCATE": t}, 8, aligned=aligned) for t in (False, True)]
    for report in compile_all(cases, tmp_path):
        check(report)
