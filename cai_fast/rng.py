"""Keyed randomness: every draw is a function of (seed, stage, sample id, draw index) and of nothing else.

There is no generator state to save, so a draw does not depend on batch, rank, order or time (design §9). The
mappings are spelled out here (blake2b, SplitMix64) because library generators may change between versions.
"""

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

KEY_MASK = (1 << 63) - 1  # keys are kept as int64 tensors


def key(seed: int, stage: str, sample_id: str, draw: int = 0) -> int:
    """63-bit key of one draw; `draw` counts the visits of this sample in this stage."""
    text = json.dumps([seed, stage, sample_id, draw])  # JSON keeps ("a", "bc") and ("ab", "c") apart
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & KEY_MASK


def _digest(key: int, purpose: bytes) -> int:
    """128 bits; `purpose` makes the helpers below independent of each other for the same key."""
    return int.from_bytes(hashlib.blake2b(key.to_bytes(8, "big"), digest_size=16, person=purpose).digest(), "big")


def uniform(key: int) -> float:
    """Uniform in [0, 1), with 53 random bits."""
    return (_digest(key, b"uniform") >> 75) / (1 << 53)


def choice(key: int, n: int) -> int:
    """Uniform in 0 .. n-1 (the bias of 128 bits modulo n is below 1e-19 for any n that fits int64)."""
    if n < 1:
        raise ValueError(f"choice needs n >= 1, got {n}")
    return _digest(key, b"choice") % n


def permutation(key: int, n: int) -> list[int]:
    """Random order of 0 .. n-1: the ranks of n SplitMix64 outputs, ties (probability n²/2^65) by index."""
    state = np.uint64(_digest(key, b"permutation") & (2**64 - 1))
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = state + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable").tolist()


def generator(key: int) -> "torch.Generator":
    """CPU torch.Generator seeded with the key, for initialising weights."""
    import torch  # the rest of this file must stay usable without torch

    return torch.Generator().manual_seed(key)
