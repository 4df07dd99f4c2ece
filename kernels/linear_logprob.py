"""Log-probabilities of a linear head without the [N, V] logits, differentiable by recomputation (4 GEMMs)."""

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
    like_chunk,
    log_softmax_,
    logit_chunks,
    main_grad_of,
    operands,
    select,
)


class LinearLogprob(NamedTuple):
    logprob: Tensor
    """[N] log softmax(hidden weight^T / temperature)[target]; 0 where the target lies outside [0, V)."""
    lse: Tensor
    """[N] log sum exp of the logits / temperature."""
    entropy: Tensor | None
    """[N] in nats, if asked for."""


def _reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, temperature: float, entropy: bool
) -> LinearLogprob:
    dtype = accumulate_dtype(hidden.dtype)
    z = hidden.to(dtype) @ weight.to(dtype).t() / temperature
    logp = z.log_softmax(-1)
    logprob = torch.where(valid, logp.gather(1, targets[:, None]).squeeze(1), 0.0)
    return LinearLogprob(logprob, z.logsumexp(-1), -(logp.exp() * logp).sum(-1) if entropy else None)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        valid: Tensor,
        temperature: float,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        h, w = operands(hidden, weight)
        logprob = h.new_empty(h.shape[0], dtype=accumulate_dtype(h.dtype))
        lse = torch.empty_like(logprob)
        entropy = torch.empty_like(lse) if want_entropy else None
        scratch = None
        for rows, z in logit_chunks(h, w, temperature):
            target = targets[rows, None]
            torch.gather(z, 1, target, out=lse[rows, None])
            log_softmax_(z)
            torch.gather(z, 1, target, out=logprob[rows, None])
            if entropy is not None:
                scratch = like_chunk(scratch, z)
                torch.sum(z.mul_(torch.exp(z, out=scratch)), -1, out=entropy[rows])
        lse.sub_(logprob)
        logprob.masked_fill_(~valid, 0.0)
        if entropy is not None:
            entropy.neg_()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, valid, entropy)
        ctx.temperature, ctx.main_grad = temperature, main_grad_of(hidden, weight, ctx.needs_input_grad[1])
        return logprob, lse, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, d_logprob: Tensor | None, d_lse: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, valid, entropy = ctx.saved_tensors
        h, w = operands(hidden, weight)
        grads = HeadGrad(h, w, *ctx.needs_input_grad[:2], ctx.main_grad)
        zero = h.new_zeros((), dtype=accumulate_dtype(h.dtype)).expand(h.shape[0])
        g = zero if d_logprob is None else torch.where(valid, d_logprob, 0.0)
        s = (zero if d_lse is None else d_lse) - g
        scratch = None
        for rows, z in logit_chunks(h, w, ctx.temperature):
            # dz_j = [g (delta_jt - p_j) + s p_j - e p_j (log p_j + entropy)] / temperature
            log_softmax_(z)
            if d_entropy is None:
                dz = z.exp_().mul_(s[rows, None])
            else:
                e = d_entropy[rows, None]
                scratch = p = like_chunk(scratch, z)
                torch.exp(z, out=p)
                dz = z.mul_(-e).add_(s[rows, None] - e * entropy[rows, None]).mul_(p)
            dz.scatter_add_(1, targets[rows, None], g[rows, None])
            grads.add(rows, dz if ctx.temperature == 1.0 else dz.mul_(1.0 / ctx.temperature))
        d_hidden, d_weight = (
            None if g is None else g.to(x.dtype) for g, x in ((grads.hidden, hidden), (grads.weight_sum(), weight))
        )
        return d_hidden, d_weight, None, None, None, None


def _chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, temperature: float, entropy: bool
) -> LinearLogprob:
    return LinearLogprob(*_Recompute.apply(hidden, weight, targets, valid, temperature, entropy))


_IMPLEMENTATIONS = {"reference": _reference, "chunked": _chunked, "triton": lazy_triton("head", "linear_logprob")}
_TILED = _IMPLEMENTATIONS | {"triton": lazy_triton("head", "tiled_logprob")}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    tiled: bool = False,
    backend: str = "auto",
) -> LinearLogprob:
    """Log-probability of each row's target, log-sum-exp and, if asked, entropy: fp32, differentiable.

    hidden [N, H], weight [V, H], targets [N] int64. A row's result does not depend on the rows around it
    (on CUDA: see common.logit_chunks). With `weight.main_grad`, an fp32 [V, H] buffer (see main_grad_of in
    common.py), the backward adds the weight's gradient to it, for any upstream gradient.

    tiled: for inference only. No gradient is formed, and on Triton the logits exist but as one tile in the L2 cache,
    which takes less than 64 MB in place of a chunk of rows times V. Its sums run in another order, so that the last
    bits may differ from those of the losses, and may depend on N; the default takes the losses' own path, whose
    log-prob makes the first ratio of `linear_policy_loss` exactly 1. On the other backends the values are the same
    bits either way.

    ValueError: shapes that do not fit, temperature <= 0, or tiled where a gradient would be formed.
    """
    check_head("linear_logprob", hidden, weight, targets=targets)
    check_temperature("linear_logprob", temperature)
    if tiled and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        raise ValueError(
            "linear_logprob: tiled=True forms no gradient, but hidden or weight requires one. "
            "Call it under torch.no_grad(), or leave tiled off"
        )
    implementation = select("linear_logprob", _TILED if tiled else _IMPLEMENTATIONS, backend, hidden.device)
    valid = (targets >= 0) & (targets < weight.shape[0])
    return implementation(hidden, weight, targets.clamp(0, weight.shape[0] - 1), valid, temperature, entropy)
