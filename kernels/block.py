"""The small operations of a decoder block, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .common import accumulate_dtype, check_number, check_tensor, differentiates, lazy_triton, select


def _rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x if residual is None else x + residual
    wide = x.to(accumulate_dtype(x.dtype))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype), x


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of x, 1 / rms)."""
    wide = x.to(accumulate_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).to(x.dtype) * weight, rstd


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        normal = x.to(rstd.dtype) * rstd
        upstream = upstream.to(rstd.dtype)
        product = upstream * normal
        d_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        # dx = rstd (u w - normal mean(u w normal))
        mean = (product @ weight.to(rstd.dtype)).div_(x.shape[-1])[..., None]
        dx = (upstream * weight).sub_(normal.mul_(mean)).mul_(rstd)
        return dx.to(x.dtype), d_weight, None


def _rms_norm_chunked(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x if residual is None else x + residual
    return _RmsNorm.apply(x, weight, eps) if differentiates(x, weight) else _normed(x, weight, eps)[0], x


_RMS_NORM = {"reference": _rms_norm_reference, "chunked": _rms_norm_chunked, "triton": lazy_triton("block", "rms_norm")}


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich 2019), statistics in fp32.

    x, residual [..., H] of one dtype, weight [H]. With a residual: (norm of the sum, sum), where sum = x + residual is
    rounded to its dtype before the norm is taken; both results are differentiable.
    """
    check_tensor("rms_norm", "x", x)
    check_number("rms_norm", "eps", eps, 0)
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: expected x [..., H] and weight [H], got {list(x.shape)} and {list(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual must have x's shape {list(x.shape)} and dtype {x.dtype}. "
            f"Got {list(residual.shape)} and {residual.dtype}."
        )
    normal, total = select("rms_norm", _RMS_NORM, backend, x.device)(x, weight, eps, residual)
    return normal if residual is None else (normal, total)


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(upstream, cos, -sin), None, None


def _rotate_chunked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _Rope.apply(x, cos, sin) if differentiates(x) else _rotated(x, cos, sin)


_ROPE = {"reference": _rotate_reference, "chunked": _rotate_chunked, "triton": lazy_triton("block", "rotate")}


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotary position embedding of the two halves of each head (Su et al. 2021, in Hugging Face's Llama layout).

    q [T, Hq, D], k [T, Hkv, D]; cos, sin [T, D/2], or [T, D] whose halves repeat, for each token's position.
    """
    implementation = select("rope", _ROPE, backend, q.device)
    half = q.shape[-1] // 2
    cos, sin = (table[:, None, :half].to(q.dtype) for table in (cos, sin))
    return implementation(q, cos, sin), implementation(k, cos, sin)


def _swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    """CPU only. torch's own silu rounds differently in the tail of a thread's share, so that a row would depend on the
    rows around it; torch.exp does not."""
    wide = gate.to(accumulate_dtype(gate.dtype))
    return wide.neg().exp_().add_(1).reciprocal_().mul_(wide).mul_(up).to(gate.dtype)


class _SwiGlu(torch.autograd.Function):
    """`_gated`; gradients mix all rows anyway and take torch's silu."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(upstream * up, gate), F.silu(gate).mul_(upstream)


def _swiglu_chunked(gate: Tensor, up: Tensor) -> Tensor:
    if gate.device.type != "cpu":
        return F.silu(gate) * up
    return _SwiGlu.apply(gate, up) if differentiates(gate, up) else _gated(gate, up)


_SWIGLU = {"reference": _swiglu_reference, "chunked": _swiglu_chunked, "triton": lazy_triton("block", "swiglu")}


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up (Shazeer 2020); gate and up of one shape."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate and up must be alike, got {list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}"
        )
    return select("swiglu", _SWIGLU, backend, gate.device)(gate, up)
