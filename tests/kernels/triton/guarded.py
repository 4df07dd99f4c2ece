"""Poisoned memory for kernels: what they allocate is filled, and lies between bands that must stay untouched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BAND = 64  # elements on either side


@contextmanager
def guarded(poison: float) -> Iterator[None]:
    """torch.empty and torch.empty_like give poisoned, guarded memory; leaving checks the bands."""
    blocks: list[tuple[Tensor, int]] = []

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        fill = poison if dtype.is_floating_point else -1
        block = torch.full((size.numel() + 2 * BAND,), fill, dtype=dtype, device=device)
        blocks.append((block, size.numel()))
        return block[BAND : BAND + size.numel()].view(size)

    def empty_like(like: Tensor, **_: Any) -> Tensor:
        return empty(like.shape, dtype=like.dtype, device=like.device)

    with mock.patch("torch.empty", empty), mock.patch("torch.empty_like", empty_like):
        yield
    assert blocks, "nothing was allocated with torch.empty"
    for block, size in blocks:
        outside = torch.cat((block[:BAND], block[BAND + size :]))
        untouched = torch.full_like(outside, poison if block.dtype.is_floating_point else -1)
        assert torch.equal(outside.nan_to_num(12345.0), untouched.nan_to_num(12345.0)), "written outside the output"


def same_under_poison(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The result, required to be the same bits whatever the memory held before: hence also twice the same."""
    results = []
    for poison in (torch.nan, 3e7):
        with guarded(poison):
            results.append(call())
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.isnan(), second.isnan())
        assert torch.equal(first.nan_to_num(12345.0), second.nan_to_num(12345.0))
    return results[0]


def error(ours: Tensor, exact: Tensor) -> float:
    """Largest deviation from the fp64 reference; infinities and NaN must stand in the same places."""
    ours = ours.double()
    finite = exact.isfinite()
    torch.testing.assert_close(ours[~finite], exact[~finite], equal_nan=True)
    return (ours - exact)[finite].abs().max().item() if finite.any() else 0.0


def assert_as_exact_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """Error <= 2 x torch's in the same dtype, plus 1e-6 (fp32) or 1e-3 (bf16)."""
    slack = 1e-3 if torchs.dtype == torch.bfloat16 else 1e-6
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape
    assert error(ours, exact) <= 2 * error(torchs, exact) + slack, (error(ours, exact), error(torchs, exact))
