"""Generalised advantage estimation (Schulman et al. 2016) over packed sequences."""

import torch
from torch import Tensor

from .common import accumulate_dtype, check_tensor, lazy_triton, select


def _delta(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    following = torch.roll(values, -1)
    following[cu_seqlens[1:] - 1] = 0.0
    return rewards + gamma * following - values


def _reference(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    delta = _delta(rewards, values, cu_seqlens, gamma)
    advantages = torch.empty_like(delta)
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        carry = delta.new_zeros(())
        for t in range(end - 1, start - 1, -1):
            carry = delta[t] + gamma * lam * carry
            advantages[t] = carry
    return advantages, advantages + values


def _chunked(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Segmented reverse scan by doubling: after k rounds a token holds the discounted sum of its next 2^k deltas.

    log2(T) rounds over flat arrays: no padding, no loop over tokens or sequences, nothing read on the host.
    """
    delta = _delta(rewards, values, cu_seqlens, gamma)
    total = delta.shape[0]
    factor = torch.full_like(delta, gamma * lam)
    factor[cu_seqlens[1:] - 1] = 0.0  # nothing flows over a sequence's end; an empty sequence marks its forerunner's
    step = 1
    while step < total:
        delta = torch.cat((torch.addcmul(delta[:-step], factor[:-step], delta[step:]), delta[-step:]))
        factor = torch.cat((factor[:-step] * factor[step:], factor[-step:]))
        step *= 2
    return delta, delta + values


_IMPLEMENTATIONS = {"reference": _reference, "chunked": _chunked, "triton": lazy_triton("gae", "advantages")}


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(advantages[T], returns[T]) in fp32: A_t = sum_k (gamma lam)^k delta_{t+k}, returns = A + values.

    rewards, values [T] packed; cu_seqlens [S+1] int, rising from 0 to T, which is not read on the host and so not
    checked. The value after a sequence's last token is 0. No gradient is formed.
    """
    if rewards.shape != values.shape or rewards.dim() != 1:
        raise ValueError(f"gae: expected rewards and values [T], got {list(rewards.shape)} and {list(values.shape)}")
    check_tensor("gae", "cu_seqlens", cu_seqlens, integer=True)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < (2 if values.shape[0] else 1):
        raise ValueError(
            f"gae: expected cu_seqlens [S+1] from 0 to T = {values.shape[0]}, got {list(cu_seqlens.shape)}"
        )
    implementation = select("gae", _IMPLEMENTATIONS, backend, values.device)
    dtype = accumulate_dtype(values.dtype)
    rewards, values = rewards.detach().to(dtype), values.detach().to(dtype)
    if values.shape[0] == 0:
        return rewards, values
    return implementation(rewards, values, cu_seqlens.to(values.device, torch.int64), gamma, lam)
