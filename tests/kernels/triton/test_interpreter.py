"""What the repaired interpreter must get right before any other test of a kernel means something."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter import from_float32, to_float32
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy(source, target, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(target + at, value.to(target.dtype.element_ty), mask=at < n)


@triton.jit
def _matmul(a, b, c, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tile = at[:, None] * BLOCK + at[None, :]
    tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile), input_precision="ieee"))


@triton.jit
def _double(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(x + at, value + value)


def test_rounding_to_bf16_is_to_nearest_even() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=g) * torch.logspace(-44, 38, 5000)
    ties = (torch.arange(2000, dtype=torch.int32) << 15).add_(0x3F800000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45])
    source = torch.cat((values, ties, special))
    out = torch.empty(source.shape, dtype=torch.bfloat16)
    _copy[(1,)](source, out, source.numel(), BLOCK=1024)
    assert torch.equal(out.isnan(), source.isnan())
    assert torch.equal(out.nan_to_num(7.0).view(torch.int16), source.bfloat16().nan_to_num(7.0).view(torch.int16))
    bits = np.arange(2**16, dtype=np.uint16)
    finite = bits[np.isfinite(to_float32(bits))]
    assert (from_float32(to_float32(finite)) == finite).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_widening_is_exact(dtype: torch.dtype) -> None:
    source = torch.randn(100, dtype=torch.float64).to(dtype)
    out = torch.empty(100, dtype=torch.float32)
    _copy[(1,)](source, out, 100, BLOCK=64)
    assert torch.equal(out, source.float())


def test_dot_of_bf16() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(32, 32, generator=g).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    _matmul[(1,)](a, b, out, BLOCK=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), atol=1e-5, rtol=1e-5)


def test_arithmetic_in_bf16_is_refused() -> None:
    with pytest.raises(InterpreterError, match="convert to fp32 first"):
        _double[(1,)](torch.ones(16, dtype=torch.bfloat16), BLOCK=16)
