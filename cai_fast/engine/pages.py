"""Paged KV cache: small pages with reference counts, shared by the rows that begin alike, and a block table.

Pages for a request's longest possible end are taken when it is admitted, so that nothing in flight is ever preempted
(block tables: PagedAttention, arXiv 2309.06180).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from weakref import ref

import torch
from torch import Tensor

from cai_fast import kernels
from cai_fast.engine.blocks import MIN_SHARED
from cai_fast.engine.cache import WIDTH_STEP, PageUse, Read, SlotCache, round_up
from cai_fast.engine.prefix import Prefix
from cai_fast.engine.state import to_device
from cai_fast.engine.tiles import Tiles
from cai_fast.errors import InputError
from cai_fast.model import ModelConfig

CUDA_PAGE = 64  # default page size on a GPU
POOL_SHARE = 0.5  # of a GPU's free memory at most; the rest is left to prefill, logits and the trainer


class PagedCache(SlotCache):
    """Pool `(layers, 2, pages, kv_heads, page_size, head_dim)`; `table [rows, max pages]` int32: the pages of a row.

    A page belongs to every row and prefix that counts it in `_refs`. The full pages of a prefix's first stretch are
    made when a request first uses it and kept for the next one, until no handle has it any more, the weights change or
    a request needs the room. What follows in a kept handle is copied into the rows' own pages.
    """

    ragged = True

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int,
        like: Tensor,
        *,
        rows: int,
        max_len: int,
        fixed: bool,
        tiled: bool,
    ) -> None:
        """fixed: every decode step has the shape of one with a row of `max_len`; tiled: rows behind a long prefix
        attend to it together."""
        # One page more: padding rows write their keys to it.
        super().__init__(config.num_layers, pages + 1, config.num_kv_heads, page_size, config.head_dim, like)
        shape = rows, -(-max_len // page_size)
        self.trash, self.table = pages, torch.full(shape, pages, dtype=torch.int32, device=like.device)
        self.fixed, self.peak = fixed, 0
        self._refs, self._free = [0] * pages, list(reversed(range(pages)))
        self._rows: dict[int, list[int]] = {}
        # By the first stretch's id: the stretch, the weights it was made with, its full pages.
        self._prefixes: dict[int, tuple[ref[Tensor], tuple[int, ...], list[int]]] = {}
        self.tiles = Tiles(rows, shape[1], page_size, like.device, every=fixed) if tiled else None

    def _take(self, count: int) -> list[int]:
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        self.peak = max(self.peak, len(self._refs) - len(self._free))
        return pages

    def _drop(self, pages: list[int]) -> None:
        for page in pages:
            if self._refs[page] < 1:
                raise RuntimeError(f"engine: page {page} is freed twice")
            self._refs[page] -= 1
            if not self._refs[page]:
                self._free.append(page)

    def _make_room(self, count: int, keep: list[int]) -> bool:
        """Whether `count` pages are free, at the cost of prefixes (not the one with pages `keep`) that no row uses."""
        for key, (_, _, pages) in list(self._prefixes.items()):
            if len(self._free) >= count:
                break
            if pages is not keep and self._refs[pages[0]] == 1:
                del self._prefixes[key]
                self._drop(pages)
        return len(self._free) >= count

    def reserve(self, row: int, total: int, length: int, prefix: Prefix | None, twin: int | None) -> bool:
        """See `SlotCache.reserve`: the full pages of the twin's prompt, or else of the prefix, are shared."""
        needed, root = -(-total // self.page_size), self._root(prefix)
        shared = root if twin is None else self._rows[twin][: length // self.page_size]
        if not self._make_room(needed - len(shared), root):
            return False
        if twin is None and prefix is not None and not shared:
            shared = root = self._place(prefix)
        for page in shared:
            self._refs[page] += 1
        self._rows[row] = [*shared, *self._take(needed - len(shared))]
        if self.tiles is not None:
            self.tiles.join(row, root if len(root) * self.page_size >= MIN_SHARED else None)
        return True

    def _root(self, prefix: Prefix | None) -> list[int]:
        """Pages of a prefix's first stretch, if it has been used before."""
        if prefix is None or not prefix.stretches:
            return []
        stretch, _, pages = self._prefixes.get(id(prefix.stretches[0]), (lambda: None, (), []))
        return pages if stretch() is prefix.stretches[0] else []

    def seat(self, rows: slice) -> None:
        """See `SlotCache.seat`: the rows' pages go to the block table."""
        owned = [self._rows[row] for row in range(rows.start, rows.stop)]
        filled = [[*pages, *[self.trash] * (self.table.shape[1] - len(pages))] for pages in owned]
        self.table[rows] = to_device(filled, torch.int32, self.table.device)
        if self.tiles is not None:
            self.tiles.flush()

    def vacate(self, rows: slice) -> None:
        """See `SlotCache.vacate`."""
        self.table[rows] = self.trash
        if self.tiles is not None:
            self.tiles.flush()

    def _place(self, prefix: Prefix) -> list[int]:
        """Copy the full pages of the prefix's first stretch into the pool."""
        if not prefix.stretches:
            return []
        first = prefix.stretches[0]
        full = first.shape[3] // self.page_size
        pages = self._take(full)
        if full:
            kv = first[..., : full * self.page_size, :].unflatten(3, (full, self.page_size))
            self.kv.index_copy_(2, to_device(pages, torch.int64, self.kv.device), kv.transpose(2, 3))
            self._prefixes[id(first)] = ref(first), prefix.version, pages
        return pages

    def release(self, rows: Iterable[int]) -> None:
        """See `SlotCache.release`; a page that nobody else holds becomes free."""
        for row in rows:
            self._drop(self._rows.pop(row))
            if self.tiles is not None:
                self.tiles.join(row, None)

    def clear(self) -> None:
        """Release every row."""
        self.release(list(self._rows))

    def forget(self, version: tuple[int, ...]) -> None:
        """See `SlotCache.forget`. Called before any use, so that a handle's end needs no callback at a random time."""
        for key, (stretch, made, pages) in list(self._prefixes.items()):
            if stretch() is None or made != version:
                del self._prefixes[key]
                self._drop(pages)

    def usage(self) -> PageUse:
        """Pages held now."""
        held = [count for count in self._refs if count]
        return PageUse(len(self._refs), len(held), sum(count > 1 for count in held), self.peak)

    def index(self, rows: Tensor, positions: Tensor) -> Tensor:
        """See `SlotCache.index`."""
        return self._index(self.table[rows, positions // self.page_size].long(), positions % self.page_size)

    def fill(self, row: int, prefix: Prefix) -> None:
        """Copy what follows the full pages of the prefix's first stretch; those are shared."""
        size = self.page_size
        begin = prefix.stretches[0].shape[3] // size * size
        for page in range(begin // size, -(-len(prefix) // size)):
            here, at = page * size, self._rows[row][page]
            part = _between(prefix.stretches, here, min(here + size, len(prefix)))
            self.kv[:, :, at, :, : part.shape[3]] = part

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """See `SlotCache.read`: a copy."""
        size = self.page_size
        pages = self._rows[row][start // size : -(-stop // size)]
        kv = self.kv.index_select(2, to_device(pages, torch.int64, self.kv.device)).transpose(2, 3).flatten(3, 4)
        return kv[..., start - start // size * size : stop - start // size * size, :]

    def share(self, row: int, twin: int, length: int) -> None:
        """Copy the prompt's partial last page; the full ones are shared."""
        full, rest = divmod(length, self.page_size)
        if rest:
            self.kv[:, :, self._rows[row][full]] = self.kv[:, :, self._rows[twin][full]]

    def move(self, holes: Sequence[int], tails: Sequence[int], lengths: Sequence[int]) -> None:
        """See `SlotCache.move`; the keys stay where they are."""
        for hole, tail in zip(holes, tails, strict=True):
            self._rows[hole] = self._rows.pop(tail)
            if self.tiles is not None:
                self.tiles.move(hole, tail)
        to, source = (to_device(rows, torch.int64, self.table.device) for rows in (holes, tails))
        self.table.index_copy_(0, to, self.table.index_select(0, source))

    def width(self, longest: int) -> int:
        """See `SlotCache.width`: whole pages."""
        return self.table.shape[1] * self.page_size if self.fixed else round_up(longest, self.page_size)

    def reader(self, positions: Tensor, width: int, windows: set[int | None]) -> Read:
        """See `SlotCache.reader`; there are no windows."""
        table, lengths = self.table[: positions.shape[0], : width // self.page_size], positions + 1

        def attention(layer: int, window: int | None, q: Tensor) -> Tensor:
            keys, values = self.kv[layer]
            return kernels.paged_attention(q, keys, values, table, lengths)

        def tiled(layer: int, window: int | None, q: Tensor) -> Tensor:
            keys, values = self.kv[layer]
            starts = self.tiles.starts[: q.shape[0]]
            own = kernels.paged_attention(q, keys, values, table, lengths, starts=starts, return_lse=True)
            shared = kernels.shared_attention(q, keys, values, *self.tiles.arguments)
            return kernels.merge_attention(*shared, *own)[0]

        return tiled if self.tiles else attention

    def skipped(self, row: int) -> int:
        """See `SlotCache.skipped`: the block table of a row covers all of it."""
        return 0

    def common(self) -> int:
        """See `SlotCache.common`, less what `skipped` does not say."""
        return -self.tiles.again() if self.tiles else 0

    @property
    def variant(self) -> bool:
        """See `SlotCache.variant`."""
        return bool(self.tiles)


def _between(stretches: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Positions `start` to `stop` of stretches that follow each other."""
    parts, before = [], 0
    for kv in stretches:
        part = kv[:, :, :, max(0, start - before) : max(0, stop - before)]
        before += kv.shape[3]
        if part.shape[3]:
            parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


def _memory(device: torch.device) -> int:
    """Bytes of a GPU that may go to pages."""
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(POOL_SHARE * (torch.cuda.mem_get_info(device)[0] + reusable))


def plan_cache(
    config: ModelConfig,
    like: Tensor,
    *,
    rows: int,
    max_len: int,
    page_size: int | None,
    num_pages: int | None,
    fixed: bool,
    shared_decode: bool | None,
) -> Callable[[], SlotCache]:
    """What makes the cache of an engine with `rows` rows, on `like`'s device and in its type; arguments: see `Engine`.
    Its size is settled when it is made: until then other models and engines may take memory.

    A sliding window shorter than `max_len` needs slots: the default falls back to them, a page size is an InputError.
    """
    windowed, cuda = config.max_window is not None and config.max_window < max_len, like.device.type == "cuda"
    if page_size is None:
        page_size = CUDA_PAGE if cuda and not windowed else 0
    if page_size < 0 or page_size and windowed:
        raise InputError(
            f"engine: page_size {page_size} must be >= 0, and 0 (slots) for a model whose sliding window is shorter "
            f"than max_len {max_len}: attention to pages has no window"
        )
    if num_pages is not None and not page_size:
        raise InputError(f"engine: num_pages {num_pages} is for pages, but page_size 0 means slots")
    if shared_decode and (config.max_window is not None or cuda and not page_size):
        raise InputError("engine: shared_decode needs a model without sliding windows, and pages on a GPU")
    if not page_size:
        positions = round_up(max_len, WIDTH_STEP)
        share = shared_decode is not False and like.device.type == "cpu" and config.max_window is None
        shape = config.num_layers, rows, config.num_kv_heads, positions, config.head_dim
        return partial(SlotCache, *shape, like, share)
    needed = -(-max_len // page_size)
    page_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * like.element_size() * page_size

    def make() -> SlotCache:
        # More could never be in use at once: a shared page takes the place of one of a row that shares it.
        most = rows * needed
        pages = num_pages or (min(most, _memory(like.device) // page_bytes) if cuda else most)
        _check_room(pages)
        return PagedCache(
            config, pages, page_size, like, rows=rows, max_len=max_len, fixed=fixed, tiled=bool(shared_decode)
        )

    def _check_room(pages: int) -> None:
        if pages < needed:
            raise InputError(
                f"engine: {pages} pages of {page_size} tokens ({page_bytes / 2**20:.3g} MiB each) do not hold one "
                f"request of max_len {max_len}, which needs {needed}. Raise engine.num_pages, lower engine.max_len "
                "or free memory"
            )

    if num_pages is not None:
        _check_room(num_pages)
    return make
