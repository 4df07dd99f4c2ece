"""Cross-entropy of a linear head without the [N, V] logits."""

import torch
from torch import Tensor

from .common import accumulate_dtype, check_head, kept_rows, lazy_triton, select, take
from .token_loss import token_loss


def _reference(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, scale: float | Tensor) -> Tensor:
    dtype = accumulate_dtype(hidden.dtype)
    logprob = (hidden.to(dtype) @ weight.to(dtype).t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    return -(logprob * weights).sum() * scale


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, scale: float | Tensor) -> Tensor:
    gradient = -weights * scale

    def row_loss(rows: slice, logprob: Tensor) -> tuple[Tensor, Tensor]:
        return logprob * gradient[rows], gradient[rows]

    return token_loss(hidden, weight, targets, row_loss, 1.0, entropy=False).loss


_IMPLEMENTATIONS = {"reference": _reference, "chunked": _chunked, "triton": lazy_triton("head", "linear_cross_entropy")}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """scale x sum_i weights_i x -log softmax(hidden_i weight^T)[targets_i], a scalar in fp32.

    hidden [N, H], weight [V, H], targets [N] int64, weights [N]. Rows with a target outside [0, V) or weight 0 are
    left out before any matrix product. scale is the global 1/count: nothing divides later.

    With `weight.main_grad`, an fp32 [V, H] buffer (see main_grad_of in common.py), the weight's
    gradient is added to it in the forward, and the loss must be differentiated exactly once, with an
    upstream gradient of 1: put factors into `scale`.
    """
    check_head("linear_cross_entropy", hidden, weight, targets=targets, weights=weights)
    implementation = select("linear_cross_entropy", _IMPLEMENTATIONS, backend, hidden.device)
    index = kept_rows(targets, weight.shape[0], weights)
    dtype = accumulate_dtype(hidden.dtype)
    weights = torch.ones(targets.shape, dtype=dtype, device=hidden.device) if weights is None else weights.to(dtype)
    return implementation(take(hidden, index), weight, take(targets, index), take(weights, index), scale)
