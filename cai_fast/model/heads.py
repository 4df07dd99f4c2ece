"""Heads that turn a hidden state into one number: preference-model score, value of a state."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """hidden [N, H] -> [N] fp32. One weight [1, H] (Hugging Face's `score.weight`), no bias.

    A product and a sum, not a matrix-vector product: each row is then reduced alone, so its bits do not depend on N.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return scalar_rows(hidden, self.weight)


def scalar_rows(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [N, H], weight [1, H] -> [N] fp32. Usable as `loss` of `model(batch, loss=...)` on a score model."""
    return (hidden.float() * weight.float()).sum(-1)


@torch.no_grad()
def init_scalar(weight: Tensor, seed: int, *, zero: bool = False) -> None:
    """Fill a [1, H] head: zeros, or N(0, 1/(H+1)) so that scores start at unit scale (Stiennon et al. 2020)."""
    if zero:
        weight.zero_()
        return
    generator = torch.Generator().manual_seed(seed)
    weight.copy_(torch.randn(weight.shape, generator=generator) / (weight.shape[-1] + 1) ** 0.5)
