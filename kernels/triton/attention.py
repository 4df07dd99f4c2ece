"""Decode attention over a paged cache, split over tokens.

One program per sequence, kv head and split; the query heads of a group are the rows of its dot products. A split is a
fixed number of tokens, whatever the batch, and splits are merged in order, so a sequence's result depends on it alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # tl.dot's smallest row count
BLOCK = 64  # tokens of one step
SPLIT = 512  # tokens of one program
EMPTY = tl.constexpr(-1e30)  # the maximum of no score: finite, so that an empty split yields no NaN


@triton.jit(do_not_specialize=["table_width"])
def _partial(
    query, k_pages, v_pages, table, lengths, acc_out, max_out, sum_out, scale, table_width, head_size,
    q_sequence, q_head, q_column, k_page, k_head, k_token, k_column, v_page, v_head, v_token, v_column,
    table_row, table_column, length_stride,
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Attention of one sequence's query heads of one kv head to the keys of one split: numerator, maximum, denominator.

    query [B, Hq, D]; k_pages, v_pages [pages, Hkv, PAGE, D]; table [B, table_width]; lengths [B]; results fp32,
    [B, Hq, splits, D] or [B, Hq, splits].
    """
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.minimum(tl.load(lengths + sequence * length_stride), table_width * PAGE).to(tl.int32)
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, length)
    rows, column = tl.arange(0, ROWS), tl.arange(0, HEAD)
    used = rows < GROUP
    real = column < head_size
    tile = used[:, None] & real[None, :]
    heads = head * GROUP + rows
    q = tl.load(
        query + sequence * q_sequence + heads[:, None] * q_head + column[None, :] * q_column, mask=tile, other=0.0
    )
    top = tl.full([ROWS], EMPTY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = token < end
        page = tl.load(table + sequence * table_row + token // PAGE * table_column, mask=inside, other=0).to(tl.int64)
        page = tl.maximum(page, 0)
        loaded = inside[:, None] & real[None, :]
        k_at = page * k_page + head * k_head + token % PAGE * k_token
        k = tl.load(k_pages + k_at[:, None] + column[None, :] * k_column, mask=loaded, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        # Natural logarithms: base 2 would round large scores once more, and the memory is what takes the time.
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - new_top[:, None])
        keep = tl.exp(top - new_top)
        v_at = page * v_page + head * v_head + token % PAGE * v_token
        v = tl.load(v_pages + v_at[:, None] + column[None, :] * v_column, mask=loaded, other=0.0)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * keep + tl.sum(p, 1)
        top = new_top
    out = (sequence * tl.num_programs(1) * GROUP + heads) * tl.num_programs(2) + split
    tl.store(acc_out + out[:, None] * head_size + column[None, :], acc, mask=tile)
    tl.store(max_out + out, top, mask=used)
    tl.store(sum_out + out, total, mask=used)


@triton.jit
def _merge_splits(acc_in, max_in, sum_in, out, lse_out, splits, head_size, HEAD: tl.constexpr):
    """Merge one head's partial results of all splits, in order, into out [D] and its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HEAD)
    real = column < head_size
    acc = tl.zeros([HEAD], tl.float32)
    total = tl.zeros([1], tl.float32)
    top = tl.full([1], EMPTY, tl.float32)
    for split in range(splits):
        at = row * splits + split + tl.zeros([1], tl.int64)
        their_top = tl.load(max_in + at)
        new_top = tl.maximum(top, their_top)
        ours, theirs = tl.exp(top - new_top), tl.exp(their_top - new_top)
        total = total * ours + tl.load(sum_in + at) * theirs
        acc = acc * ours + tl.load(acc_in + at * head_size + column, mask=real, other=0.0) * theirs
        top = new_top
    some = tl.where(total == 0, 1.0, total)  # a sequence without keys: output 0, lse -inf; a NaN stays one
    tl.store(out + row * head_size + column, (acc / some).to(out.dtype.element_ty), mask=real)
    lse = tl.where(total == 0, float("-inf"), top + tl.log(some))
    tl.store(lse_out + row + tl.zeros([1], tl.int64), lse)


def paged_attention(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float, *,
    split: int = SPLIT, warps: int = 4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, D], lse [B, Hq] fp32); arguments as cai_fast.kernels.paged_attention's."""
    if query.dtype == torch.float64:
        raise ValueError("paged_attention: backend 'triton' keeps fp32 statistics; take 'chunked' for float64")
    batch, q_heads, size = query.shape
    kv_heads, page = k_pages.shape[1:3]
    group, head = q_heads // kv_heads, max(16, triton.next_power_of_2(size))
    splits = max(1, triton.cdiv(block_table.shape[1] * page, split))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    acc = torch.empty(batch, q_heads, splits, size, dtype=torch.float32, device=query.device)
    top, total = torch.empty(2, batch, q_heads, splits, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, q_heads, dtype=torch.float32, device=query.device)
    if lse.numel() == 0:
        return out, lse
    _partial[(batch, kv_heads, splits)](
        query, k_pages, v_pages, block_table, seq_lens, acc, top, total, scale, block_table.shape[1], size,
        *query.stride(), *k_pages.stride(), *v_pages.stride(), *block_table.stride(), seq_lens.stride(0),
        GROUP=group, HEAD=head, PAGE=page, BLOCK=BLOCK, SPLIT=split,
        ROWS=max(ROWS, triton.next_power_of_2(group)), num_warps=warps,
    )  # fmt: skip
    _merge_splits[(batch * q_heads,)](acc, top, total, out, lse, splits, size, HEAD=head, num_warps=1)
    return out, lse


@triton.jit
def _merge_two(out1, lse1, out2, lse2, out, lse_out, rows, size, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Merge ROWS heads of two attentions (out [rows, size], lse [rows]) over disjoint keys."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HEAD)
    inside = row < rows
    a, b = (
        tl.load(lse1 + row, mask=inside, other=0.0).to(tl.float32),
        tl.load(lse2 + row, mask=inside, other=0.0).to(tl.float32),
    )
    top = tl.maximum(a, b)
    finite = tl.where(top == float("-inf"), 0.0, top)
    ours, theirs = tl.exp(a - finite), tl.exp(b - finite)
    total = ours + theirs
    total = tl.where(total == 0, 1.0, total)  # at least 1 unless neither has keys
    at = row[:, None] * size + column[None, :]
    mask = inside[:, None] & (column < size)[None, :]
    first = tl.load(out1 + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(out2 + at, mask=mask, other=0.0).to(tl.float32)
    merged = first * (ours / total)[:, None] + second * (theirs / total)[:, None]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=mask)
    tl.store(lse_out + row, tl.where(top == float("-inf"), top, finite + tl.log(total)), mask=inside)


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """(out [..., D], lse [...] fp32) over both key sets; arguments as cai_fast.kernels.merge_attention's."""
    out1, lse1, out2, lse2 = (x.contiguous() for x in (out1, lse1, out2, lse2))
    out, lse = torch.empty_like(out1), torch.empty(lse1.shape, dtype=torch.float32, device=lse1.device)
    rows, size = lse1.numel(), out1.shape[-1]
    if rows:
        _merge_two[(triton.cdiv(rows, 16),)](
            out1, lse1, out2, lse2, out, lse, rows, size, ROWS=16, HEAD=triton.next_power_of_2(size)
        )
    return out, lse
