"""RLOO, GRPO and the KL estimators: advantages by hand, invariances, expectations over every answer there is."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from test_ppo import SCORES, arm_probs, examples, settings
from tiny import CONFIG, alone, gradients, log_probs, relative_difference, tiny_model
from torch import Tensor

from cai_fast import advantages, config
from cai_fast.batching import Example
from cai_fast.checkpoint import Checkpoints
from cai_fast.errors import InputError
from cai_fast.model import Model, ScalarHead, init_random
from cai_fast.policy_gradient import Critic, PolicyGradient, Rollouts

ALGORITHMS = ("ppo", "rloo", "grpo")
ESTIMATORS = ("k1", "k2", "k3", "exact")
GROUPS = [0, 3, 0, 3, 3, 0, 6, 6, 9, 9, 9, 9]  # of the twelve examples; interleaved, of 2, 3 and 4
Named = dict[str, Tensor]


def make(
    policy: Model | None = None, reference: Model | None = None, critic: Critic | None = None, **changes: object
) -> PolicyGradient:
    policy, reference = policy or tiny_model(2), reference or tiny_model(1)
    cfg = settings(**({"samples_per_prompt": 2, "algorithm": "rloo", "minibatches": 1} | changes))
    if cfg.network and critic is None:
        critic = Critic(ScalarHead(policy.config.hidden_size))
    return PolicyGradient(policy, reference.requires_grad_(False), critic, cfg, seed=0, dist=alone())


def measured(trainer: PolicyGradient, scores: Tensor = SCORES) -> Rollouts:
    rollouts = trainer.measure(examples(), 0)
    trainer.set_advantages(rollouts, scores, GROUPS)
    return rollouts


# Advantages


def test_advantages_by_hand() -> None:
    returns, groups = torch.tensor([1.0, 4.0, 10.0, 0.0, 5.0]), [0, 7, 0, 7, 0]
    torch.testing.assert_close(advantages.rloo(returns, groups), torch.tensor([-6.5, 4.0, 7.0, -4.0, -0.5]))
    wide, narrow = math.sqrt(122 / 9) + advantages.GROUP_EPS, 2 + advantages.GROUP_EPS
    expected = torch.tensor([-13 / 3 / wide, 2 / narrow, 14 / 3 / wide, -2 / narrow, -1 / 3 / wide])
    torch.testing.assert_close(advantages.grpo(returns, groups), expected)


@pytest.mark.parametrize("of", [advantages.rloo, advantages.grpo])
def test_equal_answers_teach_nothing(of: object) -> None:
    for level in (0.0, 0.1, -1e6):
        assert torch.equal(of(torch.full((3,), level), [1, 1, 1]), torch.zeros(3))
    rounding = of(torch.tensor([0.1, 0.1 + 1e-8, 0.1 + 2e-8], dtype=torch.float64), [1, 1, 1])
    assert float(rounding.abs().max()) < 1e-3, "rounding is no signal"
    assert of(torch.zeros(0), []).shape == (0,), "a rank without answers"


@pytest.mark.parametrize("of", [advantages.rloo, advantages.grpo])
def test_a_group_is_judged_by_itself(of: object) -> None:
    returns, index = torch.randn(12, generator=torch.Generator().manual_seed(0)), torch.tensor(GROUPS)
    before, other = of(returns, GROUPS), of(returns + 5.0 * (index == 3), GROUPS)
    torch.testing.assert_close(other, before, atol=1e-5, rtol=1e-5)  # a level that all share is no merit
    changed = of(returns * (1 + 2.0 * (index == 3)), GROUPS)
    assert torch.equal(changed[index != 3], before[index != 3])
    scaled = before * (1 + 2.0 * (index == 3)) if of is advantages.rloo else before
    torch.testing.assert_close(changed, scaled, atol=1e-3, rtol=1e-3)
    sums = torch.zeros(10).index_add_(0, index, before)
    torch.testing.assert_close(sums, torch.zeros(10), atol=1e-5, rtol=0)
    order = torch.tensor([7, 2, 9, 11, 0, 4, 1, 8, 3, 10, 6, 5])
    torch.testing.assert_close(of(returns[order], index[order].tolist()), before[order])


def test_one_answer_has_nothing_to_be_compared_with() -> None:
    for of in (advantages.rloo, advantages.grpo):
        with pytest.raises(ValueError, match="a group of one answer"):
            of(torch.zeros(3), [0, 0, 1])
        with pytest.raises(ValueError, match="2 groups for returns"):
            of(torch.zeros(3), [0, 0])
    for algorithm in ("rloo", "grpo"):
        with pytest.raises(
            InputError, match=f"{algorithm} compares .* rl.samples_per_prompt must be at least 2. Got 1"
        ):
            settings(algorithm=algorithm)
    with pytest.raises(ValueError, match="has no critic"):
        PolicyGradient(tiny_model(), tiny_model(), Critic(ScalarHead(32)),
                       settings(algorithm="rloo", samples_per_prompt=2), seed=0, dist=alone())  # fmt: skip


@pytest.mark.parametrize(("words", "named"), [
    ("rloo --rl.samples_per_prompt 2 --rl.critic pm --rl.gamma 0.9", "rloo does not read rl.critic, rl.gamma:"),
    ("grpo --rl.samples_per_prompt 2 --rl.dpo_beta 0.2", "grpo does not read rl.dpo_beta:"),
    ("ppo --rl.batch_pairs 8", "ppo does not read rl.batch_pairs:"),
    ("dpo --rl.kl_coef 0.2 --rl.lr 1e-4 --guards.kl off", "dpo does not read guards.kl, rl.kl_coef:"),
])  # fmt: skip
def test_what_an_algorithm_does_not_read_is_refused_before_any_work(words: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        config.load(["--rl.algorithm", *words.split()])
    config.load(["--stages", "sft", "--rl.algorithm", *words.split()])  # no business of another stage


@pytest.mark.parametrize("name", ["rloo", "grpo", "dpo"])
def test_the_toy_presets_change_nothing_but_the_algorithm(name: str) -> None:
    toy, other = config.load(["--config", "toy"]), config.load(["--config", f"toy-{name}"])
    assert other.rl.algorithm == name
    changed = {section for section in config.SECTIONS if getattr(toy, section) != getattr(other, section)}
    assert changed == {"rl"}
    if name != "dpo":
        assert other.rl.prompts_per_step * other.rl.samples_per_prompt == toy.rl.prompts_per_step


# Gradients; those of the first step are in test_rl_gradients.py


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_coefficient_is_applied(algorithm: str, estimator: str) -> None:
    found = []
    for kl_coef in (0.0, 0.3):
        trainer = make(algorithm=algorithm, kl_estimator=estimator, kl_coef=kl_coef)
        rollouts = measured(trainer)
        trainer._accumulate(rollouts.bins, 1 / rollouts.tokens[0])
        found.append(gradients(trainer.policy))
    assert relative_difference(*found) > 0.05


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_adaptive_coefficient_is_the_one_that_is_applied(estimator: str) -> None:
    fixed = make(kl_estimator=estimator, kl_coef=0.3 * 1.02)
    steered = make(kl_estimator=estimator, kl_coef=0.3, kl_target=0.1)
    steered.adapt_kl(10.0)
    for trainer in (fixed, steered):
        rollouts = measured(trainer)
        trainer._accumulate(rollouts.bins, 1 / rollouts.tokens[0])
    assert relative_difference(gradients(steered.policy), gradients(fixed.policy)) < 1e-5


@pytest.mark.parametrize(("algorithm", "estimator"), [("rloo", "k1"), ("grpo", "k3"), ("grpo", "exact")])
def test_gradient_does_not_depend_on_bins(algorithm: str, estimator: str) -> None:
    results = []
    for tokens in (16, 10_000):
        trainer = make(algorithm=algorithm, kl_estimator=estimator, micro_tokens=tokens)
        rollouts = measured(trainer)
        results.append((trainer._accumulate(rollouts.bins, 1 / rollouts.tokens[0]), gradients(trainer.policy)))
    assert relative_difference(results[0][1], results[1][1]) <= 1e-6
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_first_ratio_is_exactly_one(estimator: str) -> None:
    trainer = make(kl_estimator=estimator, algorithm="grpo", minibatches=2)
    stats = trainer.update(measured(trainer), 1.0)
    assert stats["first_ratio_gap"] == 0.0 and stats["approx_kl"] > 0
    assert ("kl_loss" in stats) == (estimator != "k1")
    assert "value_loss" not in stats and "critic_grad_norm" not in stats
    assert trainer.critic_optimizer is None and not any(name.startswith("critic") for name in trainer._tensors())


def test_statistics_say_how_much_there_is_to_learn_from() -> None:
    trainer = make(kl_coef=0.0)
    scores = torch.where(torch.tensor(GROUPS) == 9, 1.0, SCORES)
    stats = trainer.set_advantages(trainer.measure(examples(), 0), scores, GROUPS)
    assert stats["zero_advantage"] == pytest.approx(4 / 12)
    assert stats["returns"] == pytest.approx(float(scores.mean()))


@pytest.mark.parametrize(("algorithm", "estimator"), [("rloo", "k1"), ("grpo", "k3"), ("rloo", "exact")])
def test_resume_is_bitwise(algorithm: str, estimator: str, tmp_path: object) -> None:
    def iterate(trainer: PolicyGradient, steps: range) -> None:
        for step in steps:
            rollouts = trainer.measure(examples(), step)
            trainer.set_advantages(rollouts, SCORES, GROUPS)
            trainer.update(rollouts, 1.0)
            trainer.adapt_kl(float(rollouts.k1.mean()))

    whole, first, second = (make(algorithm=algorithm, kl_estimator=estimator, kl_target=0.01) for _ in range(3))
    iterate(whole, range(3))
    iterate(first, range(1))
    with Checkpoints(tmp_path, alone()) as states:
        first.save(states, 1, {})
        second.restore(states, states.latest())
    iterate(second, range(1, 3))
    assert all(map(torch.equal, whole.policy.parameters(), second.policy.parameters()))
    assert whole.kl_coef == second.kl_coef


# Expectations: which divergence each estimator's gradient is that of

V, LENGTH = 3, 2
ANSWERS = [list(tokens) for tokens in itertools.product(range(V), repeat=LENGTH)]


def small(seed: int) -> Model:
    return init_random(CONFIG.replace(vocab_size=V), seed, std=0.25)


@pytest.fixture(scope="module")
def divergences() -> dict[str, Named]:
    """Gradients in fp64 of what there is to follow, over every answer there is: the whole answer's KL either way, and
    per token at the states of fixed probabilities."""
    policy, reference = small(1), small(2).requires_grad_(False)
    p, q = (torch.stack([log_probs(m, Example("", [0], a), 1.0) for a in ANSWERS]) for m in (policy, reference))
    taken = torch.tensor(ANSWERS)[:, :, None]
    own, other = p.gather(2, taken).sum((1, 2)), q.gather(2, taken).sum((1, 2))
    visits = own.detach().exp()[:, None]  # of every state, by the answers that pass it
    wholes = {
        "whole reverse": (own.exp() * (own - other)).sum(),
        "whole forward": (other.exp() * (other - own)).sum(),
        "reverse": (visits * (p.exp() * (p - q)).sum(-1)).sum(),
        "forward": (visits * (q.exp() * (q - p)).sum(-1)).sum(),
    }
    names, parameters = zip(*policy.named_parameters(), strict=True)
    found = {}
    for name, value in wholes.items():
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        found[name] = dict(zip(names, grads, strict=True))
    return found


def expected_gradient(estimator: str) -> Named:
    """E[gradient] of the KL penalty alone, by the trainer, over all pairs of answers to one prompt."""
    trainer = make(small(1), small(2), kl_estimator=estimator, kl_coef=1.0, micro_tokens=1000)
    with torch.no_grad():
        taken = [
            log_probs(trainer.policy, Example("", [0], a), 1.0).gather(1, torch.tensor(a)[:, None]) for a in ANSWERS
        ]
    probability = [float(logs.sum().exp()) for logs in taken]
    for (a, p), (b, q) in _pairs(probability, estimator):
        rollouts = trainer.measure([Example("a", [0], a), Example("b", [0], b)], 0)
        trainer.set_advantages(rollouts, torch.zeros(2), [0, 0])
        trainer._accumulate(rollouts.bins, p * q / 2)
    return gradients(trainer.policy)


def _pairs(probability: list[float], estimator: str) -> Iterator[tuple[tuple[list[int], float], ...]]:
    """A penalty in the reward reaches the gradient through the other answer too; in the loss each answer is alone."""
    answers = list(zip(ANSWERS, probability, strict=True))
    if estimator == "k1":
        yield from itertools.product(answers, repeat=2)
    else:
        yield from (((a, p), (a, 1.0)) for a, p in answers)


@pytest.mark.parametrize(("estimator", "follows"), [
    ("k1", "whole reverse"), ("k2", "reverse"), ("k3", "forward"), ("exact", "reverse"),
])  # fmt: skip
def test_each_estimator_follows_its_divergence_and_no_other(
    estimator: str, follows: str, divergences: dict[str, Named]
) -> None:
    found = expected_gradient(estimator)

    def distance(name: str) -> float:
        a, b = (
            torch.cat([g.flatten().double() for _, g in sorted(grads.items())]) for grads in (found, divergences[name])
        )
        return float((a - b).norm() / b.norm())

    assert distance(follows) < 1e-4
    assert all(distance(name) > 0.05 for name in divergences if name != follows)


def optimum(estimator: str, q: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Of E[r] - beta KL over one token: q exp(r / beta) against KL(p||q); q beta / (level - r) against KL(q||p)."""
    if estimator != "k3":
        return torch.softmax(q.log() + rewards / beta, 0)
    low, high = rewards.max(), rewards.max() + beta
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if (q * beta / (level - rewards)).sum() > 1 else (low, level)
    return q * beta / (level - rewards)


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_penalised_bandit_reaches_the_optimum_of_its_divergence(estimator: str) -> None:
    rewards, pulls = torch.full((64,), 0.0), 128
    rewards[10], rewards[11] = 4.0, 3.0
    trainer = make(tiny_model(1, std=0.05), tiny_model(1, std=0.05), kl_estimator=estimator,
                   kl_coef=1.0, lr=2e-3, epochs=2, micro_tokens=1000)  # fmt: skip
    targets = {e: optimum(e, arm_probs(trainer.reference), rewards, 1.0) for e in ("k1", "k3")}

    def distance(target: Tensor) -> float:
        p = arm_probs(trainer.policy)
        return float((p * (p / target).log()).sum())

    before = distance(targets["k1"])
    for step in range(35):
        generator = torch.Generator().manual_seed(step)
        actions = torch.multinomial(arm_probs(trainer.policy), pulls, replacement=True, generator=generator)
        rollouts = trainer.measure([Example(str(i), [1, 3], [int(a)]) for i, a in enumerate(actions)], step)
        trainer.set_advantages(rollouts, rewards[actions], [0] * pulls)
        trainer.update(rollouts, 1.0)
    own, other = ("k3", "k1") if estimator == "k3" else ("k1", "k3")
    assert before > 0.5 and distance(targets[own]) < 0.05 < distance(targets[other]) / 2
