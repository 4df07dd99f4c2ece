"""How much better an answer, or each token of it, was than expected: one function for each algorithm.

S answers of a rank, N response tokens of theirs. A group is the answers to one prompt, all of them on one rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cai_fast import kernels, losses
from cai_fast.distributed import Distributed

GROUP_EPS = 1e-4  # added to a group's deviation: what rounding makes of equal scores must not become an advantage of 1


def ppo(
    rewards: Tensor, values: Tensor, cu_targets: Tensor, gamma: float, lam: float, dist: Distributed
) -> tuple[Tensor, Tensor]:
    """Collective: (advantages[N], returns[N]) by generalised advantage estimation (Schulman et al. 2016) from rewards
    and values [N] of the answers that cu_targets[S+1] bounds; advantages are whitened over all ranks' tokens."""
    raw, returns = kernels.gae(rewards, values, cu_targets, gamma=gamma, lam=lam)
    return losses.whiten(raw, dist), returns


def rloo(returns: Tensor, groups: Sequence[int]) -> Tensor:
    """[S] returns minus the mean of the other answers to the same prompt (Ahmadian et al. 2024, arXiv 2402.14740 §2.3).

    The others do not depend on the answer, so the baseline leaves the gradient's expectation as it is.
    """
    index, counts, sums = _grouped(returns, groups)
    return ((counts * returns.double() - sums[index]) / (counts - 1)).to(returns.dtype)


def grpo(returns: Tensor, groups: Sequence[int]) -> Tensor:
    """[S] returns minus their group's mean, divided by its deviation (Shao et al. 2024, arXiv 2402.03300 §4.1.2).

    The deviation is the population's; a group of equal returns has advantages of 0.
    """
    index, counts, sums = _grouped(returns, groups)
    centred = returns.double() - sums[index] / counts
    variance = torch.zeros_like(sums).index_add_(0, index, centred.square())[index] / counts
    return (centred / (variance.sqrt() + GROUP_EPS)).to(returns.dtype)


def _grouped(returns: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(group[S], size of each answer's group [S], sum of the returns of each group); fp64 sums, each group's alone."""
    names = torch.tensor(list(groups), dtype=torch.int64)
    if names.shape != returns.shape:
        raise ValueError(f"advantages: {len(names)} groups for returns of shape {list(returns.shape)}")
    _, index, counts = names.unique(return_inverse=True, return_counts=True)
    if len(names) and int(counts.min()) < 2:
        raise ValueError("advantages: a group of one answer, which nothing can be compared with")
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, index, returns.double())
    return index, counts[index], sums
