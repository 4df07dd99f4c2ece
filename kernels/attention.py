"""Decode attention over a paged cache, and the merge of two attentions over disjoint keys."""

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


def _without_pages_before(
    starts: Tensor, block_table: Tensor, seq_lens: Tensor, page: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(starts, block_table, seq_lens) of the same keys, counted from the first page that holds one. One host read."""
    seq_lens = seq_lens.clamp(max=block_table.shape[1] * page)
    skipped = starts.clamp_min(0) // page
    width = max([0, *(-(-seq_lens // page) - skipped).tolist()])
    column = (skipped[:, None] + torch.arange(width, device=skipped.device)).clamp_(max=block_table.shape[1] - 1)
    return starts - skipped * page, block_table.gather(1, column), seq_lens - skipped * page


def _gathered(dense: Callable, *, skip: bool) -> Callable:
    """`dense` attention over the pages gathered into one tensor per sequence; skip: on a CPU, those that count."""

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
        if skip and starts is not None and query.device.type == "cpu":
            starts, block_table, seq_lens = _without_pages_before(starts, block_table, seq_lens, k_pages.shape[2])
        table = block_table.clamp_min(0).long()
        gathered = (pages[table].transpose(1, 2).flatten(2, 3) for pages in (k_pages, v_pages))
        # Of pages of one token `flatten` makes a view, and a product's bits would depend on the number of sequences.
        keys, values = (x.contiguous().to(dtype) for x in gathered)
        out, lse = dense(query.to(dtype), keys, values, seq_lens, scale, starts)
        return out.to(query.dtype), lse

    return attention


_IMPLEMENTATIONS = {
    "reference": _gathered(_dense_reference, skip=False),
    "chunked": _gathered(_dense_chunked, skip=True),
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


def _merge_torch(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse1, lse2)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    share1, share2 = (lse1 - finite).exp()[..., None], (lse2 - finite).exp()[..., None]
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
