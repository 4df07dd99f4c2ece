"""Forward passes of the model for the engine: row padding, cached contexts, last rows, work counters."""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cai_fast.engine.attend import BLOCK, ChainAttend, ContextAttend, DecodeAttend, Store, StoringAttend
from cai_fast.engine.cache import SlotCache, round_up
from cai_fast.engine.prefix import Prefix
from cai_fast.engine.state import to_device
from cai_fast.model import Model
from cai_fast.model.attention import choose, packed_causal, segments

# As in model.decoder.Linear: MKL splits longer sums between threads, in a way that depends on the number of rows.
WIDE = 512
PADDING = 64  # tokens of a sequence of padding
PROBED = 20_000_000  # weights of the distinct shapes together, beyond which trying costs more than it can save
COUNTERS = (
    "trunk_tokens",
    "padding_tokens",
    "prompt_tokens",
    "prefill_tokens",
    "generated_tokens",
    "head_rows",
    "kv_bytes",
    "host_syncs",
)


@cache
def row_multiple(shapes: frozenset[tuple[int, int]], dtype: torch.dtype, threads: int) -> int:
    """The smallest number such that this CPU rounds every row of a GEMM alike, be it one of any multiple of it up to
    BLOCK rows; BLOCK if no smaller one does, or if finding out would take long.

    shapes: (in, out) of the GEMMs' weights. The library decides by the CPU, the shapes and the threads, so it is tried:
    with one thread of AVX2, for example, 4 rows and more are all alike. Rows of a few requests then cost a few rows.
    """
    if sum(a * b for a, b in shapes) > PROBED:
        return BLOCK
    g = torch.Generator().manual_seed(0)
    different: set[int] = set()
    for width, out in sorted(shapes):
        x, weight = (torch.randn(n, width, generator=g).to(dtype) for n in (BLOCK, out))
        whole = F.linear(x, weight)
        for n in range(4, BLOCK, 4):
            for part in (slice(0, n), slice(BLOCK - n, BLOCK)):
                if not torch.equal(F.linear(x[part], weight), whole[part]):
                    different.add(n)
    return next(m for m in (4, 8, 16, BLOCK) if not different & set(range(m, BLOCK, m)))


class Trunk:
    """The engine's view of the model. deterministic: on a CPU a GEMM's rows do not depend on their number; on a GPU,
    whose library may choose another kernel for another shape, passes have one shape."""

    def __init__(self, model: Model, deterministic: bool, max_tokens: int) -> None:
        """max_tokens: of one pass over packed prompts."""
        self.model, self.device, self.deterministic = model, model.device, deterministic
        self.max_tokens = max_tokens
        # Where there are kernels for it, which know no windows over several stretches; on a CPU a token's bits then
        # depend on where its context was cut.
        kernels = not deterministic if self.device.type == "cpu" else choose(self.device.type, model.dtype) != "sdpa"
        self.chained = kernels and model.config.max_window is None
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._multiple = BLOCK
        if deterministic and self.device.type == "cpu":
            weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
            weights += [model.lm_head_weight] if model.head == "lm" else []  # a scalar head is no GEMM
            pieces = {(size, w.shape[0]) for w in weights for size in (min(w.shape[1], WIDE), w.shape[1] % WIDE)}
            shapes = frozenset(shape for shape in pieces if shape[0])
            self._multiple = row_multiple(shapes, model.dtype, torch.get_num_threads())

    def rows(self, count: int) -> int:
        """Rows that a GEMM on `count` rows is padded to."""
        if not self.deterministic:
            return count
        if self.device.type == "cuda":
            return round_up(count, self.max_tokens)
        return round_up(max(count, 1), self._multiple if count < BLOCK else BLOCK)

    def tensor(self, values: Sequence[int]) -> Tensor:
        """int64 tensor on the model's device."""
        return to_device(values, torch.int64, self.device)

    def packed(
        self, token_ids: Sequence[Sequence[int]], contexts: Sequence[list[Tensor]], store: Store | None = None
    ) -> Tensor:
        """Hidden states [T, H] of packed sequences, each after its chain of cached keys and values."""
        lens = [len(tokens) for tokens in token_ids]
        total = sum(lens)
        padding = self.rows(total) - total
        flat = [token for tokens in token_ids for token in tokens] + [0] * padding
        positions: list[int] = []
        for context, n in zip(contexts, lens, strict=True):
            before = sum(kv.shape[3] for kv in context)
            positions += range(before, before + n)
        # Many short sequences of padding: one long one would cost its square.
        fill = [PADDING] * (padding // PADDING) + [padding % PADDING]
        config, cu = self.model.config, segments([*lens, *fill], self.device).cu
        if self.device.type == "cuda" and not any(contexts):
            plain = packed_causal(config, [*lens, *fill], cu, self.model.head_weight)
            attend = plain if store is None else StoringAttend(plain, lambda i, k, v: store(i, k[:total], v[:total]))
        elif self.chained:
            attend = ChainAttend(lens, contexts, fill, store=store, device=self.device)
        else:
            attend = ContextAttend(config, lens, contexts, store=store, device=self.device)
        hidden = self.model.hidden(self.tensor(flat), self.tensor(positions + [0] * padding), cu, attend=attend)
        self.counters["trunk_tokens"] += total
        self.counters["padding_tokens"] += padding
        return hidden[:total]

    def collect(
        self, token_ids: Sequence[Sequence[int]], contexts: Sequence[list[Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """As `packed`, with each sequence's keys and values `(layers, 2, Hkv, n, D)`."""
        kept: list[Tensor] = []
        hidden = self.packed(token_ids, contexts, lambda layer, k, v: kept.append(torch.stack((k, v))))
        kv = torch.stack(kept).transpose(2, 3)
        return hidden, list(kv.split([len(tokens) for tokens in token_ids], dim=3))

    def decode(
        self, tokens: Tensor, positions: Tensor, cache: SlotCache, count: int, rows: int, width: int, cu: Tensor
    ) -> Tensor:
        """Logits [rows, V] after one more token of cache rows 0..count-1; GEMMs have `rows` >= count rows."""
        attend = DecodeAttend(self.model.config, cache, positions[:count], width)
        return self._head(self.model.hidden(tokens[:rows], positions[:rows], cu[: rows + 1], attend=attend))

    def padded(self, hidden: Tensor) -> Tensor:
        """Rows for the head, filled up with zeros."""
        self.counters["head_rows"] += hidden.shape[0]
        rows = self.rows(hidden.shape[0]) if self.device.type == "cpu" else hidden.shape[0]
        return F.pad(hidden, (0, 0, 0, rows - hidden.shape[0]))

    def logits(self, hidden: Tensor, most: int) -> Tensor:
        """[N, H] -> [N, V]; N <= most."""
        rows = self.padded(hidden)
        if self.deterministic and self.device.type == "cuda":
            rows = F.pad(rows, (0, 0, 0, most - rows.shape[0]))
        return self._head(rows)[: hidden.shape[0]]

    def _head(self, hidden: Tensor) -> Tensor:
        weight = self.model.lm_head_weight
        if self.device.type != "cpu" or hidden.shape[1] <= WIDE:
            return F.linear(hidden, weight)
        return sum(F.linear(h, w) for h, w in zip(hidden.split(WIDE, 1), weight.split(WIDE, 1), strict=True))

    def last(self, hidden: Tensor, lens: Sequence[int], prefixes: Sequence[Prefix | None]) -> Tensor:
        """Hidden state [S, H] that predicts the token after each packed sequence; an empty one ends with its prefix."""
        last = hidden[(self.tensor(lens).cumsum(0) - 1).clamp_min(0)]
        for i, (n, prefix) in enumerate(zip(lens, prefixes, strict=True)):
            if n == 0:
                last[i] = prefix.last_hidden
        return last
