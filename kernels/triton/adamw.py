"""AdamW on split masters in one launch a parameter, and the ordered two-pass norm.

Bound by memory: 18 bytes a weight with bf16 gradient and moments, 30 with fp32 ones. A program updates four blocks of
QUARTER weights, so that each of its Philox calls serves four weights; a word's halves round the two moments. bf16
parameters and moments are read and written as their bits, since they are rounded by adding to these.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adamw import QUARTER, Settings, factors

SHARE = 65536  # squares that one program sums, BLOCK at a time
BLOCK = 4096
NAN = tl.constexpr(0x7FC0)  # as bf16


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _rounded(value, random):
    """int16 bits of the bf16 on either side of `value`, unbiased for `random` uniform in [0, 2^16)."""
    bits = value.to(tl.int32, bitcast=True) + random.to(tl.int32)
    return tl.where(value != value, NAN, bits >> 16).to(tl.int16)


@triton.jit
def _update(
    param, remainder, grad, exp_avg, exp_avg_sq, at, total, scale, word,
    mean_weight, square_decay, square_weight, size, root, eps, decay, ROUNDED: tl.constexpr,
):  # fmt: skip
    """One step of the weights `at`; `word` holds their 32 random bits."""
    inside = at < total
    high = tl.load(param + at, mask=inside, other=0).to(tl.int32)
    w = _float((high << 16) + tl.load(remainder + at, mask=inside, other=0).to(tl.int32))
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * scale
    m = tl.load(exp_avg + at, mask=inside, other=0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0)
    if ROUNDED:
        m, v = _float(m.to(tl.int32) << 16), _float(v.to(tl.int32) << 16)
    m += mean_weight * (g - m)
    v = square_decay * v + square_weight * (g * g)
    w -= decay * w + size * (m / (root * tl.sqrt(v) + eps))
    bits = w.to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16  # ties away from zero: see split_master
    low = bits - (high << 16)
    nan = w != w
    tl.store(param + at, tl.where(nan, NAN, high).to(tl.int16), mask=inside)
    tl.store(remainder + at, tl.where(nan, 0, low).to(tl.int16), mask=inside)
    if ROUNDED:
        m, v = _rounded(m, word & 0xFFFF), _rounded(v, word >> 16)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)


@triton.jit(do_not_specialize=["key"])
def _step(
    param,  # (total) int16, the bits of bf16
    remainder,  # (total) int16
    grad,  # (total) bf16 or fp32
    exp_avg, exp_avg_sq,  # (total) fp32, or int16 if ROUNDED
    clip,  # (1) fp32
    total, key, mean_weight, square_decay, square_weight, size, root, eps, decay,
    ROUNDED: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    """4 QUARTER weights, and the four words of each of the QUARTER counters that are theirs."""
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, QUARTER)
    at = block * (4 * QUARTER) + lane
    scale = tl.load(clip)
    word_0, word_1, word_2, word_3 = 0, 0, 0, 0
    if ROUNDED:
        counter = block * QUARTER + lane
        low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
        zero = tl.zeros([QUARTER], tl.uint32)
        word_0, word_1, word_2, word_3 = tl.philox(key, low, high, zero, zero)
    _update(param, remainder, grad, exp_avg, exp_avg_sq, at, total, scale, word_0,
            mean_weight, square_decay, square_weight, size, root, eps, decay, ROUNDED)  # fmt: skip
    _update(param, remainder, grad, exp_avg, exp_avg_sq, at + QUARTER, total, scale, word_1,
            mean_weight, square_decay, square_weight, size, root, eps, decay, ROUNDED)  # fmt: skip
    _update(param, remainder, grad, exp_avg, exp_avg_sq, at + 2 * QUARTER, total, scale, word_2,
            mean_weight, square_decay, square_weight, size, root, eps, decay, ROUNDED)  # fmt: skip
    _update(param, remainder, grad, exp_avg, exp_avg_sq, at + 3 * QUARTER, total, scale, word_3,
            mean_weight, square_decay, square_weight, size, root, eps, decay, ROUNDED)  # fmt: skip


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def adamw_step(
    param: Tensor, remainder: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, clip: Tensor | None,
    settings: Settings, key: int,
) -> None:  # fmt: skip
    """In place; arguments as cai_fast.kernels.adamw_step's, of at least one element."""
    total = param.numel()
    clip = torch.ones(1, device=param.device) if clip is None else clip
    _step[(triton.cdiv(total, 4 * QUARTER),)](
        _bits(param), remainder, grad.contiguous(), _bits(exp_avg), _bits(exp_avg_sq), clip,
        total, key, *factors(settings), ROUNDED=exp_avg.dtype == torch.bfloat16,
        QUARTER=QUARTER,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first"])
def _square_sums(grad, partials, total, first, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of SHARE squares of a gradient [total], into partials[first + program]."""
    program = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float32)
    for done in range(0, SHARE, BLOCK):
        at = program * SHARE + done + tl.arange(0, BLOCK)
        value = tl.load(grad + at, mask=at < total, other=0.0).to(tl.float32)
        sums += value * value
    tl.store(partials + first + program, tl.sum(sums, 0))


@triton.jit
def _root_of_sum(partials, norm_out, count, BLOCK: tl.constexpr):
    """One program for all: the order of addition depends on `count` alone."""
    sums = tl.zeros([BLOCK], tl.float32)
    for done in range(0, count, BLOCK):
        at = done + tl.arange(0, BLOCK)
        sums += tl.load(partials + at, mask=at < count, other=0.0)
    tl.store(norm_out, tl.sqrt_rn(tl.sum(sums, 0)))


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """() fp32; at least one gradient, none of them empty."""
    counts = [triton.cdiv(g.numel(), SHARE) for g in grads]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=grads[0].device)
    norm, first = torch.empty(1, dtype=torch.float32, device=grads[0].device), 0
    for grad, count in zip(grads, counts, strict=True):
        _square_sums[(count,)](grad.contiguous(), partials, grad.numel(), first, SHARE=SHARE, BLOCK=BLOCK)
        first += count
    _root_of_sum[(1,)](partials, norm, first, BLOCK=BLOCK)
    return norm[0]
