"""Causal attention over packed sequences: the backends, chosen once by what the machine can do.

T packed tokens, Hq query heads, Hkv key-value heads (Hq a multiple of Hkv), D head size.
`flash_attn` (package) and `varlen` (torch.nn.attention.varlen) need CUDA and 16-bit tensors; `sdpa` runs anywhere.
`CAI_ATTN=flash_attn|varlen|sdpa` overrides the choice.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cai_fast.errors import InputError
from cai_fast.model.config import ModelConfig

log = logging.getLogger(__name__)

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
BACKENDS = ("flash_attn", "varlen", "sdpa")
# Sequences up to SHORT tokens are padded to a multiple of BUCKET and share one SDPA call with others of that length.
# The padded length depends on the sequence alone, never on its neighbours, and so do its bits.
SHORT, BUCKET = 256, 16


def available(device_type: str, dtype: torch.dtype) -> list[str]:
    """Backends usable for tensors of this kind, best first."""
    found = []
    if device_type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        if importlib.util.find_spec("flash_attn") is not None:
            found.append("flash_attn")
        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
            found.append("varlen")
    return [*found, "sdpa"]


@functools.cache
def choose(device_type: str, dtype: torch.dtype) -> str:
    """The backend for this device and dtype: the best available one, or the one `CAI_ATTN` names. Logged once."""
    found = available(device_type, dtype)
    wanted = os.environ.get("CAI_ATTN", "")
    if wanted and wanted not in found:
        raise InputError(f"CAI_ATTN={wanted}: not usable for {dtype} on {device_type}; usable here: {', '.join(found)}")
    name = wanted or found[0]
    log.info("attention: %s (%s, %s; usable: %s)", name, device_type, dtype, ", ".join(found))
    return name


def packed_causal(config: ModelConfig, lens: Sequence[int], cu_seqlens: Tensor, like: Tensor) -> Attend:
    """Attention in which each of the packed sequences sees only itself, causally.

    lens: tokens of each sequence, on the host; cu_seqlens [S+1] int32 on the device (not read by `sdpa`);
    like: any tensor with the device and dtype of the queries. Build it once a forward; all layers share it.
    """
    name = choose(like.device.type, like.dtype)
    if name == "sdpa":
        return _Sdpa(config, lens, like.device)
    return _Varlen(config, name, cu_seqlens, max(lens))


@functools.cache
def _grouping(grouped: bool) -> dict[str, bool]:
    """Arguments for grouped heads: from torch 2.12 on they must be asked for; 2.11 has no such argument, needs none."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class _Varlen:
    """flash_attn's or torch's variable-length kernel."""

    def __init__(self, config: ModelConfig, name: str, cu_seqlens: Tensor, max_len: int) -> None:
        self.config, self.cu, self.max_len = config, cu_seqlens.to(torch.int32), max_len
        if name == "flash_attn":
            from flash_attn import flash_attn_varlen_func

            self.kernel, self.extra = flash_attn_varlen_func, {"causal": True}
            return
        from torch.nn.attention.varlen import varlen_attn

        self.kernel, self.extra = varlen_attn, _grouping(config.num_heads != config.num_kv_heads)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.config.window(layer)
        # A tuple, not a list: torch compares it with (-1, 0) to recognise plain causal attention.
        left = -1 if window is None else window - 1
        cu, longest = self.cu, self.max_len
        return self.kernel(q, k, v, cu, cu, longest, longest, window_size=(left, 0), **self.extra)


@dataclass(frozen=True)
class Segments:
    """Lengths of packed segments on the host, and where they begin, [S+1] int32, on the device."""

    lens: list[int]
    cu: Tensor

    @cached_property
    def padded(self) -> _Padded:
        """Where they lie when those of about the same length are padded to it."""
        return _Padded(self.lens, self.cu.device)


def segments(lens: Sequence[int], device: torch.device) -> Segments:
    """Segments of these lengths."""
    cu = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Segments(list(lens), cu if device.type == "cpu" else cu.pin_memory().to(device, non_blocking=True))


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of packed query segments q [T, Hq, D], each to its segment of k and v [K, Hkv, D]; no gradient.

    Returns out [T, Hq, D] and the log-sum-exp [T, Hq] fp32 of the scaled scores, by which parts can be merged. causal:
    query i of a segment sees keys 0..i (segments of equal length). No key segment is empty.
    """
    name = choose(q.device.type, q.dtype)
    if name == "sdpa":
        return _causal_lse(q, k, v, q_segments) if causal else _lse_by_segment(q, k, v, q_segments, k_segments)
    cu, longest = (q_segments.cu, k_segments.cu), (max(q_segments.lens), max(k_segments.lens))
    if name == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        out, lse, _ = flash_attn_varlen_func(q, k, v, *cu, *longest, causal=causal, return_attn_probs=True)
        return out, lse.transpose(0, 1)
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    extra = _grouping(q.shape[1] != k.shape[1])
    window = (-1, 0) if causal else (-1, -1)
    out, lse = varlen_attn(q, k, v, *cu, *longest, return_aux=AuxRequest(lse=True), window_size=window, **extra)
    return out, lse.transpose(0, 1)  # [Hq, T], whatever its documentation says


def _causal_lse(q: Tensor, k: Tensor, v: Tensor, own: Segments) -> tuple[Tensor, Tensor]:
    """Causal attention of CPU tensors, one call for all segments of a padded length."""
    layout, outs, lses = own.padded, [], []
    sizes = [count * size for count, size in layout.groups]
    scattered = [x.new_zeros(layout.rows, *x.shape[1:]).index_copy_(0, layout.index, x).split(sizes) for x in (q, k, v)]
    for (count, size), *qkv in zip(layout.groups, *scattered, strict=True):
        out, lse = sdpa_lse(*(x.unflatten(0, (count, size)).transpose(1, 2) for x in qkv), causal=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, layout.index), torch.cat(lses).index_select(0, layout.index)


def _lse_by_segment(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> tuple[Tensor, Tensor]:
    """Attention of CPU tensors, one call a segment."""
    parts = zip(*(x.split(n) for x, n in ((q, queries.lens), (k, keys.lens), (v, keys.lens))), strict=True)
    done = [sdpa_lse(*(x.transpose(0, 1)[None] for x in part), causal=False) for part in parts]
    return torch.cat([out[0].transpose(0, 1) for out, _ in done]), torch.cat([lse[0].T for _, lse in done])


def sdpa_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """CPU: q [n, Hq, L, D], k and v [n, Hkv, K, D], mask [n, 1, 1, K] -> (out [n, Hq, L, D], lse [n, Hq, L])."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)


class _Padded:
    """Packed sequences by padded length: `groups` (count, size), and the row `index [T]` of each token there."""

    def __init__(self, lens: Sequence[int], device: torch.device) -> None:
        padded = [-(-n // BUCKET) * BUCKET if n <= SHORT else n for n in lens]
        order = sorted(range(len(lens)), key=padded.__getitem__)
        starts, total = [0] * len(lens), 0
        groups: dict[int, int] = {}  # padded length -> sequences
        for i in order:
            starts[i] = total
            total += padded[i]
            groups[padded[i]] = groups.get(padded[i], 0) + 1
        self.rows, self.groups = total, [(count, size) for size, count in groups.items() if size]
        lengths = torch.tensor(lens)
        shift = torch.tensor(starts) - (lengths.cumsum(0) - lengths)
        index = torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()))
        self.index = index.to(device)


class _Sdpa:
    """Scaled dot-product attention on sequences grouped by padded length.

    Right padding is invisible to the real rows of a causal attention, its rows are zeros (so that not even a NaN of
    another sequence can enter), and its results are dropped.
    """

    def __init__(self, config: ModelConfig, lens: Sequence[int], device: torch.device) -> None:
        self.config = config
        layout = _Padded(lens, device)
        self.rows, self.groups, self.index = layout.rows, layout.groups, layout.index
        self.masks: dict[tuple[int, int], Tensor] = {}

    def _mask(self, size: int, window: int, device: torch.device) -> Tensor:
        if (size, window) not in self.masks:
            row = torch.arange(size, device=device)
            back = row[:, None] - row[None, :]
            self.masks[size, window] = (back >= 0) & (back < window)
        return self.masks[size, window]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, grouped = self.config.window(layer), q.shape[1] != k.shape[1]
        sizes = [count * size for count, size in self.groups]
        parts = [_Scatter.apply(x, self.index, self.rows).split(sizes) for x in (q, k, v)]
        outs = []
        for (count, size), *qkv in zip(self.groups, *parts, strict=True):
            qs, ks, vs = (x.unflatten(0, (count, size)).transpose(1, 2) for x in qkv)  # [count, heads, size, D]
            banded = window is not None and size > window
            mask = self._mask(size, window, q.device) if banded else None
            out = F.scaled_dot_product_attention(qs, ks, vs, mask, is_causal=not banded, enable_gqa=grouped)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return _Gather.apply(torch.cat(outs) if len(outs) > 1 else outs[0], self.index)


class _Scatter(torch.autograd.Function):
    """Rows to distinct places among zeros. Autograd's own gather backward adds row by row, many times slower."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


class _Gather(torch.autograd.Function):
    """The inverse of _Scatter: distinct rows of x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None
