"""Key-value cache of the requests in flight: what every layout offers, and the layout of one slot a request.

Row i of the decode state is row i of the cache. `PagedCache` (pages.py) overrides what depends on the layout.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cai_fast.engine.blocks import Blocks, shared_stretch
from cai_fast.engine.prefix import Prefix
from cai_fast.model.attention import sdpa_lse

# A masked key contributes exactly zero, so a wider window changes no bit as long as its width is a
# multiple of 32 (measured: of 16), which the CPU attention kernel handles without a remainder.
WIDTH_STEP = 32

Read = Callable[[int, int | None, Tensor], Tensor]  # layer, window, queries [n, Hq, D] -> [n, Hq, D]


class PageUse(NamedTuple):
    """Pages of a cache: all, held by a request or prefix, held more than once, and the most ever held."""

    total: int
    in_use: int
    shared: int
    peak: int


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is >= `value`."""
    return -(-value // step) * step


def band(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """bool [..., Q, K]: which keys a query sees, by absolute positions [..., Q, 1] and [K]."""
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


class SlotCache:
    """Row i owns page i, as long as the longest request: `(layers, 2, slots, kv_heads, positions, head_dim)`.

    With `share` a long prefix is not copied into the rows behind it: their pages begin after it (see blocks.py).
    """

    ragged = False  # whether a decode step reads each row's own positions only, not the longest row's for all

    def __init__(
        self, layers: int, slots: int, kv_heads: int, positions: int, head_dim: int, like: Tensor, share: bool = False
    ) -> None:
        self.kv_heads, self.page_size, self.shares = kv_heads, positions, share
        self.blocks = Blocks(slots, like.device)
        # Zeroed: a masked position has weight zero, and zero times an uninitialised NaN would be NaN.
        self.kv = like.new_zeros(layers, 2, slots, kv_heads, positions, head_dim)
        self.bytes_per_token = self.kv[:, :, 0, :, 0].nbytes
        self._flat = [[self.kv[layer, i].view(-1, head_dim) for i in (0, 1)] for layer in range(layers)]
        self._heads = torch.arange(kv_heads, device=like.device) * positions

    def reserve(self, row: int, total: int, length: int, prefix: Prefix | None, twin: int | None) -> bool:
        """Make room for `total` positions in a new row; False, and nothing changed, while there is none.

        `twin`: an older row whose `length` prompt tokens (and prefix) are the same.
        """
        self.blocks.join(row, shared_stretch(prefix) if self.shares else None)
        return True

    def seat(self, rows: slice) -> None:
        """Make rows that were reserved ready for use."""
        skipped = [self.blocks.skipped(row) for row in range(rows.start, rows.stop)]
        self.blocks.skip[rows] = torch.tensor(skipped, device=self.kv.device)

    def vacate(self, rows: slice) -> None:
        """Rows that nobody is in any more: what a padded batch writes to them goes where nobody reads."""
        self.blocks.skip[rows] = 0

    def release(self, rows: Iterable[int]) -> None:
        """Give back what the rows hold."""
        self.blocks.leave(rows)

    def clear(self) -> None:
        """Release every row."""
        self.release(range(self.blocks.skip.shape[0]))

    def forget(self, version: tuple[int, ...]) -> None:
        """Drop what is kept for prefixes that are gone or were made with weights other than `version`."""

    def usage(self) -> PageUse:
        """Pages held now; slots are not counted."""
        return PageUse(0, 0, 0, 0)

    def index(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where `write` puts the tokens at the given row and position `[T]`: `[T * kv_heads]`."""
        return self._index(rows, positions - self.blocks.skip[rows] if self.blocks else positions)

    def _index(self, pages: Tensor, offsets: Tensor) -> Tensor:
        first = pages * (self.kv_heads * self.page_size) + offsets
        return (first[:, None] + self._heads).view(-1)

    def write(self, layer: int, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k, v [T, kv_heads, head_dim]` of one layer at `index`."""
        keys, values = self._flat[layer]
        keys.index_copy_(0, index, k.reshape(-1, k.shape[-1]))
        values.index_copy_(0, index, v.reshape(-1, v.shape[-1]))

    def fill(self, row: int, prefix: Prefix) -> None:
        """Put a prefix's keys and values at the start of a row, but for what the row shares."""
        begin = 0
        for kv in prefix.stretches[1:] if self.blocks.skipped(row) else prefix.stretches:
            self.kv[:, :, row, :, begin : begin + kv.shape[3]].copy_(kv)
            begin += kv.shape[3]

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """Keys and values `(layers, 2, kv_heads, stop - start, head_dim)` of positions that are the row's own."""
        skip = self.blocks.skipped(row)
        return self.kv[:, :, row, :, start - skip : stop - skip]

    def share(self, row: int, twin: int, length: int) -> None:
        """Put the first `length` positions of row `twin` at the start of `row`."""
        start = self.blocks.skipped(row)
        self.read(row, start, length).copy_(self.read(twin, start, length))

    def move(self, holes: Sequence[int], tails: Sequence[int], lengths: Sequence[int]) -> None:
        """Row `tails[i]`, of `lengths[i]` cached positions, becomes the free row `holes[i]`."""
        for hole, tail, length in zip(holes, tails, lengths, strict=True):
            own = length - self.blocks.skipped(tail)
            self.kv[:, :, hole, :, :own].copy_(self.kv[:, :, tail, :, :own])
            self.blocks.move(hole, tail)
        self.blocks.skip[holes] = self.blocks.skip[tails]

    def skipped(self, row: int) -> int:
        """Positions at the start of a row that a step does not read for it alone."""
        return self.blocks.skipped(row)

    @property
    def variant(self) -> bool:
        """Whether a step now runs other operations than before."""
        return bool(self.blocks)

    def common(self) -> int:
        """Positions that a step reads once for several rows; O(rows)."""
        return self.blocks.positions()

    def width(self, longest: int) -> int:
        """Positions to attend to in a step whose longest row has `longest`."""
        return round_up(longest, WIDTH_STEP)

    def reader(self, positions: Tensor, width: int, windows: set[int | None]) -> Read:
        """Attention of one query a row over its keys up to `positions [n]` (< width); made once a step."""
        n, masks = positions.shape[0], {}
        if self.blocks:
            positions = positions - self.blocks.skip[:n]
        for window in windows:
            seen = band(positions[:, None], torch.arange(width, device=positions.device), window)
            # Additive and made once a step: a bool mask is converted again in every layer.
            mask = torch.zeros(seen.shape, dtype=self.kv.dtype, device=positions.device)
            masks[window] = mask.masked_fill_(~seen, float("-inf"))[:, None, None]

        def attention(layer: int, window: int | None, q: Tensor) -> Tensor:
            keys, values = self.kv[layer, :, :n, :, :width]
            if self.blocks:
                own, lse = sdpa_lse(q[:, :, None], keys, values, masks[window])
                return self.blocks.merge(layer, q, own.squeeze(2), lse.squeeze(2))
            grouped = q.shape[1] != self.kv_heads
            return F.scaled_dot_product_attention(
                q[:, :, None], keys, values, masks[window], enable_gqa=grouped
            ).squeeze(2)

        return attention
