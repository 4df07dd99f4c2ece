"""Gradients of PPO, RLOO and GRPO against plain torch in fp64, with loops for their advantages."""

import pytest
import torch
from test_ppo import SCORES, examples
from test_rl_algorithms import ESTIMATORS, GROUPS, Named, make, measured
from tiny import CONFIG, gradients, log_probs, relative_difference, tiny_model
from torch import Tensor

from cai_fast.batching import Example, pack_targets
from cai_fast.model import ScalarHead
from cai_fast.policy_gradient import Critic, PolicyGradient


def penalty(estimator: str, p: Tensor, q: Tensor, taken: Tensor) -> Tensor:
    """What the KL to the reference adds to the loss of an answer's tokens."""
    d = (q - p).gather(1, taken)
    values = {"k1": d * 0, "k2": d.square() / 2, "k3": d.exp() - 1 - d, "exact": p.exp() * (p - q)}
    return values[estimator].sum()


def by_hand(trainer: PolicyGradient, scores: Tensor, estimator: str) -> Named:
    """The gradient of the first step in plain torch, with loops for the advantages of RLOO and GRPO."""
    cfg, rows = trainer.settings, []
    for example in examples():
        p = log_probs(trainer.policy, example, cfg.temperature)
        q = log_probs(trainer.reference, example, cfg.temperature).detach()
        rows.append((p, q, torch.tensor(example.target_ids)[:, None]))
    k1 = [float((p - q).detach().gather(1, taken).sum()) for p, q, taken in rows]
    rewards = [float(s) - (cfg.kl_coef * k if estimator == "k1" else 0.0) for s, k in zip(scores, k1, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for i, (p, q, taken) in enumerate(rows):
        others = [r for j, r in enumerate(rewards) if GROUPS[j] == GROUPS[i] and j != i]
        group = torch.tensor([rewards[i], *others], dtype=torch.float64)
        if cfg.algorithm == "rloo":
            advantage = rewards[i] - sum(others) / len(others)
        else:
            advantage = float((rewards[i] - group.mean()) / (group.std(unbiased=False) + 1e-4))
        own = p.gather(1, taken)
        total = total - advantage * (own - own.detach()).exp().sum()
        total = total + cfg.kl_coef * penalty(estimator, p, q, taken)
    names, parameters = zip(*trainer.policy.named_parameters(), strict=True)
    tokens = sum(len(taken) for _, _, taken in rows)
    return dict(zip(names, torch.autograd.grad(total / tokens, parameters), strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_gradient_is_that_of_plain_torch(algorithm: str, estimator: str) -> None:
    trainer = make(algorithm=algorithm, kl_estimator=estimator, kl_coef=0.3, temperature=0.8)
    expected = by_hand(trainer, SCORES, estimator)
    rollouts = measured(trainer)
    assert len(rollouts.bins) > 2
    trainer._accumulate(rollouts.bins, 1 / rollouts.tokens[0])
    assert relative_difference(gradients(trainer.policy), expected) < 1e-4


def values_by_hand(trainer: PolicyGradient, example: Example) -> Tensor:
    """[N] of the states before each target; no gradient reaches the policy."""
    batch, critic = pack_targets([example]), trainer.critic
    if isinstance(critic.module, ScalarHead):
        hidden, weight = trainer.policy(batch.packed).detach(), critic.module.weight
    else:
        hidden, weight = critic.module(batch.packed), critic.module.score.weight
    raw = hidden[batch.rows] @ weight[0]
    return (raw.double() - critic.mean) / critic.deviation


@torch.no_grad()
def ppo_targets(trainer: PolicyGradient, estimator: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(log-probabilities, whitened advantages, returns) of each answer's tokens, by GAE as a loop."""
    cfg, found = trainer.settings, []
    for example, score in zip(examples(), SCORES.double(), strict=True):
        taken = torch.tensor(example.target_ids)[:, None]
        p, q = (log_probs(m, example, cfg.temperature).gather(1, taken) for m in (trainer.policy, trainer.reference))
        values, advantage, later = values_by_hand(trainer, example), 0.0, 0.0  # after the answer there is nothing
        raw = torch.zeros(len(taken), dtype=torch.float64)
        for t in reversed(range(len(taken))):
            reward = score * (t == len(taken) - 1) - (cfg.kl_coef * (p - q)[t, 0] if estimator == "k1" else 0.0)
            advantage = reward + cfg.gamma * later - values[t] + cfg.gamma * cfg.gae_lambda * advantage
            raw[t], later = advantage, values[t]
        found.append((p, raw, raw + values))
    everything = torch.cat([raw for _, raw, _ in found])
    mean, deviation = everything.mean(), everything.std(unbiased=False)
    return [(p, (raw - mean) / deviation, returns) for p, raw, returns in found]


def ppo_by_hand(trainer: PolicyGradient, targets: list[tuple[Tensor, Tensor, Tensor]], estimator: str) -> list[Named]:
    """The gradients of policy and critic in plain torch, of the weights as they are now."""
    cfg, total, tokens, clipped = trainer.settings, torch.zeros((), dtype=torch.float64), 0, 0
    for example, (old, advantage, returns) in zip(examples(), targets, strict=True):
        taken = torch.tensor(example.target_ids)[:, None]
        p = log_probs(trainer.policy, example, cfg.temperature)
        q = log_probs(trainer.reference, example, cfg.temperature).detach()
        ratio = (p.gather(1, taken) - old).exp().squeeze(1)
        limited = ratio.clamp(1 - cfg.clip_coef, 1 + cfg.clip_coef)
        total = total - torch.minimum(ratio * advantage, limited * advantage).sum()
        total = total + cfg.kl_coef * penalty(estimator, p, q, taken)
        total = total + cfg.vf_coef * (values_by_hand(trainer, example) - returns).square().sum() / 2
        tokens, clipped = tokens + len(taken), clipped + int((limited * advantage < ratio * advantage).sum())
    assert 0 < clipped < tokens
    modules = [dict(m.named_parameters()) for m in (trainer.policy, trainer.critic.module)]
    grads = iter(torch.autograd.grad(total / tokens, [p for named in modules for p in named.values()]))
    return [{name: next(grads) for name in named} for named in modules]


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_ppo_are_those_of_plain_torch(estimator: str, network: bool) -> None:
    """Once the policy has moved, since before that every ratio is 1 and none is clipped."""
    generator, head = torch.Generator().manual_seed(3), ScalarHead(CONFIG.hidden_size)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.2, generator=generator)
    critic = Critic(tiny_model(7, head="score"), 0.3, 2.0) if network else Critic(head, 0.1, 1.5)
    trainer = make(critic=critic, algorithm="ppo", kl_estimator=estimator, kl_coef=0.3, temperature=0.8, gamma=0.9,
                   gae_lambda=0.8, samples_per_prompt=1)  # fmt: skip
    targets, rollouts = ppo_targets(trainer, estimator), measured(trainer)
    assert len(rollouts.bins) > 2
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    expected = ppo_by_hand(trainer, targets, estimator)
    trainer._accumulate(rollouts.bins, 1 / rollouts.tokens[0])
    for module, wanted in zip((trainer.policy, trainer.critic.module), expected, strict=True):
        assert relative_difference(gradients(module), wanted) < 1e-4
