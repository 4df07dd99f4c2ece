"""The policy loss's sums over rows: fp64 references, poisoned memory, planted faults."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from cai_fast.kernels.triton import rows
from cai_fast.kernels.triton import sums as kernels
from guarded import BAND, error, same_under_poison
from mutants import mutant
from torch import Tensor

SIZES = [0, 1, 63, 64, 65, 200, 64 * 4 + 1, 64 * 9 - 1]
"""Against 64 rows a block and 4 merged at once: no rows, one block, two, and three rounds of merging."""


def by_torch(outputs: Tensor, weights: Tensor) -> Tensor:
    """The textbook: [8] sums, the loss first."""
    pg, kl, clipped, ratio = outputs[rows.PG :].unbind()
    terms = torch.stack((pg, kl, clipped, ratio, ratio.square(), outputs[rows.ENTROPY], torch.ones_like(ratio)))
    return torch.cat((outputs[rows.LOSS].sum()[None], (terms * weights).sum(1)))


def in_a_band(values: Tensor) -> Tensor:
    """The same values at a column range of a wider matrix of NaN, hence neither contiguous nor safe to read beyond."""
    wide = torch.full((*values.shape[:-1], values.shape[-1] + 2 * BAND), torch.nan, dtype=values.dtype)
    wide[..., BAND:-BAND] = values
    return wide[..., BAND:-BAND]


def check_sums(size: int, module: ModuleType = kernels, dtype: torch.dtype = torch.float32) -> None:
    g = torch.Generator().manual_seed(size)
    outputs, weights = torch.randn(8, size, generator=g).to(dtype), torch.rand(size, generator=g).to(dtype)
    outputs[[rows.LOGPROB, rows.LSE]] = torch.nan  # not among the sums
    inputs = in_a_band(outputs), in_a_band(weights)
    loss, stats = same_under_poison(lambda: module.policy_sums(*inputs))
    assert loss.shape == () and stats.shape == (7,)
    exact, torchs = by_torch(outputs.double(), weights.double()), by_torch(outputs, weights)
    for ours, one, other in zip((loss, *stats), torchs, exact, strict=True):
        assert error(ours, other) <= 2 * error(one, other) + 1e-6 * max(1.0, abs(other.item()))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROWS", 64)
    monkeypatch.setattr(kernels, "MERGED", 4)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_exact_as_torch(size: int, dtype: torch.dtype) -> None:
    check_sums(size, dtype=dtype)


@pytest.mark.parametrize("size", [1024, 5000])
def test_the_kernels_own_blocks(size: int) -> None:
    check_sums(size)


def test_weights_of_any_stride() -> None:
    outputs, weights = torch.randn(8, 70), torch.rand(140)[::2]
    for ours, plain in zip(
        kernels.policy_sums(outputs, weights), kernels.policy_sums(outputs, weights.contiguous()), strict=True
    ):
        assert torch.equal(ours, plain)


FAULTS = {
    "rows beyond the last": ("inside = row < n", "inside = row <= n", 63),
    "the last row is lost": ("inside = row < n", "inside = row < n - 1", 200),
    "the ratio is not squared": ("ratio * ratio * weight", "ratio * weight", 65),
    "the loss is weighted twice": ("3 * stride, 1.0, inside", "3 * stride, weight, inside", 65),
    "the rows are taken for dense": ("stride = stride.to(tl.int64)", "stride = n.to(tl.int64)", 65),
    "blocks overlap": ("program * ROWS + tl", "program * (ROWS - 1) + tl", 65),
    "the last block is not merged": ("mask=(block < blocks)", "mask=(block < blocks - 1)", 200),
    "only one round of merging": ("range(0, blocks, MERGED)", "range(0, MERGED, MERGED)", 64 * 9 - 1),
    "blocks beyond the last are merged": ("mask=(block < blocks)", "mask=(block < MERGED)", 64 * 5),
    "the statistics are shifted": ("stats + column - 1", "stats + column", 200),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(tmp_path: Path, fault: str) -> None:
    old, new, size = FAULTS[fault]
    with mutant(kernels, tmp_path, old, new) as module:
        module.ROWS, module.MERGED = 64, 4
        with pytest.raises(AssertionError):
            check_sums(size, module)
