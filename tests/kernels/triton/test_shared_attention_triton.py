"""Attention to shared prefixes and from a start on, in Triton; `mutants` plant what these tests must find."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cai_fast.kernels import merge_attention, paged_attention, shared_attention
from cai_fast.kernels.triton import attention as kernel
from guarded import assert_as_exact_as_torch, same_under_poison
from mutants import mutant
from prefixes import Prefixes, prefixes
from torch import Tensor

FP32, BF16 = torch.float32, torch.bfloat16
SCALE = 0.3
SPLIT, OWN_SPLIT = 32, 64
FEW = {"dtype": FP32, "heads": (2, 1)}  # each program takes the interpreter milliseconds


def run(x: Prefixes, module: ModuleType = kernel, split: int = kernel.SPLIT) -> tuple[Tensor, Tensor]:
    return module.shared_attention(*x.shared, SCALE, split=split)


def run_own(x: Prefixes, module: ModuleType = kernel, split: int = kernel.SPLIT) -> tuple[Tensor, Tensor]:
    return module.paged_attention(*x.whole, SCALE, x.starts, split=split)


def equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_exactness(x: Prefixes, module: ModuleType = kernel, split: int = kernel.SPLIT) -> None:
    exact = shared_attention(*x.double().shared, scale=SCALE, backend="reference")
    plain = shared_attention(*x.shared, scale=SCALE, backend="chunked")
    for triple in zip(run(x, module, split), plain, exact, strict=True):
        assert_as_exact_as_torch(*triple)


# Heads of 1, 3, 4 and 8 to a key head, sizes that fill a block or do not, pages of one token, of a block and between.
@pytest.mark.parametrize(
    ("dtype", "heads", "page", "size"),
    [
        (BF16, (4, 2), 4, 8),
        (FP32, (2, 2), 16, 32),
        (BF16, (8, 1), 64, 64),
        (FP32, (4, 1), 1, 128),
        (BF16, (3, 1), 7, 96),
    ],
)
def test_as_exact_as_torch(dtype: torch.dtype, heads: tuple[int, int], page: int, size: int) -> None:
    check_exactness(prefixes(dtype, heads, page, size))


@pytest.mark.parametrize("split", [16, 64])
def test_splits_are_merged(split: int) -> None:
    check_exactness(prefixes(**FEW, size=20), split=split)


def check_parts(module: ModuleType = kernel) -> None:
    """Six heads of four sequences in one program of 32 rows or two of 16, and of twelve sequences in five."""
    x = prefixes(BF16, (6, 1), size=16, lengths=(20, 0, 9))
    whole = run(x, module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_ROWS", 16)
        assert equal(run(x, module), whole)
        rows = torch.full((2, 12), -1, dtype=torch.int32)
        rows[0, ::2], rows[1, 5] = torch.tensor([8, 6, 3, 1, 0, -1]), 2
        wide = dataclasses.replace(x, tile_group=torch.tensor([0, 2]), tile_rows=rows)
        out, lse = run(wide, module)
        out[5], lse[5] = whole[0][5], whole[1][5]  # in no tile here
        assert equal((out, lse), whole)


def test_a_tile_of_many_rows_is_computed_in_parts() -> None:
    check_parts()


def check_independence(module: ModuleType = kernel) -> None:
    """The other rows, the row's place, other tiles and prefixes, and the width of the table change no bit."""
    x = prefixes(BF16, (2, 1), size=16)
    together = run(x, module, SPLIT)
    for row, group in ((6, 0), (8, 0), (2, 2)):
        alone = dataclasses.replace(
            x,
            query=x.query[row : row + 1],
            tables=x.tables[group : group + 1, : -(-int(x.lengths[group]) // 4)],
            lengths=x.lengths[group : group + 1],
            tile_group=torch.tensor([0]),
            tile_rows=torch.tensor([[-1, 0, -1, -1]]),
        )
        assert equal(tuple(t[0] for t in run(alone, module, SPLIT)), tuple(t[row] for t in together))


def test_a_row_does_not_depend_on_the_others() -> None:
    check_independence()


def check_memory(module: ModuleType = kernel) -> None:
    """Strides of every argument, unwritten memory and the bounds of what is written."""
    x = prefixes(**FEW, lengths=(40, 0, 18))
    strided = dataclasses.replace(
        x,
        query=x.query.transpose(0, 1).contiguous().transpose(0, 1),
        k_pages=x.k_pages.transpose(1, 2).contiguous().transpose(1, 2),
        v_pages=x.v_pages.transpose(0, 3).contiguous().transpose(0, 3),
        tables=x.tables.long().t().contiguous().t(),
        lengths=torch.stack((x.lengths, x.lengths + 9), 1).int()[:, 0],
        tile_group=torch.stack((x.tile_group, 0 * x.tile_group), 1)[:, 0],
        tile_rows=x.tile_rows.t().contiguous().t(),
    )
    assert equal(same_under_poison(lambda: run(strided, module, SPLIT)), run(x, kernel, SPLIT))
    narrow = dataclasses.replace(x, tables=x.tables[:, :2])  # what follows in memory are page numbers too
    within = dataclasses.replace(narrow, lengths=x.lengths.clamp(max=8))
    assert equal(run(narrow, module), run(within))


def test_strides_poison_and_lengths_beyond_the_table() -> None:
    check_memory()


def test_nothing_to_do() -> None:
    x = prefixes(**FEW)
    none = dataclasses.replace(x, tile_group=x.tile_group[:0], tile_rows=x.tile_rows[:0])
    empty = dataclasses.replace(x, tables=x.tables[:0], lengths=x.lengths[:0], tile_group=0 * x.tile_group - 1)
    narrow = dataclasses.replace(x, tables=x.tables[:, :0])
    for case in (none, empty, narrow, dataclasses.replace(x, tile_rows=x.tile_rows[:, :0])):
        out, lse = same_under_poison(lambda case=case: run(case))
        assert out.shape == x.query.shape and not out.any() and (lse == -torch.inf).all()
    assert run(dataclasses.replace(none, query=x.query[:0]))[0].shape == (0, 2, 8)
    with pytest.raises(ValueError, match="shared_attention: backend 'triton' keeps fp32 statistics"):
        shared_attention(*x.double().shared, backend="triton")


def test_nan_stays_where_torch_keeps_it() -> None:
    x = prefixes(**FEW)
    x.query[3, 1] = math.nan
    x.v_pages[x.tables[2, 8], 0, 0, 5] = math.nan
    expected = shared_attention(*x.shared, scale=SCALE, backend="chunked")
    for ours, plain in zip(run(x, split=SPLIT), expected, strict=True):
        assert plain.isnan().any()
        torch.testing.assert_close(ours, plain, equal_nan=True)


def check_own(x: Prefixes, module: ModuleType = kernel, split: int = kernel.SPLIT) -> None:
    settings = {"scale": SCALE, "starts": x.starts, "return_lse": True}
    exact = paged_attention(*x.double().whole, **settings, backend="reference")
    plain = paged_attention(*x.whole, **settings, backend="chunked")
    for triple in zip(run_own(x, module, split), plain, exact, strict=True):
        assert_as_exact_as_torch(*triple)


def behind_poison(**settings: object) -> Prefixes:
    """Starts anywhere in a page, at and beside a split's border, at the last key, at the end and beyond it."""
    x = prefixes(**FEW | settings)
    starts = torch.tensor([70, 69, 33, -3, 12, 31, 9999, 0, 64], dtype=torch.int32)
    x.k_pages[x.table[1, 17], :, 0] = x.v_pages[x.table[1, 17], :, 0] = math.nan
    return dataclasses.replace(x, starts=starts)


@pytest.mark.parametrize(("dtype", "split"), [(FP32, 32), (BF16, OWN_SPLIT), (FP32, kernel.SPLIT)])
def test_keys_before_the_start_do_not_count(dtype: torch.dtype, split: int) -> None:
    check_own(behind_poison(dtype=dtype), split=split)


def check_own_memory(module: ModuleType = kernel) -> None:
    x = behind_poison()
    strided = dataclasses.replace(x, starts=torch.stack((x.starts, x.starts + 1), 1)[:, 0].long())
    assert equal(same_under_poison(lambda: run_own(strided, module, OWN_SPLIT)), run_own(x, split=OWN_SPLIT))


def test_starts_strides_and_poison() -> None:
    check_own_memory()


def test_a_start_of_zero_changes_no_bit() -> None:
    x = prefixes(BF16, (2, 1))
    zero = dataclasses.replace(x, starts=0 * x.starts)
    assert equal(run_own(zero, split=OWN_SPLIT), kernel.paged_attention(*x.whole, SCALE, split=OWN_SPLIT))


@pytest.mark.parametrize(("dtype", "page"), [(FP32, 16), (BF16, 64)])
def test_prefix_and_own_keys_merge_to_the_whole(dtype: torch.dtype, page: int) -> None:
    x = prefixes(dtype, (4, 1), page, 32, lengths=(128, 0, 64))
    exact = paged_attention(*x.double().whole, return_lse=True, backend="reference")
    plain = paged_attention(*x.whole, return_lse=True, backend="triton")
    own = paged_attention(*x.whole, starts=x.starts, return_lse=True, backend="triton")
    merged = merge_attention(*shared_attention(*x.shared, backend="triton"), *own, backend="triton")
    for triple in zip(merged, plain, exact, strict=True):
        assert_as_exact_as_torch(*triple)
    untouched = [4, 7]  # in no tile, and without a key in its prefix
    assert equal(tuple(t[untouched] for t in merged), tuple(t[untouched] for t in own))


@pytest.mark.gpu
def test_gpu_graph_follows_its_metadata() -> None:
    """A decode step captured once; then the rows leave their prefixes and attend to everything by themselves."""
    x = prefixes(BF16, (8, 2), 16, 64, lengths=(64, 0, 48))
    x = dataclasses.replace(x, **{field.name: getattr(x, field.name).cuda() for field in dataclasses.fields(x)})

    def step() -> tuple[Tensor, Tensor]:
        own = paged_attention(*x.whole, starts=x.starts, return_lse=True, backend="triton")
        return merge_attention(*shared_attention(*x.shared, backend="triton"), *own, backend="triton")

    step()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged = step()
    exact = paged_attention(*x.double().whole, return_lse=True, backend="reference")
    plain = paged_attention(*x.whole, return_lse=True, backend="triton")
    for _ in range(2):
        for result in merged:
            result.fill_(torch.nan)
        graph.replay()
        for triple in zip(merged, plain, exact, strict=True):
            assert_as_exact_as_torch(*triple)
        x.tile_group.fill_(-1)
        x.starts.zero_()


def exactness(split: int = SPLIT, **settings: object) -> Callable[[ModuleType], None]:
    return lambda module: check_exactness(prefixes(**FEW | settings), module, split)


def own(split: int = OWN_SPLIT) -> Callable[[ModuleType], None]:
    return lambda module: check_own(behind_poison(), module, split)


FAULTS = {
    "the last key of a split is left out": ("token < end", "token < end - 1", exactness()),
    "1 % of the scores": ("* scale\n", "* scale * 0.99\n", exactness(dtype=BF16)),
    "the numerator is not rescaled": ("acc = acc * keep[:, None] +", "acc = acc +", exactness(kernel.SPLIT)),
    "another head's query": ("heads * q_head\n    q = ", "(heads ^ 1) * q_head\n    q = ", exactness()),
    "rows before heads": ("lane // GROUP", "lane % TILE", exactness()),
    "every part is the first": ("block % PARTS * ROWS +", "", check_parts),
    "another prefix's table": ("tables + group * table_row", "tables + (group ^ 2) * table_row", exactness()),
    "the first tile's prefix": ("tile_group + tile * group_stride", "tile_group", exactness()),
    "an unused tile takes the first prefix": (
        "group_stride).to(tl.int64)\n", "group_stride).to(tl.int64)\n    group = tl.maximum(group, 0)\n", exactness(),
    ),
    "the last split is not merged": ("(length + SPLIT - 1) // SPLIT", "length // SPLIT", exactness()),
    "splits behind the prefix are merged": ("(length + SPLIT - 1) // SPLIT", "splits", check_memory),
    "absent rows are stored": ("if (row >= 0) & (", "if (", check_memory),
    "rows in no tile stay unwritten": (".fill_(-torch.inf)", "", check_memory),
    "keys beyond the table count": ("tl.minimum(position, limit)", "position", check_memory),
    "splits depend on the number of tiles": (
        "splits = triton.cdiv(keys, split)", "split *= tiles\n    splits = triton.cdiv(keys, split)",
        check_independence,
    ),
    "the first key is left out": ("token >= first", "token > first", own()),
    "blocks from the next on": (
        "tl.maximum(first - begin, 0) // BLOCK", "(tl.maximum(first - begin, 0) + BLOCK - 1) // BLOCK",
        own(kernel.SPLIT),
    ),
    "the block of the start counts whole": ("inside & (token >= first)", "inside", own()),
    "splits before the start are merged": ("// SPLIT\n    end", "* 0\n    end", check_own_memory),
    "splits beyond the end are merged": (", SPLIT)\n    value", ", SPLIT) * 0 + splits\n    value", check_own_memory),
    "the start of the first sequence": ("row // heads * start_stride", "row * 0", own()),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(tmp_path: Path, fault: str) -> None:
    old, new, check = FAULTS[fault]
    with mutant(kernel, tmp_path, old, new) as module:
        with pytest.raises(AssertionError):
            check(module)
