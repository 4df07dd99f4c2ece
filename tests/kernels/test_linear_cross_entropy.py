import math

import pytest
import torch
import torch.nn.functional as F
from cai_fast.kernels import linear_cross_entropy
from torch import Tensor

pytestmark = pytest.mark.usefixtures("small_chunks")
BACKENDS = ("reference", "chunked")


def grads(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_by_hand(backend: str) -> None:
    # logits are (0, log 3): probabilities 1/4 and 3/4.
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]], requires_grad=True)
    weights = torch.tensor([1.0, 2.0])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), weights=weights, scale=0.5, backend=backend)
    assert loss.item() == pytest.approx(0.5 * (math.log(4) + 2 * math.log(4 / 3)))
    d_hidden, d_weight = grads(loss, hidden, weight)
    # dlogits = scale * weight * (p - onehot): row 0 (-3/8, 3/8), row 1 (1/4, -1/4)
    torch.testing.assert_close(d_hidden, torch.tensor([[0.375 * math.log(3)], [-0.25 * math.log(3)]]))
    torch.testing.assert_close(d_weight, torch.tensor([[-0.125], [0.125]]))


@pytest.mark.parametrize("rows,vocab", [(1, 257), (31, 2), (127, 1000), (129, 17), (64, 1)])
def test_matches_torch_in_fp64(head, rows: int, vocab: int) -> None:
    hidden, weight, targets = head(rows, 9, vocab)
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum") * 0.3
    loss = linear_cross_entropy(hidden, weight, targets, scale=torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(grads(loss, hidden, weight), grads(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_do_not_count_even_when_nan(head, backend: str) -> None:
    hidden, weight, targets = head(70, 8, 40)
    keep = torch.ones(70, dtype=torch.bool)
    keep[[0, 33, 50, 69]] = False
    targets = targets.clone()
    targets[0], targets[33], targets[50] = -1, 40, -100
    weights = torch.rand(70, dtype=torch.float64) + 0.1
    weights[69] = 0.0
    poisoned = torch.where(keep[:, None], hidden, torch.nan).detach().requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, targets, weights=weights, backend=backend)
    rows = F.cross_entropy(hidden[keep] @ weight.t(), targets[keep], reduction="none")
    expected = (rows * weights[keep]).sum()
    torch.testing.assert_close(loss, expected)
    d_hidden, d_weight = grads(loss, poisoned, weight)
    e_hidden, e_weight = grads(expected, hidden, weight)
    torch.testing.assert_close(d_hidden, e_hidden)
    torch.testing.assert_close(d_weight, e_weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["no rows", "all ignored"])
def test_nothing_to_learn_from_is_zero_with_zero_gradients(head, backend: str, case: str) -> None:
    hidden, weight, targets = head(0 if case == "no rows" else 5, 4, 7)
    loss = linear_cross_entropy(hidden, weight, targets - 100, backend=backend)
    assert loss.item() == 0.0
    assert all(not g.any() for g in grads(loss, hidden, weight))


def test_gradcheck(head) -> None:
    hidden, weight, targets = head(37, 3, 6)
    weights = torch.rand(37, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: 3.0 * linear_cross_entropy(h, w, targets, weights=weights, scale=0.2), (hidden, weight)
    )


def test_shifting_all_logits_changes_nothing(head) -> None:
    hidden, weight, targets = head(40, 8, 30, torch.float32)
    wide = torch.cat((hidden, torch.ones(40, 1)), 1)
    shift = [torch.cat((weight, torch.full((30, 1), c)), 1) for c in (0.0, 100.0, -100.0)]
    losses = torch.stack([linear_cross_entropy(wide, w, targets, scale=1 / 40) for w in shift])
    torch.testing.assert_close(losses, losses[:1].expand(3), atol=1e-4, rtol=0)


def test_extreme_temperatures_of_logits_stay_finite(head) -> None:
    hidden, weight, targets = head(40, 8, 30, torch.float32)
    for factor in (1e-4, 1e3):
        loss = linear_cross_entropy(hidden * factor, weight, targets)
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads(loss, hidden, weight))


def test_non_contiguous_inputs_and_expanded_upstream(head) -> None:
    hidden, weight, targets = head(50, 6, 20)
    wide = torch.zeros(50, 12, dtype=torch.float64)
    wide[:, 3:9] = hidden.detach()
    strided = wide[:, 3:9].detach().requires_grad_()
    transposed = weight.detach().t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    loss = linear_cross_entropy(strided, transposed, targets).expand(4).sum()
    expected = 4 * F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    for ours, theirs in zip(grads(loss, strided, transposed), grads(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs_receive_no_gradient(head, frozen: str) -> None:
    hidden, weight, targets = head(40, 6, 20)
    h = hidden.detach() if frozen in ("hidden", "both") else hidden
    w = weight.detach() if frozen in ("weight", "both") else weight
    loss = linear_cross_entropy(h, w, targets)
    assert loss.requires_grad == (frozen != "both")
    if frozen == "weight":
        torch.testing.assert_close(
            *grads(loss, hidden), *grads(F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"), hidden)
        )


def test_backward_twice_gives_the_same_gradient(head) -> None:
    hidden, weight, targets = head(40, 6, 20)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_runs_are_bitwise_equal(head) -> None:
    hidden, weight, targets = head(300, 32, 500, torch.float32)
    runs = [linear_cross_entropy(hidden, weight, targets) for _ in range(2)]
    assert torch.equal(*runs)
    assert all(torch.equal(a, b) for a, b in zip(*(grads(r, hidden, weight) for r in runs), strict=True))


def test_half_precision_is_as_exact_as_its_inputs(head) -> None:
    hidden, weight, targets = head(70, 64, 100, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = F.cross_entropy(h @ w.t(), targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(grads(loss, hidden, weight), grads(expected, h, w), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() <= 4e-3 * theirs.norm()


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"linear_cross_entropy: expected hidden \[N, H\].*\[4, 3\].*\[5, 2\]"):
        linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected targets of shape \[4\], got \[3\]"):
        linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(3, dtype=torch.int64))


def test_the_backward_frees_the_gradients_it_gave(head) -> None:
    """A loss that is still held, as the last micro-batch's is, must not hold a [V, H] gradient as well."""
    hidden, weight, targets = head(5, 4, 9)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        _ = loss.grad_fn.saved_tensors
