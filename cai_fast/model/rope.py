"""Rotary position embedding: the frequencies of every supported scaling, and tables of their cosines and sines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cai_fast.model.config import ModelConfig


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(inverse frequencies [D/2] fp32, factor on cos and sin), in fp32 step for step as transformers computes them."""
    dim, rope = config.head_dim, config.rope
    scaling: dict[str, Any] = dict(rope.scaling)
    powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    inv = 1.0 / powers
    if rope.kind == "linear":
        return inv / scaling["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(inv, scaling), 1.0
    if rope.kind == "yarn":
        return _yarn(inv, powers, dim, rope.theta, scaling)
    return inv, 1.0


def _llama3(inv: Tensor, s: dict[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths slowed by `factor`, short ones kept, a linear blend between."""
    factor, low, high = s["factor"], s["low_freq_factor"], s["high_freq_factor"]
    length = s["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv
    smooth = (length / wavelength - low) / (high - low)
    blend = (1 - smooth) * inv / factor + smooth * inv
    slowed = torch.where(wavelength > length / low, inv / factor, inv)
    medium = (wavelength >= length / high) & (wavelength <= length / low)
    return torch.where(medium, blend, slowed)


def _yarn(inv: Tensor, powers: Tensor, dim: int, theta: float, s: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolate slow dimensions, keep fast ones, sharpen attention."""
    factor, length = s["factor"], s["original_max_position_embeddings"]

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = s.get("attention_factor")
    if attention is None:
        m, m_all = s.get("mscale"), s.get("mscale_all_dim")
        attention = magnitude(m) / magnitude(m_all) if m and m_all else magnitude(1.0)

    def dimension(rotations: float) -> float:
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.get("beta_fast") or 32), dimension(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return 1.0 / (factor * powers) * (1 - keep) + inv * keep, float(attention)


class RopeTables:
    """cos and sin [positions, D/2] fp32, grown on demand and kept by device. Not a module: nothing to save or shard."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, D/2] fp32, of the positions [T]."""
        limit = self.config.max_position_embeddings
        # Reading the largest position would stall a GPU, so there the table has its full length from the start.
        need = limit if positions.is_cuda else int(positions.max()) + 1
        if need > limit:
            raise ValueError(f"position {need - 1} beyond the model's {limit} positions")
        cos, sin = self.tables.get(positions.device, (None, None))
        if cos is None or cos.shape[0] < need:
            cos, sin = self._build(min(limit, max(256, 1 << (need - 1).bit_length())), positions.device)
            self.tables[positions.device] = cos, sin
        return cos[positions], sin[positions]

    def _build(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        with torch.device("cpu"):  # even inside a meta-device context
            inv, factor = frequencies(self.config)
            angle = torch.arange(rows).float()[:, None] * inv[None, :]
            # The angle is fp32 as in transformers; its cosine goes through fp64, whose rounding to fp32 does not depend
            # on where in the table (in a vector register or in the loop's tail) an element lies.
            cos, sin = angle.double().cos() * factor, angle.double().sin() * factor
        return cos.float().to(device), sin.float().to(device)
