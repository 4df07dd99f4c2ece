"""A Triton paged decode attention, only to measure what bandwidth such a kernel reaches (engine.md, question 4).

Layout and design are kernels.md (e)'s: cache [page][kv head][token][D], one program per sequence, kv head and split
of a fixed number of tokens, the query heads of a group padded to 16 rows, partial results merged by log-sum-exp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
ROWS = 16  # tl.dot's smallest row count


@triton.jit
def _partial(
    query, k_pages, v_pages, table, lengths, acc_out, max_out, sum_out, scale,
    table_width, kv_heads,
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, length)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, HEAD)
    heads = (sequence * kv_heads + head) * GROUP + rows
    used = (rows < GROUP)[:, None]
    q = tl.load(query + heads[:, None] * HEAD + columns[None, :], mask=used, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that an empty split yields no NaN
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = token < end
        page = tl.load(table + sequence * table_width + token // PAGE, mask=inside, other=0).to(tl.int64)
        offset = ((page * kv_heads + head) * PAGE + token % PAGE) * HEAD
        k = tl.load(k_pages + offset[:, None] + columns[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k)) * scale
        score = tl.where(inside[None, :], score, -1e30)
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.where(inside[None, :], tl.exp2(score - new_top[:, None]), 0.0)
        keep = tl.exp2(top - new_top)
        v = tl.load(v_pages + offset[:, None] + columns[None, :], mask=inside[:, None], other=0.0)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v)
        total = total * keep + tl.sum(p, 1)
        top = new_top
    out = heads * tl.num_programs(2) + split
    tl.store(acc_out + out[:, None] * HEAD + columns[None, :], acc, mask=used)
    tl.store(max_out + out, top, mask=rows < GROUP)
    tl.store(sum_out + out, total, mask=rows < GROUP)


def paged_decode(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, *, split: int, splits: int,
    warps: int = 4,
) -> Tensor:  # fmt: skip
    """kernels.paged_attention's result, [B, Hq, D]; splits x split tokens must cover the longest sequence."""
    batch, q_heads, size = query.shape
    kv_heads, page = k_pages.shape[1:3]
    partial = query.new_empty(batch, q_heads, splits, size, dtype=torch.float32)
    top, total = (query.new_empty(batch, q_heads, splits, dtype=torch.float32) for _ in range(2))
    _partial[(batch, kv_heads, splits)](
        query, k_pages, v_pages, table, lengths, partial, top, total, size**-0.5 * LOG2E,
        table.shape[1], kv_heads,
        GROUP=q_heads // kv_heads, HEAD=size, PAGE=page, BLOCK=64, SPLIT=split, ROWS=ROWS, num_warps=warps,
    )  # fmt: skip
    share = torch.exp2(top - top.amax(-1, keepdim=True))
    return ((partial * share[..., None]).sum(2) / (total * share).sum(-1, keepdim=True)).to(query.dtype)
