"""The chunked engine of losses that depend on one log-probability per row.

The gradient is formed in the forward: per chunk the logits are made once, turned into dL/dlogits in place and
multiplied into both gradients (3 GEMMs in all, no logits kept). That is possible because a row's coefficient
dL/dlogprob needs only that row's log-probability and numbers known beforehand.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .common import HeadGrad, accumulate_dtype, give_weight_grad, like_chunk, log_softmax_, logit_chunks, operands

RowLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(rows, logprob[n]) -> (loss[n], dloss/dlogprob[n]), weights and scale included."""


class TokenLoss(NamedTuple):
    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None


class ForwardGradient(torch.autograd.Function):
    """A scalar loss whose gradients its forward left in ctx: d_hidden, d_weight, dtypes, main_grad."""

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        d_hidden = None if ctx.d_hidden is None else (ctx.d_hidden * upstream).to(ctx.dtypes[0])
        d_weight = None if ctx.d_weight is None else ctx.d_weight * upstream
        return d_hidden, give_weight_grad(d_weight, ctx.dtypes[1], ctx.main_grad), None, None, None, None, None


class _TokenLoss(ForwardGradient):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_loss: RowLoss,
        temperature: float,
        want_entropy: bool,
        want: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        h, w = operands(hidden, weight)
        grads = HeadGrad(h, w, *want)
        logprob = h.new_empty(h.shape[0], dtype=accumulate_dtype(h.dtype))
        losses = torch.empty_like(logprob)
        entropy = torch.empty_like(logprob) if want_entropy else None
        scratch = None
        for rows, z in logit_chunks(h, w, temperature):
            target = targets[rows, None]
            log_softmax_(z)
            torch.gather(z, 1, target, out=logprob[rows, None])
            losses[rows], g = row_loss(rows, logprob[rows])
            if entropy is not None:
                scratch = p = like_chunk(scratch, z)
                torch.exp(z, out=p)
                torch.sum(z.mul_(p), -1, out=entropy[rows])
            elif any(want):
                p = z.exp_()
            if any(want):
                # dz_j = g (delta_jt - p_j) / temperature; the target's term is formed in fp32, before any rounding.
                g = (g if temperature == 1.0 else g / temperature)[:, None]
                grads.add(rows, p.mul_(-g).scatter_add_(1, target, g))
        if entropy is not None:
            entropy.neg_()
        ctx.d_hidden, ctx.d_weight = grads.hidden, grads.weight_sum()
        ctx.dtypes, ctx.main_grad = (hidden.dtype, weight.dtype), getattr(weight, "main_grad", None)
        ctx.mark_non_differentiable(*(x for x in (logprob, entropy) if x is not None))
        return losses.sum(), logprob, entropy


def token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_loss: RowLoss, temperature: float, *, entropy: bool
) -> TokenLoss:
    """Sum of row losses, differentiable in hidden and weight. Every target must lie in [0, V)."""
    grad = torch.is_grad_enabled()
    want = (grad and hidden.requires_grad, grad and weight.requires_grad)
    return TokenLoss(*_TokenLoss.apply(hidden, weight, targets, row_loss, temperature, entropy, want))
