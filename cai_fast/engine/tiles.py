"""Shared-prefix decode on pages: which rows attend to which prefix's pages together, in tensors of fixed size.

A step may stand in a CUDA graph, so nothing here changes shape or place when rows come and go (Hydragen, arXiv
2402.05099; the kernels are `kernels.shared_attention` and `paged_attention` with `starts`).
"""

import torch
from torch import Tensor

from cai_fast.engine.state import to_device

ROWS = 16  # rows of a tile: with 4 to 8 query heads a kv head, 64 to 128 rows of a matrix product
PREFIXES = 16  # shared at once, unless every row's bits must be the same in any company


class Tiles:
    """tables [G, P], lengths [G], tile_group [N], tile_rows [N, R] and starts [rows] of the kernels."""

    def __init__(self, rows: int, pages: int, page_size: int, device: torch.device, *, every: bool) -> None:
        """pages: of the longest request; every: no prefix is left out, though there be one for each row. Else rows
        behind more than PREFIXES attend to their pages by themselves."""
        self.page_size, self.rows, self.pages = page_size, rows, pages
        self.prefixes = rows if every else min(rows, PREFIXES)
        self.count = -(-rows // ROWS) + self.prefixes
        # One tensor, so that a change is one copy.
        sizes = [self.prefixes * pages, self.prefixes, self.count, self.count * ROWS, rows]
        self._all = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        tables, self.lengths, self.tile_group, tile_rows, self.starts = self._all.split(sizes)
        self.tables, self.tile_rows = tables.view(self.prefixes, pages), tile_rows.view(self.count, ROWS)
        self.tile_group.fill_(-1)
        self._of: dict[int, list[int]] = {}  # row -> full pages of its shared prefix
        self._stale = False

    def __bool__(self) -> bool:
        return bool(self._of)

    def join(self, row: int, shared: list[int] | None) -> None:
        """A new row begins with these pages, the same list for all rows behind a prefix."""
        if (shared or None) is not self._of.get(row):
            self._stale = True
            self._of.pop(row, None)
            if shared:
                self._of[row] = shared

    def move(self, hole: int, tail: int) -> None:
        """Row `tail` becomes row `hole`."""
        self.join(hole, self._of.get(tail))
        self.join(tail, None)

    def again(self) -> int:
        """Positions that a step does not read again: those of a prefix for every row behind it but one."""
        once = {id(pages): len(pages) for pages in self._of.values()}
        return (sum(map(len, self._of.values())) - sum(once.values())) * self.page_size

    def flush(self) -> None:
        """Copy what has changed to the device."""
        if not self._stale:
            return
        self._stale = False
        members: dict[int, list[int]] = {}
        for row, pages in self._of.items():
            members.setdefault(id(pages), []).append(row)
        tables = [[0] * self.pages for _ in range(self.prefixes)]
        lengths, starts = [0] * self.prefixes, [0] * self.rows
        groups, tiles = [-1] * self.count, [[-1] * ROWS for _ in range(self.count)]
        tile = 0
        for group, rows in enumerate(list(members.values())[: self.prefixes]):
            pages = self._of[rows[0]]
            tables[group][: len(pages)] = pages
            lengths[group] = len(pages) * self.page_size
            for first in range(0, len(rows), ROWS):
                part = rows[first : first + ROWS]
                groups[tile], tiles[tile][: len(part)] = group, part
                tile += 1
            for row in rows:
                starts[row] = lengths[group]
        flat = [
            *(p for table in tables for p in table),
            *lengths,
            *groups,
            *(r for rows in tiles for r in rows),
            *starts,
        ]
        self._all.copy_(to_device(flat, torch.int32, self._all.device))

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The metadata of `shared_attention`."""
        return self.tables, self.lengths, self.tile_group, self.tile_rows
