"""rms_norm of x + residual on Triton: one launch forward, one backward, for either gradient or both."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cai_fast.kernels import rms_norm
from cai_fast.kernels.triton import block as kernel
from guarded import assert_as_exact_as_torch, same_under_poison
from mutants import mutant
from torch import Tensor

SHAPES = [(1, 1), (131, 20), (3, 5, 129), (2, 64), (0, 8)]
DTYPES = (torch.float32, torch.bfloat16)
USED = ["both", "norm", "sum"]
Norm = Callable[[Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]]


def by(backend: str) -> Norm:
    return lambda x, weight, eps, residual: rms_norm(x, weight, eps, residual, backend=backend)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(x, weight, residual) and the gradients of (norm, sum)."""
    inputs = [normal(*shape, seed=1), normal(shape[-1], seed=2), 0.3 * normal(*shape, seed=3)]
    upstreams = [normal(*shape, seed=4), normal(*shape, seed=5)]
    return [x.to(dtype) for x in inputs], [x.to(dtype) for x in upstreams]


def results(norm: Norm, inputs: list[Tensor], upstreams: list[Tensor], used: str = "both") -> tuple[Tensor, ...]:
    """Norm and sum, then the gradients of x, weight (where the norm is used) and residual."""
    x, weight, residual = inputs = [x.detach().requires_grad_() for x in inputs]
    out = norm(x, weight, 1e-5, residual)
    chosen = {"both": slice(0, 2), "norm": slice(0, 1), "sum": slice(1, 2)}[used]
    wanted = [x, residual] if used == "sum" else inputs
    return *(o.detach() for o in out), *torch.autograd.grad(out[chosen], wanted, upstreams[chosen])


def check_exactness(norm: Norm, shape: tuple[int, ...], dtype: torch.dtype, used: str) -> None:
    inputs, upstreams = problem(shape, dtype)
    ours, plain = (results(n, inputs, upstreams, used) for n in (norm, by("chunked")))
    exact = results(by("reference"), [x.double() for x in inputs], [u.double() for u in upstreams], used)
    for triple in zip(ours, plain, exact, strict=True):
        assert_as_exact_as_torch(*triple)
    total = inputs[0] + inputs[2]
    assert torch.equal(ours[1], total), "the sum is torch's, bit by bit"
    alone = rms_norm(total, inputs[1], 1e-5, backend="triton")
    assert torch.equal(ours[0], alone), "the norm is that of the rounded sum"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("used", USED)
def test_forward_and_backward_are_as_exact_as_torch(shape: tuple[int, ...], dtype: torch.dtype, used: str) -> None:
    check_exactness(by("triton"), shape, dtype, used)


def check_memory(norm: Norm, shape: tuple[int, ...], used: str) -> None:
    """Strided inputs, upstream gradients of stride 0, poisoned and guarded memory: the bits of plain inputs."""
    inputs, upstreams = problem(shape, torch.float32)
    expanded = [u[..., :1].expand(shape) for u in upstreams]
    strided = [torch.stack((x, x + 1), -1)[..., 0] for x in inputs]
    plain = results(by("triton"), inputs, [u.contiguous() for u in expanded], used)
    ours = same_under_poison(lambda: results(norm, strided, expanded, used))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("shape,used", [((131, 20), "both"), *(((3, 5, 129), used) for used in USED)], ids=str)
def test_strides_and_poison(shape: tuple[int, ...], used: str) -> None:
    check_memory(by("triton"), shape, used)


def test_gradcheck() -> None:
    inputs = [x.double().requires_grad_() for x in problem((3, 5), torch.float64)[0]]
    assert torch.autograd.gradcheck(lambda x, w, r: by("triton")(x, w, 1e-5, r), inputs, atol=1e-6)


def test_parts_that_need_no_gradient() -> None:
    (x, weight, residual), (upstream, _) = problem((7, 20), torch.float32)
    expected = results(by("triton"), [x, weight, residual], [upstream, upstream], "norm")
    for frozen, of in ((0, [1, 2]), (1, [0, 2]), (2, [0, 1])):
        inputs = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, weight, residual))]
        out, _ = by("triton")(inputs[0], inputs[1], 1e-5, inputs[2])
        gradients = torch.autograd.grad(out, [inputs[i] for i in of], upstream)
        assert all(torch.equal(g, expected[2 + i]) for g, i in zip(gradients, of, strict=True))


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_a_residual_of_another_shape_or_dtype_is_refused(backend: str) -> None:
    x, weight = torch.zeros(3, 4), torch.ones(4)
    for residual in (torch.zeros(1, 4), torch.zeros(3, 4).bfloat16()):
        with pytest.raises(ValueError, match=r"rms_norm: residual must have x's shape \[3, 4\]"):
            rms_norm(x, weight, 1e-5, residual, backend=backend)


def exactness(dtype: torch.dtype, used: str = "both") -> Callable[[Norm], None]:
    return lambda norm: check_exactness(norm, (131, 20), dtype, used)


def memory(norm: Norm) -> None:
    check_memory(norm, (3, 5, 129), "both")


FAULTS = {
    "the residual is left out": ("other=0.0).to(accumulate)).to(", "other=0.0).to(accumulate) * 0).to(",
                                 exactness(torch.float32)),
    "the norm is that of the sum before rounding": (
        "value = total.to(accumulate)", "value += tl.load(residual + at, mask=inside, other=0.0).to(accumulate)",
        exactness(torch.bfloat16),
    ),
    "the norm is that of x": ("value = total.to(accumulate)", "value = value", exactness(torch.float32)),
    "the sum is not stored at its end": (
        "tl.store(total_out + at, total, mask=inside)", "tl.store(total_out + at, total, mask=column < width - 1)",
        exactness(torch.float32),
    ),
    "the sum is stored beyond its end": (
        "tl.store(total_out + at, total, mask=inside)", "tl.store(total_out + at, total, mask=column <= width)", memory
    ),
    "the sum's gradient is lost": ("SUMMED=d_total is not None", "SUMMED=False", exactness(torch.float32)),
    "the sum's gradient is scaled": (
        "dx = (up * w - normal * mean) * rstd\n        if SUMMED:\n            dx +=",
        "dx = (up * w - normal * mean) * rstd\n        if SUMMED:\n            dx += rstd *", exactness(torch.bfloat16),
    ),
    "the sum's gradient is taken for dense": (
        "d_total.contiguous(), dx", "d_total, dx", memory
    ),
    "the residual has another gradient than x": (
        "return d_total, None, None, d_total", "return d_total, None, None, 1.01 * d_total",
        exactness(torch.float32, "sum"),
    ),
    "x is saved instead of the sum": ("x if total is None else total, weight", "x, weight", exactness(torch.float32)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(tmp_path: Path, fault: str) -> None:
    old, new, check = FAULTS[fault]

    def norm(module: ModuleType) -> Norm:
        return lambda x, weight, eps, residual: module.rms_norm(x, weight, eps, residual)

    with mutant(kernel, tmp_path, old, new) as module:
        with pytest.raises(AssertionError):
            check(norm(module))
