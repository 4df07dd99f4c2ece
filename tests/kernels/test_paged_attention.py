import math

import pytest
import torch
import torch.nn.functional as F
from cai_fast.kernels import merge_attention, paged_attention
from torch import Tensor

BACKENDS = ("reference", "chunked")
LENGTHS = [1, 4, 5, 11, 0]


def cache(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query [5, 4, 8], pages of 4 tokens and 2 heads in shuffled order, NaN wherever no sequence has written."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(5, 4, 8, generator=g, dtype=dtype)
    k_pages, v_pages = torch.full((2, 20, 2, 4, 8), math.nan, dtype=dtype)
    table = torch.full((5, 3), -1)
    free = iter(torch.randperm(20, generator=g).tolist())
    for row, length in enumerate(LENGTHS):
        for page in range(-(-length // 4)):
            table[row, page] = number = next(free)
            used = min(4, length - 4 * page)
            for pages in (k_pages, v_pages):
                pages[number, :, :used] = torch.randn(2, used, 8, generator=g, dtype=dtype)
    return query, k_pages, v_pages, table, torch.tensor(LENGTHS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_matches_dense_attention_over_poisoned_pages(backend: str, scale: float | None) -> None:
    query, k_pages, v_pages, table, lengths = cache()
    out, lse = paged_attention(query, k_pages, v_pages, table, lengths, scale=scale, return_lse=True, backend=backend)
    for row, length in enumerate(LENGTHS[:-1]):
        pages = table[row, : -(-length // 4)]
        k, v = (p[pages].transpose(0, 1).flatten(1, 2)[:, :length] for p in (k_pages, v_pages))
        expected = F.scaled_dot_product_attention(query[row, :, None], k, v, scale=scale, enable_gqa=True)[:, 0]
        torch.testing.assert_close(out[row], expected)
        score = torch.einsum("hd,hld->hl", query[row], k.repeat_interleave(2, 0)) * (scale or 8**-0.5)
        torch.testing.assert_close(lse[row], score.logsumexp(-1))
    assert not out[4].any() and (lse[4] == -torch.inf).all()


def test_by_hand() -> None:
    # Scores log 1 and log 3: the values 0 and 8 average to 6.
    query = torch.tensor([[[1.0]]])
    k_pages = torch.tensor([0.0, math.log(3.0)]).view(1, 1, 2, 1)
    v_pages = torch.tensor([0.0, 8.0]).view(1, 1, 2, 1)
    out, lse = paged_attention(
        query, k_pages, v_pages, torch.tensor([[0]]), torch.tensor([2]), scale=1.0, return_lse=True
    )
    assert out.item() == pytest.approx(6) and lse.item() == pytest.approx(math.log(4))


def test_merge_of_disjoint_keys_is_attention_over_all() -> None:
    query, k_pages, v_pages, table, lengths = cache()
    whole = paged_attention(query, k_pages, v_pages, table, lengths, return_lse=True)
    first = paged_attention(query, k_pages, v_pages, table[:, :1], lengths.clamp(max=4), return_lse=True)
    rest = paged_attention(query, k_pages, v_pages, table[:, 1:], (lengths - 4).clamp(min=0), return_lse=True)
    for merged in (merge_attention(*first, *rest), merge_attention(*rest, *first)):
        torch.testing.assert_close(merged[0], whole[0])
        torch.testing.assert_close(merged[1], whole[1])


def test_half_precision_keeps_fp32_statistics() -> None:
    query, k_pages, v_pages, table, lengths = cache()
    half = (query.bfloat16(), k_pages.bfloat16(), v_pages.bfloat16())
    out, lse = paged_attention(*half, table, lengths, return_lse=True)
    expected, expected_lse = paged_attention(*(x.double() for x in half), table, lengths, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse.float())
    torch.testing.assert_close(out, expected.bfloat16())


def test_shapes_are_checked() -> None:
    query, k_pages, v_pages, table, lengths = cache()
    with pytest.raises(ValueError, match="paged_attention: expected query"):
        paged_attention(query[:, :3], k_pages, v_pages, table, lengths)
