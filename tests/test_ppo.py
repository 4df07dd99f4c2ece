"""PPO: known optima, exact ratios, invariance to bins and ranks, resume."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cai_fast.kernels import common
from tiny import alone, gradients, relative_difference, tiny_model

from cai_fast import losses
from cai_fast.batching import Example, pack, pack_targets
from cai_fast.checkpoint import Checkpoints
from cai_fast.config_sections import RlConfig
from cai_fast.model import Model, ScalarHead
from cai_fast.policy_gradient import Critic, PolicyGradient

ROOT = Path(__file__).resolve().parents[1]


def settings(**changes: object) -> RlConfig:
    values = dict(
        steps=10, prompts_per_step=8, epochs=2, minibatches=2, lr=1e-3, critic_lr=1e-2, kl_coef=0.1, micro_tokens=40,
        vf_coef=0.25,
    )  # fmt: skip
    return RlConfig(**(values | changes))


def make(
    policy: Model | None = None, critic: Critic | None = None, std: float = 0.2, **changes: object
) -> PolicyGradient:
    policy = policy or tiny_model(1, std=std)
    reference = tiny_model(1, std=std).requires_grad_(False)
    critic = critic or Critic(ScalarHead(policy.config.hidden_size))
    return PolicyGradient(policy, reference, critic, settings(**changes), seed=0, dist=alone())


def examples(count: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(5)

    def tokens(low: int) -> list[int]:
        size = int(torch.randint(low, 9, (1,), generator=generator))
        return torch.randint(4, 60, (size,), generator=generator).tolist()

    return [Example(str(i), [1, *tokens(1)], tokens(2)) for i in range(count)]


SCORES = torch.linspace(-1, 1, 12)


@torch.no_grad()
def arm_probs(policy: Model) -> torch.Tensor:
    return (policy(pack([[1, 3]]))[-1] @ policy.lm_head_weight.t()).softmax(-1)


def play(ppo: PolicyGradient, rewards: torch.Tensor, step: int, pulls: int = 128) -> None:
    """One PPO iteration on a bandit: one-token answers to one prompt."""
    generator = torch.Generator().manual_seed(step)
    actions = torch.multinomial(arm_probs(ppo.policy), pulls, replacement=True, generator=generator)
    rollouts = ppo.measure([Example(str(i), [1, 3], [int(a)]) for i, a in enumerate(actions)], step)
    ppo.set_advantages(rollouts, rewards[actions])
    ppo.update(rollouts, 1.0)


def test_two_armed_bandit_is_solved() -> None:
    rewards = torch.full((64,), -3.0)
    rewards[10], rewards[11] = 1.0, 0.0
    ppo = make(std=0.05, kl_coef=0.0, lr=3e-3, micro_tokens=1000)
    for step in range(25):
        play(ppo, rewards, step)
    assert arm_probs(ppo.policy)[10] > 0.95


def test_kl_penalised_bandit_reaches_the_closed_form_optimum() -> None:
    """max E[r] - beta KL(p||q) is at p ~ q exp(r / beta)."""
    rewards, beta = torch.full((64,), 0.0), 1.0
    rewards[10], rewards[11] = 4.0, 3.0
    ppo = make(std=0.05, kl_coef=beta, lr=2e-3, epochs=2, minibatches=1, micro_tokens=1000)
    target = arm_probs(ppo.reference) * (rewards / beta).exp()
    target /= target.sum()

    def distance() -> float:
        p = arm_probs(ppo.policy)
        return float((p * (p / target).log()).sum())

    before = distance()
    for step in range(35):
        play(ppo, rewards, step)
    assert before > 0.5
    assert distance() < 0.02
    arms = arm_probs(ppo.policy)[[10, 11]]
    assert float(arms[0] / arms[1]) == pytest.approx(float(target[10] / target[11]), rel=0.25)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_ratio_is_exactly_one(temperature: float) -> None:
    ppo = make(temperature=temperature)
    rollouts = ppo.measure(examples(), 0)
    ppo.set_advantages(rollouts, SCORES)
    for b in rollouts.bins:
        _, stats = ppo._loss(b, 1.0)
        assert float(stats["ratio_gap"][0]) == 0.0
        assert float(stats["clipfrac"][0]) == 0.0
    assert ppo.update(rollouts, 1.0)["first_ratio_gap"] == 0.0
    _, stats = ppo._loss(rollouts.bins[0], 1.0)
    assert float(stats["ratio_gap"][0]) > 0, "the update moved the policy"


def test_measurements_are_right() -> None:
    policy = tiny_model(2)
    ppo = make(policy, temperature=0.5)
    rows = examples(3)
    rollouts = ppo.measure(rows, 0)
    assert sorted(i for b in rollouts.bins for i in b.samples) == [0, 1, 2]
    assert sum(rollouts.tokens) == sum(len(e.target_ids) for e in rows)
    for i, e in enumerate(rows):
        batch = pack_targets([e])
        logp = [((m(batch.packed)[batch.rows] @ m.lm_head_weight.t()) / 0.5).log_softmax(-1).detach().double()
                for m in (policy, ppo.reference)]  # fmt: skip
        taken = [x.gather(1, batch.targets[:, None]).squeeze(1) for x in logp]
        exact = (logp[0].exp() * (logp[0] - logp[1])).sum()
        assert float(rollouts.k1[i]) == pytest.approx(float((taken[0] - taken[1]).sum()), abs=1e-4)
        assert float(rollouts.kl[i]) == pytest.approx(float(exact), rel=1e-4)
    assert torch.equal(make().measure(rows, 0).kl, torch.zeros(3)), "policy = reference"


def test_advantages_are_whitened_over_the_whole_batch() -> None:
    ppo = make()
    rollouts = ppo.measure(examples(), 0)
    ppo.set_advantages(rollouts, SCORES)
    everything = torch.cat([b.terms.advantages for b in rollouts.bins]).double()
    assert len(rollouts.bins) > 2
    assert float(everything.mean()) == pytest.approx(0, abs=1e-5)
    assert float(everything.std(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert any(abs(float(b.terms.advantages.mean())) > 0.01 for b in rollouts.bins), "not bin by bin"


def test_returns_are_score_minus_kl_when_values_are_zero() -> None:
    ppo = make(tiny_model(2), gae_lambda=1.0)
    rows = examples(4)
    rollouts = ppo.measure(rows, 0)
    ppo.set_advantages(rollouts, SCORES[:4])
    for b in rollouts.bins:
        first = b.terms.returns[b.batch.cu_targets[:-1]]
        expected = SCORES[b.samples] - 0.1 * rollouts.k1[b.samples]
        torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("micro_tokens", [16, 30, 10_000])
def test_gradient_does_not_depend_on_bins(micro_tokens: int) -> None:
    results = []
    for tokens in (micro_tokens, 10_000):
        ppo = make(tiny_model(2), minibatches=1, micro_tokens=tokens)
        rollouts = ppo.measure(examples(), 0)
        ppo.set_advantages(rollouts, SCORES)
        stats = ppo._accumulate(rollouts.bins, 1 / rollouts.tokens[0])
        head = {n: p.grad.clone() for n, p in ppo.critic.module.named_parameters()}
        results.append((gradients(ppo.policy) | head, stats))
    assert relative_difference(results[0][0], results[1][0]) <= 1e-6
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-6)


def test_detached_critic_learns_and_leaves_the_trunk_alone() -> None:
    alone_grads, with_critic = [], []
    for vf_coef, out in ((0.0, alone_grads), (10.0, with_critic)):
        ppo = make(vf_coef=vf_coef, minibatches=1)
        rollouts = ppo.measure(examples(), 0)
        ppo.set_advantages(rollouts, SCORES)
        ppo._accumulate(rollouts.bins, 1 / rollouts.tokens[0])
        out.append(gradients(ppo.policy))
    assert all(torch.equal(alone_grads[0][n], with_critic[0][n]) for n in alone_grads[0])
    ppo, history = make(lr=0.0, epochs=4, critic_lr=3e-2), []
    for step in range(10):
        rollouts = ppo.measure(examples(), step)
        history.append(ppo.set_advantages(rollouts, SCORES)["explained_variance"])
        ppo.update(rollouts, 1.0)
    assert history[-1] > history[0] + 0.3


def test_critic_from_the_preference_model_starts_with_its_scores() -> None:
    pm = tiny_model(7, head="score")
    mean, deviation = 0.3, 2.0
    critic = Critic(pm.clone(), mean, deviation)
    eoc = 3
    rows = [Example(e.id, e.prompt_ids, [*e.target_ids, eoc, 0]) for e in examples(5)]  # the state after eoc counts too
    rollouts = make(critic=critic).measure(rows, 0)
    for b in rollouts.bins:
        at_eoc = b.values[b.batch.cu_targets[1:] - 1]
        scores = losses.scores(pm, pack([[*rows[i].prompt_ids, *rows[i].target_ids[:-1]] for i in b.samples]))
        torch.testing.assert_close(at_eoc, (scores - mean) / deviation, atol=1e-6, rtol=1e-6)


def test_adaptive_kl_coefficient() -> None:
    fixed, adaptive = make(kl_coef=0.5), make(kl_coef=0.5, kl_target=2.0)
    for ppo in (fixed, adaptive):
        ppo.adapt_kl(10.0)
    assert fixed.kl_coef == 0.5
    assert adaptive.kl_coef == pytest.approx(0.5 * 1.02)
    adaptive.adapt_kl(1.9)
    assert adaptive.kl_coef == pytest.approx(0.5 * 1.02 * 0.995)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    ppo = make()
    rollouts = ppo.measure(examples(), 0)
    ppo.set_advantages(rollouts, SCORES)
    rollouts.minibatches[0][0].terms.advantages.fill_(math.inf)
    before = {n: p.clone() for n, p in ppo.policy.named_parameters()}
    assert math.isnan(ppo.update(rollouts, 1.0)["grad_norm"])
    assert all(torch.equal(p, before[n]) for n, p in ppo.policy.named_parameters())


def iterate(ppo: PolicyGradient, steps: range) -> None:
    for step in steps:
        rollouts = ppo.measure(examples(), step)
        ppo.set_advantages(rollouts, SCORES)
        ppo.adapt_kl(float(rollouts.k1.mean()))
        ppo.update(rollouts, 1.0 / (1 + step))


@pytest.mark.parametrize("kind", ["detached", "network"])
def test_resume_is_bitwise(tmp_path: Path, kind: str) -> None:
    def fresh() -> PolicyGradient:
        critic = None if kind == "detached" else Critic(tiny_model(7, head="score"), 0.1, 2.0)
        return make(critic=critic, kl_target=0.01)

    whole, first, second = fresh(), fresh(), fresh()
    iterate(whole, range(4))
    iterate(first, range(2))
    with Checkpoints(tmp_path, alone()) as states:
        first.save(states, 2, {"reward_mean": 0.25})
        state = states.latest()
        assert state is not None
        assert state.step == 2
        assert second.restore(states, state) == {"reward_mean": 0.25}
    iterate(second, range(2, 4))
    for a, b in ((whole.policy, second.policy), (whole.critic.module, second.critic.module)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert whole.kl_coef == second.kl_coef


RANKS = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import torch
from test_ppo import SCORES, examples, make
from tiny import tiny_model
from cai_fast import distributed
d = distributed.init("cpu")
ppo = make(tiny_model(2), kl_coef=0.2)
ppo.dist = d
rows = examples()
start, end = (0, 5) if d.rank == 0 else (5, 12)
rollouts = ppo.measure(rows[start:end], 0, start, len(rows))
stats = ppo.set_advantages(rollouts, SCORES[start:end])
stats |= ppo._accumulate(rollouts.minibatches[0], 1 / rollouts.tokens[0])
grads = torch.cat([p.grad.flatten() for p in ppo.policy.parameters()])
if d.rank == 0:
    torch.save(grads, sys.argv[3])
    print(json.dumps(stats))
distributed.shutdown()
"""


@pytest.mark.distributed
def test_two_ranks_give_the_gradient_of_one(tmp_path: Path) -> None:
    ppo = make(tiny_model(2), kl_coef=0.2)
    rollouts = ppo.measure(examples(), 0)
    expected = ppo.set_advantages(rollouts, SCORES) | ppo._accumulate(rollouts.minibatches[0], 1 / rollouts.tokens[0])
    single = torch.cat([p.grad.flatten() for p in ppo.policy.parameters()])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", RANKS, str(ROOT), str(ROOT / "tests"), str(tmp_path / "grads.pt")]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert json.loads(outputs[0].splitlines()[-1]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    both = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert float((both - single).norm() / single.norm()) <= 1e-6


def test_the_update_multiplies_the_chunks_that_the_measurement_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the ratio is exactly 1 only if both multiply the head by the same rows in the same chunks."""
    monkeypatch.setattr(common, "chunk_rows", lambda vocab, device: 4)
    ppo, seen, product = make(), [], common._mm

    def recorded(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        if out.shape[1] == ppo.policy.config.vocab_size and not torch.equal(right, reference):
            seen.append(left.clone())
        product(left, right, out)

    with torch.no_grad():
        ppo.policy.lm_head_weight.mul_(1.01)  # tells the policy's products from the reference's
    reference = ppo.reference.lm_head_weight.t()
    monkeypatch.setattr(common, "_mm", recorded)
    rollouts = ppo.measure(examples(), 0)
    ppo.set_advantages(rollouts, SCORES)
    for b in rollouts.bins:
        seen.clear()
        ppo._measure(b.samples, examples())
        measured = seen[: len(seen) // 2]  # then once more for the exact KL
        seen.clear()
        ppo._loss(b, 1.0)
        assert len(measured) == -(-len(b.logprob) // 4) == len(seen)
        assert all(torch.equal(x, y) for x, y in zip(measured, seen, strict=True))
