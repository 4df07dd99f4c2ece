"""The small operations of a decoder block, one launch forward and one backward each: they are bound by memory traffic.

Everything is computed in fp32 (fp64 for fp64 inputs) and rounded once, but for rms_norm's normalised value, which is
rounded before the weight multiplies it, as in the other backends. No atomics: sums over rows are partial and ordered.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..common import accumulate_dtype

PARTIALS = 128  # programs of the norm's backward: one partial gradient of the weight each, whatever the GPU
ELEMENTS = 1024  # of one swiglu program


@triton.jit
def _norm_forward(
    x, residual, weight, total_out, out, rstd_out, width, eps, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: of x, or of x + residual, which is rounded to their dtype, stored and then taken for x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    accumulate: tl.constexpr = rstd_out.dtype.element_ty
    value = tl.load(x + at, mask=inside, other=0.0).to(accumulate)
    if RESIDUAL:
        total = (value + tl.load(residual + at, mask=inside, other=0.0).to(accumulate)).to(x.dtype.element_ty)
        tl.store(total_out + at, total, mask=inside)
        value = total.to(accumulate)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    normal = (value * rstd).to(x.dtype.element_ty).to(accumulate)
    w = tl.load(weight + column, mask=inside, other=0.0).to(accumulate)
    tl.store(out + at, (normal * w).to(out.dtype.element_ty), mask=inside)
    tl.store(rstd_out + row, rstd)


@triton.jit(do_not_specialize=["rows", "share"])
def _norm_backward(
    x, weight, rstd_in, upstream, d_total, dx_out, dw_out, rows, width, share,
    SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`share` rows: their dx, plus x's other gradient d_total where SUMMED, and one partial gradient of weight."""
    program = tl.program_id(0).to(tl.int64)
    first = program * share
    column = tl.arange(0, BLOCK)
    inside = column < width
    accumulate: tl.constexpr = rstd_in.dtype.element_ty
    w = tl.load(weight + column, mask=inside, other=0.0).to(accumulate)
    dw = tl.zeros([BLOCK], accumulate)
    for done in range(0, tl.minimum(share, tl.maximum(rows - first, 0))):
        at = (first + done) * width + column
        rstd = tl.load(rstd_in + first + done)
        normal = tl.load(x + at, mask=inside, other=0.0).to(accumulate) * rstd
        up = tl.load(upstream + at, mask=inside, other=0.0).to(accumulate)
        mean = tl.sum(up * normal * w, 0) / width
        # dx = rstd (u w - normal mean(u w normal))
        dx = (up * w - normal * mean) * rstd
        if SUMMED:
            dx += tl.load(d_total + at, mask=inside, other=0.0).to(accumulate)
        tl.store(dx_out + at, dx.to(dx_out.dtype.element_ty), mask=inside)
        dw += up * normal
    tl.store(dw_out + program * width + column, dw, mask=inside)


def _row(width: int) -> dict[str, int]:
    """Launch options of a program that holds one row: 16 elements a thread, up to 16 warps."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


class _RmsNorm(torch.autograd.Function):
    """(norm, None) of x, or (norm, sum) of x + residual, whose gradients arrive together and leave as one."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, weight = x.contiguous(), weight.contiguous()
        residual = None if residual is None else residual.contiguous()
        total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        width = x.shape[-1]
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        rows = x.numel() // width
        rstd = torch.empty(rows, dtype=accumulate_dtype(x.dtype), device=x.device)
        if rows:
            _norm_forward[(rows,)](
                x, x if residual is None else residual, weight, out if total is None else total, out, rstd, width, eps,
                RESIDUAL=residual is not None, **_row(width),
            )  # fmt: skip
        ctx.save_for_backward(x if total is None else total, weight, rstd)
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, upstream: Tensor | None, d_total: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        x, weight, rstd = ctx.saved_tensors
        rows, width = rstd.shape[0], x.shape[-1]
        if upstream is None:  # only the sum was used
            return d_total, None, None, d_total
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if rows == 0:
            return dx, torch.zeros_like(weight), None, dx if ctx.needs_input_grad[3] else None
        share = triton.cdiv(rows, PARTIALS)
        programs = triton.cdiv(rows, share)
        dw = torch.empty(programs, width, dtype=rstd.dtype, device=x.device)
        upstream = upstream.contiguous()
        _norm_backward[(programs,)](
            x, weight, rstd, upstream, upstream if d_total is None else d_total.contiguous(), dx, dw, rows, width,
            share, SUMMED=d_total is not None, **_row(width),
        )  # fmt: skip
        return dx, dw.sum(0).to(weight.dtype), None, dx if ctx.needs_input_grad[3] else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x, residual [..., H] of one dtype, weight [H] -> (norm [..., H], x + residual or None)."""
    return _RmsNorm.apply(x, weight, eps, residual)


@triton.jit
def _rotate(
    x, cos, sin, out, heads, half, x_token, x_head, x_column, table_token, table_column, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token's heads x [heads, 2 half], rotated by cos, sin [half]; sign -1 rotates back."""
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    table = token * table_token + column * table_column
    c = tl.load(cos + table, mask=column < half, other=0.0).to(accumulate)
    s = tl.load(sin + table, mask=column < half, other=0.0).to(accumulate) * sign
    at = token * x_token + head * x_head + column * x_column
    first = tl.load(x + at, mask=inside, other=0.0).to(accumulate)
    second = tl.load(x + at + half * x_column, mask=inside, other=0.0).to(accumulate)
    to = (token * heads + head) * 2 * half + column
    tl.store(out + to, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    tokens, heads, half = x.shape[0], x.shape[1], x.shape[2] // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _rotate[(tokens,)](
            x, cos, sin, out, heads, half, *x.stride(), cos.stride(0), cos.stride(2), sign,
            HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(half), WIDE=x.dtype == torch.float64,
        )  # fmt: skip
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(upstream, *ctx.saved_tensors, -1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D]; cos, sin [T, 1, D/2] of equal strides."""
    cos, sin = cos.contiguous(), sin.contiguous()
    return _Rope.apply(x, cos, sin)


@triton.jit
def _swiglu_forward(gate, up, out, total, WIDE: tl.constexpr, ELEMENTS: tl.constexpr):
    """silu(gate) up of ELEMENTS elements."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < total
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    g = tl.load(gate + at, mask=inside, other=0.0).to(accumulate)
    u = tl.load(up + at, mask=inside, other=0.0).to(accumulate)
    tl.store(out + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate, up, upstream, d_gate, d_up, total, WIDE: tl.constexpr, ELEMENTS: tl.constexpr):
    """Gradients of ELEMENTS elements of gate and up, whose product is recomputed."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < total
    accumulate: tl.constexpr = tl.float64 if WIDE else tl.float32
    g = tl.load(gate + at, mask=inside, other=0.0).to(accumulate)
    u = tl.load(up + at, mask=inside, other=0.0).to(accumulate)
    d = tl.load(upstream + at, mask=inside, other=0.0).to(accumulate)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(d_gate + at, (d * u * slope).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, (d * g * sigmoid).to(d_up.dtype.element_ty), mask=inside)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out, total = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), gate.numel()
        if total:
            wide = gate.dtype == torch.float64
            _swiglu_forward[(triton.cdiv(total, ELEMENTS),)](gate, up, out, total, WIDE=wide, ELEMENTS=ELEMENTS)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        total, wide = gate.numel(), gate.dtype == torch.float64
        d_gate, d_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        if total:
            _swiglu_backward[(triton.cdiv(total, ELEMENTS),)](
                gate, up, upstream.contiguous(), d_gate, d_up, total, WIDE=wide, ELEMENTS=ELEMENTS
            )
        return d_gate, d_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for gate and up of one shape."""
    return _SwiGlu.apply(gate, up)
