"""Slot KV cache: one contiguous stretch of `max_len` positions for every request in flight, allocated once."""

import torch
from torch import Tensor

# A masked key contributes exactly zero, so a wider window changes no bit as long as its width is a
# multiple of 32 (measured: of 16), which the CPU attention kernel handles without a remainder.
WIDTH_STEP = 32


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is >= `value`."""
    return -(-value // step) * step


class SlotCache:
    """Keys and values `(layers, 2, slots, kv_heads, positions, head_dim)`; a request owns one slot."""

    def __init__(self, layers: int, slots: int, kv_heads: int, max_len: int, head_dim: int, like: Tensor) -> None:
        self.kv_heads, self.positions = kv_heads, round_up(max_len, WIDTH_STEP)
        # Zeroed: a masked position has weight zero, and zero times an uninitialised NaN would be NaN.
        self.kv = like.new_zeros(layers, 2, slots, kv_heads, self.positions, head_dim)
        self.bytes_per_token = self.kv[:, :, 0, :, 0].nbytes
        self._flat = [[self.kv[layer, i].view(-1, head_dim) for i in (0, 1)] for layer in range(layers)]
        self._heads = torch.arange(kv_heads, device=like.device) * self.positions

    def index(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Flat row numbers `[T * kv_heads]` of the given slot and position of every token `[T]`."""
        first = slots * (self.kv_heads * self.positions) + positions
        return (first[:, None] + self._heads).view(-1)

    def write(self, layer: int, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k, v [T, kv_heads, head_dim]` of one layer at `index`."""
        keys, values = self._flat[layer]
        keys.index_copy_(0, index, k.reshape(-1, k.shape[-1]))
        values.index_copy_(0, index, v.reshape(-1, v.shape[-1]))

    def fill(self, slot: int, kv: Tensor) -> None:
        """Copy a stretch `(layers, 2, kv_heads, n, head_dim)` to the start of a slot."""
        self.kv[:, :, slot, :, : kv.shape[3]].copy_(kv)

    def read(self, slot: int, length: int) -> Tensor:
        """View `(layers, 2, kv_heads, length, head_dim)` of a slot's first positions."""
        return self.kv[:, :, slot, :, :length]
