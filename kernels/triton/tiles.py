"""Statistics of the head's rows without their logits, from library products: one tile of logits in the L2 cache.

Per chunk of CHUNK rows and tile of TILE vocabulary entries, in that order: one matrix product into the one buffer there
is, then one program per row that takes the row's part of the tile into four running numbers, the last tile's program
turning them into log-prob, log-sum-exp and entropy. A tile is read right after it was written, from the L2 cache as far
as it stayed there; memory holds the one buffer, whatever N and V.

Deterministic: tiles come in the vocabulary's order and no program shares a number with another. Tiles depend on V only,
but the product of the last chunk has as many rows as are left, and the library may round it differently than a full
one: a row's bits are independent of the other rows' values, not of their number. (Filling the chunk up would cost a
short batch the time of CHUNK rows; `fused_logprob` is independent of both.)

Shapes: N rows, H hidden, V vocabulary, C = CHUNK rows at most.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import _mm, accumulate_dtype, operand_dtype
from .rows import _ABSENT, _LOG2E, _LOWEST, ENTROPY, LOGPROB, LSE, _online

CHUNK, TILE = 2048, 4096
"""Rows and columns of the buffer: 33.6 MB of fp32 logits, for the L2 of an H100 or H200 (50 MB), past which the tile of
the weight streams (as large again for bf16 and H = 4096). A product has 16 x 16 output blocks of 128 x 256, which fill
132 multiprocessors twice to 97 %. Chosen by sizes, not yet by timing: 1024 rows would fill them once as well."""

STATISTICS = (LOGPROB, LSE, ENTROPY)
"""The rows of what `statistics` returns, as in the first three of the row kernels' outputs."""


@triton.jit
def _results(top, total, spread, chosen, inv_t):
    """Log-prob, log-sum-exp and entropy from the running numbers of `rows._online` and the target's logit."""
    log_total = tl.log(total)
    return (chosen - top) * inv_t - log_total, top * inv_t + log_total, log_total - spread / total * inv_t


@triton.jit(do_not_specialize=["first_column", "n", "last"])
def _fold(
    tile,  # (C, width) logits of the columns from first_column on, the given stride apart
    targets,  # (C,) in [0, V)
    state,  # (4, C) maximum, sum, spread, target's logit: as in rows._online; read from the second tile on
    outputs,  # (3, C) log-prob, log-sum-exp, entropy, n apart: written by the last tile
    stride, first_column, width, n, last, inv_t, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take one row's part of a tile into its state."""
    i = tl.program_id(0).to(tl.int64)
    row, state, count = tile + i * stride, state + i, tl.num_programs(0)
    dtype = tile.dtype.element_ty
    inv_t = tl.full([], 1.0, dtype) * inv_t
    scale2 = inv_t * _LOG2E
    top, total = tl.full([], _LOWEST, dtype), tl.full([], 0.0, dtype)
    spread, chosen = tl.full([], 0.0, dtype), tl.full([], 0.0, dtype)
    if first_column != 0:
        top, total = tl.load(state), tl.load(state + count)
        spread, chosen = tl.load(state + 2 * count), tl.load(state + 3 * count)
    columns = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        at = start + columns
        z = tl.load(row + at, mask=at < width, other=_ABSENT)
        top, total, spread = _online(z, top, total, spread, scale2)
    target = tl.load(targets + i) - first_column
    if (target >= 0) & (target < width):
        chosen = tl.load(row + target)
    if last != 0:
        logprob, lse, entropy = _results(top, total, spread, chosen, inv_t)
        outputs += i
        tl.store(outputs, logprob)
        tl.store(outputs + n, lse)
        tl.store(outputs + 2 * n, entropy)
    else:
        tl.store(state, top)
        tl.store(state + count, total)
        tl.store(state + 2 * count, spread)
        tl.store(state + 3 * count, chosen)


def statistics(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """[3, N] log-prob, log-sum-exp and entropy of the rows hidden [N, H] weight [V, H]^T / temperature, in nats.

    targets [N] int64 in [0, V), contiguous. Any floating types; fp32 (fp64 for fp64 inputs, at twice the memory). No
    gradient. Operands of two types, and strides that the library takes in neither order, cost copies of a tile's
    operands besides the buffer.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    operand, device = operand_dtype(hidden, weight), hidden.device
    dtype = accumulate_dtype(operand)
    outputs = torch.empty(len(STATISTICS), rows, dtype=dtype, device=device)
    if rows == 0:
        return outputs
    height, tile = min(CHUNK, rows), min(TILE, vocab)
    buffer = torch.empty(height, tile, dtype=dtype, device=device)
    state = torch.empty(4, height, dtype=dtype, device=device)
    block = max(16, triton.next_power_of_2(tile))
    for start in range(0, rows, height):
        part, out = hidden[start : start + height].to(operand), outputs[:, start : start + height]
        count, target = part.shape[0], targets[start : start + height]
        for column in range(0, vocab, tile):
            columns = weight[column : column + tile].to(operand)
            # A view of the wider buffer, whose rows stay aligned, however few columns are left.
            logits = buffer[:count, : columns.shape[0]]
            _mm(part, columns.t(), logits)
            _fold[(count,)](
                logits, target, state, out, buffer.stride(0), column, columns.shape[0], out.stride(0),
                int(column + tile >= vocab), 1.0 / temperature, BLOCK=block, num_warps=max(1, min(16, block // 256)),
            )  # fmt: skip
    return outputs
