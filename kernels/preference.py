"""From a judge's option logits to soft preference labels, and the loss that trains a preference model on them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import accumulate_dtype, check_tensor, lazy_triton, select

_MIN_ROWS = 32  # as in common.py: fewer rows may take another GEMM path with other roundings


class PreferenceLabels(NamedTuple):
    prob_a: Tensor
    """[C] probability that response_a is better: orders averaged, clamped, averaged over principles; NaN if absent."""
    per_principle: Tensor
    """[C, P, 2] probability that response_a is better in either order, already un-swapped; NaN if absent."""
    position_bias: Tensor
    """[C, P] |difference of the two orders|: 0 for a judge that ignores position; NaN unless both are there."""


class PreferenceLoss(NamedTuple):
    loss: Tensor
    stats: dict[str, Tensor]
    """Unscaled weighted sums: loss, accuracy (a tie counts half), margin (|reward_a - reward_b|), count."""


def _score_reference(hidden: Tensor, weight: Tensor, option_ids: Tensor) -> Tensor:
    dtype = accumulate_dtype(hidden.dtype)
    logits = (hidden.to(dtype) @ weight.to(dtype).t())[:, option_ids.clamp_min(0)]
    return logits.masked_fill(option_ids < 0, -torch.inf).logsumexp(-1).log_softmax(-1)


def _score_chunked(hidden: Tensor, weight: Tensor, option_ids: Tensor) -> Tensor:
    dtype = accumulate_dtype(hidden.dtype)
    rows = weight[option_ids.clamp_min(0).flatten()].to(dtype)
    padding = max(0, _MIN_ROWS - hidden.shape[0])
    logits = F.linear(F.pad(hidden.to(dtype), (0, 0, 0, padding)), rows)[: hidden.shape[0]]
    logits = logits.unflatten(1, option_ids.shape).masked_fill(option_ids < 0, -torch.inf)
    return logits.logsumexp(-1).log_softmax(-1)


_SCORE = {
    "reference": _score_reference,
    "chunked": _score_chunked,
    "triton": lazy_triton("preference", "score_options"),
}


def score_options(hidden: Tensor, weight: Tensor, option_ids: Tensor, *, backend: str = "auto") -> Tensor:
    """[B, K] log-probability of each option, normalised over the K options, in fp32.

    hidden [B, H], weight [V, H], option_ids [K, G] int64: the G token variants of an option, -1 = absent, whose
    probabilities are summed. Only those rows of weight are read.
    """
    check_tensor("score_options", "option_ids", option_ids, integer=True)
    if hidden.dim() != 2 or option_ids.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"score_options: expected hidden [B, H], weight [V, H], option_ids [K, G], got {list(hidden.shape)}, "
            f"{list(weight.shape)}, {list(option_ids.shape)}"
        )
    return select("score_options", _SCORE, backend, hidden.device)(hidden, weight, option_ids.to(hidden.device))


def _labels_torch(logprob: Tensor, clamp: tuple[float, float] | None) -> tuple[Tensor, Tensor, Tensor]:
    prob = logprob.to(accumulate_dtype(logprob.dtype)).softmax(-1)
    per_principle = torch.stack((prob[:, :, 0, 0], prob[:, :, 1, 1]), -1)
    label = per_principle.nanmean(-1)
    if clamp is not None:
        label = label.clamp(*clamp)
    bias = (per_principle[..., 0] - per_principle[..., 1]).abs()
    return label.nanmean(-1), per_principle, bias


_LABELS = {
    "reference": _labels_torch,
    "chunked": _labels_torch,
    "triton": lazy_triton("preference", "preference_labels"),
}


def preference_labels(
    logprob: Tensor, *, clamp: tuple[float, float] | None = None, backend: str = "auto"
) -> PreferenceLabels:
    """Soft labels from option log-probabilities [C, P, 2, 2] = (comparison, principle, order, letter).

    Order 1 asked with the responses swapped, so that its letter B means response_a. NaN marks what was not asked.
    clamp (lo, hi) bounds a principle's label after the orders are averaged (the paper's 0.4-0.6 with CoT).
    """
    if logprob.dim() != 4 or logprob.shape[2:] != (2, 2):
        raise ValueError(f"preference_labels: expected [C, P, 2, 2], got {list(logprob.shape)}")
    if clamp is not None and not 0 <= clamp[0] <= clamp[1] <= 1:
        raise ValueError(f"preference_labels: clamp must be (lo, hi) with 0 <= lo <= hi <= 1, got {clamp}")
    return PreferenceLabels(*select("preference_labels", _LABELS, backend, logprob.device)(logprob, clamp))


def preference_loss(
    reward_a: Tensor,
    reward_b: Tensor,
    prob_a: Tensor,
    *,
    weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> PreferenceLoss:
    """Soft Bradley-Terry: scale x sum_c weights_c CE(prob_a_c, sigmoid(reward_a_c - reward_b_c)); all inputs [C]."""
    given = {"reward_a": reward_a, "reward_b": reward_b, "prob_a": prob_a, "weights": weights}
    for name, value in given.items():
        check_tensor("preference_loss", name, value)
        if value is not None and (value.dim() != 1 or value.shape != reward_a.shape):
            shapes = {n: list(v.shape) for n, v in given.items() if v is not None}
            raise ValueError(f"preference_loss: expected {name} [C] as all others, got {shapes}")
    dtype = accumulate_dtype(reward_a.dtype)
    margin = reward_a.to(dtype) - reward_b.to(dtype)
    prob_a = prob_a.to(dtype)
    weights = torch.ones_like(prob_a) if weights is None else weights.to(dtype)
    rows = F.softplus(margin) - prob_a * margin
    with torch.no_grad():
        agreement = 0.5 + 0.5 * torch.sign(margin) * torch.sign(prob_a - 0.5)
        sums = (torch.stack((rows, agreement, margin.abs(), torch.ones_like(margin))) * weights).sum(1)
    names = ("loss", "accuracy", "margin", "count")
    return PreferenceLoss((rows * weights).sum() * scale, dict(zip(names, sums.unbind(), strict=True)))
