"""python -m pytest bench/bench_head.py --benchmark-enable: the CPU head, chunked against reference.

The sizes are the toy's (V 300) and a small real vocabulary. Compare the rows of one size: the ratio counts, not the
milliseconds of the machine.
"""

import pytest
import torch
from torch import Tensor

from cai_fast import kernels

SIZES = {"toy": (1500, 96, 300), "small": (512, 256, 32768)}


def inputs(size: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, width, vocab = SIZES[size]
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g) * width**-0.5).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=g)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", ["cross entropy", "policy", "kl"])
def test_loss_and_gradient(benchmark, loss: str, size: str, backend: str) -> None:
    hidden, weight, targets = inputs(size)
    old = torch.full(targets.shape, -5.0)
    works = {
        "cross entropy": lambda: kernels.linear_cross_entropy(hidden, weight, targets, backend=backend),
        "policy": lambda: kernels.linear_policy_loss(hidden, weight, targets, old, old, backend=backend).loss,
        "kl": lambda: kernels.linear_kl(hidden, weight, hidden.flip(0), weight, backend=backend).kl.sum(),
    }
    benchmark.group = f"{loss}, {size}"
    benchmark(lambda: torch.autograd.grad(works[loss](), (hidden, weight)))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("size", SIZES)
def test_logprob(benchmark, size: str, backend: str) -> None:
    hidden, weight, targets = inputs(size)
    benchmark.group = f"logprob, {size}"
    with torch.no_grad():
        benchmark(lambda: kernels.linear_logprob(hidden, weight, targets, backend=backend))
