"""Decode attention over a paged cache, split over tokens: of each sequence to its own keys, of many to a common prefix.

One program per sequence (or tile of sequences that share a prefix), kv head and split; the query heads of a group, of
one sequence or of all in the tile, are the rows of its dot products. A split is a fixed number of tokens, whatever the
batch, and splits are merged in order, so a sequence's result depends on it alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # tl.dot's smallest row count
TILE_ROWS = 128  # its largest here: more would not stay in registers
BLOCK = 64  # tokens of one step
SPLIT = 512  # tokens of one program
EMPTY = tl.constexpr(-1e30)  # the maximum of no score: finite, so that an empty split yields no NaN


@triton.jit
def _attend(
    q, k_pages, v_pages, table, first, begin, end, scale, head_size,
    k_page, k_token, k_column, v_page, v_token, v_column, table_column,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Attention of q [ROWS, HEAD] to the keys begin <= p < end of one head, without those before `first` (or None):
    numerator [ROWS, HEAD], maximum [ROWS], denominator [ROWS]."""
    real = tl.arange(0, HEAD) < head_size
    column = tl.arange(0, HEAD)[None, :]
    top = tl.full([ROWS], EMPTY, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    for block in range(begin, end, BLOCK):
        token = block + tl.arange(0, BLOCK)
        inside = token < end
        if first is not None:
            inside = inside & (token >= first)
        page = tl.load(table + token // PAGE * table_column, mask=inside, other=0).to(tl.int64)
        page = tl.maximum(page, 0)
        loaded = inside[:, None] & real[None, :]
        k_at = page * k_page + token % PAGE * k_token
        k = tl.load(k_pages + k_at[:, None] + column * k_column, mask=loaded, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        # Natural logarithms: base 2 would round large scores once more, and the memory is what takes the time.
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - new_top[:, None])
        keep = tl.exp(top - new_top)
        v_at = page * v_page + token % PAGE * v_token
        v = tl.load(v_pages + v_at[:, None] + column * v_column, mask=loaded, other=0.0)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * keep + tl.sum(p, 1)
        top = new_top
    return acc, top, total


@triton.jit
def _merged(acc_in, max_in, sum_in, row, splits, begin, end, head_size, HEAD: tl.constexpr):
    """One head's partial results of the splits from `begin` to `end`, merged in order: out [HEAD] and its log-sum-exp
    [1], fp32."""
    column = tl.arange(0, HEAD)
    acc = tl.zeros([HEAD], tl.float32)
    total = tl.zeros([1], tl.float32)
    top = tl.full([1], EMPTY, tl.float32)
    for split in range(begin, end):
        at = row * splits + split + tl.zeros([1], tl.int64)
        their_top = tl.load(max_in + at)
        new_top = tl.maximum(top, their_top)
        ours, theirs = tl.exp(top - new_top), tl.exp(their_top - new_top)
        total = total * ours + tl.load(sum_in + at) * theirs
        acc = acc * ours + tl.load(acc_in + at * head_size + column, mask=column < head_size, other=0.0) * theirs
        top = new_top
    some = tl.where(total == 0, 1.0, total)  # a sequence without keys: output 0, lse -inf; a NaN stays one
    return acc / some, tl.where(total == 0, float("-inf"), top + tl.log(some))


@triton.jit
def _clamped(position, limit):
    """A position of any integer type as an int32 between 0 and limit."""
    return tl.maximum(tl.minimum(position, limit), 0).to(tl.int32)


@triton.jit(do_not_specialize=["table_width"])
def _partial(
    query, k_pages, v_pages, table, starts, lengths, acc_out, max_out, sum_out, scale, table_width, head_size,
    q_sequence, q_head, q_column, k_page, k_head, k_token, k_column, v_page, v_head, v_token, v_column,
    table_row, table_column, start_stride, length_stride,
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Attention of one sequence's query heads of one kv head to the keys of one split: numerator, maximum, denominator.

    query [B, Hq, D]; k_pages, v_pages [pages, Hkv, PAGE, D]; table [B, table_width]; starts [B] or None; lengths [B];
    results fp32, [B, Hq, splits, D] or [B, Hq, splits], written for the splits that hold keys which may count.
    """
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.minimum(tl.load(lengths + sequence * length_stride), table_width * PAGE).to(tl.int32)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    rows, column = tl.arange(0, ROWS), tl.arange(0, HEAD)
    used = rows < tl.where(begin < length, GROUP, 0)
    first = None
    if starts is not None:
        first = _clamped(tl.load(starts + sequence * start_stride), table_width * PAGE)
        used = used & (rows < tl.where(first < begin + SPLIT, GROUP, 0))
        begin += tl.maximum(first - begin, 0) // BLOCK * BLOCK  # whole blocks, which keeps to the borders of pages
    tile = used[:, None] & (column < head_size)[None, :]
    heads = head * GROUP + rows
    q = tl.load(
        query + sequence * q_sequence + heads[:, None] * q_head + column[None, :] * q_column, mask=tile, other=0.0
    )
    acc, top, total = _attend(
        q, k_pages + head * k_head, v_pages + head * v_head, table + sequence * table_row, first, begin, end, scale,
        head_size, k_page, k_token, k_column, v_page, v_token, v_column, table_column, PAGE, BLOCK, ROWS, HEAD,
    )  # fmt: skip
    out = (sequence * tl.num_programs(1) * GROUP + heads) * tl.num_programs(2) + split
    tl.store(acc_out + out[:, None] * head_size + column[None, :], acc, mask=tile)
    tl.store(max_out + out, top, mask=used)
    tl.store(sum_out + out, total, mask=used)


@triton.jit
def _merge_splits(
    acc_in, max_in, sum_in, starts, lengths, out, lse_out, splits, heads, head_size, start_stride, length_stride,
    HEAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Merge one head's partial results of the splits that were written, in order, into out [D] and its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HEAD)
    begin = 0
    if starts is not None:
        begin = _clamped(tl.load(starts + row // heads * start_stride), splits * SPLIT) // SPLIT
    end = tl.cdiv(_clamped(tl.load(lengths + row // heads * length_stride), splits * SPLIT), SPLIT)
    value, lse = _merged(acc_in, max_in, sum_in, row, splits, begin, end, head_size, HEAD)
    tl.store(out + row * head_size + column, value.to(out.dtype.element_ty), mask=column < head_size)
    tl.store(lse_out + row + tl.zeros([1], tl.int64), lse)


def _check_precision(op: str, query: Tensor) -> None:
    if query.dtype == torch.float64:
        raise ValueError(f"{op}: backend 'triton' keeps fp32 statistics; take 'chunked' for float64")


def paged_attention(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float,
    starts: Tensor | None = None, *, split: int = SPLIT, warps: int = 4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, D], lse [B, Hq] fp32); arguments as cai_fast.kernels.paged_attention's."""
    _check_precision("paged_attention", query)
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
    start_stride = 0 if starts is None else starts.stride(0)
    _partial[(batch, kv_heads, splits)](
        query, k_pages, v_pages, block_table, starts, seq_lens, acc, top, total, scale, block_table.shape[1], size,
        *query.stride(), *k_pages.stride(), *v_pages.stride(), *block_table.stride(), start_stride, seq_lens.stride(0),
        GROUP=group, HEAD=head, PAGE=page, BLOCK=BLOCK, SPLIT=split,
        ROWS=max(ROWS, triton.next_power_of_2(group)), num_warps=warps,
    )  # fmt: skip
    _merge_splits[(batch * q_heads,)](
        acc,
        top,
        total,
        starts,
        seq_lens,
        out,
        lse,
        splits,
        q_heads,
        size,
        start_stride,
        seq_lens.stride(0),
        HEAD=head,
        SPLIT=split,
        num_warps=1,
    )
    return out, lse


@triton.jit
def _prefix_length(tile_group, lengths, tile, group_stride, length_stride, keys):
    """(group, its number of keys) of a tile; an unused tile has group -1 and no keys."""
    group = tl.load(tile_group + tile * group_stride).to(tl.int64)
    length = tl.load(lengths + group * length_stride, mask=group >= 0, other=0)
    return group, _clamped(length, keys)


@triton.jit(do_not_specialize=["keys"])
def _shared_partial(
    query, k_pages, v_pages, tables, lengths, tile_group, tile_rows, acc_out, max_out, sum_out, scale, keys, head_size,
    q_row, q_head, q_column, k_page, k_head, k_token, k_column, v_page, v_head, v_token, v_column,
    table_row, table_column, length_stride, group_stride, tile_stride, member_stride,
    TILE: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Attention of (a part of) a tile's query heads of one kv head to the keys of one split of the tile's prefix.

    query [B, Hq, D]; k_pages, v_pages [pages, Hkv, PAGE, D]; tables [G, keys / PAGE]; lengths [G]; tile_group [N];
    tile_rows [N, TILE]; results fp32, [N, TILE, Hq, splits, D] or [N, TILE, Hq, splits], written where they count.
    """
    block, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    tile = block // PARTS
    group, length = _prefix_length(tile_group, lengths, tile, group_stride, length_stride, keys)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    lane, column = block % PARTS * ROWS + tl.arange(0, ROWS), tl.arange(0, HEAD)
    member, heads = lane // GROUP, head * GROUP + lane % GROUP
    members = tl.where(begin < length, TILE, 0)
    at = tile_rows + tile * tile_stride + member * member_stride
    row = tl.load(at, mask=member < members, other=-1).to(tl.int64)
    used = row >= 0
    mask = used[:, None] & (column < head_size)[None, :]
    q_at = row * q_row + heads * q_head
    q = tl.load(query + q_at[:, None] + column[None, :] * q_column, mask=mask, other=0.0)
    acc, top, total = _attend(
        q, k_pages + head * k_head, v_pages + head * v_head, tables + group * table_row, None, begin, end, scale,
        head_size, k_page, k_token, k_column, v_page, v_token, v_column, table_column, PAGE, BLOCK, ROWS, HEAD,
    )  # fmt: skip
    out = ((tile * TILE + member) * tl.num_programs(1) * GROUP + heads) * tl.num_programs(2) + split
    tl.store(acc_out + out[:, None] * head_size + column[None, :], acc, mask=mask)
    tl.store(max_out + out, top, mask=used)
    tl.store(sum_out + out, total, mask=used)


@triton.jit(do_not_specialize=["keys"])
def _merge_tiles(
    acc_in, max_in, sum_in, lengths, tile_group, tile_rows, out, lse_out, splits, keys, heads, head_size,
    length_stride, group_stride, tile_stride, member_stride,
    TILE: tl.constexpr, HEAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one head of one of a tile's rows, in order, into that row's out [Hq, D] and lse [Hq]."""
    program = tl.program_id(0).to(tl.int64)
    slot, head = program // heads, program % heads
    tile, column = slot // TILE, tl.arange(0, HEAD)
    group, length = _prefix_length(tile_group, lengths, tile, group_stride, length_stride, keys)
    row = tl.load(tile_rows + tile * tile_stride + slot % TILE * member_stride).to(tl.int64)
    if (row >= 0) & (length > 0):
        end = (length + SPLIT - 1) // SPLIT
        value, lse = _merged(acc_in, max_in, sum_in, program, splits, 0, end, head_size, HEAD)
        target = row * heads + head
        tl.store(out + target * head_size + column, value.to(out.dtype.element_ty), mask=column < head_size)
        tl.store(lse_out + target + tl.zeros([1], tl.int64), lse)


def shared_attention(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, lengths: Tensor, tile_group: Tensor,
    tile_rows: Tensor, scale: float, *, split: int = SPLIT,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, D], lse [B, Hq] fp32); arguments as cai_fast.kernels.shared_attention's."""
    _check_precision("shared_attention", query)
    _, q_heads, size = query.shape
    (tiles, tile), (kv_heads, page) = tile_rows.shape, k_pages.shape[1:3]
    group, head, keys = q_heads // kv_heads, max(16, triton.next_power_of_2(size)), tables.shape[1] * page
    splits = triton.cdiv(keys, split)
    # What no tile holds stays so.
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device).zero_()
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device).fill_(-torch.inf)
    if lse.numel() * tile_rows.numel() * splits == 0:
        return out, lse
    acc = torch.empty(tiles, tile, q_heads, splits, size, dtype=torch.float32, device=query.device)
    top, total = torch.empty(2, tiles, tile, q_heads, splits, dtype=torch.float32, device=query.device)
    most = ROWS if query.dtype == torch.float32 else TILE_ROWS  # exact fp32 products take many more registers
    rows = min(most, max(ROWS, triton.next_power_of_2(tile * group)))
    parts = triton.cdiv(tile * group, rows)
    strides = (lengths.stride(0), tile_group.stride(0), *tile_rows.stride())
    _shared_partial[(tiles * parts, kv_heads, splits)](
        query, k_pages, v_pages, tables, lengths, tile_group, tile_rows, acc, top, total, scale, keys, size,
        *query.stride(), *k_pages.stride(), *v_pages.stride(), *tables.stride(), *strides,
        TILE=tile, PARTS=parts, GROUP=group, HEAD=head, PAGE=page, BLOCK=BLOCK, SPLIT=split, ROWS=rows,
        num_warps=4 if rows < TILE_ROWS else 8,
    )  # fmt: skip
    _merge_tiles[(tiles * tile * q_heads,)](
        acc, top, total, lengths, tile_group, tile_rows, out, lse, splits, keys, q_heads, size, *strides,
        TILE=tile, HEAD=head, SPLIT=split, num_warps=1,
    )  # fmt: skip
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
