"""The policy loss's sums over rows: at most two launches, no atomics, the same bits whatever the memory held before.

A program sums ROWS rows of every statistic at once; where there are several such blocks, a second launch adds their
partial sums in order. Blocks are fixed, so the order of additions depends on N alone. fp32 (fp64 for fp64 inputs); the
error grows with log N inside a block and, beyond MERGED blocks, linearly in their groups.
Traffic: 6 of the 8 rows of outputs and the weights once, 28 bytes a row in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 1024  # rows of one partial sum: a batch up to this size takes one launch
MERGED = 1024  # partial sums added at once
SUMS = 8  # the loss and linear_policy_loss.STATS


@triton.jit
def _total(values, weight, inside):
    return tl.sum(tl.load(values, mask=inside, other=0.0) * weight, 0)


@triton.jit(do_not_specialize=["n", "stride"])
def _policy_sums(outputs, weights, loss, stats, n, stride, ROWS: tl.constexpr):
    """Sums of rows program x ROWS + [0, ROWS) of outputs (8, n), see rows.py, at 8 x program of loss and stats."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    inside = row < n
    stride = stride.to(tl.int64)
    weight = tl.load(weights + row, mask=inside, other=0.0)
    at, stats = outputs + row, stats + program * 8
    ratio = tl.load(at + 7 * stride, mask=inside, other=0.0)
    tl.store(loss + program * 8, _total(at + 3 * stride, 1.0, inside))  # weight and scale are in it already
    tl.store(stats, _total(at + 4 * stride, weight, inside))
    tl.store(stats + 1, _total(at + 5 * stride, weight, inside))
    tl.store(stats + 2, _total(at + 6 * stride, weight, inside))
    tl.store(stats + 3, tl.sum(ratio * weight, 0))
    tl.store(stats + 4, tl.sum(ratio * ratio * weight, 0))
    tl.store(stats + 5, _total(at + 2 * stride, weight, inside))
    tl.store(stats + 6, tl.sum(weight, 0))


@triton.jit(do_not_specialize=["blocks"])
def _merge(partials, loss, stats, blocks, MERGED: tl.constexpr):
    """The sums of partials (blocks, 8) over the blocks, in order."""
    column = tl.arange(0, 8)
    total = tl.zeros([8], partials.dtype.element_ty)
    for start in range(0, blocks, MERGED):
        block = start + tl.arange(0, MERGED)
        at = block.to(tl.int64)[:, None] * 8 + column[None, :]
        total += tl.sum(tl.load(partials + at, mask=(block < blocks)[:, None], other=0.0), 0)
    tl.store(loss + column, total, mask=column == 0)
    tl.store(stats + column - 1, total, mask=column > 0)


def policy_sums(outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, stats [7]) of the row kernel's outputs [8, N] and weights [N]: the loss is the plain sum of its row, stats
    are linear_policy_loss.STATS, each the sum of weight x value."""
    rows = outputs.shape[1]
    weights = weights.contiguous()
    assert outputs.stride(1) == 1 and outputs.dtype == weights.dtype
    loss, stats = (torch.empty(shape, dtype=outputs.dtype, device=outputs.device) for shape in ((), (SUMS - 1,)))
    blocks = max(1, triton.cdiv(rows, ROWS))
    if blocks == 1:
        _policy_sums[(1,)](outputs, weights, loss, stats, rows, outputs.stride(0), ROWS=ROWS)
        return loss, stats
    partials = torch.empty(blocks, SUMS, dtype=outputs.dtype, device=outputs.device)
    flat = partials.view(-1)
    _policy_sums[(blocks,)](outputs, weights, flat, flat[1:], rows, outputs.stride(0), ROWS=ROWS)
    _merge[(1,)](partials, loss, stats, blocks, MERGED=min(MERGED, triton.next_power_of_2(blocks)))
    return loss, stats
