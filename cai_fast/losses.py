"""Losses and reward arithmetic. Every loss is (global scale) x (sum over local terms): nothing divides afterwards.

`scale` is 1 / (global count), known before the forward, so gradients are the same for every split into micro-batches
and ranks. Statistics are unscaled (sum, count) pairs. T packed tokens, N target tokens, S sequences, C comparisons.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cai_fast import kernels
from cai_fast.batching import Packed, TargetBatch, segment_sum
from cai_fast.distributed import Distributed, global_moments
from cai_fast.model import Model
from cai_fast.model.heads import scalar_rows

Stats = dict[str, tuple[Tensor | float, Tensor | float]]
"""Name -> (sum, count)."""


def sft_loss(model: Model, batch: TargetBatch, scale: float) -> tuple[Tensor, Stats]:
    """Weighted cross-entropy of the targets; only their rows reach the head."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.index_select(0, batch.rows)
        return kernels.linear_cross_entropy(rows, weight, batch.targets, weights=batch.weights, scale=scale)

    value = model(batch.packed, loss=loss)
    return value, {"loss": (value.detach() / scale, batch.weights.sum())}


def last_rows(packed: Packed) -> Tensor:
    """[S] row of each sequence's last token."""
    return packed.cu_seqlens[1:].long() - 1


def scores(model: Model, packed: Packed) -> Tensor:
    """[S] fp32 preference-model scores, read at each sequence's last token (the end-of-context token)."""
    return model(packed, loss=lambda hidden, weight: scalar_rows(hidden.index_select(0, last_rows(packed)), weight))


def preference_loss(model: Model, pairs: Packed, prob_a: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Stats]:
    """Soft Bradley-Terry loss of C comparisons; `pairs` packs a_0, b_0, a_1, b_1, ...; prob_a, weights [C]."""
    a, b = scores(model, pairs).unflatten(0, (-1, 2)).unbind(1)
    result = kernels.preference_loss(a, b, prob_a, weights=weights, scale=scale)
    count = result.stats["count"]
    return result.loss, {name: (result.stats[name], count) for name in ("loss", "accuracy", "margin")}


def answer_logprobs(model: Model, batch: TargetBatch) -> Tensor:
    """[S] summed log-probabilities of each example's targets, differentiable."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.index_select(0, batch.rows)
        return segment_sum(kernels.linear_logprob(rows, weight, batch.targets).logprob, batch.cu_targets)

    return model(batch.packed, loss=loss)


def dpo_loss(
    model: Model, batch: TargetBatch, reference: Tensor, prob_a: Tensor, weights: Tensor, beta: float, scale: float
) -> tuple[Tensor, Stats]:
    """DPO with soft labels (arXiv 2305.18290, eq. 7): soft Bradley-Terry of beta times the log-ratios of C comparisons.

    `batch` packs the answers a_0, b_0, a_1, b_1, ...; reference [C, 2] their log-probabilities under the reference;
    prob_a, weights [C]. `log_ratio` is the answers' mean: where it falls, both become less likely than others.
    """
    ratios = answer_logprobs(model, batch).unflatten(0, (-1, 2)) - reference
    a, b = (beta * ratios).unbind(1)
    result = kernels.preference_loss(a, b, prob_a, weights=weights, scale=scale)
    count = result.stats["count"]
    stats: Stats = {name: (result.stats[name], count) for name in ("loss", "accuracy", "margin")}
    return result.loss, stats | {"log_ratio": ((ratios.detach().mean(1) * weights).sum(), count)}


class PolicyTerms(NamedTuple):
    """Per-token constants of the policy loss, each [N], in the order of the batch's targets."""

    old_logprob: Tensor
    advantages: Tensor
    ref_logprob: Tensor
    returns: Tensor | None = None  # what the critic is fitted to


def policy_loss(
    hidden: Tensor, weight: Tensor, batch: TargetBatch, terms: PolicyTerms, *, clip_coef: float, temperature: float,
    scale: float, kl_coef: float = 0.0, kl_estimator: str = "",
) -> tuple[Tensor, Stats]:  # fmt: skip
    """Clipped PPO objective from the policy's hidden states [N, H] at the rows of the batch's targets, plus kl_coef
    times the sampled KL estimator "k2" or "k3"; see kernels.linear_policy_loss for what their gradients are.

    Without weights: no row is dropped, so the head multiplies the chunks that gave the old log-probabilities.
    """
    penalty = {"ref_logprob": terms.ref_logprob, "kl_coef": kl_coef, "kl_estimator": kl_estimator}
    out = kernels.linear_policy_loss(
        hidden, weight, batch.targets, terms.old_logprob, terms.advantages,
        clip_coef=clip_coef, temperature=temperature, scale=scale, **(penalty if kl_estimator else {}),
    )  # fmt: skip
    count = out.stats["count"]
    log_ratio = out.logprob - terms.old_logprob
    stats: Stats = {
        "policy_loss": (out.stats["pg"], count),
        "clipfrac": (out.stats["clipped"], count),
        "entropy": (out.stats["entropy"], count),
        "approx_kl": ((log_ratio.exp() - 1 - log_ratio).sum(), count),  # k3: non-negative, low variance
        "ratio_gap": (log_ratio.abs().sum(), count),
    }
    if kl_estimator:
        stats["kl_loss"] = (out.stats["kl"], count)
    return out.loss, stats


def value_loss(values: Tensor, returns: Tensor, scale: float) -> tuple[Tensor, Stats]:
    """Half the squared error of values [N]."""
    errors = (values - returns).square() / 2
    return errors.sum() * scale, {"value_loss": (errors.detach().sum(), errors.numel())}


def token_rewards(score: Tensor, k1: Tensor, cu_targets: Tensor, kl_coef: float) -> Tensor:
    """[N] rewards: -kl_coef x k1 at every token, plus score[S] at each response's last token (arXiv 2204.05862 §4.1).

    k1[N] = log policy - log reference at the sampled tokens, whose expectation is the KL divergence.
    """
    rewards = -kl_coef * k1
    rewards[cu_targets[1:] - 1] += score
    return rewards


def whiten(values: Tensor, dist: Distributed) -> Tensor:
    """Collective: values[N] shifted and scaled to mean 0, variance 1 over all ranks' values (fp64 moments)."""
    mean, variance = global_moments(values, None, dist)
    return ((values.double() - mean) / (variance.sqrt() + 1e-8)).to(values.dtype)


def explained_variance(values: Tensor, returns: Tensor, dist: Distributed) -> float:
    """Collective: 1 - Var(returns - values) / Var(returns); nan where returns do not vary."""
    _, residual = global_moments(returns - values, None, dist)
    _, total = global_moments(returns, None, dist)
    return float(1 - residual / total) if total > 0 else float("nan")


def standardisation(scores: Tensor, dist: Distributed) -> tuple[float, float]:
    """Collective: (mean, deviation) of scores over all ranks; a deviation too small to divide by is taken as 1."""
    mean, variance = global_moments(scores, None, dist)
    deviation = float(variance.sqrt())
    return float(mean), deviation if deviation > torch.finfo(torch.float32).eps else 1.0
