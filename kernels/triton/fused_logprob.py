"""Statistics of the head's rows without their logits, as one kernel: the product with running statistics behind it.

A program takes BLOCK_ROWS rows and the SPLIT vocabulary entries of its split, block of columns by block of columns:
the product's K loop over tensor descriptors (TMA) into fp32 accumulators, then per row the maximum, sum exp(z - max),
sum exp(z - max) (z - max) and the target's logit, kept in registers. It stores one partial result per row; a second
small kernel merges a row's partials in the vocabulary's order. No atomics. Columns beyond V are -inf: a zero there
would count as a logit (verl #2899: wrong wherever the vocabulary is not a multiple of the block).

Blocks and splits are constants and no number of one row meets another row's: a row's bits depend on neither the values
nor the number of the rows around it.

Traffic: W once per GROUP row blocks, hidden from L2, 12 bytes of partials per row and split each way. Memory: those of
MAX_ROWS rows. Precision: fp32 accumulators and statistics; the maximum is taken off before any scaling (as in `rows`).

Shapes: N rows, H hidden, V vocabulary, NS = ceil(V / SPLIT) splits, C = MAX_ROWS rows at most.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .rows import _ABSENT, _LOG2E, _LOWEST
from .tiles import STATISTICS, _results

BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH = 128, 128, 64
WARPS, STAGES = 8, 3
"""One tile of the product, and how it is run. Compiled for sm_90: 98 KB of shared memory and at most 128 registers, so
that two programs share a multiprocessor and one's statistics run beside the other's products."""

SPLIT = 4096
"""Columns of one program, a multiple of BLOCK_COLUMNS: V = 128256 gives 32 splits; with 4096 rows 1024 programs."""

GROUP = 32
"""Row blocks that go through a split side by side: its columns come from HBM once for 4096 rows."""

MAX_ROWS = 16384
"""Rows whose partials exist together, a multiple of BLOCK_ROWS: 6.3 MB of them at V = 128256."""

MERGE_ROWS = 128

FUSED_SHAPES: frozenset[tuple[int, int]] = frozenset()
"""The (H, V) for which this form is what `linear_logprob(tiled=True)` takes, half types only. A pair belongs here once
a measurement on the GPU shows it ahead of `tiles`; nothing has been measured yet."""


@triton.jit
def _online_rows(z, top, total, spread, scale2):
    """`rows._online` for a block z [rows, columns] and numbers [rows]."""
    new_top = tl.maximum(top, tl.max(z, 1))
    keep = tl.exp2((top - new_top) * scale2)
    d = z - new_top[:, None]
    p = tl.exp2(d * scale2)
    spread = keep * (spread + total * (top - new_top)) + tl.sum(tl.where(p == 0, 0.0, p * d), 1)
    return new_top, total * keep + tl.sum(p, 1), spread


@triton.jit(do_not_specialize=["n", "n_splits"])
def _partials(
    hidden,  # descriptor (n, width), blocks of ROWS x WIDTH
    weight,  # descriptor (vocab, width), blocks of COLUMNS x WIDTH
    targets,  # (n,) in [0, vocab)
    partials,  # (3, n_splits, n) maximum, sum, spread of a row's logits in a split
    chosen,  # (n,) logit of the target, written by the split it lies in
    n, n_splits, vocab, width, inv_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the vocabulary."""
    program, row_blocks = tl.program_id(0), tl.cdiv(n, ROWS)
    group = program // (GROUP * n_splits)
    group_rows = tl.minimum(row_blocks - group * GROUP, GROUP)
    in_group = program % (GROUP * n_splits)
    split, first_row = in_group // group_rows, (group * GROUP + in_group % group_rows) * ROWS
    scale2 = tl.full([], 1.0, tl.float32) * inv_t * _LOG2E
    rows, columns = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = rows < n
    first_column = split * SPLIT
    target = tl.load(targets + rows, mask=inside, other=0).to(tl.int32)
    top, total = tl.full([ROWS], _LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    spread, logit = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(first_column, tl.minimum(first_column + SPLIT, vocab), COLUMNS):
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, width, WIDTH):
            z = tl.dot(hidden.load([first_row, k]), weight.load([start, k]).T, z, input_precision="ieee")
        at = start + columns
        if RAGGED:
            z = tl.where((at < vocab)[None, :], z, _ABSENT)
        logit += tl.sum(tl.where(at[None, :] == target[:, None], z, 0.0), 1)
        top, total, spread = _online_rows(z, top, total, spread, scale2)
    out = partials + split.to(tl.int64) * n + rows
    step = n_splits.to(tl.int64) * n
    tl.store(out, top, mask=inside)
    tl.store(out + step, total, mask=inside)
    tl.store(out + 2 * step, spread, mask=inside)
    mine = (target >= first_column) & (target < first_column + SPLIT)
    tl.store(chosen + rows, logit, mask=inside & mine)


@triton.jit(do_not_specialize=["rows", "n_splits", "n"])
def _merge(
    partials,  # (3, n_splits, rows)
    chosen,  # (rows,)
    outputs,  # (3, rows) log-prob, log-sum-exp, entropy, n apart
    rows, n_splits, n, inv_t, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the partials of BLOCK rows, split by split."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    inv_t = tl.full([], 1.0, tl.float32) * inv_t
    scale2 = inv_t * _LOG2E
    step = n_splits.to(tl.int64) * rows
    top, total = tl.full([BLOCK], _LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)
    at = partials + row
    for _ in range(n_splits):
        # other: what a split without any probability holds
        their_top = tl.load(at, mask=inside, other=_LOWEST)
        their_total = tl.load(at + step, mask=inside, other=0.0)
        their_spread = tl.load(at + 2 * step, mask=inside, other=0.0)
        new_top = tl.maximum(top, their_top)
        ours, theirs = tl.exp2((top - new_top) * scale2), tl.exp2((their_top - new_top) * scale2)
        spread = ours * (spread + total * (top - new_top))
        spread += theirs * (their_spread + their_total * (their_top - new_top))
        total = total * ours + their_total * theirs
        top = new_top
        at += rows
    logit = tl.load(chosen + row, mask=inside, other=0.0)
    logprob, lse, entropy = _results(top, total, spread, logit, inv_t)
    outputs += row
    tl.store(outputs, logprob, mask=inside)
    tl.store(outputs + n, lse, mask=inside)
    tl.store(outputs + 2 * n, entropy, mask=inside)


def _row_stride(matrix: Tensor) -> int:
    """Elements from row to row. Of a single row torch's own stride means nothing."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def fits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether tensor descriptors can describe both: one dtype, rows contiguous, beginning at multiples of 16 bytes and
    not overlapping; not fp64, which has no fp32 statistics."""
    return hidden.dtype == weight.dtype != torch.float64 and all(
        0 < m.shape[1] <= _row_stride(m)
        and m.stride(1) == 1
        and _row_stride(m) * m.element_size() % 16 == 0
        and m.data_ptr() % 16 == 0
        for m in (hidden, weight)
    )


def _descriptor(matrix: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [_row_stride(matrix), 1], [rows, BLOCK_WIDTH])


def statistics(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """[3, N] fp32 log-prob, log-sum-exp and entropy of the rows hidden [N, H] weight [V, H]^T / temperature, in nats.

    targets [N] int64 in [0, V), contiguous. No gradient. ValueError where `fits` says no. fp32 inputs are multiplied as
    fp32 (no TF32), which is exact and slow: the kernel is made for half types.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    outputs = torch.empty(len(STATISTICS), rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return outputs
    if not fits(hidden, weight):
        raise ValueError(
            "fused_logprob: hidden and weight must be of one dtype, not fp64, with contiguous rows at multiples of 16 "
            f"bytes. Got {hidden.dtype} {list(hidden.shape)} with strides {hidden.stride()} and {weight.dtype} "
            f"{list(weight.shape)} with strides {weight.stride()}. Take tiles.statistics."
        )
    splits, height = triton.cdiv(vocab, SPLIT), min(MAX_ROWS, rows)
    partials = torch.empty(3, splits, height, dtype=torch.float32, device=hidden.device)
    chosen = torch.empty(height, dtype=torch.float32, device=hidden.device)
    columns = _descriptor(weight, BLOCK_COLUMNS)
    for start in range(0, rows, height):
        part, out = hidden[start : start + height], outputs[:, start : start + height]
        count = part.shape[0]
        _partials[(triton.cdiv(count, BLOCK_ROWS) * splits,)](
            _descriptor(part, BLOCK_ROWS), columns, targets[start : start + height], partials, chosen,
            count, splits, vocab, hidden.shape[1], 1.0 / temperature,
            ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS, WIDTH=BLOCK_WIDTH, SPLIT=SPLIT, GROUP=GROUP,
            RAGGED=vocab % BLOCK_COLUMNS != 0, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        _merge[(triton.cdiv(count, MERGE_ROWS),)](
            partials, chosen, out, count, splits, out.stride(0), 1.0 / temperature, BLOCK=MERGE_ROWS, num_warps=4
        )
    return outputs
