import math

import pytest
import torch
import torch.nn.functional as F
from cai_fast.kernels import preference_labels, preference_loss, score_options

BACKENDS = ("reference", "chunked")
NAN = math.nan


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_by_hand(backend: str) -> None:
    # Token probabilities before normalisation 1, 2, 3, 4, 5; option 0 = tokens {0, 3}, option 1 = {1}.
    weight = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]).log()
    out = score_options(torch.ones(1, 1), weight, torch.tensor([[0, 3], [1, -1]]), backend=backend)
    torch.testing.assert_close(out.exp(), torch.tensor([[5 / 7, 2 / 7]]))


def test_options_match_the_full_softmax(head) -> None:
    hidden, weight, _ = head(50, 8, 30)
    ids = torch.tensor([[3, 7, -1], [29, -1, -1], [0, 1, 2]])
    p = (hidden @ weight.t()).softmax(-1)
    mass = torch.stack([p[:, [3, 7]].sum(1), p[:, 29], p[:, [0, 1, 2]].sum(1)], 1)
    expected = (mass / mass.sum(1, keepdim=True)).log()
    for backend in BACKENDS:
        torch.testing.assert_close(score_options(hidden, weight, ids, backend=backend), expected)
    assert torch.autograd.gradcheck(lambda h, w: score_options(h, w, ids), (hidden[:3], weight))


def test_a_comparison_does_not_depend_on_its_neighbours(head) -> None:
    hidden, weight, _ = head(100, 96, 300, torch.float32)
    ids = torch.tensor([[5, -1], [9, 11]])
    together = score_options(hidden, weight, ids)
    for i in (0, 50, 99):
        assert torch.equal(score_options(hidden[i : i + 1], weight, ids), together[i : i + 1])
    assert score_options(hidden[:0], weight, ids).shape == (0, 2)


def test_labels_unswap_average_and_measure_position_bias() -> None:
    first = torch.tensor([0.9, 0.1]).log()  # the judge says letter A with 0.9 in both orders: pure position bias
    fair = torch.stack((torch.tensor([0.8, 0.2]), torch.tensor([0.2, 0.8]))).log()  # response_a at 0.8 either way
    out = preference_labels(torch.stack((torch.stack((first, first)), fair))[None])
    torch.testing.assert_close(out.per_principle, torch.tensor([[[0.9, 0.1], [0.8, 0.8]]]))
    torch.testing.assert_close(out.position_bias, torch.tensor([[0.8, 0.0]]))
    torch.testing.assert_close(out.prob_a, torch.tensor([0.65]))


def test_labels_with_absent_orders_and_principles() -> None:
    logprob = torch.full((2, 2, 2, 2), NAN)
    logprob[0, 1, 1] = torch.tensor([0.3, 0.7]).log()
    out = preference_labels(logprob)
    torch.testing.assert_close(out.prob_a, torch.tensor([0.7, NAN]), equal_nan=True)
    assert out.position_bias.isnan().all() and out.per_principle.isnan().sum() == 7


def test_clamp_bounds_each_principle_after_averaging_the_orders() -> None:
    def asked(order_0: float, order_1: float) -> torch.Tensor:
        """Log-probabilities [2, 2] of a judge that gives response_a these probabilities."""
        return torch.tensor([[order_0, 1 - order_0], [1 - order_1, order_1]]).log()

    out = preference_labels(torch.stack((asked(0.99, 0.01), asked(0.9, 0.9)))[None], clamp=(0.4, 0.6))
    torch.testing.assert_close(out.prob_a, torch.tensor([0.55]))  # mean of 0.5 and 0.6
    torch.testing.assert_close(out.per_principle[0, 0], torch.tensor([0.99, 0.01]))


def test_swapping_the_responses_reflects_the_label() -> None:
    logprob = torch.randn(9, 3, 2, 2).log_softmax(-1)
    # With a and b exchanged, what was order 0 is order 1 of the new comparison, letters unchanged.
    total = preference_labels(logprob).prob_a + preference_labels(logprob.flip(2)).prob_a
    torch.testing.assert_close(total, torch.ones(9))


def test_loss_by_hand() -> None:
    reward_a = torch.tensor([math.log(3.0), 0.0, 5.0], requires_grad=True)
    reward_b = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    prob_a, weights = torch.tensor([1.0, 0.25, 0.9]), torch.tensor([1.0, 2.0, 0.0])
    loss, stats = preference_loss(reward_a, reward_b, prob_a, weights=weights, scale=0.5)
    total = math.log(4 / 3) + 2 * math.log(2)
    assert loss.item() == pytest.approx(0.5 * total)
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(
        {"loss": total, "accuracy": 2.0, "margin": math.log(3), "count": 3.0}
    )
    d_a, d_b = torch.autograd.grad(loss, (reward_a, reward_b))
    torch.testing.assert_close(d_a, torch.tensor([-0.125, 0.25, 0.0]))
    torch.testing.assert_close(d_b, -d_a)
    assert not any(v.requires_grad for v in stats.values())


def test_loss_is_binary_cross_entropy_and_finite_far_out() -> None:
    a, b, y = (torch.randn(50, dtype=torch.float64) for _ in range(3))
    y = y.sigmoid()
    expected = F.binary_cross_entropy_with_logits(a - b, y, reduction="sum")
    torch.testing.assert_close(preference_loss(a, b, y).loss, expected)
    torch.testing.assert_close(preference_loss(a, b, y).loss, preference_loss(b, a, 1 - y).loss)
    far = preference_loss(torch.tensor([1e4]), torch.tensor([-1e4]), torch.tensor([0.0]))
    assert far.loss.item() == pytest.approx(2e4)
    assert preference_loss(a[:0], b[:0], y[:0]).loss.item() == 0
