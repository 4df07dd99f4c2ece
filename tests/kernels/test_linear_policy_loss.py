import math

import pytest
import torch
from cai_fast.kernels import linear_logprob, linear_policy_loss
from torch import Tensor

BACKENDS = ("reference", "chunked")


def problem(head, rows: int = 70, vocab: int = 20, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    hidden, weight, targets = head(rows, 6, vocab, dtype)
    g = torch.Generator().manual_seed(5)
    logprob = linear_logprob(hidden, weight, targets, backend="reference").logprob.detach()
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "old_logprob": logprob + 0.3 * torch.randn(rows, generator=g, dtype=dtype),
        "advantage": torch.randn(rows, generator=g, dtype=dtype),
        "ref_logprob": logprob + 0.5 * torch.randn(rows, generator=g, dtype=dtype),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_by_hand(backend: str) -> None:
    # One logit is fixed, so the policy's probabilities are 1/4 and 3/4.
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    old = torch.tensor([math.log(0.25), math.log(0.5)])  # ratios 1 and 1.5
    out = linear_policy_loss(
        hidden,
        weight,
        torch.tensor([0, 1]),
        old,
        torch.tensor([2.0, 1.0]),
        ref_logprob=torch.tensor([math.log(0.5), math.log(0.75)]),
        kl_coef=0.1,
        scale=0.5,
        backend=backend,
    )
    k2 = math.log(2) ** 2 / 2
    assert out.loss.item() == pytest.approx(0.5 * (-2.0 - 1.2 + 0.1 * k2))
    stats = {name: value.item() for name, value in out.stats.items()}
    entropy = 2 * (0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert stats == pytest.approx(
        {"pg": -3.2, "kl": k2, "clipped": 1.0, "ratio": 2.5, "ratio_sq": 3.25, "entropy": entropy, "count": 2.0}
    )
    torch.testing.assert_close(out.logprob, torch.tensor([math.log(0.25), math.log(0.75)]))
    # Row 0: dloss/dlogprob = 0.5 (-2 + 0.1 * -(log 2)); dlogprob/dhidden = -(3/4) log 3. Row 1 is clipped, d = 0.
    (d_hidden,) = torch.autograd.grad(out.loss, hidden)
    expected = 0.5 * (-2 - 0.1 * math.log(2)) * -0.75 * math.log(3)
    torch.testing.assert_close(d_hidden, torch.tensor([[expected], [0.0]]), atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("ref", [True, False])
def test_matches_the_reference_with_ignored_rows(head, estimator: str, temperature: float, ref: bool) -> None:
    inputs = problem(head)
    inputs["targets"][::9] = -1
    weights = torch.rand(70, dtype=torch.float64) * (torch.arange(70) % 5 != 2)
    if not ref:
        del inputs["ref_logprob"]
    results = []
    for backend in BACKENDS:
        out = linear_policy_loss(
            **inputs,
            weights=weights,
            kl_coef=0.3 * ref,
            kl_estimator=estimator,
            temperature=temperature,
            scale=0.1,
            backend=backend,
        )
        gradients = torch.autograd.grad(3 * out.loss, (inputs["hidden"], inputs["weight"]))
        results.append((out.loss, out.logprob, *out.stats.values(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradcheck(head, estimator: str) -> None:
    inputs = problem(head, 34, 5)
    hidden, weight = inputs.pop("hidden"), inputs.pop("weight")
    assert torch.autograd.gradcheck(
        lambda h, w: linear_policy_loss(h, w, **inputs, kl_coef=0.3, kl_estimator=estimator).loss, (hidden, weight)
    )


@pytest.mark.parametrize("rows,width,vocab", [(1, 96, 300), (45, 96, 300), (1500, 96, 300), (40, 1024, 50)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_exactly_one_with_equal_weights(head, rows: int, width: int, vocab: int, temperature: float) -> None:
    hidden, weight, targets = head(rows, width, vocab, torch.float32)
    with torch.no_grad():
        old = linear_logprob(hidden, weight, targets, temperature=temperature).logprob
    # The update sees a subset of the rows, in another chunk position: still the same bits.
    for index in (torch.arange(rows), torch.arange(rows - 1, -1, -2)):
        out = linear_policy_loss(
            hidden[index], weight, targets[index], old[index], torch.randn(index.numel()), temperature=temperature
        )
        assert torch.equal(out.logprob, old[index])
        assert out.stats["ratio"].item() == out.stats["count"].item() == index.numel()
        assert out.stats["ratio_sq"].item() == index.numel() and out.stats["clipped"].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "advantage,shift,active",
    [(1.0, 0.5, False), (1.0, -0.5, True), (-1.0, 0.5, True), (-1.0, -0.5, False), (1.0, 0.05, True), (0.0, 0.5, None)],
)
def test_clip_on_both_sides(head, backend: str, advantage: float, shift: float, active: bool | None) -> None:
    hidden, weight, targets = head(1, 4, 6)
    old = linear_logprob(hidden, weight, targets).logprob.detach() - shift
    out = linear_policy_loss(hidden, weight, targets, old, torch.tensor([advantage]).double(), backend=backend)
    ratio = math.exp(shift)
    bounded = min(max(ratio, 0.8), 1.2)
    assert out.loss.item() == pytest.approx(max(-advantage * ratio, -advantage * bounded), abs=1e-12)
    (d_hidden,) = torch.autograd.grad(out.loss, hidden)
    assert bool(d_hidden.any()) is bool(active)
    assert out.stats["clipped"].item() == (active is False)


def test_at_the_bound_itself_the_gradient_flows() -> None:
    # Probability 1/2 against 1/4: the ratio is 2 up to rounding, and 1 + (ratio - 1) is the ratio itself.
    hidden = torch.tensor([[1.0]], dtype=torch.float64)
    weight = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    target, advantage = torch.tensor([0]), torch.ones(1, dtype=torch.float64)
    old = torch.tensor([math.log(0.25)], dtype=torch.float64)
    ratio = (linear_logprob(hidden, weight, target).logprob - old).exp().item()
    for backend in BACKENDS:
        out = linear_policy_loss(hidden, weight, target, old, advantage, clip_coef=ratio - 1, backend=backend)
        (d_weight,) = torch.autograd.grad(out.loss, weight)
        torch.testing.assert_close(d_weight, torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
        assert out.stats["clipped"].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_huge_log_ratio_stays_finite_and_has_no_gradient(head, backend: str) -> None:
    hidden, weight, targets = head(3, 4, 6)
    old = linear_logprob(hidden, weight, targets).logprob.detach() - torch.tensor([1000.0, 0.0, -1000.0])
    out = linear_policy_loss(
        hidden,
        weight,
        targets,
        old,
        -torch.ones(3).double(),
        ref_logprob=old + 2000,
        kl_coef=1e-3,
        kl_estimator="k3",
        backend=backend,
    )
    assert out.stats["ratio"].item() == pytest.approx(math.exp(20) + 1)
    (d_hidden,) = torch.autograd.grad(out.loss, hidden)
    assert torch.isfinite(out.loss) and torch.isfinite(d_hidden).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_kept(head, backend: str, rows: int) -> None:
    hidden, weight, targets = head(rows, 4, 6)
    zeros = torch.zeros(rows).double()
    out = linear_policy_loss(hidden, weight, targets, zeros, zeros, weights=zeros, backend=backend)
    assert out.loss.item() == 0 and not any(v.item() for v in out.stats.values()) and not out.logprob.any()
    assert not any(g.any() for g in torch.autograd.grad(out.loss, (hidden, weight)))


def test_k1_is_refused_and_kl_needs_a_reference(head) -> None:
    inputs = problem(head, 3)
    with pytest.raises(ValueError, match="zero-mean gradient"):
        linear_policy_loss(**inputs, kl_estimator="k1")
    del inputs["ref_logprob"]
    with pytest.raises(ValueError, match="kl_coef = 0.1 needs ref_logprob"):
        linear_policy_loss(**inputs, kl_coef=0.1)
