import pytest
import torch
import torch.nn.functional as F
from cai_fast.kernels import rms_norm, rope, swiglu

BACKENDS = ("reference", "chunked")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 8), (0, 4)])
def test_rms_norm(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, backend=backend), F.rms_norm(x, shape[-1:], weight, 1e-5))
    if x.numel():
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, backend=backend), (x, weight))


def test_rms_norm_by_hand() -> None:
    out = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_with_residual_returns_the_sum(backend: str) -> None:
    x, residual = torch.randn(2, 6, 8, dtype=torch.float64)
    x.requires_grad_()
    weight = torch.randn(8, dtype=torch.float64)
    normal, total = rms_norm(x, weight, 1e-6, residual, backend=backend)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normal, F.rms_norm(x + residual, (8,), weight, 1e-6))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-6, residual, backend=backend), (x,))


def test_rms_norm_keeps_half_inputs_and_fp32_statistics() -> None:
    x = (torch.randn(16, 64) * 300).half()
    out = rms_norm(x, torch.ones(64, dtype=torch.half), 1e-6)
    assert out.dtype == torch.half
    torch.testing.assert_close(out, F.rms_norm(x.float(), (64,), eps=1e-6).half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_rotates_each_pair(backend: str) -> None:
    q, k = torch.randn(5, 4, 6, dtype=torch.float64), torch.randn(5, 2, 6, dtype=torch.float64)
    angle = torch.rand(5, 3, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    for x, out in zip((q, k), rope(q, k, cos, sin, backend=backend), strict=True):
        turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1))
    full = rope(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(full, rope(q, k, cos, sin, backend=backend), strict=True))
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, backend=backend), (q, k))


def test_rope_of_views_and_of_position_zero() -> None:
    packed = torch.randn(5, 3 * 4 * 6)
    q, k = packed[:, :24].view(5, 4, 6), packed[:, 24:48].view(5, 4, 6)
    assert not q.is_contiguous()
    for x, out in zip((q, k), rope(q, k, torch.ones(5, 3), torch.zeros(5, 3)), strict=True):
        assert torch.equal(out, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu(backend: str) -> None:
    gate, up = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(swiglu(gate, up, backend=backend), gate / (1 + (-gate).exp()) * up)
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u, backend=backend), (gate, up))
