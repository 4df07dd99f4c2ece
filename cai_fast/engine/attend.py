"""Attention of the engine's phases, handed to `model.hidden(..., attend=...)`; rotary embedding is applied.

T rows, Hq query and Hkv key-value heads, D head size. Rows of `q` beyond the described sequences are padding: what
comes out there is nobody's.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from cai_fast import kernels
from cai_fast.engine.cache import SlotCache, band, round_up
from cai_fast.engine.state import to_device
from cai_fast.model import ModelConfig
from cai_fast.model.attention import Attend, Segments, attention_lse, segments

# The CPU kernel works on blocks of query rows, and a row of a full block does not depend on the rest of the block.
# So rows and keys are aligned to blocks by their absolute position and padded with zeros: a token's bits then do not
# depend on its neighbours, and up to some 110 to 380 keys (by machine: where MKL starts to split sums) neither on where
# a shared prefix ends.
BLOCK = 32

Store = Callable[[int, Tensor, Tensor], None]


class _Group:
    """Sequences alike in context length and padded length: one SDPA call a layer."""

    def __init__(
        self, before: int, size: int, members: list[tuple[int, int, list[Tensor]]], device: torch.device
    ) -> None:
        self.before, self.front, self.size = before, before % BLOCK, size
        self.count, self.keys = len(members), before - self.front + size
        source = [torch.arange(start, start + n) for start, n, _ in members]
        self.source = torch.cat(source).to(device)  # packed row of each token

        def places(offset: int, stride: int) -> Tensor:
            rows = [torch.arange(n) + (i * stride + offset) for i, (_, n, _) in enumerate(members)]
            return torch.cat(rows).to(device)

        self.query_place, self.key_place = places(self.front, size), places(before, self.keys)
        self.contexts = [context for _, _, context in members]
        shared = all(a is b for context in self.contexts for a, b in zip(context, self.contexts[0], strict=False))
        self.shared = shared and len({len(context) for context in self.contexts}) == 1
        self.masks: dict[int | None, Tensor | None] = {}

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """None where plain top-left causal attention is right."""
        if window is not None and window >= self.keys:
            window = None
        if self.before == 0 and window is None:
            return None
        if window not in self.masks:
            keys = torch.arange(self.keys, device=device)
            self.masks[window] = band(keys[self.before - self.front :, None], keys, window)
        return self.masks[window]

    def fill(self, layer: int, which: int, x: Tensor) -> Tensor:
        """Keys (which 0) or values (1) of context and sequence, padded: [count, Hkv, keys, D]."""
        out = x.new_zeros(self.count * self.keys, *x.shape[1:]).index_copy_(0, self.key_place, x[self.source])
        out = out.unflatten(0, (self.count, self.keys)).transpose(1, 2)
        if self.before:
            for target, context in [(out, self.contexts[0])] if self.shared else zip(out, self.contexts, strict=True):
                target[..., : self.before, :] = torch.cat([kv[layer, which] for kv in context], dim=1)
        return out


class ContextAttend:
    """Causal attention of packed sequences, each after its own (possibly empty) chain of cached keys.

    `contexts[s]`: stretches `(layers, 2, Hkv, n, D)` of keys and values that precede sequence s;
    `store(layer, k, v)` receives the new keys and values [T, Hkv, D] of each layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        lens: Sequence[int],
        contexts: Sequence[list[Tensor]],
        *,
        store: Store | None,
        device: torch.device,
    ) -> None:
        self.config, self.store, self.rows = config, store, sum(lens)
        groups: dict[tuple[int, int], list[tuple[int, int, list[Tensor]]]] = {}
        row = 0
        for n, context in zip(lens, contexts, strict=True):
            before = sum(kv.shape[3] for kv in context)
            if n:
                groups.setdefault((before, round_up(before % BLOCK + n, BLOCK)), []).append((row, n, context))
            row += n
        self.groups = [_Group(before, size, members, device) for (before, size), members in groups.items()]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
        if self.store is not None:
            self.store(layer, k[: self.rows], v[: self.rows])
        result = torch.zeros_like(q, memory_format=torch.contiguous_format)
        window, grouped = self.config.window(layer), q.shape[1] != k.shape[1]
        for group in self.groups:
            queries = q.new_zeros(group.count * group.size, *q.shape[1:])
            queries.index_copy_(0, group.query_place, q[group.source])
            queries = queries.unflatten(0, (group.count, group.size)).transpose(1, 2)
            mask = group.mask(window, q.device)
            out = F.scaled_dot_product_attention(
                queries,
                group.fill(layer, 0, k),
                group.fill(layer, 1, v),
                mask,
                is_causal=mask is None,
                enable_gqa=grouped,
            )
            out = out.transpose(1, 2).flatten(0, 1)
            result.index_copy_(0, group.source, out.index_select(0, group.query_place))
        return result


class ChainAttend:
    """As `ContextAttend`, in parts: a sequence's own tokens causally, then every stretch of the contexts with all
    queries behind it as one segment, merged by log-sum-exp. No stretch is copied for each sequence behind it, lengths
    may differ, and on a GPU it is one kernel a depth and layer. No sliding windows.
    """

    def __init__(
        self,
        lens: Sequence[int],
        contexts: Sequence[list[Tensor]],
        padding: Sequence[int],
        *,
        store: Store | None,
        device: torch.device,
    ) -> None:
        self.store, self.rows = store, sum(lens)
        self.own = segments([n for n in (*lens, *padding) if n], device)
        starts = list(accumulate(lens, initial=0))
        # By depth: the stretches there, the queries and keys of each, and the queries' rows in that order.
        self.depths: list[tuple[list[Tensor], Segments, Segments, Tensor]] = []
        for depth in range(max(map(len, contexts), default=0)):
            stretches: dict[int, tuple[Tensor, list[int]]] = {}
            for i, context in enumerate(contexts):
                if depth < len(context) and context[depth].shape[3] and lens[i]:
                    stretches.setdefault(id(context[depth]), (context[depth], []))[1].append(i)
            if stretches:
                behind = [members for _, members in stretches.values()]
                rows = [row for members in behind for i in members for row in range(starts[i], starts[i] + lens[i])]
                queries = segments([sum(lens[i] for i in members) for members in behind], device)
                keys = segments([kv.shape[3] for kv, _ in stretches.values()], device)
                index = to_device(rows, torch.int64, device)
                self.depths.append(([kv for kv, _ in stretches.values()], queries, keys, index))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
        if self.store is not None:
            self.store(layer, k[: self.rows], v[: self.rows])
        out, lse = attention_lse(q, k, v, self.own, self.own, causal=True)
        for stretches, queries, keys, index in self.depths:
            k, v = (torch.cat([kv[layer, i] for kv in stretches], 1).transpose(0, 1) for i in (0, 1))
            part, part_lse = attention_lse(q[index], k, v, queries, keys, causal=False)
            merged, merged_lse = kernels.merge_attention(out[index], lse[index], part, part_lse.contiguous())
            out, lse = out.index_copy(0, index, merged), lse.index_copy(0, index, merged_lse)
        return out


class StoringAttend:
    """The trainer's packed attention, which also hands the keys and values of each layer to `store`."""

    def __init__(self, attend: Attend, store: Store) -> None:
        self.attend, self.store = attend, store

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
        self.store(layer, k, v)
        return self.attend(layer, q, k, v)


class DecodeAttend:
    """One new token a request: write its keys and values to its row, attend to the row's first `width` positions."""

    def __init__(self, config: ModelConfig, cache: SlotCache, positions: Tensor, width: int) -> None:
        self.config, self.cache, self.rows = config, cache, positions.shape[0]
        self.index = cache.index(torch.arange(self.rows, device=positions.device), positions)
        self.read = cache.reader(positions, width, {config.window(layer) for layer in range(config.num_layers)})

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
        n = self.rows
        self.cache.write(layer, self.index, k[:n], v[:n])
        out = self.read(layer, self.config.window(layer), q[:n])
        return out if q.shape[0] == n else F.pad(out, (0, 0, 0, 0, 0, q.shape[0] - n))
