import math

import pytest
import torch
from cai_fast.kernels import linear_kl, linear_logprob, linear_policy_loss

pytestmark = pytest.mark.usefixtures("small_chunks")
BACKENDS = ("reference", "chunked")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_by_hand(backend: str) -> None:
    weight = torch.tensor([[0.0], [math.log(3.0)]])  # policy 1/4, 3/4
    ref_weight = torch.tensor([[0.0], [0.0]])  # reference 1/2, 1/2
    hidden = torch.ones(2, 1)
    out = linear_kl(hidden, weight, hidden, ref_weight, torch.tensor([0, 1]), backend=backend)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    torch.testing.assert_close(out.kl, torch.full((2,), kl))
    torch.testing.assert_close(out.logprob, torch.tensor([math.log(0.25), math.log(0.75)]))
    torch.testing.assert_close(out.ref_logprob, torch.full((2,), math.log(0.5)))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("upstream", ["uniform", "rows"])
@pytest.mark.parametrize("frozen", [False, True])
def test_matches_torch_in_fp64(head, temperature: float, upstream: str, frozen: bool) -> None:
    hidden, weight, targets = head(70, 6, 30)
    ref_hidden, ref_weight, _ = head(70, 9, 30, seed=1)
    targets = torch.where(torch.arange(70) % 11 == 0, 30, targets)
    inputs = (hidden,) if frozen else (hidden, weight)
    factor = torch.rand(70, dtype=torch.float64)
    p, q = ((h @ w.t() / temperature).log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    expected = (p.exp() * (p - q)).sum(-1)
    head_weight = weight.detach() if frozen else weight
    for backend in BACKENDS:
        out = linear_kl(hidden, head_weight, ref_hidden, ref_weight, targets, temperature=temperature, backend=backend)
        torch.testing.assert_close(out.kl, expected)
        valid = targets < 30
        for got, z in ((out.logprob, p), (out.ref_logprob, q)):
            torch.testing.assert_close(got[valid], z.detach().gather(1, targets.clamp(max=29)[:, None])[valid, 0])
            assert not got[~valid].any()
        for ours, theirs in zip(
            torch.autograd.grad((out.kl * factor).sum() if upstream == "rows" else out.kl.mean(), inputs),
            torch.autograd.grad(
                (expected * factor).sum() if upstream == "rows" else expected.mean(), inputs, retain_graph=True
            ),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_gradcheck(head) -> None:
    hidden, weight, _ = head(34, 3, 5)
    ref_hidden, ref_weight, _ = head(34, 3, 5, seed=1)
    factor = torch.rand(34, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: (linear_kl(h, w, ref_hidden, ref_weight, temperature=0.8).kl * factor).sum(), (hidden, weight)
    )


def test_identical_models_have_exactly_no_divergence(head) -> None:
    hidden, weight, _ = head(300, 96, 300, torch.float32)
    out = linear_kl(hidden, weight, hidden, weight)
    assert not out.kl.any() and out.logprob is None and out.ref_logprob is None
    assert not any(g.any() for g in torch.autograd.grad(out.kl.sum(), (hidden, weight)))


def test_never_negative_and_exact_in_fp32(head) -> None:
    hidden, weight, _ = head(200, 16, 400, torch.float32)
    close = (hidden + 1e-3 * torch.randn(200, 16)).detach()
    out = linear_kl(hidden, weight, close, weight).kl
    z = [(h.double() @ weight.double().t()).log_softmax(-1) for h in (hidden, close)]
    assert (out >= -1e-6).all()
    torch.testing.assert_close(out.double(), (z[0].exp() * (z[0] - z[1])).sum(-1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(head, backend: str) -> None:
    hidden, weight, targets = head(0, 4, 5)
    out = linear_kl(hidden, weight, hidden, weight, targets, backend=backend)
    assert out.kl.shape == (0,)
    assert all(not g.any() for g in torch.autograd.grad(out.kl.sum(), (hidden, weight)))


def test_sampled_k2_gradient_is_on_average_the_exact_kl_gradient(head) -> None:
    """E_p[grad k2] = grad KL(p || q), while k3's expectation is the gradient of KL(q || p)."""
    hidden, weight, _ = head(1, 4, 6)
    _, ref_weight, _ = head(1, 4, 6, seed=3)
    ref_weight = (weight + 0.3 * ref_weight).detach()
    n = 60_000
    p = (hidden @ weight.t()).softmax(-1).detach()
    targets = torch.multinomial(p[0], n, replacement=True, generator=torch.Generator().manual_seed(0))
    rows = hidden.detach().expand(n, -1).contiguous()
    ref = linear_logprob(rows, ref_weight, targets).logprob.detach()
    old = linear_logprob(rows, weight, targets).logprob.detach()
    zero = torch.zeros(n, dtype=torch.float64)

    def sampled(estimator: str) -> torch.Tensor:
        out = linear_policy_loss(
            rows, weight, targets, old, zero, ref_logprob=ref, kl_coef=1.0, kl_estimator=estimator, scale=1 / n
        )
        return torch.autograd.grad(out.loss, weight)[0]

    exact = torch.autograd.grad(linear_kl(hidden, weight, hidden, ref_weight).kl.sum(), weight)[0]
    logp, logq = (hidden @ weight.t()).log_softmax(-1), (hidden @ ref_weight.t()).log_softmax(-1)
    reverse = torch.autograd.grad((logq.exp() * (logq - logp)).sum(), weight)[0]
    assert (exact - reverse).norm() > 0.1 * exact.norm()
    assert (sampled("k2") - exact).norm() < 0.03 * exact.norm()
    assert (sampled("k3") - reverse).norm() < 0.03 * exact.norm()


def test_models_of_other_vocabularies_are_refused(head) -> None:
    hidden, weight, _ = head(3, 4, 5)
    with pytest.raises(ValueError, match="equal N and V"):
        linear_kl(hidden, weight, hidden, torch.zeros(6, 4))
