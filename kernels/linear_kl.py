"""Exact KL(policy || reference) over the whole vocabulary, from two models' hidden states.

With a gradient: 4 GEMMs (both logits, both gradients), formed in the forward for an upstream gradient of 1 a row,
which the backward scales when it is uniform (`.sum()`, or a mean). Any other upstream costs a second pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .common import (
    HeadGrad,
    accumulate_dtype,
    check_head,
    check_temperature,
    lazy_triton,
    log_softmax_,
    logit_chunks,
    main_grad_of,
    operands,
    select,
)


class LinearKL(NamedTuple):
    kl: Tensor
    """[N] in nats, >= 0, differentiable in the policy's hidden and weight."""
    logprob: Tensor | None
    """[N] the policy's log-probability of the target, detached; 0 where the target lies outside [0, V)."""
    ref_logprob: Tensor | None


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    targets: Tensor | None


def _reference(x: Inputs, temperature: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = accumulate_dtype(x.hidden.dtype)
    p = (x.hidden.to(dtype) @ x.weight.to(dtype).t() / temperature).log_softmax(-1)
    q = (x.ref_hidden.detach().to(dtype) @ x.ref_weight.detach().to(dtype).t() / temperature).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    if x.targets is None:
        return kl, None, None
    return kl, *(z.detach().gather(1, x.targets[:, None]).squeeze(1) for z in (p, q))


class Pass(NamedTuple):
    kl: Tensor
    logprob: Tensor | None
    ref_logprob: Tensor | None
    d_hidden: Tensor | None
    d_weight: Tensor | None


KLPass = Callable[[Inputs, float, Tensor | None, tuple[bool, bool]], Pass]
"""(inputs, temperature, upstream, (want d_hidden, want d_weight)) -> one pass over all rows."""


def _kl_pass(x: Inputs, temperature: float, upstream: Tensor | None, want: tuple[bool, bool]) -> Pass:
    """One pass over the rows; upstream [N] (None: all 1) multiplies each row's gradient."""
    h, w = operands(x.hidden, x.weight)
    grads = HeadGrad(h, w, *want)
    dtype = accumulate_dtype(h.dtype)
    kl, logprob, ref_logprob = (h.new_empty(h.shape[0], dtype=dtype) for _ in range(3))
    reference = logit_chunks(*operands(x.ref_hidden, x.ref_weight), temperature)
    for (rows, p), (_, q) in zip(logit_chunks(h, w, temperature), reference, strict=True):
        log_softmax_(p)
        log_softmax_(q)
        if x.targets is not None:
            target = x.targets[rows, None]
            torch.gather(p, 1, target, out=logprob[rows, None])
            torch.gather(q, 1, target, out=ref_logprob[rows, None])
        torch.sub(p, q, out=q)
        q.mul_(p.exp_())  # p (log p - log q)
        torch.sum(q, -1, out=kl[rows])
        if any(want):
            # dz_j = u p_j [(log p_j - log q_j) - KL] / temperature
            dz = q.addcmul_(p, kl[rows, None], value=-1.0)
            if temperature != 1.0:
                dz.mul_(1.0 / temperature)
            grads.add(rows, dz if upstream is None else dz.mul_(upstream[rows, None]))
    if x.targets is None:
        logprob = ref_logprob = None
    return Pass(kl, logprob, ref_logprob, grads.hidden, grads.weight_sum())


class _ForwardGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        targets: Tensor | None,
        temperature: float,
        want: tuple[bool, bool],
        kl_pass: KLPass,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs = Inputs(hidden, weight, ref_hidden, ref_weight, targets)
        result = kl_pass(inputs, temperature, None, want)
        ctx.save_for_backward(*inputs, result.d_hidden, result.d_weight)
        ctx.temperature, ctx.want, ctx.main_grad = temperature, want, main_grad_of(hidden, weight, want[1])
        ctx.kl_pass = kl_pass
        ctx.mark_non_differentiable(*(x for x in (result.logprob, result.ref_logprob) if x is not None))
        return result.kl, result.logprob, result.ref_logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, d_hidden, d_weight = ctx.saved_tensors
        inputs = Inputs(*given)
        if upstream.stride(0) == 0 or upstream.numel() <= 1:
            # An expanded gradient is uniform, and that is known on the host.
            factor = upstream[:1].sum()
            d_hidden = None if d_hidden is None else d_hidden * factor
            d_weight = None if d_weight is None else d_weight * factor
        elif d_weight is None:
            d_hidden = d_hidden * upstream[:, None]
        else:
            again = ctx.kl_pass(inputs, ctx.temperature, upstream, ctx.want)
            d_hidden, d_weight = again.d_hidden, again.d_weight
        d_hidden = None if d_hidden is None else d_hidden.to(inputs.hidden.dtype)
        if ctx.main_grad is not None:
            # Only now: the forward could not know the upstream gradient, which a mean makes other than 1.
            ctx.main_grad.add_(d_weight)
            d_weight = None
        elif d_weight is not None:
            d_weight = d_weight.to(inputs.weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None


def differentiable_kl(x: Inputs, temperature: float, kl_pass: KLPass) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(kl, logprob, ref_logprob), the first differentiable, by a backend's pass over the rows."""
    grad = torch.is_grad_enabled()
    want = (grad and x.hidden.requires_grad, grad and x.weight.requires_grad)
    ref_hidden, ref_weight = x.ref_hidden.detach(), x.ref_weight.detach()
    return _ForwardGradient.apply(x.hidden, x.weight, ref_hidden, ref_weight, x.targets, temperature, want, kl_pass)


def _chunked(x: Inputs, temperature: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return differentiable_kl(x, temperature, _kl_pass)


_IMPLEMENTATIONS = {"reference": _reference, "chunked": _chunked, "triton": lazy_triton("head", "linear_kl")}


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> LinearKL:
    """KL(softmax(hidden weight^T / T) || softmax(ref_hidden ref_weight^T / T)) of each row, [N] in fp32.

    hidden [N, H], weight [V, H]; ref_hidden [N, H'], ref_weight [V, H'] (H' may differ). With targets [N] both
    models' log-probabilities of them come along. Only the policy receives a gradient.
    With `weight.main_grad`, an fp32 [V, H] buffer (see main_grad_of in common.py), the backward adds
    the weight's gradient to it, for any upstream gradient; the forward holds a [V, H] gradient of its own until then.
    """
    check_head("linear_kl", hidden, weight, targets=targets)
    check_head("linear_kl (reference)", ref_hidden, ref_weight)
    if ref_hidden.shape[0] != hidden.shape[0] or ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"linear_kl: policy and reference need equal N and V, got hidden {list(hidden.shape)}, weight "
            f"{list(weight.shape)}, ref_hidden {list(ref_hidden.shape)}, ref_weight {list(ref_weight.shape)}"
        )
    check_temperature("linear_kl", temperature)
    implementation = select("linear_kl", _IMPLEMENTATIONS, backend, hidden.device)
    clamped = None if targets is None else targets.clamp(0, weight.shape[0] - 1)
    result = LinearKL(*implementation(Inputs(hidden, weight, ref_hidden, ref_weight, clamped), temperature))
    if targets is None:
        return result
    invalid = (targets < 0) | (targets >= weight.shape[0])
    return result._replace(
        logprob=result.logprob.masked_fill(invalid, 0.0), ref_logprob=result.ref_logprob.masked_fill(invalid, 0.0)
    )
