import math

import numpy as np
import pytest
import torch
from cai_fast.kernels import preference_labels, score_options
from cai_fast.kernels.triton import preference as kernel
from guarded import assert_as_exact_as_torch, same_under_poison
from sm90 import Case, check, compile_all
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

IDS = torch.tensor([[3, 7, -1], [29, -1, -1], [0, 1, 2]])
DTYPES = (torch.float32, torch.bfloat16)


def head(rows: int, width: int, dtype: torch.dtype, vocab: int = 30) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (rows, vocab))
    return hidden.to(dtype), (3 * weight / width**0.5).to(dtype)


def asked(comparisons: int, principles: int) -> Tensor:
    """Log-probabilities of which two in five were not asked, among them a whole comparison."""
    g = torch.Generator().manual_seed(0)
    logprob = torch.randn(comparisons, principles, 2, 2, generator=g)
    logprob[torch.rand(comparisons, principles, 2, generator=g) < 0.4] = math.nan
    logprob[comparisons // 2 :][:1] = math.nan
    return logprob


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width", [(1, 8), (17, 130), (40, 257)])
@pytest.mark.parametrize("ids", [IDS, IDS[:, :1], torch.tensor([[4, 4], [-1, -1]])])
def test_options_are_as_exact_as_torch(dtype: torch.dtype, rows: int, width: int, ids: Tensor) -> None:
    hidden, weight = head(rows, width, dtype)
    exact = score_options(hidden.double(), weight.double(), ids, backend="reference")
    plain = score_options(hidden, weight, ids, backend="reference")
    assert_as_exact_as_torch(score_options(hidden, weight, ids, backend="triton"), plain, exact)


def test_an_option_far_below_another_keeps_its_logprob() -> None:
    weight = torch.tensor([[0.0], [-300.0], [-301.0], [-torch.inf]])
    ids = torch.tensor([[0, -1], [1, 2], [3, -1]])
    out = score_options(torch.ones(1, 1), weight, ids, backend="triton")
    expected = -300 + math.log1p(math.exp(-1))
    torch.testing.assert_close(out, torch.tensor([[0.0, expected, -torch.inf]]))


def test_options_of_strided_rows_poison_and_shift() -> None:
    hidden, weight = head(21, 140, torch.float32)
    plain = score_options(hidden, weight, IDS, backend="triton")
    wide = torch.full((21, 300), math.nan)
    wide[:, 7:287:2] = hidden
    arguments = (wide[:, 7:287:2], weight.t().contiguous().t(), IDS.t().contiguous().t())
    (strided,) = same_under_poison(lambda: (score_options(*arguments, backend="triton"),))
    assert torch.equal(strided, plain)
    one = torch.cat((hidden, torch.ones(21, 1)), 1)
    shifted = score_options(one, torch.cat((weight, torch.full((30, 1), 1e4)), 1), IDS, backend="triton")
    torch.testing.assert_close(shifted, plain, atol=4e-3, rtol=0)  # ulp of 1e4 is 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    hidden, weight = head(40, 200, dtype)
    together = score_options(hidden, weight, IDS, backend="triton")
    for row in (0, 5, 39):
        assert torch.equal(score_options(hidden[row : row + 1], weight, IDS, backend="triton"), together[row : row + 1])
    assert score_options(hidden[:0], weight, IDS, backend="triton").shape == (0, 3)


def test_options_have_torchs_gradient() -> None:
    hidden, weight = (x.requires_grad_() for x in head(5, 20, torch.float32))
    upstream = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    results = []
    for backend in ("triton", "reference"):
        out = score_options(hidden, weight, IDS, backend=backend)
        results.append(torch.autograd.grad(out, (hidden, weight), upstream))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("clamp", [None, (0.4, 0.6)])
@pytest.mark.parametrize("comparisons,principles", [(1, 1), (21, 5), (16, 16), (2, 0), (0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_are_as_exact_as_torch(clamp, comparisons: int, principles: int, dtype: torch.dtype) -> None:
    logprob = asked(comparisons, principles).to(dtype)
    exact = preference_labels(logprob.double(), clamp=clamp, backend="chunked")
    plain = preference_labels(logprob, clamp=clamp, backend="chunked")
    for triple in zip(preference_labels(logprob, clamp=clamp, backend="triton"), plain, exact, strict=True):
        assert_as_exact_as_torch(*triple)


def test_labels_of_strided_input_extremes_and_poison() -> None:
    logprob = asked(19, 3)
    logprob[0, 0] = torch.tensor([[0.0, -torch.inf], [-1e4, 0.0]])
    plain = preference_labels(logprob, backend="triton")
    assert plain.per_principle[0, 0].tolist() == [1.0, 1.0]
    strided = logprob.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    ours = same_under_poison(lambda: tuple(preference_labels(strided, backend="triton")))
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    alone = preference_labels(logprob[18:], backend="triton")
    assert torch.equal(alone.prob_a.nan_to_num(9.0), plain.prob_a[18:].nan_to_num(9.0))


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found are: one order taken for both, letters not un-swapped, and 1 % less of all but the last block's logits."""
    monkeypatch.setattr(kernel, "_mean_of_present", lambda a, b: a)
    with pytest.raises(AssertionError):
        test_labels_are_as_exact_as_torch(None, 21, 5, torch.float32)
    monkeypatch.undo()
    right = kernel._probability
    monkeypatch.setattr(kernel, "_probability", lambda *a: 1 - right(*a) if a[5] == 1 else right(*a))
    with pytest.raises(AssertionError):
        test_labels_are_as_exact_as_torch(None, 21, 5, torch.float32)
    monkeypatch.undo()
    dot = InterpreterBuilder.create_dot

    def forgetful(self, a, b, accumulator, *rest):
        return dot(self, a, b, TensorHandle(accumulator.data * np.float32(0.99), accumulator.dtype), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", forgetful)
    with pytest.raises(AssertionError):
        test_options_are_as_exact_as_torch(torch.float32, 17, 130, IDS)


def test_sm_90(tmp_path) -> None:
    score = dict.fromkeys(("hidden", "weight"), "*bf16") | {"option_ids": "*i64", "out": "*fp32"}
    strides = ("hidden_row", "hidden_column", "weight_row", "weight_column", "id_option", "id_variant")
    score |= dict.fromkeys(("rows", "width", *strides), "i32")
    labels = dict.fromkeys(("logprob", "prob_a", "per_principle", "position_bias"), "*fp32")
    strides = ("comparison_stride", "principle_stride", "order_stride", "letter_stride")
    labels |= dict.fromkeys(("comparisons", "principles", *strides), "i32")
    sizes = {"OPTIONS": 2, "VARIANTS": 3, "COLUMNS": 16, "PADDED": 2, "ROWS": kernel.ROWS, "WIDTH": kernel.WIDTH}
    # A last axis of stride 1 is compiled in, as the launcher does it.
    del score["hidden_column"], score["weight_column"]
    sizes |= {"hidden_column": 1, "weight_column": 1}
    clamp = {"CLAMP": True, "LOW": 0.4, "HIGH": 0.6, "COMPARISONS": kernel.COMPARISONS, "PRINCIPLES": 16}
    aligned = ("width", "hidden_row", "weight_row")
    reports = compile_all(
        [
            Case("preference:_score", score, sizes, aligned=aligned),
            Case("preference:_score", score | {"hidden": "*fp32", "weight": "*fp32"}, sizes, aligned=aligned),
            Case("preference:_labels", labels, clamp),
        ],
        tmp_path,
    )
    for report in reports:
        check(report)
    assert reports[0].count("HMMA") > 0
