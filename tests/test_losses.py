"""Losses against hand calculation, and their independence of how a batch is split."""

import math

import pytest
import torch
from tiny import alone, gradients, relative_difference, tiny_model

from cai_fast import losses
from cai_fast.batching import Example, pack, pack_targets

EXAMPLES = [
    Example(str(i), [1, *range(2, 3 + i)], [7 + i, 9, 11 + i, 2][: 1 + i % 4], weight=1.0 + i % 2) for i in range(9)
]


def test_sft_loss_by_hand() -> None:
    model = tiny_model()
    examples = [Example("a", [1, 5], [6, 7]), Example("b", [3], [9], weight=3.0)]
    loss, stats = losses.sft_loss(model, pack_targets(examples), 1 / 5)
    expected = 0.0
    for e in examples:
        for k, target in enumerate(e.target_ids):
            context = [*e.prompt_ids, *e.target_ids[:k]]
            hidden = model(pack([context]))[-1]
            expected -= e.weight * (hidden @ model.lm_head_weight.t()).log_softmax(-1)[target].item()
    assert loss.item() == pytest.approx(expected / 5, rel=1e-5)
    total, count = stats["loss"]
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(count) == 5


@pytest.mark.parametrize("split", [[9], [4, 5], [1] * 9, [2, 6, 1]])
def test_sft_gradient_does_not_depend_on_the_split(split: list[int]) -> None:
    scale = 1 / sum(e.weight * len(e.target_ids) for e in EXAMPLES)
    model = tiny_model()
    losses.sft_loss(model, pack_targets(EXAMPLES), scale)[0].backward()
    whole = gradients(model)
    model.zero_grad()
    start = 0
    for size in split:
        losses.sft_loss(model, pack_targets(EXAMPLES[start : start + size]), scale)[0].backward()
        start += size
    assert relative_difference(gradients(model), whole) <= 1e-6


def test_preference_loss_by_hand() -> None:
    model = tiny_model(head="score")
    pairs = [([1, 5, 2], [1, 5, 6, 2]), ([3, 2], [4, 2])]
    prob_a, weights = torch.tensor([0.8, 0.0]), torch.tensor([1.0, 2.0])
    loss, stats = losses.preference_loss(model, pack([s for p in pairs for s in p]), prob_a, weights, 1 / 3)
    expected, right = 0.0, 0.0
    for pair, p, w in zip(pairs, prob_a.tolist(), weights.tolist(), strict=True):
        a, b = (losses.scores(model, pack([s])).item() for s in pair)
        sigma = 1 / (1 + math.exp(b - a))
        expected -= w * (p * math.log(sigma) + (1 - p) * math.log(1 - sigma))
        right += w * ((a > b) == (p > 0.5))
    assert loss.item() == pytest.approx(expected / 3, rel=1e-5)
    assert float(stats["accuracy"][0]) == right
    assert float(stats["accuracy"][1]) == 3


def test_preference_gradient_vanishes_where_the_model_agrees() -> None:
    model = tiny_model(head="score")
    packed = pack([[1, 5, 2], [1, 6, 2]])
    a, b = losses.scores(model, packed).tolist()
    agreed = torch.tensor([1 / (1 + math.exp(b - a))])
    losses.preference_loss(model, packed, agreed, torch.ones(1), 1.0)[0].backward()
    assert max(float(g.abs().max()) for g in gradients(model).values()) < 1e-6


def test_scores_are_read_at_the_last_token() -> None:
    model = tiny_model(head="score")
    together = losses.scores(model, pack([[1, 5, 2], [7, 8, 9, 2]]))
    for row, sequence in enumerate(([1, 5, 2], [7, 8, 9, 2])):
        hidden = model(pack([sequence]))
        assert together[row].item() == pytest.approx((hidden[-1] @ model.score.weight[0]).item(), rel=1e-5)


def test_policy_loss_by_hand() -> None:
    model = tiny_model()
    batch = pack_targets([Example("a", [1, 5], [6, 7, 2])])
    logits = model(batch.packed)[batch.rows] @ model.lm_head_weight.t()
    logp = logits.log_softmax(-1)[range(3), [6, 7, 2]].tolist()
    ratios, advantages = [1.0, 1.5, 1.5], [2.0, 1.0, -1.0]
    old = torch.tensor([p - math.log(r) for p, r in zip(logp, ratios, strict=True)])
    terms = losses.PolicyTerms(old, torch.tensor(advantages), torch.zeros(3))
    hidden = model(batch.packed)[batch.rows]
    loss, stats = losses.policy_loss(
        hidden, model.lm_head_weight, batch, terms, clip_coef=0.2, temperature=1.0, scale=1 / 3
    )
    # ratio 1.5 gains nothing beyond 1.2 for a good token, and is pulled back from 1.5 for a bad one
    assert loss.item() == pytest.approx((-2.0 - 1.2 + 1.5) / 3, rel=1e-5)
    assert float(stats["clipfrac"][0]) == 1
    assert float(stats["approx_kl"][0]) == pytest.approx(2 * (0.5 - math.log(1.5)), rel=1e-4)


def test_value_loss_and_token_rewards_by_hand() -> None:
    loss, _ = losses.value_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]), 0.5)
    assert loss.item() == pytest.approx((1 + 4) / 2 / 2)
    rewards = losses.token_rewards(
        torch.tensor([10.0, 20.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]), 0.1
    )
    assert rewards.tolist() == pytest.approx([-0.1, 10 - 0.2, 20 - 0.3])


def test_whitening_and_moments() -> None:
    values = torch.randn(1000) * 3 + 1e4
    white = losses.whiten(values, alone())
    assert float(white.double().mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.double().std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert losses.whiten(torch.tensor([3.0]), alone()).tolist() == [0.0], "one value has no spread"
    returns = torch.randn(50)
    assert losses.explained_variance(returns, returns, alone()) == pytest.approx(1)
    assert losses.explained_variance(torch.zeros(50), returns, alone()) == pytest.approx(0)
    assert math.isnan(losses.explained_variance(torch.zeros(2), torch.ones(2), alone()))
    assert losses.standardisation(torch.tensor([1.0, 3.0]), alone()) == (2.0, 1.0)
    assert losses.standardisation(torch.tensor([5.0, 5.0]), alone()) == (5.0, 1.0)
