"""Decode attention over a paged cache, and the merge of two attentions over disjoint keys."""

from collections.abc import Callable

import torch
from torch import Tensor

from .common import accumulate_dtype, check_tensor, lazy_triton, select


def _dense_reference(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """query [B, Hq, D], keys and values [B, Hkv, L, D] -> (out [B, Hq, D], lse [B, Hq])."""
    group = query.shape[1] // keys.shape[1]
    outs, lses = [], []
    for q, k, v, length in zip(query, keys, values, seq_lens.tolist(), strict=True):
        score = torch.einsum("hd,hld->hl", q, k[:, :length].repeat_interleave(group, 0)) * scale
        probability = torch.nan_to_num(score.softmax(-1))
        outs.append(torch.einsum("hl,hld->hd", probability, v[:, :length].repeat_interleave(group, 0)))
        lses.append(score.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


def _dense_chunked(
    query: Tensor, keys: Tensor, values: Tensor, seq_lens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    grouped = query.unflatten(1, (keys.shape[1], -1))
    score = (grouped @ keys.transpose(-1, -2)).mul_(scale)
    absent = torch.arange(keys.shape[2], device=query.device) >= seq_lens[:, None]
    score.masked_fill_(absent[:, None, None], -torch.inf)
    lse = score.logsumexp(-1)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)  # an empty sequence attends to nothing: output 0
    # What lies beyond a sequence's end may be anything, NaN included, and 0 x NaN is NaN.
    values = values.masked_fill(absent[:, None, :, None], 0.0)
    out = score.sub_(finite[..., None]).exp_() @ values
    return out.flatten(1, 2), lse.flatten(1, 2)


def _gathered(dense: Callable) -> Callable:
    """`dense` attention over the pages gathered into one tensor per sequence."""

    def attention(
        query: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(query.dtype)
        table = block_table.clamp_min(0).long()
        gathered = (pages[table].transpose(1, 2).flatten(2, 3) for pages in (k_pages, v_pages))
        # Of pages of one token `flatten` makes a view, and a product's bits would depend on the number of sequences.
        keys, values = (x.contiguous().to(dtype) for x in gathered)
        out, lse = dense(query.to(dtype), keys, values, seq_lens, scale)
        return out.to(query.dtype), lse

    return attention


_IMPLEMENTATIONS = {
    "reference": _gathered(_dense_reference),
    "chunked": _gathered(_dense_chunked),
    "triton": lazy_triton("attention", "paged_attention"),
}


def paged_attention(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one query token per sequence to its cached keys; statistics in fp32.

    query [B, Hq, D]; k_pages, v_pages [pages, Hkv, page_size, D], Hq a multiple of Hkv; block_table [B, P] int page
    numbers (entries past the sequence may be -1); seq_lens [B] keys that count. scale defaults to D ** -0.5.
    Returns out [B, Hq, D], and lse [B, Hq] fp32 if asked (a sequence of length 0: out 0, lse -inf).
    """
    if query.dim() != 3 or k_pages.dim() != 4 or k_pages.shape != v_pages.shape or query.shape[1] % k_pages.shape[1]:
        raise ValueError(
            f"paged_attention: expected query [B, Hq, D] and pages [pages, Hkv, page_size, D], got "
            f"{list(query.shape)}, {list(k_pages.shape)}, {list(v_pages.shape)}"
        )
    for name, value in (("block_table", block_table), ("seq_lens", seq_lens)):
        check_tensor("paged_attention", name, value, integer=True)
    if block_table.dim() != 2 or seq_lens.shape != query.shape[:1] or block_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"paged_attention: expected block_table [B, P] and seq_lens [B] for {query.shape[0]} sequences, got "
            f"{list(block_table.shape)} and {list(seq_lens.shape)}"
        )
    implementation = select("paged_attention", _IMPLEMENTATIONS, backend, query.device)
    out, lse = implementation(
        query,
        k_pages,
        v_pages,
        block_table,
        seq_lens.to(query.device),
        query.shape[-1] ** -0.5 if scale is None else scale,
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
