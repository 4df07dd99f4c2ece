import math

import numpy as np
import pytest
import torch
from cai_fast.kernels import merge_attention, paged_attention
from cai_fast.kernels.triton import attention as kernel
from guarded import assert_as_exact_as_torch, same_under_poison
from sm90 import Case, check, compile_all
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

LENGTHS = [1, 4, 5, 70, 0]
DTYPES = (torch.float32, torch.bfloat16)


def cache(
    dtype: torch.dtype, q_heads: int = 4, kv_heads: int = 2, page: int = 4, size: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pages in shuffled order, NaN wherever no sequence has written; the table is -1 past a sequence's end."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(len(LENGTHS), q_heads, size, generator=g).to(dtype)
    width = -(-max(LENGTHS) // page)
    k_pages, v_pages = torch.full((2, width * len(LENGTHS), kv_heads, page, size), math.nan, dtype=dtype)
    table = torch.full((len(LENGTHS), width), -1)
    free = iter(torch.randperm(k_pages.shape[0], generator=g).tolist())
    for row, length in enumerate(LENGTHS):
        for at in range(-(-length // page)):
            table[row, at] = number = next(free)
            used = min(page, length - page * at)
            for pages in (k_pages, v_pages):
                pages[number, :, :used] = torch.randn(kv_heads, used, size, generator=g).to(dtype)
    return query, k_pages, v_pages, table, torch.tensor(LENGTHS)


def wide(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (*(x.double() for x in inputs[:3]), *inputs[3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,page,size", [((4, 2), 4, 8), ((3, 1), 7, 20), ((20, 1), 16, 32), ((2, 2), 70, 16)])
@pytest.mark.parametrize("scale", [None, 5.0])
def test_as_exact_as_torch(dtype: torch.dtype, heads: tuple[int, int], page: int, size: int, scale) -> None:
    inputs = cache(dtype, *heads, page, size)
    exact = paged_attention(*wide(inputs), scale=scale, return_lse=True, backend="reference")
    plain = paged_attention(*inputs, scale=scale, return_lse=True, backend="chunked")
    ours = paged_attention(*inputs, scale=scale, return_lse=True, backend="triton")
    for triple in zip(ours, plain, exact, strict=True):
        assert_as_exact_as_torch(*triple)


@pytest.mark.parametrize("split", [4, 16, 64])
def test_splits_are_merged(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.paged_attention, "__kwdefaults__", {"split": split, "warps": 4})
    test_as_exact_as_torch(torch.float32, (4, 2), 4, 8, None)


def test_a_sequence_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.paged_attention, "__kwdefaults__", {"split": 16, "warps": 4})
    query, k_pages, v_pages, table, lengths = cache(torch.bfloat16)
    together = paged_attention(query, k_pages, v_pages, table, lengths, return_lse=True, backend="triton")
    for row in (1, 2, 3):
        few = table[row : row + 1, : -(-LENGTHS[row] // 4)]  # a shorter table: fewer splits are launched
        alone = paged_attention(
            query[row : row + 1], k_pages, v_pages, few, lengths[row : row + 1], return_lse=True, backend="triton"
        )
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


def test_strides_poison_and_shapes_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.paged_attention, "__kwdefaults__", {"split": 16, "warps": 4})
    query, k_pages, v_pages, table, lengths = cache(torch.float32)
    plain = paged_attention(query, k_pages, v_pages, table, lengths, return_lse=True, backend="triton")
    strided = (
        query.transpose(0, 1).contiguous().transpose(0, 1),
        k_pages.transpose(1, 2).contiguous().transpose(1, 2),
        v_pages.transpose(0, 3).contiguous().transpose(0, 3),
        table.int().t().contiguous().t(),
        torch.stack((lengths, lengths + 9), 1).int()[:, 0],
    )
    ours = same_under_poison(lambda: paged_attention(*strided, return_lse=True, backend="triton"))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    out, lse = paged_attention(query, k_pages, v_pages, table[:, :0], 0 * lengths, return_lse=True, backend="triton")
    assert not out.any() and (lse == -torch.inf).all()
    none = paged_attention(query[:0], k_pages, v_pages, table[:0], lengths[:0], backend="triton")
    assert none.shape == (0, 4, 8)
    with pytest.raises(ValueError, match="paged_attention: backend 'triton' keeps fp32 statistics"):
        paged_attention(query.double(), k_pages, v_pages, table, lengths, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 7, 20), (0, 4, 8)])
def test_merge_is_as_exact_as_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    out1, out2 = torch.randn(2, *shape, generator=g).to(dtype)
    lse1, lse2 = 20 * torch.randn(2, *shape[:-1], generator=g)
    if shape[0] > 1:
        lse1[0], lse2[:2], lse1[3], lse2[4] = -torch.inf, -torch.inf, 1e4, -1e4
    exact = merge_attention(out1.double(), lse1.double(), out2.double(), lse2.double(), backend="chunked")
    plain = merge_attention(out1, lse1, out2, lse2, backend="chunked")
    two = out2.transpose(0, 1).contiguous().transpose(0, 1)
    ours = merge_attention(out1, lse1, two, lse2, backend="triton")
    for triple in zip(ours, plain, exact, strict=True):
        assert_as_exact_as_torch(*triple)
    if shape[0]:
        poisoned = same_under_poison(lambda: merge_attention(out1, lse1, out2, lse2, backend="triton"))
        assert all(torch.equal(a, b) for a, b in zip(poisoned, ours, strict=True))


def test_nan_stays_where_torch_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.paged_attention, "__kwdefaults__", {"split": 16, "warps": 4})
    query, k_pages, v_pages, table, lengths = cache(torch.float32)
    query[1, 3] = math.nan
    k_pages[table[3, 5], 0, 2] = math.nan  # two heads of the longest sequence
    v_pages[table[2, 0], 1, 0, 5] = math.nan  # one column of two heads
    results = []
    for backend in ("triton", "chunked"):
        one = paged_attention(query, k_pages, v_pages, table, lengths, return_lse=True, backend=backend)
        two = (torch.ones_like(one[0]), torch.zeros_like(one[1]))
        results.append((*one, *merge_attention(*one, *two, backend=backend)))
    for ours, plain in zip(*results, strict=True):
        assert plain.isnan().any() and not plain.isnan().all()
        torch.testing.assert_close(ours, plain, equal_nan=True)


def test_a_length_beyond_the_table_counts_the_tables_keys() -> None:
    g = torch.Generator().manual_seed(3)
    query, (k, v) = torch.randn(1, 2, 16, generator=g), torch.randn(2, 4, 1, 4, 16, generator=g)
    table = torch.tensor([[3, 1, 2]], dtype=torch.int32)[:, :2]  # what follows the row in memory is a page's number too
    ours, whole = (paged_attention(query, k, v, table, torch.tensor([length]), backend="triton") for length in (12, 8))
    assert torch.equal(ours, whole)


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found are products that are 1 % too small in bf16, and a last split that is not launched."""
    dot = InterpreterBuilder.create_dot

    def less(*operands):
        product = dot(*operands)
        return TensorHandle(product.data * np.float32(0.99), product.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", less)
    with pytest.raises(AssertionError):
        test_as_exact_as_torch(torch.bfloat16, (4, 2), 4, 8, None)
    monkeypatch.undo()
    monkeypatch.setattr(kernel.triton, "cdiv", lambda a, b: a // b)
    with pytest.raises(AssertionError):
        test_splits_are_merged(16, monkeypatch)


def test_sm_90(tmp_path) -> None:
    strides = ("q_head", "k_page", "k_head", "k_token", "v_page", "v_head", "v_token")
    attend = dict.fromkeys(("query", "k_pages", "v_pages"), "*bf16") | {"lengths": "*i32", "scale": "fp32"}
    attend |= dict.fromkeys(("acc_out", "max_out", "sum_out"), "*fp32")
    attend |= dict.fromkeys(("head_size", "table_row", *strides), "i32")
    unit = dict.fromkeys(("q_column", "k_column", "v_column", "table_column", "length_stride"), 1)
    partial = attend | {"table": "*i32", "table_width": "i32", "q_sequence": "i32"}
    merge = dict.fromkeys(("acc_in", "max_in", "sum_in", "lse_out"), "*fp32") | {"out": "*bf16"}
    merge |= dict.fromkeys(("splits", "heads", "head_size"), "i32")
    two = dict.fromkeys(("lse1", "lse2", "lse_out"), "*fp32") | dict.fromkeys(("out1", "out2", "out"), "*bf16")
    tiles = {"tile_group": "*i32", "tile_rows": "*i32", "lengths": "*i32", "keys": "i32", "tile_stride": "i32"}
    split, start = {"SPLIT": kernel.SPLIT}, {"starts": "*i32"}
    members = {"group_stride": 1, "member_stride": 1, "length_stride": 1}
    cases = [
        Case(
            "attention:_merge_splits",
            merge | start | {"lengths": "*i32"},
            split | {"HEAD": 128, "start_stride": 1, "length_stride": 1},
            warps=1,
        ),
        Case("attention:_merge_two", two | dict.fromkeys(("rows", "size"), "i32"), {"ROWS": 16, "HEAD": 128}),
        Case("attention:_merge_tiles", merge | tiles, split | members | {"HEAD": 128, "TILE": 16}, warps=1),
    ]
    for size, group, page, starts in ((64, 4, 16, {}), (128, 4, 64, {}), (128, 4, 64, start)):
        sizes = split | {"GROUP": group, "HEAD": size, "PAGE": page, "BLOCK": kernel.BLOCK, "ROWS": 16}
        sizes |= {"start_stride": 1} if starts else {"start_stride": 0, "starts": None}
        aligned = ("head_size", "q_sequence", *strides)
        cases.append(Case("attention:_partial", partial | starts, unit | sizes, aligned=aligned))
    for rows in (64, kernel.TILE_ROWS):
        sizes = split | {"GROUP": 4, "HEAD": 128, "PAGE": 64, "BLOCK": kernel.BLOCK, "ROWS": rows}
        sizes |= unit | members | {"TILE": rows // 4, "PARTS": 1}
        aligned = ("head_size", "q_row", *strides)
        shared = attend | tiles | {"tables": "*i32", "q_row": "i32"}
        cases.append(Case("attention:_shared_partial", shared, sizes, rows // 16, aligned=aligned))
    reports = compile_all(cases, tmp_path)
    for report in reports:
        check(report)
    assert all(report.count("HMMA") > 0 for report in reports[3:6])
    assert all(report.count("HGMMA") > 0 for report in reports[6:])
