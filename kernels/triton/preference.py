"""A judge's option logits and the soft labels made of them: one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..common import accumulate_dtype

ROWS = 16  # rows of one program, and tl.dot's smallest side
WIDTH = 128  # hidden elements of one tl.dot
COMPARISONS = 16


@triton.jit
def _score(
    hidden, weight, option_ids, out, rows, width,
    hidden_row, hidden_column, weight_row, weight_column, id_option, id_variant,
    OPTIONS: tl.constexpr, VARIANTS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Option log-probabilities of ROWS rows: hidden [B, H] against the option rows of weight [V, H] alone."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    used = column < OPTIONS * VARIANTS
    token = tl.load(
        option_ids + column // VARIANTS * id_option + column % VARIANTS * id_variant, mask=used, other=-1
    ).to(tl.int64)
    present = token >= 0
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, WIDTH):
        k = first + tl.arange(0, WIDTH)
        inside = k < width
        h = tl.load(
            hidden + row[:, None] * hidden_row + k[None, :] * hidden_column,
            mask=(row < rows)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            weight + token[None, :] * weight_row + k[:, None] * weight_column,
            mask=present[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        logits = tl.dot(h, w.to(h.dtype), logits, input_precision="ieee")
    # Each option has its own maximum: variants far below another option's still count fully in their own sum.
    option = tl.arange(0, PADDED)
    mass = tl.full([ROWS, PADDED], float("-inf"), tl.float32)
    for one in tl.static_range(OPTIONS):
        member = present & (column // VARIANTS == one)
        z = tl.where(member[None, :], logits, float("-inf"))
        top = tl.max(z, 1)
        finite = tl.where(top == float("-inf"), 0.0, top)
        total = tl.maximum(tl.sum(tl.exp(z - finite[:, None]), 1), 1e-30)  # at least 1 but for an empty option
        lse = tl.where(top == float("-inf"), top, finite + tl.log(total))
        mass = tl.where(option[None, :] == one, lse[:, None], mass)
    top = tl.max(mass, 1)
    total = tl.sum(tl.exp(mass - top[:, None]), 1)
    result = mass - top[:, None] - tl.log(total)[:, None]
    tl.store(
        out + row[:, None] * OPTIONS + option[None, :], result, mask=(row < rows)[:, None] & (option < OPTIONS)[None, :]
    )


def _launch_score(hidden: Tensor, weight: Tensor, option_ids: Tensor) -> Tensor:
    (rows, width), (options, variants) = hidden.shape, option_ids.shape
    out = torch.empty(rows, options, dtype=torch.float32, device=hidden.device)
    if out.numel() == 0:
        return out
    _score[(triton.cdiv(rows, ROWS),)](
        hidden, weight, option_ids, out, rows, width,
        *hidden.stride(), *weight.stride(), *option_ids.stride(),
        OPTIONS=options, VARIANTS=variants, COLUMNS=max(16, triton.next_power_of_2(options * variants)),
        PADDED=triton.next_power_of_2(options), ROWS=ROWS, WIDTH=WIDTH,
    )  # fmt: skip
    return out


class _ScoreOptions(torch.autograd.Function):
    """Scoring is inference; a gradient, where one is asked for, comes from torch on the option rows alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, option_ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, option_ids)
        return _launch_score(hidden, weight, option_ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, option_ids = ctx.saved_tensors
        ids = option_ids.clamp_min(0).flatten()
        with torch.enable_grad():
            h, w = hidden.detach().float().requires_grad_(), weight.detach()[ids].float().requires_grad_()
            logits = (h @ w.t()).unflatten(1, option_ids.shape).masked_fill(option_ids < 0, -torch.inf)
            d_hidden, d_rows = torch.autograd.grad(logits.logsumexp(-1).log_softmax(-1), (h, w), upstream)
        d_weight = torch.zeros(weight.shape, device=weight.device).index_add_(0, ids, d_rows)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None


def score_options(hidden: Tensor, weight: Tensor, option_ids: Tensor) -> Tensor:
    """[B, K] fp32 option log-probabilities for hidden [B, H], weight [V, H], option_ids [K, G]; -1 = absent."""
    return _ScoreOptions.apply(hidden, weight, option_ids)


@triton.jit
def _mean_of_present(a, b):
    total = tl.where(a == a, a, 0.0) + tl.where(b == b, b, 0.0)
    return tl.where((a == a) & (b == b), 0.5 * total, tl.where((a == a) | (b == b), total, float("nan")))


@triton.jit
def _probability(logprob, offset, order_stride, letter_stride, mask, ORDER: tl.constexpr, accumulate: tl.constexpr):
    """Probability that response_a is better: letter A of order 0, letter B of order 1 (responses swapped)."""
    at = logprob + offset + ORDER * order_stride
    ours = tl.load(at + ORDER * letter_stride, mask=mask, other=0.0).to(accumulate)
    theirs = tl.load(at + (1 - ORDER) * letter_stride, mask=mask, other=0.0).to(accumulate)
    top = tl.maximum(ours, theirs)
    ours, theirs = tl.exp(ours - top), tl.exp(theirs - top)
    return ours / (ours + theirs)


@triton.jit
def _labels(
    logprob, prob_a, per_principle, position_bias, comparisons, principles,
    comparison_stride, principle_stride, order_stride, letter_stride,
    CLAMP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, COMPARISONS: tl.constexpr, PRINCIPLES: tl.constexpr,
):  # fmt: skip
    """Labels of COMPARISONS comparisons: un-swapped, averaged over orders, clamped, averaged over principles."""
    accumulate: tl.constexpr = prob_a.dtype.element_ty
    comparison = tl.program_id(0).to(tl.int64) * COMPARISONS + tl.arange(0, COMPARISONS)
    principle = tl.arange(0, PRINCIPLES)
    mask = (comparison < comparisons)[:, None] & (principle < principles)[None, :]
    offset = comparison[:, None] * comparison_stride + principle[None, :] * principle_stride
    first = _probability(logprob, offset, order_stride, letter_stride, mask, 0, accumulate)
    second = _probability(logprob, offset, order_stride, letter_stride, mask, 1, accumulate)
    label = _mean_of_present(first, second)
    if CLAMP:
        # A NaN fails both comparisons and stays.
        label = tl.where(label < LOW, LOW, tl.where(label > HIGH, HIGH, label))
    present = mask & (label == label)
    count = tl.sum(present.to(accumulate), 1)
    mean = tl.where(count > 0, tl.sum(tl.where(present, label, 0.0), 1) / tl.maximum(count, 1.0), float("nan"))
    at = comparison[:, None] * principles + principle[None, :]
    tl.store(per_principle + 2 * at, first, mask=mask)
    tl.store(per_principle + 2 * at + 1, second, mask=mask)
    tl.store(position_bias + at, tl.abs(first - second), mask=mask)
    tl.store(prob_a + comparison, mean, mask=comparison < comparisons)


def preference_labels(logprob: Tensor, clamp: tuple[float, float] | None) -> tuple[Tensor, Tensor, Tensor]:
    """(prob_a [C], per_principle [C, P, 2], position_bias [C, P]) from logprob [C, P, 2, 2]; NaN = not asked."""
    comparisons, principles = logprob.shape[:2]
    dtype = accumulate_dtype(logprob.dtype)
    shapes = ((comparisons,), (comparisons, principles, 2), (comparisons, principles))
    out = tuple(torch.empty(shape, dtype=dtype, device=logprob.device) for shape in shapes)
    if comparisons == 0:
        return out
    low, high = clamp or (0.0, 1.0)
    _labels[(triton.cdiv(comparisons, COMPARISONS),)](
        logprob.detach(), *out, comparisons, principles, *logprob.stride(),
        CLAMP=clamp is not None, LOW=low, HIGH=high,
        COMPARISONS=COMPARISONS, PRINCIPLES=triton.next_power_of_2(max(1, principles)),
    )  # fmt: skip
    return out
