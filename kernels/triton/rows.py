"""Row kernels of the fused heads: from one row of logits to its statistics, its loss and the logits' gradient.

One program per row. The first pass over the row keeps a running maximum m, l = sum exp(z - m) and
sum exp(z - m) (z - m), from which log-prob, log-sum-exp and entropy follow; the loss and its coefficients g = dL/dlogp,
s = dL/dlse, e = dL/dentropy need nothing else. The second pass writes
    dz_j = [g (delta_jt - p_j) + s p_j - e p_j (log p_j + entropy)] / temperature
over the row itself: as fp32 in place, or in half precision into the front half of the row's bytes.

z - m is formed before any scaling, so that adding a constant to all logits costs no precision. Rows are [C, V] logits
with the given stride; per-row numbers are columns of [k, N] matrices, row i of a chunk at column i.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 16384
"""Columns of one step (half for the KL, which holds two rows). So large, with 32 warps, that about one row is under way
on a multiprocessor: then the second pass finds most of it in L2. Chosen by registers and L2 size, not yet by timing."""

LOGPROB, LSE, ENTROPY, LOSS, PG, KL, CLIPPED, RATIO = range(8)
OUTPUTS = 8
STATISTICS, LINEAR, POLICY = 0, 1, 2
"""What the row kernel does with a row's log-prob; inputs [4, N] are, in turn, unused; g, s, e; old, advantage, factor
(weight x scale) and ref. All modes are one compiled kernel, hence equal logits give equal bits in all of them."""

_POLICY = tl.constexpr(POLICY)
_LOWEST = tl.constexpr(-3.0e38)  # finite, so that a block of -inf does not turn the running sums into NaN
_ABSENT = tl.constexpr(-float("inf"))  # what columns beyond V hold: probability 0
_LOG2E = tl.constexpr(1.4426950408889634)
_LIMIT = tl.constexpr(20.0)  # common.LOG_RATIO_LIMIT


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _bounded(x, low, high):
    """x in [low, high]; unlike tl.minimum and tl.maximum it keeps a NaN, which must reach the loss."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _online(z, top, total, spread, scale2):
    """Take a block z into top = max z, total = sum p, spread = sum p (z - top), where p = 2^(scale2 (z - top))."""
    new_top = tl.maximum(top, tl.max(z, 0))
    keep = tl.exp2((top - new_top) * scale2)
    d = z - new_top
    p = tl.exp2(d * scale2)
    spread = keep * (spread + total * (top - new_top)) + tl.sum(tl.where(p == 0, 0.0, p * d), 0)
    return new_top, total * keep + tl.sum(p, 0), spread


@triton.jit
def _policy(logprob, inputs, outputs, n, low, high, kl_coef, has_ref, k3):
    """Clipped objective plus KL of one row -> (loss, dloss/dlogprob); its terms go to outputs."""
    old, advantage = tl.load(inputs), tl.load(inputs + n)
    factor, ref = tl.load(inputs + 2 * n), tl.load(inputs + 3 * n)
    log_ratio = logprob - old
    ratio = _exp(_bounded(log_ratio, -_LIMIT, _LIMIT))
    plain = -advantage * ratio
    bounded = -advantage * _bounded(ratio, low, high)
    clipped = bounded > plain
    pg = tl.where(clipped, bounded, plain)
    d = tl.where(has_ref != 0, ref - logprob, 0.0)
    power = _exp(_bounded(d, -_LIMIT, _LIMIT))
    kl = tl.where(k3 != 0, power - 1.0 - d, d * d * 0.5)
    slope = tl.where(k3 != 0, 1.0 - tl.where(tl.abs(d) > _LIMIT, 0.0, power), -d)
    slope = tl.where(has_ref != 0, slope, 0.0)
    g = tl.where((tl.abs(log_ratio) > _LIMIT) | clipped, 0.0, plain) + kl_coef * slope
    tl.store(outputs + 4 * n, pg)
    tl.store(outputs + 5 * n, kl)
    tl.store(outputs + 6 * n, clipped.to(ratio.dtype))
    tl.store(outputs + 7 * n, ratio)
    return (pg + kl_coef * kl) * factor, g * factor


@triton.jit(do_not_specialize=["n", "mode", "write", "has_ref", "k3"])
def _row(
    logits, grad, targets, inputs, outputs, vocab, stride, grad_stride, n, mode, write, has_ref, k3,
    inv_t, low, high, kl_coef, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits (C, V): statistics and loss to outputs (8, C), and if `write` the gradient over the row."""
    i = tl.program_id(0).to(tl.int64)
    row, grad_row = logits + i * stride, grad + i * grad_stride
    target = tl.load(targets + i)
    dtype = logits.dtype.element_ty
    inv_t = tl.full([], 1.0, dtype) * inv_t
    scale2 = inv_t * _LOG2E
    columns = tl.arange(0, BLOCK)
    top, total, spread = tl.full([], _LOWEST, dtype), tl.full([], 0.0, dtype), tl.full([], 0.0, dtype)
    for start in range(0, vocab, BLOCK):
        at = start + columns
        z = tl.load(row + at, mask=at < vocab, other=_ABSENT)
        top, total, spread = _online(z, top, total, spread, scale2)
    log_total = tl.log(total)
    logprob = (tl.load(row + target) - top) * inv_t - log_total
    entropy = log_total - spread / total * inv_t
    inputs += i
    outputs += i
    tl.store(outputs, logprob)
    tl.store(outputs + n, top * inv_t + log_total)
    tl.store(outputs + 2 * n, entropy)
    if mode != 0:
        if mode == _POLICY:
            loss, g = _policy(logprob, inputs, outputs, n, low, high, kl_coef, has_ref, k3)
            s, e = tl.full([], 0.0, dtype), tl.full([], 0.0, dtype)
        else:
            g, s, e = tl.load(inputs), tl.load(inputs + n), tl.load(inputs + 2 * n)
            loss = g * logprob
        tl.store(outputs + 3 * n, loss)
        if write != 0:
            inv_total = 1.0 / total
            for start in range(0, vocab, BLOCK):
                at = start + columns
                d = tl.load(row + at, mask=at < vocab, other=_ABSENT) - top
                p = tl.exp2(d * scale2) * inv_total
                weight = s - g - e * (d * inv_t - log_total + entropy)
                dz = tl.where(p == 0, 0.0, p * weight) + tl.where(at == target, g, 0.0)
                # The front of the row is written while its back is still to be read: no thread may store before
                # all have loaded this block. Later blocks lie beyond what this store reaches.
                tl.debug_barrier()
                tl.store(grad_row + at, (dz * inv_t).to(grad.dtype.element_ty), mask=at < vocab)


@triton.jit(do_not_specialize=["n", "has_targets", "has_upstream", "write"])
def _kl_row(
    policy, reference, grad, targets, upstream, outputs, vocab, stride, grad_stride, n,
    has_targets, has_upstream, write, inv_t, BLOCK: tl.constexpr,
):  # fmt: skip
    """KL(p || q) of one row of either model's logits; dz_j = u p_j (log p_j - log q_j - KL) / temperature."""
    i = tl.program_id(0).to(tl.int64)
    row, ref_row, grad_row = policy + i * stride, reference + i * stride, grad + i * grad_stride
    dtype = policy.dtype.element_ty
    inv_t = tl.full([], 1.0, dtype) * inv_t
    scale2 = inv_t * _LOG2E
    columns = tl.arange(0, BLOCK)
    top, ref_top = tl.full([], _LOWEST, dtype), tl.full([], _LOWEST, dtype)
    total, ref_total, gap = tl.full([], 0.0, dtype), tl.full([], 0.0, dtype), tl.full([], 0.0, dtype)
    for start in range(0, vocab, BLOCK):
        at = start + columns
        z = tl.load(row + at, mask=at < vocab, other=_ABSENT)
        y = tl.load(ref_row + at, mask=at < vocab, other=_ABSENT)
        new_top, new_ref_top = tl.maximum(top, tl.max(z, 0)), tl.maximum(ref_top, tl.max(y, 0))
        keep = tl.exp2((top - new_top) * scale2)
        d, ref_d = z - new_top, y - new_ref_top
        p = tl.exp2(d * scale2)
        # gap = sum p [(z - top) - (y - ref_top)] with each model's own maximum taken off before they are compared
        gap = keep * (gap + total * ((top - new_top) - (ref_top - new_ref_top)))
        gap += tl.sum(tl.where(p == 0, 0.0, p * (d - ref_d)), 0)
        total = total * keep + tl.sum(p, 0)
        ref_total = ref_total * tl.exp2((ref_top - new_ref_top) * scale2) + tl.sum(tl.exp2(ref_d * scale2), 0)
        top, ref_top = new_top, new_ref_top
    log_total, ref_log_total = tl.log(total), tl.log(ref_total)
    offset = ref_log_total - log_total
    kl = gap / total * inv_t + offset
    tl.store(outputs + i, kl)
    if has_targets != 0:
        target = tl.load(targets + i)
        tl.store(outputs + n + i, (tl.load(row + target) - top) * inv_t - log_total)
        tl.store(outputs + 2 * n + i, (tl.load(ref_row + target) - ref_top) * inv_t - ref_log_total)
    if write != 0:
        factor = inv_t / total
        if has_upstream != 0:
            factor *= tl.load(upstream + i)
        for start in range(0, vocab, BLOCK):
            at = start + columns
            d = tl.load(row + at, mask=at < vocab, other=_ABSENT) - top
            ref_d = tl.load(ref_row + at, mask=at < vocab, other=_ABSENT) - ref_top
            p = tl.exp2(d * scale2)
            dz = tl.where(p == 0, 0.0, p * ((d - ref_d) * inv_t + offset - kl) * factor)
            tl.debug_barrier()  # as in _row
            tl.store(grad_row + at, dz.to(grad.dtype.element_ty), mask=at < vocab)


def _block(vocab: int, limit: int) -> dict[str, int]:
    block = max(16, min(limit, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "num_warps": max(1, min(32, block // 256))}


def gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the gradient of contiguous logits [C, V] goes: [C, V] of `dtype` over the same memory, from each row's
    first byte (row stride 2V for half types, which a matrix product takes as it is)."""
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]


def launch_rows(
    logits: Tensor, grad: Tensor, targets: Tensor, inputs: Tensor, outputs: Tensor, mode: int, write: bool,
    inv_t: float, *, clip_coef: float = 0.0, kl_coef: float = 0.0, has_ref: bool = False, k3: bool = False,
) -> None:  # fmt: skip
    """Fill outputs [8, C] and, if `write`, turn logits [C, V] into their gradient; targets [C], in [0, V).

    inputs [4, C] and outputs may be column ranges of wider matrices of one width.
    """
    count, vocab = logits.shape
    if count == 0:
        return
    assert inputs.stride() == outputs.stride() and targets.is_contiguous() and logits.stride(1) == 1
    _row[(count,)](
        logits, grad, targets, inputs, outputs, vocab, logits.stride(0), grad.stride(0), inputs.stride(0),
        mode, int(write), int(has_ref), int(k3), inv_t, 1.0 - clip_coef, 1.0 + clip_coef, float(kl_coef),
        **_block(vocab, MAX_BLOCK),
    )  # fmt: skip


def launch_kl_rows(
    policy: Tensor, reference: Tensor, grad: Tensor, targets: Tensor | None, upstream: Tensor | None, outputs: Tensor,
    write: bool, inv_t: float,
) -> None:  # fmt: skip
    """Fill outputs [3, C] (KL, log-prob, reference log-prob) and, if `write`, turn policy [C, V] into its gradient.

    outputs may be a column range of a wider matrix; targets [C] in [0, V); upstream [C] (None: all 1).
    """
    count, vocab = policy.shape
    if count == 0:
        return
    assert policy.stride() == reference.stride() and policy.stride(1) == 1
    _kl_row[(count,)](
        policy, reference, grad, outputs if targets is None else targets, outputs if upstream is None else upstream,
        outputs, vocab, policy.stride(0), grad.stride(0), outputs.stride(0), int(targets is not None),
        int(upstream is not None), int(write), inv_t, **_block(vocab, MAX_BLOCK // 2),
    )  # fmt: skip
