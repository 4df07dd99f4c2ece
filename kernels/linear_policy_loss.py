"""The clipped PPO objective (Schulman et al. 2017, eq. 7) with a KL term, straight from hidden states.

Sampled KL estimators with d = ref_logprob - logprob (Schulman, "Approximating KL divergence", 2020):
k2 = d^2 / 2, whose gradient -d grad(logprob) is on average that of KL(policy || reference);
k3 = exp(d) - 1 - d, whose gradient is on average that of KL(reference || policy).
k1 = -d belongs in the reward: as a loss its gradient has mean zero, so it is refused here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .common import (
    LOG_RATIO_LIMIT,
    accumulate_dtype,
    check_head,
    check_number,
    check_temperature,
    kept_rows,
    lazy_triton,
    select,
    take,
)
from .token_loss import token_loss

STATS = ("pg", "kl", "clipped", "ratio", "ratio_sq", "entropy", "count")


class PolicyLoss(NamedTuple):
    loss: Tensor
    """Scalar: scale x sum_i weights_i (pg_i + kl_coef kl_i)."""
    stats: dict[str, Tensor]
    """Unscaled weighted sums (scalars on the device): STATS; `clipped` counts rows whose gradient clipping removed,
    `count` is the sum of weights."""
    logprob: Tensor
    """[N] detached log-probabilities of the targets; 0 for rows that do not count."""


class Rows(NamedTuple):
    """Per-row constants of the loss, each [N]."""

    old: Tensor
    advantage: Tensor
    weights: Tensor
    ref: Tensor | None


class Settings(NamedTuple):
    clip_coef: float
    kl_coef: float
    kl_estimator: str
    temperature: float
    scale: float | Tensor


class _Terms(NamedTuple):
    pg: Tensor
    kl: Tensor
    clipped: Tensor
    ratio: Tensor


def _exp_clamped(x: Tensor) -> Tensor:
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _terms(logprob: Tensor, r: Rows, s: Settings) -> _Terms:
    """Row terms, each [N]; plain torch, so autograd through it is the reference's gradient."""
    ratio = _exp_clamped(logprob - r.old)
    plain = -r.advantage * ratio
    bounded = -r.advantage * ratio.clamp(1 - s.clip_coef, 1 + s.clip_coef)
    if r.ref is None:
        kl = torch.zeros_like(logprob)
    else:
        d = r.ref - logprob
        kl = d.square() / 2 if s.kl_estimator == "k2" else _exp_clamped(d) - 1 - d
    return _Terms(torch.maximum(plain, bounded), kl, bounded > plain, ratio)


def _gradient(logprob: Tensor, r: Rows, s: Settings, terms: _Terms) -> Tensor:
    """d(pg + kl_coef kl) / dlogprob, [N]: what autograd gives for _terms, in closed form."""
    active = ((logprob - r.old).abs() <= LOG_RATIO_LIMIT) & ~terms.clipped
    g = torch.where(active, -r.advantage * terms.ratio, 0.0)
    if r.ref is not None and s.kl_coef:
        d = r.ref - logprob
        slope = -d if s.kl_estimator == "k2" else 1 - torch.where(d.abs() <= LOG_RATIO_LIMIT, _exp_clamped(d), 0.0)
        g = g + s.kl_coef * slope
    return g


def _stats(logprob: Tensor, entropy: Tensor, r: Rows, s: Settings) -> dict[str, Tensor]:
    t = _terms(logprob, r, s)
    rows = torch.stack(
        (t.pg, t.kl, t.clipped.to(logprob.dtype), t.ratio, t.ratio.square(), entropy, torch.ones_like(logprob))
    )
    return dict(zip(STATS, (rows * r.weights).sum(1).unbind(), strict=True))


def _reference(hidden: Tensor, weight: Tensor, targets: Tensor, r: Rows, s: Settings) -> PolicyLoss:
    dtype = accumulate_dtype(hidden.dtype)
    z = (hidden.to(dtype) @ weight.to(dtype).t() / s.temperature).log_softmax(-1)
    logprob = z.gather(1, targets[:, None]).squeeze(1)
    t = _terms(logprob, r, s)
    loss = ((t.pg + s.kl_coef * t.kl) * r.weights).sum() * s.scale
    entropy = -(z.exp() * z).sum(-1)
    return PolicyLoss(loss, _stats(logprob.detach(), entropy.detach(), r, s), logprob.detach())


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor, r: Rows, s: Settings) -> PolicyLoss:
    factor = r.weights * s.scale

    def row_loss(rows: slice, logprob: Tensor) -> tuple[Tensor, Tensor]:
        part = Rows(*(None if x is None else x[rows] for x in r))
        t = _terms(logprob, part, s)
        return (t.pg + s.kl_coef * t.kl) * factor[rows], _gradient(logprob, part, s, t) * factor[rows]

    loss, logprob, entropy = token_loss(hidden, weight, targets, row_loss, s.temperature, entropy=True)
    return PolicyLoss(loss, _stats(logprob, entropy, r, s), logprob)


Implementation = Callable[[Tensor, Tensor, Tensor, Rows, Settings], PolicyLoss]
_IMPLEMENTATIONS = {"reference": _reference, "chunked": _chunked, "triton": lazy_triton("head", "linear_policy_loss")}


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    weights: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    clip_coef: float = 0.2,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    temperature: float = 1.0,
    scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> PolicyLoss:
    """scale x sum_i weights_i (max(-A_i r_i, -A_i clip(r_i, 1 +- clip_coef)) + kl_coef kl_i).

    hidden [N, H], weight [V, H], targets [N] int64; old_logprob, advantage, weights, ref_logprob [N]. Rows with a
    target outside [0, V) or weight 0 do not count, whatever else they hold. With `weights` they are dropped before any
    matrix product, which takes one host synchronisation. Without, every row keeps its place and nothing synchronises;
    only the hidden states of rows that do not count must then be finite.

    The ratio r = exp(logprob - old_logprob) is exactly 1 when old_logprob is linear_logprob's with the same backend,
    temperature, hidden states and head: on CPU always; on CUDA if that call saw the same rows in the same order and no
    row was dropped here, which without `weights` none is (see common.logit_chunks).

    With `weight.main_grad`, an fp32 [V, H] buffer (see main_grad_of in common.py), the weight's
    gradient is added to it in the forward, and the loss must be differentiated exactly once, with an
    upstream gradient of 1: put factors into `scale`.
    """
    op = "linear_policy_loss"
    rows = {"old_logprob": old_logprob, "advantage": advantage, "weights": weights, "ref_logprob": ref_logprob}
    check_head(op, hidden, weight, targets=targets, **rows)
    check_temperature(op, temperature)
    check_number(op, "clip_coef", clip_coef, 0)
    if kl_estimator not in ("k2", "k3"):
        hint = " (k1 as a loss has a zero-mean gradient: put it in the reward)" if kl_estimator == "k1" else ""
        raise ValueError(f"{op}: kl_estimator must be 'k2' or 'k3', got {kl_estimator!r}{hint}")
    if kl_coef and ref_logprob is None:
        raise ValueError(f"{op}: kl_coef = {kl_coef} needs ref_logprob")
    implementation = select(op, _IMPLEMENTATIONS, backend, hidden.device)
    settings = Settings(clip_coef, kl_coef, kl_estimator, temperature, scale)
    dtype = accumulate_dtype(hidden.dtype)
    old, advantage, weights, ref = (None if x is None else x.detach().to(dtype) for x in rows.values())
    if weights is None:
        return _all_rows(implementation, hidden, weight, targets, (old, advantage, ref), settings)
    return _kept_rows(implementation, hidden, weight, targets, Rows(old, advantage, weights, ref), settings)


def _all_rows(
    implementation: Implementation, hidden: Tensor, weight: Tensor, targets: Tensor,
    numbers: tuple[Tensor, Tensor, Tensor | None], s: Settings,
) -> PolicyLoss:  # fmt: skip
    """Without weights: a row whose target lies outside [0, V) stays in its place, with weight 0 and numbers 0 instead
    of (old_logprob, advantage, ref_logprob), so that the host need not know how many there are."""
    ignored = (targets < 0) | (targets >= weight.shape[0])
    old, advantage, ref = (None if x is None else x.masked_fill(ignored, 0.0) for x in numbers)
    rows = Rows(old, advantage, (~ignored).to(old.dtype), ref)
    result = implementation(hidden, weight, targets.clamp(0, weight.shape[0] - 1), rows, s)
    return result._replace(logprob=result.logprob.masked_fill(ignored, 0.0))


def _kept_rows(
    implementation: Implementation, hidden: Tensor, weight: Tensor, targets: Tensor, r: Rows, s: Settings
) -> PolicyLoss:
    """With weights: only the rows that count reach a matrix product."""
    index = kept_rows(targets, weight.shape[0], r.weights)
    kept = Rows(*(take(x, index) for x in r))
    result = implementation(take(hidden, index), weight, take(targets, index), kept, s)
    if index is None:
        return result
    logprob = torch.zeros(targets.shape, dtype=r.old.dtype, device=hidden.device).index_copy_(0, index, result.logprob)
    return result._replace(logprob=logprob)
