"""Generalised advantage estimation as a segmented reverse scan: one launch, one program per sequence.

A token is the affine map carry -> delta + gamma lam carry of the advantage that follows it. Maps compose
associatively, so that a block is scanned in parallel; blocks go from the sequence's end and hand on their first lane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # tokens scanned at once: most responses are one block


@triton.jit
def _after(decay_1, delta_1, decay_2, delta_2):
    """The map of the second applied to the result of the first."""
    return decay_1 * decay_2, delta_2 + decay_2 * delta_1


@triton.jit
def _gae(
    rewards, values, cu_seqlens, advantages, returns, reward_stride, value_stride, bound_stride,
    GAMMA: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advantages and returns of one sequence, in blocks from its end; rewards, values [T], cu_seqlens [S+1]."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + sequence * bound_stride).to(tl.int64)
    end = tl.load(cu_seqlens + (sequence + 1) * bound_stride).to(tl.int64)
    accumulate = advantages.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    carry = tl.zeros([1], accumulate)
    for done in range(0, end - start, BLOCK):
        token = end - done - BLOCK + lane
        inside = token >= start  # only the block that holds the sequence's first tokens is not full
        value = tl.load(values + token * value_stride, mask=inside, other=0.0).to(accumulate)
        following = tl.load(values + (token + 1) * value_stride, mask=inside & (token + 1 < end), other=0.0)
        reward = tl.load(rewards + token * reward_stride, mask=inside, other=0.0).to(accumulate)
        delta = reward + GAMMA * following.to(accumulate) - value
        decay = tl.full([BLOCK], DECAY, accumulate)
        decay, delta = tl.associative_scan((decay, delta), 0, _after, reverse=True)
        advantage = delta + decay * carry
        tl.store(advantages + token, advantage, mask=inside)
        tl.store(returns + token, advantage + value, mask=inside)
        carry = tl.sum(tl.where(lane == 0, advantage, 0.0), 0, keep_dims=True)


def advantages(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages[T], returns[T]) for rewards, values [T] and bounds [S+1]; gamma and lam are compiled in."""
    result = torch.empty((2, *values.shape), dtype=values.dtype, device=values.device)
    _gae[(cu_seqlens.shape[0] - 1,)](
        rewards, values, cu_seqlens, result[0], result[1],
        rewards.stride(0), values.stride(0), cu_seqlens.stride(0), GAMMA=gamma, DECAY=gamma * lam, BLOCK=BLOCK,
    )  # fmt: skip
    return result[0], result[1]
