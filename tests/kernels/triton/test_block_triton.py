from collections.abc import Callable

import pytest
import torch
from cai_fast.kernels import rms_norm, rope, swiglu
from cai_fast.kernels.triton import block as kernel
from guarded import assert_as_exact_as_torch, same_under_poison
from sm90 import Case, check, compile_all
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def norm(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-5, backend=backend)


def rotation(backend: str, q: Tensor, k: Tensor) -> Tensor:
    angle = torch.arange(q.shape[0])[:, None] * torch.logspace(0, -2, q.shape[-1] // 2)
    return torch.cat(rope(q, k, angle.cos(), angle.sin(), backend=backend), 1)


def glu(backend: str, gate: Tensor, up: Tensor) -> Tensor:
    return swiglu(gate, up, backend=backend)


OPERATIONS: list[tuple[Callable[[str, Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = [
    (norm, (1, 1), (1,)),
    (norm, (131, 20), (20,)),
    (norm, (3, 5, 129), (129,)),
    (norm, (0, 8), (8,)),
    (rotation, (7, 4, 16), (7, 1, 16)),
    (rotation, (3, 3, 20), (3, 2, 20)),
    (rotation, (0, 2, 8), (0, 2, 8)),
    (glu, (1, 1), (1, 1)),
    (glu, (9, 257), (9, 257)),
    (glu, (0, 3), (0, 3)),
]


def results(operation: Callable, backend: str, inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = operation(backend, *inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation,first,second", OPERATIONS)
def test_forward_and_backward_are_as_exact_as_torch(operation, first, second, dtype: torch.dtype) -> None:
    inputs = [normal(*first).to(dtype), normal(*second, seed=9).to(dtype)]
    upstream = normal(*operation("chunked", *inputs).shape, seed=5).to(dtype)
    exact = results(operation, "reference", [x.double() for x in inputs], upstream.double())
    plain = results(operation, "chunked", inputs, upstream)
    for triple in zip(results(operation, "triton", inputs, upstream), plain, exact, strict=True):
        assert_as_exact_as_torch(*triple)


@pytest.mark.parametrize("operation,first,second", OPERATIONS)
def test_strides_and_poison(operation, first, second) -> None:
    inputs = [normal(*first).float(), normal(*second, seed=9).float()]
    upstream = normal(*operation("chunked", *inputs).shape).float()[..., :1].expand_as(operation("chunked", *inputs))
    plain = results(operation, "triton", inputs, upstream.contiguous())
    strided = [torch.stack((x, x + 1), -1)[..., 0] for x in inputs]
    if upstream.numel():
        ours = same_under_poison(lambda: results(operation, "triton", strided, upstream))
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    "operation,first,second", [(norm, (3, 17), (17,)), (rotation, (2, 2, 6), (2, 1, 6)), (glu, (3, 17), (3, 17))]
)
def test_gradcheck(operation, first, second) -> None:
    inputs = [normal(*first).requires_grad_(), normal(*second, seed=9).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: operation("triton", *x), inputs, atol=1e-6)


def test_a_row_does_not_depend_on_the_batch() -> None:
    x, weight = normal(40, 96).bfloat16(), normal(96).bfloat16()
    assert torch.equal(norm("triton", x[7:8], weight), norm("triton", x, weight)[7:8])
    q, k = normal(9, 4, 16).bfloat16(), normal(9, 2, 16).bfloat16()
    assert torch.equal(rotation("triton", q[:3], k[:3]), rotation("triton", q, k)[:3])
    assert torch.equal(glu("triton", x[7:8], x[8:9]), glu("triton", x[:39], x[1:])[7:8])


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found are a rotation whose gradient turns the same way, and a block that ends before the row does."""
    rotated = kernel._rotated
    monkeypatch.setattr(kernel, "_rotated", lambda x, cos, sin, sign: rotated(x, cos, sin, 1))
    with pytest.raises(AssertionError):
        test_forward_and_backward_are_as_exact_as_torch(*OPERATIONS[4], torch.bfloat16)
    monkeypatch.undo()
    monkeypatch.setattr(kernel.triton, "next_power_of_2", lambda n: 1 << n.bit_length() - 1)
    with pytest.raises(AssertionError):
        test_forward_and_backward_are_as_exact_as_torch(*OPERATIONS[1], torch.float32)


def norm_cases() -> list[Case]:
    """Without and with a residual, in the launches' own blocks and warps."""
    half = dict.fromkeys
    forward = half(("x", "residual", "weight", "total_out", "out"), "*bf16") | {"rstd_out": "*fp32"}
    forward |= {"width": "i32", "eps": "fp32"}
    backward = half(("x", "weight", "upstream", "d_total", "dx_out"), "*bf16")
    backward |= half(("rstd_in", "dw_out"), "*fp32") | half(("rows", "width", "share"), "i32")
    cases = []
    for width, used in ((4096, False), (8192, True)):
        options = kernel._row(width)
        for name, signature, flag in (
            ("block:_norm_forward", forward, "RESIDUAL"),
            ("block:_norm_backward", backward, "SUMMED"),
        ):
            constants = {flag: used, "BLOCK": options["BLOCK"]}
            cases.append(Case(name, signature, constants, options["num_warps"], aligned=("width",)))
    return cases


def test_sm_90(tmp_path) -> None:
    half = dict.fromkeys
    strides = ("x_token", "x_head", "table_token")
    rotate = half(("x", "cos", "sin", "out"), "*bf16") | half(("heads", "half", *strides), "i32")
    options = {"x_column": 1, "table_column": 1, "sign": -1, "HEADS": 32, "HALF": 64, "WIDE": False}
    flat = {"WIDE": False, "ELEMENTS": kernel.ELEMENTS}
    glu_forward = half(("gate", "up", "out"), "*bf16") | {"total": "i32"}
    glu_backward = half(("gate", "up", "upstream", "d_gate", "d_up"), "*bf16") | {"total": "i64"}
    cases = [
        *norm_cases(),
        Case("block:_rotate", rotate, options, aligned=("half", *strides)),
        Case("block:_swiglu_forward", glu_forward, flat),
        Case("block:_swiglu_backward", glu_backward, flat),
    ]
    for report in compile_all(cases, tmp_path):
        check(report)
