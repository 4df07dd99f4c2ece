"""AdamW for bf16 weights with exact fp32 masters, and the global norm of gradients.

A master weight is kept as its nearest bf16, which is the model's parameter, and a 16-bit remainder: 4 bytes, where a
bf16 copy beside an fp32 master takes 6, and an update far below one bf16 step is still never lost. With a bf16
gradient and bf16 moments the optimizer holds 10 bytes a weight and moves 18 in a step.

bf16 moments are rounded stochastically (Gupta et al. 2015, arXiv 1502.02551; Zamirai et al. 2021, arXiv 2010.06192):
to nearest, exp_avg_sq could not follow, for with beta2 = 0.999 it changes by less than half a bf16 step. The random
bits are a function of (key, index of the weight) alone, the same on every backend.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import check_number, lazy_triton, select
from .sampling import philox4x32

QUARTER = 1024
"""Weights that are four blocks of this many share their Philox counters: one counter gives four 32-bit words, and the
n-th goes to the n-th of those blocks. Part of the definition of a result, hence not to be tuned."""
_PIECE = 2**20  # weights whose temporaries the chunked backend holds at once; a multiple of 4 QUARTER
_HALF, _LOW = 0x8000, 0xFFFF
_NAN = 0x7FC0  # as bf16


class Settings(NamedTuple):
    """Hyper-parameters of one step, which is the `step`-th, counted from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


class Factors(NamedTuple):
    """What an update multiplies by, computed in fp64: m += mean_weight (g - m), v = square_decay v + square_weight g^2,
    w -= decay w + size m / (root sqrt(v) + eps)."""

    mean_weight: float
    square_decay: float
    square_weight: float
    size: float
    root: float
    eps: float
    decay: float


def factors(s: Settings) -> Factors:
    """The bias corrections are folded into `size` and `root`."""
    root = 1.0 / math.sqrt(1.0 - s.beta2**s.step)
    return Factors(
        1.0 - s.beta1, s.beta2, 1.0 - s.beta2, s.lr / (1.0 - s.beta1**s.step), root, s.eps, s.lr * s.weight_decay
    )


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """(nearest bf16, remainder int16) of an fp32 tensor; `join_master` gives back the bits of all but NaN.

    Ties go away from zero, not to even as in a conversion: then bits - (high << 16) lies in [-2^15, 2^15) and every
    int16 means one master. To even, a tie rounded down would leave +2^15, which int16 cannot hold. The largest fp32
    numbers have infinity for their nearest bf16, and still join. A NaN becomes one whose remainder is 0.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"split_master: expected float32, got {master.dtype}")
    bits = master.view(torch.int32)
    high = (bits + _HALF) >> 16
    low = bits - (high << 16)
    nan = master.isnan()  # a payload of ones would carry into the sign: a NaN that the model would see as -0
    high, low = high.masked_fill(nan, _NAN), low.masked_fill(nan, 0)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 masters of bf16 parameters and their int16 remainders, exactly."""
    if (param.dtype, remainder.dtype) != (torch.bfloat16, torch.int16) or param.shape != remainder.shape:
        raise ValueError(
            f"join_master: expected bfloat16 and int16 of one shape, got {param.dtype} {list(param.shape)} and "
            f"{remainder.dtype} {list(remainder.shape)}"
        )
    return ((param.view(torch.int16).int() << 16) + remainder).view(torch.float32)


def random_words(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """[count] 32-bit words (as int64) of the weights from `start`, a multiple of 4 QUARTER."""
    group = 4 * QUARTER
    counter = torch.arange(start // 4, (start + -(-count // group) * group) // 4, device=device)
    zero, halves = torch.zeros_like(counter), torch.tensor([[key & 0xFFFFFFFF], [key >> 32]], device=device)
    words = philox4x32((counter & 0xFFFFFFFF, counter >> 32, zero, zero), (halves[0], halves[1]))
    return torch.stack(words).view(4, -1, QUARTER).transpose(0, 1).reshape(-1)[:count]


def _store(moment: Tensor, value: Tensor, random: Tensor | None) -> None:
    """Write an fp32 moment; as bf16 it is rounded away from zero with the probability that makes it unbiased.

    random: int in [0, 2^16). A carry out of the low half is that event; infinity has none, NaN stays NaN.
    """
    if random is not None:
        high = ((value.view(torch.int32) + random.int()) >> 16).masked_fill(value.isnan(), _NAN)
        value = high.to(torch.int16).view(torch.bfloat16)
    moment.copy_(value)


def _random(moment: Tensor, key: int, start: int) -> tuple[Tensor | None, Tensor | None]:
    """The 16 random bits of each weight's exp_avg and exp_avg_sq: the low and the high half of its word."""
    if moment.dtype == torch.float32:
        return None, None
    words = random_words(key, start, moment.numel(), moment.device)
    return (words & _LOW).view(moment.shape), (words >> 16).view(moment.shape)


def _reference(
    param: Tensor, remainder: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, clip: Tensor | None,
    s: Settings, key: int,
) -> None:  # fmt: skip
    w, g = join_master(param, remainder), grad.float() * (1.0 if clip is None else clip)
    m = s.beta1 * exp_avg.float() + (1 - s.beta1) * g
    v = s.beta2 * exp_avg_sq.float() + (1 - s.beta2) * g * g
    m_hat, v_hat = m / (1 - s.beta1**s.step), v / (1 - s.beta2**s.step)
    w = w - s.lr * s.weight_decay * w - s.lr * m_hat / (v_hat.sqrt() + s.eps)
    for target, value in zip((param, remainder), split_master(w), strict=True):
        target.copy_(value)
    for target, value, random in zip((exp_avg, exp_avg_sq), (m, v), _random(exp_avg, key, 0), strict=True):
        _store(target, value, random)


def _chunked(
    param: Tensor, remainder: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, clip: Tensor | None,
    s: Settings, key: int,
) -> None:  # fmt: skip
    f, grad = factors(s), grad.reshape(-1)
    for start in range(0, grad.numel(), _PIECE):
        p, low, m_out, v_out = (t.view(-1)[start : start + _PIECE] for t in (param, remainder, exp_avg, exp_avg_sq))
        g = grad[start : start + _PIECE].float()
        g = g if clip is None else g * clip
        m, v = m_out.float().lerp_(g, f.mean_weight), v_out.float().mul_(f.square_decay)  # fp32 moments: in place
        v.addcmul_(g, g, value=f.square_weight)
        w = join_master(p, low)
        change = w * f.decay
        change.addcdiv_(m, v.sqrt().mul_(f.root).add_(f.eps), value=f.size)
        high, rest = split_master(w.sub_(change))
        p.copy_(high)
        low.copy_(rest)
        for target, value, random in zip((m_out, v_out), (m, v), _random(m_out, key, start), strict=True):
            if random is not None:
                _store(target, value, random)


_STEP = {"reference": _reference, "chunked": _chunked, "triton": lazy_triton("adamw", "adamw_step")}


@torch.no_grad()
def adamw_step(
    param: Tensor,
    remainder: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    clip: Tensor | None = None,
    key: int = 0,
    backend: str = "auto",
) -> None:
    """One AdamW step in place (Loshchilov and Hutter 2019), as torch.optim.AdamW takes it on the fp32 masters.

    param bf16 and remainder int16 of one shape are the masters (`split_master`); grad bf16 or fp32, any strides;
    exp_avg, exp_avg_sq both fp32, or both bf16 and then rounded stochastically with the bits of `key` in [0, 2^63),
    which should differ between parameters and steps. step counts from 1. clip: an fp32 scalar on the same device that
    multiplies the gradient, so that clipping by a norm needs no pass of its own and nothing is read on the host.
    """
    _check_step(param, remainder, grad, exp_avg, exp_avg_sq)
    for name, value, low in (("lr", lr, 0), ("eps", eps, 0), ("weight_decay", weight_decay, 0)):
        check_number("adamw_step", name, value, low)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_step: betas must be two numbers in [0, 1), got {betas}")
    if not isinstance(step, int) or not isinstance(key, int) or step < 1 or not 0 <= key < 2**63:
        raise ValueError(f"adamw_step: expected step >= 1 and key in [0, 2^63), got step {step}, key {key}")
    if clip is not None and (not isinstance(clip, Tensor) or clip.numel() != 1 or clip.dtype != torch.float32):
        raise ValueError(f"adamw_step: clip must be one float32 number, got {clip!r}")
    settings = Settings(*map(float, (lr, *betas, eps, weight_decay)), step)  # an int would be compiled into the kernel
    implementation = select("adamw_step", _STEP, backend, param.device)
    if param.numel():
        implementation(param.detach(), remainder, grad.detach(), exp_avg, exp_avg_sq, clip, settings, key)
        # A kernel's writes go past autograd, whose version counters say whether something was made with these weights.
        torch.autograd.graph.increment_version((param, remainder, exp_avg, exp_avg_sq))


def _check_step(param: Tensor, remainder: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    half, full = torch.bfloat16, torch.float32
    allowed = {
        "param": (param, (half,)), "remainder": (remainder, (torch.int16,)), "grad": (grad, (half, full)),
        "exp_avg": (exp_avg, (half, full)), "exp_avg_sq": (exp_avg_sq, (exp_avg.dtype,)),
    }  # fmt: skip
    for name, (tensor, dtypes) in allowed.items():
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(f"adamw_step: expected {name} of type {expected}, got {tensor.dtype}")
        if tensor.shape != param.shape:
            raise ValueError(f"adamw_step: expected {name} {list(param.shape)}, got {list(tensor.shape)}")
        if tensor is not grad and not tensor.is_contiguous():
            raise ValueError(f"adamw_step: {name} is updated in place and must be contiguous")


def _norm_reference(grads: Sequence[Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().float()


def _norm_chunked(grads: Sequence[Tensor]) -> Tensor:
    pieces = [piece for g in grads for piece in g.reshape(-1).split(_PIECE)]
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms))


_NORM = {"reference": _norm_reference, "chunked": _norm_chunked, "triton": lazy_triton("adamw", "gradient_norm")}


@torch.no_grad()
def gradient_norm(grads: Sequence[Tensor | None], *, backend: str = "auto") -> Tensor:
    """Global L2 norm: an fp32 scalar on the gradients' device; 0 on the CPU if there are none. None is passed over.

    Squares are summed in fp32, by fixed blocks and then over these in order: the same bits every time, whatever the
    strides. Nothing is read on the host.
    """
    present = [g.detach() for g in grads if g is not None and g.numel()]
    if not present:
        return torch.zeros((), dtype=torch.float32)
    return select("gradient_norm", _NORM, backend, present[0].device)(present)
