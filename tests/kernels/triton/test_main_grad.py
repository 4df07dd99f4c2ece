"""`weight.main_grad`: the head's weight gradient added straight to the caller's buffer, in both backends."""

from collections.abc import Callable

import pytest
import torch
from cai_fast.kernels import common, linear_cross_entropy, linear_kl, linear_logprob, linear_policy_loss
from torch import Tensor

ROWS, WIDTH, VOCAB = 9, 6, 37
BACKENDS = ("chunked", "triton")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "chunk_rows", lambda vocab, device: 4)


def problem(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets and numbers [3, N]; the weight is the same for every seed."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    hidden = torch.randn(ROWS, WIDTH, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=fixed).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (ROWS,), generator=g), torch.randn(3, ROWS, generator=g)


def cross_entropy(h: Tensor, w: Tensor, targets: Tensor, numbers: Tensor, backend: str) -> Tensor:
    return linear_cross_entropy(h, w, targets, weights=numbers[0].abs(), scale=0.2, backend=backend)


def policy(h: Tensor, w: Tensor, targets: Tensor, numbers: Tensor, backend: str) -> Tensor:
    return linear_policy_loss(h, w, targets, numbers[0] - 4, numbers[1], scale=0.2, backend=backend).loss


def logprob(h: Tensor, w: Tensor, targets: Tensor, numbers: Tensor, backend: str) -> Tensor:
    """Differentiated with an upstream gradient for each row, which its backward knows."""
    out = linear_logprob(h, w, targets, entropy=True, backend=backend)
    return (out.logprob * numbers[0] + out.entropy * numbers[1]).sum()


def kl(h: Tensor, w: Tensor, targets: Tensor, numbers: Tensor, backend: str) -> Tensor:
    return (linear_kl(h, w, 0.5 * h.detach(), w.detach(), backend=backend).kl * numbers[0]).sum()


def mean_kl(h: Tensor, w: Tensor, targets: Tensor, numbers: Tensor, backend: str) -> Tensor:
    return linear_kl(h, w, 0.5 * h.detach(), w.detach(), backend=backend).kl.mean()


LOSSES = (cross_entropy, policy)
OPS = (*LOSSES, logprob, kl, mean_kl)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_two_micro_batches_add_up_to_autograds_gradient(op: Callable, backend: str, dtype: torch.dtype) -> None:
    batches = [problem(dtype, seed) for seed in (0, 1)]
    weight = batches[0][1]
    weight.main_grad = torch.ones(weight.shape, dtype=common.accumulate_dtype(dtype))
    exact = torch.ones(weight.shape, dtype=torch.float64)
    for h, w, targets, numbers in batches:
        op(h, weight, targets, numbers, backend).backward()
        h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
        d_hidden, d_weight = torch.autograd.grad(op(h64, w64, targets, numbers, "reference"), (h64, w64))
        exact += d_weight
        bound = 4e-3 if dtype == torch.bfloat16 else 1e-7  # the numbers are fp32
        assert (h.grad - d_hidden).norm() <= bound * d_hidden.norm()
        assert (weight.main_grad - exact).norm() <= bound * (exact - 1).norm()
    assert weight.grad is None


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_head_and_a_pass_without_gradients_leave_it_alone(op: Callable, backend: str) -> None:
    h, w, targets, numbers = problem(torch.float32)
    w.main_grad = torch.zeros_like(w)
    with torch.no_grad():
        op(h, w, targets, numbers, backend)
    frozen = w.detach()
    frozen.main_grad = torch.zeros(1)  # not even looked at
    (2 * op(h, frozen, targets, numbers, backend)).backward()
    assert h.grad.any() and not w.main_grad.any() and w.grad is None and not frozen.main_grad.any()


@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_upstream_gradients_and_a_second_backward_are_refused(op: Callable, backend: str) -> None:
    h, w, targets, numbers = problem(torch.float32)
    w.main_grad = torch.zeros_like(w)
    with pytest.raises(RuntimeError, match="main_grad holds the gradient of the loss itself"):
        (2 * op(h, w, targets, numbers, backend)).backward()
    loss = op(h, w, targets, numbers, backend)
    (loss + h.sum()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wrong,message",
    [
        (torch.zeros(VOCAB, WIDTH).bfloat16(), "Got torch.bfloat16"),
        (torch.zeros(WIDTH, VOCAB), r"Got torch.float32 of shape \[6, 37\] on cpu"),
        (torch.zeros(VOCAB, WIDTH, device="meta"), "on meta"),
    ],
    ids=["dtype", "shape", "device"],
)
def test_an_unfit_buffer_is_named(op: Callable, backend: str, wrong: Tensor, message: str) -> None:
    h, w, targets, numbers = problem(torch.bfloat16)
    w.main_grad = wrong
    expected = r"weight.main_grad must be torch.float32 of shape \[37, 6\] on cpu. .*"
    with pytest.raises(ValueError, match=expected + message):
        op(h, w, targets, numbers, backend)


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first chunk that overwrites the buffer, and a gradient that autograd receives as well."""
    original = common.HeadGrad.__init__

    def overwriting(self: common.HeadGrad, *arguments: object) -> None:
        original(self, *arguments)
        self._empty = True

    def given_twice(self: common.HeadGrad, *arguments: object) -> None:
        original(self, *arguments)
        self._own = True

    for fault in (overwriting, given_twice):
        monkeypatch.setattr(common.HeadGrad, "__init__", fault)
        for op in LOSSES:
            with pytest.raises(AssertionError):
                test_two_micro_batches_add_up_to_autograds_gradient(op, "chunked", torch.float64)
