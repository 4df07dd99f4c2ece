"""Decode attention over a paged cache: of each sequence to its own keys, of many sequences to the pages of a common
prefix, and the merge of two attentions over disjoint keys.

Sequences that share a prefix read its keys once for all of them: `shared_attention` to the prefix's pages,
`paged_attention` from `starts` on to their own, then `merge_attention` (Hydragen, arXiv 2402.05099; cascade inference,
flashinfer.ai/2024/02/02/cascade-inference.html).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .common import accumulate_dtype, check_tensor, lazy_triton, select


def _dense_reference(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, scale: float, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """query [B, Hq, D], keys and values [B, Hkv, L, D] -> (out [B, Hq, D], lse [B, Hq])."""
    group = query.shape[1] // keys.shape[1]
    firsts = [0] * len(query) if starts is None else starts.clamp_min(0).tolist()
    outs, lses = [], []
    for q, k, v, first, length in zip(query, keys, values, firsts, seq_lens.tolist(), strict=True):
        score = torch.einsum("hd,hld->hl", q, k[:, first:length].repeat_interleave(group, 0)) * scale
        probability = torch.nan_to_num(score.softmax(-1))
        outs.append(torch.einsum("hl,hld->hd", probability, v[:, first:length].repeat_interleave(group, 0)))
        lses.append(score.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


def _dense_chunked(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, scale: float, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    grouped = query.unflatten(1, (keys.shape[1], -1))
    score = (grouped @ keys.transpose(-1, -2)).mul_(scale)
    position = torch.arange(keys.shape[2], device=query.device)
    absent = position >= seq_lens[:, None]
    if starts is not None:
        absent |= position < starts[:, None]
    score.masked_fill_(absent[:, None, None], -torch.inf)
    lse = score.logsumexp(-1)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)  # an empty sequence attends to nothing: output 0
    # What lies outside a sequence's keys may be anything, NaN included, and 0 x NaN is NaN.
    values = values.masked_fill(absent[:, None, :, None], 0.0)
    out = score.sub_(finite[..., None]).exp_() @ values
    return out.flatten(1, 2), lse.flatten(1, 2)


def _gathered(dense: Callable) -> Callable:
    """`dense` attention over the pages gathered into one tensor per sequence."""

    def attention(
        query: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        scale: float,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(query.dtype)
        table = block_table.clamp_min(0).long()
        gathered = (pages[table].transpose(1, 2).flatten(2, 3) for pages in (k_pages, v_pages))
        # Of pages of one token `flatten` makes a view, and a product's bits would depend on the number of sequences.
        keys, values = (x.contiguous().to(dtype) for x in gathered)
        out, lse = dense(query.to(dtype), keys, values, seq_lens, scale, starts)
        return out.to(query.dtype), lse

    return attention


_IMPLEMENTATIONS = {
    "reference": _gathered(_dense_reference),
    "chunked": _gathered(_dense_chunked),
    "triton": lazy_triton("attention", "paged_attention"),
}


def _check_pages(op: str, query: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    for name, value in (("query", query), ("k_pages", k_pages), ("v_pages", v_pages)):
        check_tensor(op, name, value)
    shapes = query.shape, k_pages.shape, v_pages.shape
    matching = query.dim() == 3 and k_pages.dim() == 4 and k_pages.shape == v_pages.shape
    if not matching or query.shape[1] % k_pages.shape[1] or query.shape[2] != k_pages.shape[3]:
        raise ValueError(
            f"{op}: expected query [B, Hq, D] and pages [pages, Hkv, page_size, D], got "
            f"{', '.join(str(list(shape)) for shape in shapes)}"
        )


def paged_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one query token per sequence to its cached keys; statistics in fp32.

    query [B, Hq, D]; k_pages, v_pages [pages, Hkv, page_size, D], Hq a multiple of Hkv; block_table [B, P] int page
    numbers (entries past the sequence may be -1); seq_lens [B] keys in the table, of which those before starts [B] do
    not count. scale defaults to D ** -0.5. Returns out [B, Hq, D], and lse [B, Hq] fp32 if asked (a sequence without
    keys: out 0, lse -inf).
    """
    _check_pages("paged_attention", query, k_pages, v_pages)
    for name, value in (("block_table", block_table), ("seq_lens", seq_lens), ("starts", starts)):
        check_tensor("paged_attention", name, value, integer=True)
    if block_table.dim() != 2 or seq_lens.shape != query.shape[:1] or block_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"paged_attention: expected block_table [B, P] and seq_lens [B] for {query.shape[0]} sequences, got "
            f"{list(block_table.shape)} and {list(seq_lens.shape)}"
        )
    if starts is not None and starts.shape != seq_lens.shape:
        raise ValueError(f"paged_attention: expected starts of shape {list(seq_lens.shape)}, got {list(starts.shape)}")
    implementation = select("paged_attention", _IMPLEMENTATIONS, backend, query.device)
    out, lse = implementation(
        query,
        k_pages,
        v_pages,
        block_table,
        seq_lens.to(query.device),
        query.shape[-1] ** -0.5 if scale is None else scale,
        None if starts is None else starts.to(query.device),
    )
    return (out, lse) if return_lse else out


def _shared_reference(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, lengths: Tensor, tile_group: Tensor,
    tile_rows: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype, page, heads = accumulate_dtype(query.dtype), k_pages.shape[2], query.shape[1] // k_pages.shape[1]
    out = torch.zeros_like(query)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=dtype, device=query.device)
    for group, rows in zip(tile_group.tolist(), tile_rows.tolist(), strict=True):
        for row in rows:
            if group < 0 or row < 0 or lengths[group] <= 0:
                continue
            pages = tables[group, : -(-int(lengths[group]) // page)].long()
            keys, values = (x[pages].transpose(0, 1).flatten(1, 2).to(dtype) for x in (k_pages, v_pages))
            keys, values = (x[:, : lengths[group]].repeat_interleave(heads, 0) for x in (keys, values))
            score = torch.einsum("hd,hld->hl", query[row].to(dtype), keys) * scale
            out[row] = torch.einsum("hl,hld->hd", score.softmax(-1), values)
            lse[row] = score.logsumexp(-1)
    return out, lse


def _shared_chunked(
    query: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, lengths: Tensor, tile_group: Tensor,
    tile_rows: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A group's pages are gathered once; a tile's absent rows are computed too, so that a product's shape, hence a
    row's bits, does not depend on how many are there."""
    dtype, (kv_heads, page) = accumulate_dtype(query.dtype), k_pages.shape[1:3]
    grouped = tile_rows.shape[1], query.shape[1] // kv_heads
    out = torch.zeros_like(query)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=dtype, device=query.device)
    groups, lens = tile_group.tolist(), lengths.tolist()
    for group in sorted({g for g in groups if g >= 0 and lens[g] > 0}):
        pages = tables[group, : -(-lens[group] // page)].long()
        gathered = (x[pages].transpose(0, 1).flatten(1, 2)[:, : lens[group]] for x in (k_pages, v_pages))
        keys, values = (x.to(dtype) for x in gathered)  # [Hkv, L, D]
        for rows in tile_rows[[g == group for g in groups]].long():  # [R]
            # [R, Hq, D] -> [Hkv, R x heads of a group, D]
            q = query[rows.clamp_min(0)].to(dtype).unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
            score = (q @ keys.transpose(-1, -2)).mul_(scale)
            tile_lse = score.logsumexp(-1)
            tile_out = score.sub_(tile_lse[..., None]).exp_() @ values
            for target, value in ((out, tile_out), (lse, tile_lse)):
                by_row = value.unflatten(1, grouped).transpose(0, 1).flatten(1, 2)
                target[rows[rows >= 0]] = by_row[rows >= 0].to(target.dtype)
    return out, lse


_SHARED = {
    "reference": _shared_reference,
    "chunked": _shared_chunked,
    "triton": lazy_triton("attention", "shared_attention"),
}


def shared_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    tile_group: Tensor,
    tile_rows: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of one query token per row to the cached keys of a prefix that many rows share; statistics in fp32.

    query [B, Hq, D]; k_pages, v_pages [pages, Hkv, page_size, D], Hq a multiple of Hkv; tables [G, P] int: the pages of
    prefix g, of which lengths[g] keys count (entries past them may be -1). The R rows tile_rows[n] (-1: absent) are
    computed together over prefix tile_group[n] (-1: unused tile); R x Hq / Hkv of 64 to 128 fills a GPU's matrix units.
    A row is in one tile at most; with triton and the same R its bits depend neither on its place nor on other rows.
    scale defaults to D ** -0.5. Returns out [B, Hq, D] and lse [B, Hq] fp32 (a row without keys or tile: out 0, lse
    -inf). All int arguments are on query's device; triton reads none of them on the host, the other backends do.
    """
    _check_pages("shared_attention", query, k_pages, v_pages)
    metadata = {"tables": tables, "lengths": lengths, "tile_group": tile_group, "tile_rows": tile_rows}
    for name, value in metadata.items():
        check_tensor("shared_attention", name, value, integer=True, device=query.device)
    ranks = [value.dim() for value in metadata.values()]
    if ranks != [2, 1, 1, 2] or len(tables) != len(lengths) or len(tile_group) != len(tile_rows):
        raise ValueError(
            "shared_attention: expected tables [G, P], lengths [G], tile_group [N] and tile_rows [N, R], got "
            f"{', '.join(str(list(value.shape)) for value in metadata.values())}"
        )
    implementation = select("shared_attention", _SHARED, backend, query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return implementation(query, k_pages, v_pages, tables, lengths, tile_group, tile_rows, scale)


def _merge_torch(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse1.double(), lse2.double()).to(torch.promote_types(lse1.dtype, lse2.dtype))
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    # In fp64: its rounding to fp32 does not depend on where in the tensor (in a vector register or in the loop's tail)
    # a row lies, as an fp32 exponential's does.
    share1, share2 = ((x - finite).double().exp().to(lse.dtype)[..., None] for x in (lse1, lse2))
    return (out1 * share1 + out2 * share2).to(out1.dtype), lse


_MERGE = {"reference": _merge_torch, "chunked": _merge_torch, "triton": lazy_triton("attention", "merge_attention")}


def merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from each one's (out [..., D], lse [...])."""
    if out1.shape != out2.shape or lse1.shape != lse2.shape or out1.shape[:-1] != lse1.shape:
        shapes = [list(t.shape) for t in (out1, lse1, out2, lse2)]
        raise ValueError(f"merge_attention: expected two out [..., D] and two lse [...], got {shapes}")
    return select("merge_attention", _MERGE, backend, out1.device)(out1, lse1, out2, lse2)
