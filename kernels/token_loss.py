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

from .common import HeadGrad, accumulate_dtype, like_chunk, log_softmax_, logit_chunks, main_grad_of, operands

RowLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(rows, logprob[n]) -> (loss[n], dloss/dlogprob[n]), weights and scale included."""


class TokenLoss(NamedTuple):
    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None


class ForwardGradient(torch.autograd.Function):
    """A scalar loss whose forward forms its gradients, for an upstream gradient of 1.

    With `weight.main_grad` the forward adds the weight's gradient there, where nothing can scale it afterwards: the
    backward then insists, without a host synchronisation, on an upstream gradient of 1 (RuntimeError on the CPU, a
    device-side assertion on CUDA), and on running once.
    """

    @staticmethod
    def keep(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, grads: HeadGrad, main_grad: Tensor | None) -> None:
        """What the backward needs, kept at the end of the forward: as saved tensors, which autograd frees after it."""
        ctx.save_for_backward(grads.hidden, grads.weight_sum())
        ctx.dtypes, ctx.in_main_grad, ctx.done = (hidden.dtype, weight.dtype), main_grad is not None, False

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.in_main_grad:
            if ctx.done:
                raise RuntimeError("a second backward of one loss: weight.main_grad holds its gradient already")
            ctx.done = True
            torch._assert_async(
                upstream == 1,
                "weight.main_grad holds the gradient of the loss itself, so its upstream gradient must be 1: "
                "put factors into `scale`, or do not set main_grad",
            )
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else (d_hidden * upstream).to(ctx.dtypes[0])
        d_weight = None if d_weight is None else (d_weight * upstream).to(ctx.dtypes[1])
        return d_hidden, d_weight, None, None, None, None, None


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
        main_grad = main_grad_of(hidden, weight, want[1])
        grads = HeadGrad(h, w, *want, main_grad)
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
        ForwardGradient.keep(ctx, hidden, weight, grads, main_grad)
        ctx.mark_non_differentiable(*(x for x in (logprob, entropy) if x is not None))
        return losses.sum(), logprob, entropy


def token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_loss: RowLoss, temperature: float, *, entropy: bool
) -> TokenLoss:
    """Sum of row losses, differentiable in hidden and weight. Every target must lie in [0, V)."""
    grad = torch.is_grad_enabled()
    want = (grad and hidden.requires_grad, grad and weight.requires_grad)
    return TokenLoss(*_TokenLoss.apply(hidden, weight, targets, row_loss, temperature, entropy, want))
