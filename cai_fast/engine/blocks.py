"""Shared-prefix decode on a CPU: rows behind one long prefix attend to it as one block of queries.

The keys of the prefix are read once for all of them, not once a row, and what each row adds is attended to apart;
merged by log-sum-exp the two are attention to everything (Hydragen, arXiv 2402.05099). For pages see pages.py.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cai_fast import kernels
from cai_fast.engine.prefix import Prefix
from cai_fast.model.attention import sdpa_lse

# Measured with one thread, heads of 32: at 512 keys a layer takes 1.9 times as long without for 16 rows, 2.8 times for
# 64, and half as long for 4, where it is short anyway. The choice must not depend on the rows: bits would.
MIN_SHARED = 512
# Query rows of one product. Always as many: a row's bits do not depend on how many there are.
QUERIES = 32


def block_attention(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """q [n, Hq, D], each to all of keys and values [Hkv, P, D] -> (out [n, Hq, D], lse [n, Hq])."""
    n, heads, size = q.shape
    group = heads // keys.shape[0]
    rows = max(1, QUERIES // group)
    blocks = -(-n // rows)
    q = F.pad(q, (0, 0, 0, 0, 0, blocks * rows - n)).view(blocks, rows, keys.shape[0], group, size)
    # The query heads of a kv head are further rows of the same product.
    folded = q.transpose(1, 2).reshape(blocks, keys.shape[0], rows * group, size)
    out, lse = sdpa_lse(folded, *(x.expand(blocks, -1, -1, -1) for x in (keys, values)))
    out = out.unflatten(2, (rows, group)).transpose(1, 2).reshape(blocks * rows, heads, size)
    return out[:n], lse.unflatten(2, (rows, group)).transpose(1, 2).reshape(blocks * rows, heads)[:n]


def shared_stretch(prefix: Prefix | None) -> Tensor | None:
    """The part of a prefix that is worth attending to apart: its first stretch, which kept handles have in common."""
    first = None if prefix is None or not prefix.stretches else prefix.stretches[0]
    return None if first is None or first.shape[3] < MIN_SHARED else first


class Blocks:
    """Which rows stand behind which shared stretch `(layers, 2, Hkv, n, D)`."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.skip = torch.zeros(rows, dtype=torch.int64, device=device)  # positions of a row that are shared
        self._of: dict[int, Tensor] = {}
        self._groups: tuple[int, list[tuple[Tensor, Tensor]]] | None = None  # for so many rows, until they change

    def __bool__(self) -> bool:
        return bool(self._of)

    def skipped(self, row: int) -> int:
        """Positions of a row that it shares."""
        return self._of[row].shape[3] if row in self._of else 0

    def positions(self) -> int:
        """Positions of the stretches in use, each counted once."""
        return sum({id(stretch): stretch.shape[3] for stretch in self._of.values()}.values())

    def join(self, row: int, stretch: Tensor | None) -> None:
        """A new row stands behind `stretch`."""
        self._groups = None
        self._of.pop(row, None)
        if stretch is not None:
            self._of[row] = stretch

    def leave(self, rows: Iterable[int]) -> None:
        """Rows that are gone."""
        for row in rows:
            self.join(row, None)

    def move(self, hole: int, tail: int) -> None:
        """Row `tail` becomes row `hole`."""
        self.join(hole, self._of.get(tail))
        self.join(tail, None)

    def merge(self, layer: int, q: Tensor, own: Tensor, own_lse: Tensor) -> Tensor:
        """Attention to everything from that of queries [n, Hq, D] to their own keys, own [n, Hq, D] and lse [n, Hq]."""
        if self._groups is None or self._groups[0] != q.shape[0]:
            members: dict[int, list[int]] = {}
            for row in range(q.shape[0]):
                if row in self._of:
                    members.setdefault(id(self._of[row]), []).append(row)
            groups = [(self._of[rows[0]], torch.tensor(rows, device=q.device)) for rows in members.values()]
            self._groups = q.shape[0], groups
        for stretch, rows in self._groups[1]:
            out, lse = block_attention(q[rows], *stretch[layer])
            merged, _ = kernels.merge_attention(out, lse, own[rows], own_lse[rows])
            own.index_copy_(0, rows, merged)
        return own
