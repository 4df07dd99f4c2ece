import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cai_fast.kernels import merge_attention, paged_attention, shared_attention
from prefixes import GROUPS, prefixes

BACKENDS = ("reference", "chunked")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("page", [1, 4, 16])
def test_matches_dense_attention_over_poisoned_pages(backend: str, scale: float | None, page: int) -> None:
    x = prefixes(page=page)
    out, lse = shared_attention(*x.shared, scale=scale, backend=backend)
    for row, group in enumerate(GROUPS):
        length = int(x.lengths[group]) if group >= 0 else 0
        if not length:
            assert not out[row].any() and (lse[row] == -torch.inf).all()
            continue
        pages = x.tables[group, : -(-length // page)]
        k, v = (p[pages].transpose(0, 1).flatten(1, 2)[:, :length] for p in (x.k_pages, x.v_pages))
        expected = F.scaled_dot_product_attention(x.query[row, :, None], k, v, scale=scale, enable_gqa=True)[:, 0]
        torch.testing.assert_close(out[row], expected)
        score = torch.einsum("hd,hld->hl", x.query[row], k.repeat_interleave(2, 0)) * (scale or 8**-0.5)
        torch.testing.assert_close(lse[row], score.logsumexp(-1))


def test_by_hand() -> None:
    # Scores log 1 and log 3 for the first row, 0 and 0 for the second: the values 0 and 8 average to 6 and 4.
    query = torch.tensor([[[1.0]], [[0.0]]])
    k_pages = torch.tensor([0.0, math.log(3.0)]).view(1, 1, 2, 1)
    v_pages = torch.tensor([0.0, 8.0]).view(1, 1, 2, 1)
    tile = torch.tensor([0]), torch.tensor([[1, 0]])
    out, lse = shared_attention(query, k_pages, v_pages, torch.tensor([[0]]), torch.tensor([2]), *tile, scale=1.0)
    assert out.flatten().tolist() == pytest.approx([6, 4])
    assert lse.flatten().tolist() == pytest.approx([math.log(4), math.log(2)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [1, 4, 16])
def test_prefix_and_own_keys_merge_to_the_whole(backend: str, page: int) -> None:
    x = prefixes(page=page, lengths=(64, 0, 48))
    whole = paged_attention(*x.whole, return_lse=True, backend=backend)
    own = paged_attention(*x.whole, starts=x.starts, return_lse=True, backend=backend)
    for merged in zip(merge_attention(*shared_attention(*x.shared, backend=backend), *own), whole, strict=True):
        torch.testing.assert_close(*merged)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_before_the_start_do_not_count(backend: str) -> None:
    """Starts anywhere in a page, below 0, at the last key, at the end and beyond it, behind a poisoned key."""
    x = prefixes()
    starts = torch.tensor([70, 69, 33, -3, 12, 31, 9999, 0, 96])
    k_pages, v_pages = x.k_pages, x.v_pages
    for pages in (k_pages, v_pages):
        pages[x.table[1, 17], :, 0] = math.nan  # position 68 of row 1
    out, lse = paged_attention(*x.whole, starts=starts, return_lse=True, backend=backend)
    for row, (first, length) in enumerate(zip(starts.clamp_min(0).tolist(), x.seq_lens.tolist(), strict=True)):
        if first >= length:
            assert not out[row].any() and (lse[row] == -torch.inf).all()
            continue
        pages = x.table[row, : -(-length // 4)]
        k, v = (p[pages].transpose(0, 1).flatten(1, 2)[:, first:length] for p in (k_pages, v_pages))
        expected = F.scaled_dot_product_attention(x.query[row, :, None], k, v, enable_gqa=True)[:, 0]
        torch.testing.assert_close(out[row], expected)
        score = torch.einsum("hd,hld->hl", x.query[row], k.repeat_interleave(2, 0)) * 8**-0.5
        torch.testing.assert_close(lse[row], score.logsumexp(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts_of_no_sequence_and_lengths_beyond_the_table(backend: str) -> None:
    x = prefixes(lengths=(64, 0, 48))
    pages = (x.k_pages, x.v_pages)
    none = paged_attention(x.query[:0], *pages, x.table[:0], x.seq_lens[:0], starts=x.starts[:0], backend="chunked")
    assert none.shape == (0, 4, 8)
    one = (x.query[1:2], *pages, x.table[1:2, :20])
    for starts in (torch.tensor([5]), torch.tensor([70]), torch.tensor([1000])):
        ours, expected = (
            paged_attention(*one, torch.tensor([n]), starts=starts, return_lse=True, backend=backend)
            for n in (1000, 80)
        )
        assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


def test_half_precision_keeps_fp32_statistics() -> None:
    x = prefixes(torch.bfloat16)
    out, lse = shared_attention(*x.shared)
    expected, expected_lse = shared_attention(*x.double().shared)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse.float())
    torch.testing.assert_close(out, expected.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_prefix(backend: str) -> None:
    x = prefixes()
    x.query[3, 1] = math.nan
    out, lse = shared_attention(*x.shared, backend=backend)
    assert out[3, 1].isnan().all() and lse[3, 1].isnan()
    out[3, 1], lse[3, 1] = 0.0, 0.0
    assert not out.isnan().any() and not lse.isnan().any()
    x.v_pages[x.tables[2, 8], :, 0, 5] = math.nan
    out, _ = shared_attention(*x.shared, backend=backend)
    nan = torch.zeros_like(out, dtype=torch.bool)
    nan[[2, 5], :, 5] = nan[3, 1] = True
    assert torch.equal(out.isnan(), nan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str) -> None:
    x = prefixes()
    none = dataclasses.replace(x, tile_group=x.tile_group[:0], tile_rows=x.tile_rows[:0])
    empty = dataclasses.replace(x, tables=x.tables[:0], lengths=x.lengths[:0], tile_group=0 * x.tile_group - 1)
    narrow = dataclasses.replace(x, tables=x.tables[:, :0], lengths=0 * x.lengths)
    absent = dataclasses.replace(x, tile_rows=x.tile_rows[:, :0])
    for case in (none, empty, narrow, absent):
        out, lse = shared_attention(*case.shared, backend=backend)
        assert out.shape == x.query.shape and not out.any() and (lse == -torch.inf).all()
