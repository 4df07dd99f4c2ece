"""The fused heads on Triton: matrix products of the library around the row kernels, chunk by chunk.

As in the chunked backend the gradient is formed in the forward (3 GEMMs; 4 with recomputation or for the exact KL) and
nothing of size [N, V] exists but one chunk's buffer, which the row kernels overwrite.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..common import HeadGrad, accumulate_dtype, logit_chunks, main_grad_of, operands
from ..linear_kl import Inputs, Pass, differentiable_kl
from ..linear_logprob import LinearLogprob
from ..linear_policy_loss import STATS, PolicyLoss, Rows, Settings
from ..token_loss import ForwardGradient
from . import fused_logprob, tiles
from . import rows as kernels
from .sums import policy_sums


def _gradient_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, logits[n, V], the memory of their gradient in the operands' own precision)."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    for rows, z in logit_chunks(*operands(hidden, weight), 1.0):
        yield rows, z, kernels.gradient_view(z, dtype)


def _outputs(hidden: Tensor, count: int) -> Tensor:
    return torch.empty(count, hidden.shape[0], dtype=accumulate_dtype(hidden.dtype), device=hidden.device)


class _TokenLoss(ForwardGradient):
    """(loss, outputs [8, N], stats [7]) of inputs [4, N]; settings and r None: loss sum_i g_i logprob_i, no stats."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        inputs: Tensor,
        settings: Settings | None,
        r: Rows | None,
        want: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        main_grad = main_grad_of(hidden, weight, want[1])
        grads = HeadGrad(*operands(hidden, weight), *want, main_grad)
        outputs = _outputs(hidden, kernels.OUTPUTS)
        temperature, policy = 1.0, {}
        if settings is not None:
            temperature = settings.temperature
            policy = {"clip_coef": settings.clip_coef, "kl_coef": settings.kl_coef}
            policy |= {"has_ref": r.ref is not None, "k3": settings.kl_estimator == "k3"}
        mode = kernels.LINEAR if settings is None else kernels.POLICY
        for rows, z, dz in _gradient_chunks(hidden, weight):
            kernels.launch_rows(
                z, dz, targets[rows], inputs[:, rows], outputs[:, rows], mode, any(want), 1.0 / temperature, **policy
            )
            if any(want):
                grads.add(rows, dz)
        ForwardGradient.keep(ctx, hidden, weight, grads, main_grad)
        if r is None:
            ctx.mark_non_differentiable(outputs)
            return outputs[kernels.LOSS].sum(), outputs, None
        loss, stats = policy_sums(outputs, r.weights)
        ctx.mark_non_differentiable(outputs, stats)
        return loss, outputs, stats


def _token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, inputs: Tensor, settings: Settings | None, r: Rows | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad = torch.is_grad_enabled()
    want = (grad and hidden.requires_grad, grad and weight.requires_grad)
    return _TokenLoss.apply(hidden, weight, targets.contiguous(), inputs, settings, r, want)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, scale: float | Tensor
) -> Tensor:
    g, zero = -weights * scale, torch.zeros_like(weights)
    return _token_loss(hidden, weight, targets, torch.stack((g, zero, zero, zero)), None, None)[0]


def linear_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, r: Rows, s: Settings) -> PolicyLoss:
    ref = r.old if r.ref is None else r.ref
    inputs = torch.stack((r.old, r.advantage, r.weights * s.scale, ref))
    loss, outputs, sums = _token_loss(hidden, weight, targets, inputs, s, r)
    stats = dict(zip(STATS, sums.unbind(), strict=True))
    return PolicyLoss(loss, stats, outputs[kernels.LOGPROB].clone())


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs = _outputs(hidden, kernels.OUTPUTS)
        for rows, z, dz in _gradient_chunks(hidden, weight):
            kernels.launch_rows(
                z, dz, targets[rows], outputs[:, rows], outputs[:, rows], kernels.STATISTICS, False, 1.0 / temperature
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, valid)
        ctx.temperature, ctx.main_grad = temperature, main_grad_of(hidden, weight, ctx.needs_input_grad[1])
        lse, entropy = outputs[kernels.LSE].clone(), outputs[kernels.ENTROPY].clone()
        return outputs[kernels.LOGPROB].masked_fill(~valid, 0.0), lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, valid = ctx.saved_tensors
        grads = HeadGrad(*operands(hidden, weight), *ctx.needs_input_grad[:2], ctx.main_grad)
        inputs, outputs = _outputs(hidden, kernels.OUTPUTS).zero_(), _outputs(hidden, kernels.OUTPUTS)
        for row, gradient in zip(inputs, upstream, strict=False):
            if gradient is not None:
                row.copy_(gradient)
        inputs[0].masked_fill_(~valid, 0.0)
        for rows, z, dz in _gradient_chunks(hidden, weight):
            kernels.launch_rows(
                z, dz, targets[rows], inputs[:, rows], outputs[:, rows], kernels.LINEAR, True, 1.0 / ctx.temperature
            )
            grads.add(rows, dz)
        d_hidden, d_weight = (
            None if g is None else g.to(x.dtype) for g, x in ((grads.hidden, hidden), (grads.weight_sum(), weight))
        )
        return d_hidden, d_weight, None, None, None


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, temperature: float, entropy: bool
) -> LinearLogprob:
    logprob, lse, row_entropy = _Recompute.apply(hidden, weight, targets.contiguous(), valid, temperature)
    return LinearLogprob(logprob, lse, row_entropy if entropy else None)


def tiled_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, temperature: float, entropy: bool
) -> LinearLogprob:
    """`linear_logprob` without gradients and without a chunk of logits."""
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    shape = (weight.shape[1], weight.shape[0])
    fused = half and shape in fused_logprob.FUSED_SHAPES and fused_logprob.fits(hidden, weight)
    statistics = (fused_logprob if fused else tiles).statistics
    results = statistics(hidden.detach(), weight.detach(), targets.contiguous(), temperature)
    logprob, lse, row_entropy = results.unbind()
    return LinearLogprob(logprob.masked_fill(~valid, 0.0), lse, row_entropy if entropy else None)


def _kl_pass(x: Inputs, temperature: float, upstream: Tensor | None, want: tuple[bool, bool]) -> Pass:
    grads = HeadGrad(*operands(x.hidden, x.weight), *want)
    outputs = _outputs(x.hidden, 3)
    targets = None if x.targets is None else x.targets.contiguous()
    upstream = None if upstream is None else upstream.to(outputs.dtype).contiguous()
    reference = logit_chunks(*operands(x.ref_hidden, x.ref_weight), 1.0)
    for (rows, p, dz), (_, q) in zip(_gradient_chunks(x.hidden, x.weight), reference, strict=True):
        target, factor = (None if row is None else row[rows] for row in (targets, upstream))
        kernels.launch_kl_rows(p, q, dz, target, factor, outputs[:, rows], any(want), 1.0 / temperature)
        if any(want):
            grads.add(rows, dz)
    kl, logprob, ref_logprob = (row.clone() for row in outputs)
    if targets is None:
        logprob = ref_logprob = None
    return Pass(kl, logprob, ref_logprob, grads.hidden, grads.weight_sum())


def linear_kl(x: Inputs, temperature: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return differentiable_kl(x, temperature, _kl_pass)
