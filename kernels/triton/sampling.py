"""Sampling in one launch, one program per row: no sort, no floating-point sum that depends on the order of addition.

Probabilities are fp32 and their sums 64-bit integers in units of 2^-52, so that every comparison with a sum is exact
and blocks may be summed in any order. Where top-k and top-p cut is found by bisection over the ordered bit patterns of
the log-probabilities (31 passes over a row that stays in the L2 cache); ties at the cut go to the lowest indices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
UNIT = tl.constexpr(4503599627370496.0)  # 2^52: a probability >= 2^-29 is a whole number of units
NONE = tl.constexpr(-2147483648)  # the key of what is not there, below every other


@triton.jit
def _scaled(logits, token, stride, vocab, temperature):
    z = tl.load(logits + token * stride, mask=token < vocab, other=float("-inf")).to(tl.float32)
    return tl.div_rn(z, temperature)


@triton.jit
def _key(logprob):
    """An int32 that orders as the float does; -0.0 counts as 0.0."""
    bits = (logprob + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _units(logprob):
    return (tl.exp(logprob) * UNIT).to(tl.int64)


@triton.jit
def _units_of_key(key):
    return _units((key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


@triton.jit
def _statistics(logits, stride, vocab, temperature, BLOCK: tl.constexpr):
    """(maximum, its lowest index, log of the sum of exp(z - maximum))."""
    top = tl.full([], float("-inf"), tl.float32)
    best = tl.zeros([], tl.int64)
    total = tl.zeros([], tl.float32)
    for first in range(0, vocab, BLOCK):
        token = (first + tl.arange(0, BLOCK)).to(tl.int64)
        z = _scaled(logits, token, stride, vocab, temperature)
        block_top = tl.max(z, 0)
        block_best = tl.min(tl.where((z == block_top) & (token < vocab), token, vocab), 0)
        best = tl.where(block_top > top, block_best, best)
        new_top = tl.maximum(top, block_top)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # a block may be all -inf
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(z - finite), 0)
        top = new_top
    return top, tl.minimum(best, vocab - 1), tl.log(total)


@triton.jit
def _above(logits, stride, vocab, temperature, top, log_total, cut, BLOCK: tl.constexpr):
    """(count, mass in units) of the tokens whose key is greater than `cut`."""
    count, mass = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for first in range(0, vocab, BLOCK):
        token = (first + tl.arange(0, BLOCK)).to(tl.int64)
        logprob = _scaled(logits, token, stride, vocab, temperature) - top - log_total
        kept = (_key(logprob) > cut) & (token < vocab)
        count += tl.sum(kept.to(tl.int64), 0)
        mass += tl.sum(tl.where(kept, _units(logprob), 0), 0)
    return count, mass


@triton.jit
def _cut(logits, stride, vocab, temperature, top, log_total, limit, low, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(smallest key >= low such that the tokens above it stay below `limit`, their count, their mass)."""
    high = tl.zeros([], tl.int64)  # a log-probability is at most 0: nothing lies above
    low = low.to(tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        count, mass = _above(logits, stride, vocab, temperature, top, log_total, middle, BLOCK)
        measure = count if BY_COUNT else mass
        high = tl.where(measure < limit, middle, high)
        low = tl.where(measure < limit, low, tl.minimum(middle + 1, high))
    count, mass = _above(logits, stride, vocab, temperature, top, log_total, high, BLOCK)
    return high.to(tl.int32), count, mass


@triton.jit
def _kept(logits, stride, vocab, temperature, top, log_total, top_k, top_p, BLOCK: tl.constexpr):
    """(cut, ties): kept are the keys above the cut, and the first `ties` of those equal to it."""
    cut = tl.full([], NONE, tl.int32)
    ties, mass = tl.zeros([], tl.int64), tl.full([], 1, tl.int64) << 52
    if (top_k > 0) & (top_k < vocab):
        cut, count, above = _cut(logits, stride, vocab, temperature, top, log_total, top_k, cut, True, BLOCK)
        ties = top_k - count
        mass = above + ties * _units_of_key(cut)
    if top_p > 0:  # in units of 2^-63; 0 = off
        limit = tl.umulhi(top_p.to(tl.uint64), (mass << 1).to(tl.uint64)).to(tl.int64)
        limit = tl.maximum(limit, 1)  # the first token stays, however small top_p
        of_top_k = cut
        cut, count, above = _cut(logits, stride, vocab, temperature, top, log_total, limit, cut, False, BLOCK)
        each = _units_of_key(cut)
        within = tl.cdiv(limit - above, tl.maximum(each, 1))  # the i-th tie stays while what is before it is below
        ties = tl.where(cut == of_top_k, tl.minimum(ties, within), within)
        ties = tl.where(cut == NONE, 0, ties)  # rounding left all mass below the limit: everything stays
    return cut, ties


@triton.jit
def _draw(logits, stride, vocab, temperature, top, log_total, cut, ties, target, BLOCK: tl.constexpr):
    """The first token whose cumulative mass exceeds `target`; ties at the cut are counted by index."""
    drawn, mass, seen = tl.zeros([], tl.int64), tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for first in range(0, vocab, BLOCK):
        token = (first + tl.arange(0, BLOCK)).to(tl.int64)
        logprob = _scaled(logits, token, stride, vocab, temperature) - top - log_total
        key = _key(logprob)
        tied = ((key == cut) & (token < vocab)).to(tl.int64)
        rank = seen + tl.cumsum(tied, 0)
        kept = (token < vocab) & ((key > cut) | ((tied > 0) & (rank <= ties)))
        units = tl.where(kept, _units(logprob), 0)
        below = mass + tl.cumsum(units, 0) <= target
        drawn += tl.sum((below & (token < vocab)).to(tl.int64), 0)
        seen += tl.sum(tied, 0)
        mass += tl.sum(units, 0)
    return tl.minimum(drawn, vocab - 1)


@triton.jit
def _sample(
    logits, keys, positions, temperatures, top_ks, top_ps, token_out, logprob_out, vocab, row_stride, stride,
    key_stride, position_stride, temperature_stride, k_stride, p_stride,
    TRUNCATE: tl.constexpr, DRAWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw one row's token: logits [B, V]; keys, positions, temperatures, top_ks, top_ps (units of 2^-63) [B]."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    temperature = tl.load(temperatures + row * temperature_stride).to(tl.float32)
    greedy = temperature == 0
    temperature = tl.where(greedy, 1.0, temperature)
    key = tl.load(keys + row * key_stride)
    if DRAWN:
        fraction = key.to(tl.uint64) << 11  # 53 random bits made ahead, as a fraction of 2^64
    else:
        position = tl.load(positions + row * position_stride)
        zero = tl.zeros([], tl.uint32)
        low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
        word_1, word_2, _, _ = tl.philox(key, low, high, zero, zero)
        fraction = ((word_1.to(tl.uint64) << 32) | word_2.to(tl.uint64)) >> 11 << 11
    top, best, log_total = _statistics(logits, stride, vocab, temperature, BLOCK)
    cut, ties = tl.full([], NONE, tl.int32), tl.zeros([], tl.int64)
    if TRUNCATE:
        top_k, top_p = tl.load(top_ks + row * k_stride), tl.load(top_ps + row * p_stride)
        cut, ties = _kept(logits, stride, vocab, temperature, top, log_total, top_k, top_p, BLOCK)
    _, mass = _above(logits, stride, vocab, temperature, top, log_total, cut, BLOCK)
    if TRUNCATE:
        mass += tl.where(ties > 0, ties * _units_of_key(cut), 0)
    target = tl.umulhi(fraction, mass.to(tl.uint64)).to(tl.int64)
    token = _draw(logits, stride, vocab, temperature, top, log_total, cut, ties, target, BLOCK)
    token = tl.where(greedy, best, token)
    logprob = _scaled(logits, token, stride, vocab, temperature) - top - log_total
    if TRUNCATE:
        logprob -= tl.log(mass.to(tl.float32) / UNIT)
    tl.store(token_out + row, token)
    tl.store(logprob_out + row, tl.where(greedy, 0.0, logprob))


def _per_row(value: float | Tensor, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows] of a scalar, a [1] or a [rows] tensor; nothing is copied from the host to a GPU."""
    if not isinstance(value, Tensor):
        value = torch.full((1,), value, dtype=dtype, device=device)
    return value.to(device, dtype).reshape(-1).expand(rows)


def sample_tokens(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float | Tensor, top_k: int | Tensor,
    top_p: float | Tensor, uniform: Tensor | None, truncate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(token[B] int64, logprob[B] f32); arguments as cai_fast.kernels.sample_tokens's; `truncate`: any is cut off."""
    (rows, vocab), device = logits.shape, logits.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    logprob = torch.empty(rows, dtype=torch.float32, device=device)
    if rows == 0:
        return token, logprob
    temperature = _per_row(temperature, rows, torch.float32, device)
    top_k = _per_row(top_k, rows, torch.int64, device)
    top_p = _per_row(top_p, rows, torch.float64, device)
    top_p = torch.where(top_p < 1, top_p * 2.0**63, 0.0).to(torch.int64)
    if uniform is not None:
        keys = (uniform.double() * 2.0**53).to(torch.int64)
    keys, positions = keys.reshape(-1).expand(rows), positions.reshape(-1).expand(rows)
    _sample[(rows,)](
        logits.detach(), keys, positions, temperature, top_k, top_p, token, logprob, vocab, *logits.stride(),
        keys.stride(0), positions.stride(0), temperature.stride(0), top_k.stride(0), top_p.stride(0),
        TRUNCATE=truncate, DRAWN=uniform is not None, BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), num_warps=8,
    )  # fmt: skip
    return token, logprob
