"""A paged cache of sequences that share prefixes, for the tests of attention: what must not be read is NaN."""

import dataclasses
import math

import torch
from torch import Tensor

GROUPS = [0, 0, 2, 0, -1, 2, 0, 1, 0]  # row -> prefix; row 4 has none, prefix 1 has no keys
OWN = [3, 40, 1, 20, 13, 0, 5, 9, 30]  # keys of a row behind its prefix
TILES = [(0, [0, 1, 3, 6]), (-1, [4, 4, 0, 1]), (2, [-1, 5, -1, 2]), (1, [7, -1, -1, -1]), (0, [-1, -1, 8, -1])]


@dataclasses.dataclass
class Prefixes:
    """Arguments of shared_attention, and of paged_attention over the whole sequences (`table`, `seq_lens`)."""

    query: Tensor
    k_pages: Tensor
    v_pages: Tensor
    tables: Tensor
    lengths: Tensor
    tile_group: Tensor
    tile_rows: Tensor
    table: Tensor
    seq_lens: Tensor
    starts: Tensor

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return (
            self.query, self.k_pages, self.v_pages, self.tables, self.lengths, self.tile_group, self.tile_rows,
        )  # fmt: skip

    @property
    def whole(self) -> tuple[Tensor, ...]:
        return self.query, self.k_pages, self.v_pages, self.table, self.seq_lens

    def double(self) -> "Prefixes":
        wide = {name: getattr(self, name).double() for name in ("query", "k_pages", "v_pages")}
        return dataclasses.replace(self, **wide)


def prefixes(
    dtype: torch.dtype = torch.float64,
    heads: tuple[int, int] = (4, 2),
    page: int = 4,
    size: int = 8,
    lengths: tuple[int, int, int] = (70, 0, 33),
) -> Prefixes:
    """Pages in shuffled order; tables are -1 past their end. A prefix's partial page is not that of its rows, which
    hold the whole pages in common and the rest each for itself."""
    g = torch.Generator().manual_seed(0)
    full = [length // page * page for length in lengths]
    totals = [own + (full[group] if group >= 0 else 0) for own, group in zip(OWN, GROUPS, strict=True)]
    pages = sum(-(-n // page) for n in (*totals, *lengths))
    query = torch.randn(len(GROUPS), heads[0], size, generator=g).to(dtype)
    k_pages, v_pages = torch.full((2, pages, heads[1], page, size), math.nan, dtype=dtype)
    free = iter(torch.randperm(pages, generator=g).tolist())

    def write(table: Tensor, first: int, end: int) -> None:
        """Keys at the positions first (a page's first) to end; they grow, so that the largest score moves."""
        for at in range(first // page, -(-end // page)):
            table[at] = number = next(free)
            used = min(page, end - page * at)
            for target, factor in ((k_pages, 1 + at * page / 32), (v_pages, 1)):
                target[number, :, :used] = (factor * torch.randn(heads[1], used, size, generator=g)).to(dtype)

    tables = torch.full((len(lengths), -(-max(lengths) // page)), -1, dtype=torch.int32)
    table = torch.full((len(GROUPS), -(-max(totals) // page)), -1, dtype=torch.int32)
    for group, length in enumerate(lengths):
        write(tables[group], 0, length)
    starts = torch.tensor([full[group] if group >= 0 else 0 for group in GROUPS])
    for row, group in enumerate(GROUPS):
        shared = int(starts[row]) // page
        table[row, :shared] = tables[group, :shared]
        write(table[row], int(starts[row]), totals[row])
    tile_group, tile_rows = (torch.tensor(x, dtype=torch.int32) for x in zip(*TILES, strict=True))
    return Prefixes(
        query, k_pages, v_pages, tables, torch.tensor(lengths), tile_group, tile_rows, table, torch.tensor(totals),
        starts,
    )  # fmt: skip
