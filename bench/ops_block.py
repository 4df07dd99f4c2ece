"""Contests of a decoder block's small operations, forward and backward, and of the optimizer.

Bytes: every input read and every output written once, in both directions. Unit: a copy of as many bytes.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import OURS, Contest, Outputs, Work, copying, gather
from bench.peers import need
from cai_fast import kernels

TOKENS = {"tiny": (5, 32, 48), "cpu": (1024, 512, 1536), "gpu": (8192, 4096, 14336)}  # tokens, hidden, inner
HEADS = {"tiny": (2, 1, 16), "cpu": (8, 4, 64), "gpu": (32, 8, 128)}  # query heads, key heads, head size
PARAMETERS = {"tiny": 300, "cpu": 2**20, "gpu": 2**28}
EPS, LEARNING_RATE = 1e-5, 1e-4


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _tensors(device: torch.device, seed: int, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Random tensors; all but the last take gradients: it is the upstream gradient."""
    g = torch.Generator(device).manual_seed(seed)
    made = [torch.randn(shape, generator=g, device=device).to(_dtype(device)) for shape in shapes]
    return (*(t.requires_grad_() for t in made[:-1]), made[-1])


def both_ways(op: Callable[..., Tensor], names: tuple[str, ...]) -> Work:
    """Forward and backward of `op` over all inputs but the last, which is the upstream gradient."""

    def work(x: tuple[Tensor, ...]) -> Outputs:
        out = op(*x[:-1])
        grads = torch.autograd.grad(out, x[:-1], x[-1])
        return {"out": out, **{f"d_{name}": g for name, g in zip(names, grads, strict=True)}}

    return work


def _contest(
    op: str, size: str, inputs: list[tuple[Tensor, ...]], names: tuple[str, ...], ours: Callable[..., Tensor],
    eager: Callable[..., Tensor], others: dict[str, Callable[[], Work]], traffic: float, device: torch.device,
    compile: bool,
) -> Contest:  # fmt: skip
    work = both_ways(eager, names)
    others = dict(others)
    if compile:  # the operation alone: autograd.grad inside would break the graph
        others["torch.compile"] = lambda: both_ways(torch.compile(eager, dynamic=False), names)
    found, absent = gather(others)
    works = {"copy": copying(traffic, device), OURS: both_ways(ours, names), "eager": work, **found}

    def exact(x: tuple[Tensor, ...]) -> Outputs:
        return work(tuple(t.detach().double().requires_grad_(t.requires_grad) for t in x))

    return Contest(op, size, inputs, works, baseline="copy", exact=exact, bytes=traffic, absent=absent)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _residual(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """norm + sum, so that both outputs of the residual form carry a gradient."""
    total = x + residual
    return _rms_norm(total, weight) + total


def _residual_ours(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    norm, total = kernels.rms_norm(x, weight, EPS, residual)
    return norm + total


def rms_norm(scale: str, device: torch.device, compile: bool) -> Iterator[Contest]:
    tokens, width, _ = TOKENS[scale]
    element, shape = torch.empty(0, dtype=_dtype(device)).element_size(), (tokens, width)
    size = f"{tokens}x{width}"

    def liger() -> Work:
        need("liger-kernel", "liger_kernel", gpu=True)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return both_ways(lambda x, w: LigerRMSNormFunction.apply(x, w, EPS), ("x", "weight"))

    others = {
        "F.rms_norm": lambda: both_ways(lambda x, w: F.rms_norm(x, (width,), w, EPS), ("x", "weight")),
        "Liger": liger,
    }
    inputs = [_tensors(device, s, shape, (width,), shape) for s in range(2)]
    yield _contest(
        "rms_norm", size, inputs, ("x", "weight"), lambda x, w: kernels.rms_norm(x, w, EPS), _rms_norm, others,
        5.0 * tokens * width * element, device, compile,
    )  # fmt: skip
    inputs = [_tensors(device, s, shape, shape, (width,), shape) for s in range(2)]
    yield _contest(
        "rms_norm + residual", size, inputs, ("x", "residual", "weight"), _residual_ours, _residual, {},
        9.0 * tokens * width * element, device, compile,
    )  # fmt: skip


def rope(scale: str, device: torch.device, compile: bool) -> Contest:
    tokens = TOKENS[scale][0]
    queries, keys, width = HEADS[scale]
    angles = torch.randn(tokens, width // 2, generator=torch.Generator(device).manual_seed(9), device=device)
    cos, sin = angles.cos(), angles.sin()

    def joined(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: torch.cat(rotate(q, k), 1)

    def half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Hugging Face's apply_rotary_pos_emb."""
        c, s = (torch.cat((t, t), -1)[:, None].to(q.dtype) for t in (cos, sin))
        return q * c + half(q) * s, k * c + half(k) * s

    shapes = ((tokens, queries, width), (tokens, keys, width), (tokens, queries + keys, width))
    element = torch.empty(0, dtype=_dtype(device)).element_size()
    return _contest(
        "rope", f"{tokens} tokens, {queries}+{keys} heads of {width}", [_tensors(device, s, *shapes) for s in range(2)],
        ("q", "k"), joined(lambda q, k: kernels.rope(q, k, cos, sin)), joined(plain), {},
        4.0 * tokens * (queries + keys) * width * element, device, compile,
    )  # fmt: skip


def swiglu(scale: str, device: torch.device, compile: bool) -> Contest:
    tokens, _, inner = TOKENS[scale]

    def liger() -> Work:
        need("liger-kernel", "liger_kernel", gpu=True)
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return both_ways(LigerSiLUMulFunction.apply, ("gate", "up"))

    inputs = [_tensors(device, s, *[(tokens, inner)] * 3) for s in range(2)]
    element = torch.empty(0, dtype=_dtype(device)).element_size()
    return _contest(
        "swiglu", f"{tokens}x{inner}", inputs, ("gate", "up"), kernels.swiglu, lambda g, u: F.silu(g) * u,
        {"Liger": liger}, 8.0 * tokens * inner * element, device, compile,
    )  # fmt: skip


def adamw(scale: str, device: torch.device) -> Contest:
    """One step over bf16 weights with the exact fp32 remainder: 12 bytes read and written and 2 read per parameter."""
    count = PARAMETERS[scale]
    g = torch.Generator(device).manual_seed(0)
    master, grad = torch.randn(count, generator=g, device=device), torch.randn(count, generator=g, device=device)
    grad = grad.bfloat16()
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    works: dict[str, Work] = {"copy": copying(26.0 * count, device)}
    results: dict[str, Callable[[], Outputs]] = {}

    def compact(name: str, moments: torch.dtype) -> None:
        param, remainder = kernels.split_master(master)
        first, second = (torch.zeros(count, dtype=moments, device=device) for _ in range(2))
        works[name] = lambda _: kernels.adamw_step(
            param, remainder, grad, first, second, lr=LEARNING_RATE, step=1, **settings
        )
        results[name] = lambda: {"weights": kernels.join_master(param, remainder)}

    def fused(name: str, dtype: torch.dtype) -> None:
        parameter = master.to(dtype, copy=True).requires_grad_()
        parameter.grad = grad.to(dtype)
        optimizer = torch.optim.AdamW([parameter], lr=LEARNING_RATE, fused=True, **settings)
        works[name] = lambda _: optimizer.step()
        results[name] = lambda: {"weights": parameter.detach()}

    compact(OURS, torch.float32)
    compact("cai_fast, bf16 moments", torch.bfloat16)
    fused("torch fused, fp32 weights", torch.float32)
    fused("torch fused, bf16 weights", torch.bfloat16)

    def exact(_: object) -> Outputs:
        wide = master.double().requires_grad_()
        wide.grad = grad.double()
        torch.optim.AdamW([wide], lr=LEARNING_RATE, **settings).step()
        return {"weights": wide.detach()}

    return Contest(
        "adamw_step", f"{count} parameters", [None], works, baseline="copy", bytes=26.0 * count, results=results,
        exact=exact if count < 2**24 else None,
    )  # fmt: skip


def gradient_norm(scale: str, device: torch.device) -> Contest:
    """The norm of a model's gradients in bf16: 64 matrices of one size."""
    count = PARAMETERS[scale] // 64

    def make(seed: int) -> list[Tensor]:
        g = torch.Generator(device).manual_seed(seed)
        return list(torch.randn(64, count, generator=g, device=device).bfloat16().unbind())

    works: dict[str, Work] = {
        "copy": copying(128.0 * count, device),
        OURS: lambda x: {"norm": kernels.gradient_norm(x)},
        "torch get_total_norm, in bf16": lambda x: {"norm": torch.nn.utils.get_total_norm(x)},
    }
    return Contest(
        "gradient_norm", f"64 x {count}", [make(s) for s in range(2)], works, baseline="copy", bytes=128.0 * count,
        exact=lambda x: {"norm": torch.stack(x).double().norm()},
    )  # fmt: skip


def contests(scale: str, device: torch.device, *, compile: bool = True) -> Iterator[Contest]:
    """Contests at the sizes of `scale` (tiny, cpu, gpu)."""
    yield from rms_norm(scale, device, compile)
    yield rope(scale, device, compile)
    yield swiglu(scale, device, compile)
    yield adamw(scale, device)
    yield gradient_norm(scale, device)
