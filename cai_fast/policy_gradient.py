"""Policy gradients of responses against a score: PPO (Schulman et al. 2017; arXiv 2204.05862 §4.1), RLOO, GRPO.

One iteration: sampled responses are packed into minibatches once (`measure`), and everything else runs on those same
bins: old log-probabilities, reference, values, every epoch of the update. So with unchanged weights the ratio is
exactly 1. The algorithms share one loss, the clipped objective, and differ in their advantages (advantages.py); only
PPO has a critic. Differences from the textbooks: no entropy bonus; the critic never trains the policy's trunk; every
token of a minibatch weighs the same, where GRPO's equation 3 (arXiv 2402.03300) averages within an answer first, which
gives the tokens of short answers more weight.

The KL penalty against the reference is in the reward ("k1", whose gradient then is that of the whole response's
KL(policy || reference)), or in the loss: "k2", "k3" or "exact", whose gradients are those of the divergences at the
states that were visited, without what a token does to later states. On average over the policy that sampled, k2's is
that of KL(policy || reference), k3's that of KL(reference || policy), and hence in later steps on the same answers only
nearly; exact is the former, summed over the vocabulary, at every step.
N response tokens of a bin, S responses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cai_fast import advantages, kernels, losses, rng
from cai_fast.batching import Example, TargetBatch, bins, pack_targets, segment_sum
from cai_fast.checkpoint import Checkpoints, Saved, TrainState
from cai_fast.config_sections import RlConfig
from cai_fast.distributed import Distributed, global_moments
from cai_fast.losses import PolicyTerms
from cai_fast.model import Model, ScalarHead
from cai_fast.model.heads import scalar_rows
from cai_fast.optim import Optimizer
from cai_fast.parallel import is_sharded, together
from cai_fast.runlog import Mean

STATS = ("policy_loss", "clipfrac", "entropy", "approx_kl", "ratio_gap")
KL_GAIN = 0.1  # Ziegler et al. 2019, §2.2
FILLER = Example("", [0], [0])


@dataclass
class Bin:
    """Responses packed together, and what is known of each response token [N]."""

    samples: list[int]  # indices into this rank's examples, in packed order
    batch: TargetBatch
    logprob: Tensor  # of the policy that sampled
    ref_logprob: Tensor  # of the reference
    kl: Tensor  # exact KL(policy || reference) at the token
    entropy: Tensor
    values: Tensor  # 0 without a critic
    terms: PolicyTerms | None = None

    @property
    def k1(self) -> Tensor:
        """[N] log policy - log reference of the tokens that were sampled."""
        return self.logprob - self.ref_logprob

    @property
    def lengths(self) -> Tensor:
        """[S] response tokens of each sample."""
        return self.batch.cu_targets.diff()


@dataclass
class Rollouts:
    """One iteration's measurements: the bins of each minibatch, and per-response sums [S] in the examples' order."""

    minibatches: list[list[Bin]]
    tokens: list[int]  # response tokens of each minibatch, over all ranks
    k1: Tensor
    kl: Tensor
    fillers: list[list[Bin]] = field(default_factory=list)  # of each minibatch: passes that count for nothing
    bins: list[Bin] = field(init=False)

    def __post_init__(self) -> None:
        self.bins = [b for minibatch in self.minibatches for b in minibatch]
        self.fillers = self.fillers or [[] for _ in self.minibatches]

    def flat(self, name: str) -> Tensor:
        """A field of all bins, end to end."""
        parts = [getattr(b, name) for b in self.bins]
        return torch.cat(parts) if parts else torch.zeros(0)

    @property
    def order(self) -> list[int]:
        """[S] this rank's examples as they follow one another in the bins."""
        return [i for b in self.bins for i in b.samples]


class Critic:
    """Values of the states before each response token: (raw - mean) / deviation of a scalar head.

    The head is either on the policy's hidden states, through which no gradient flows, or that of a model of its own.
    A critic that starts as the preference model takes its reward transform, so that it starts in units of reward.
    """

    def __init__(self, module: ScalarHead | Model, mean: float = 0.0, deviation: float = 1.0) -> None:
        self.module, self.mean, self.deviation = module, mean, deviation

    def __call__(self, batch: TargetBatch, hidden: Tensor) -> Tensor:
        """[N]; hidden [N, H] are the policy's states at the rows of the batch's targets."""
        if isinstance(self.module, ScalarHead):
            raw = self.module(hidden.detach())
        else:
            raw = self.module(batch.packed, loss=lambda h, w: scalar_rows(h.index_select(0, batch.rows), w))
        return (raw - self.mean) / self.deviation


class PolicyGradient:
    """Policy, reference and (for PPO alone) critic with their optimizers; `settings` is the configuration's rl section,
    `moments` the type of the optimizers' moments of bf16 weights."""

    def __init__(self, policy: Model, reference: Model, critic: Critic | None, settings: RlConfig, *, seed: int,
                 dist: Distributed, moments: str = "float32") -> None:  # fmt: skip
        if (critic is not None) != bool(settings.network):
            raise ValueError(f"rl.algorithm = {settings.algorithm} has {'a' if settings.network else 'no'} critic")
        self.policy, self.reference, self.critic = policy, reference, critic
        self.settings, self.seed, self.dist = settings, seed, dist
        self.kl_coef = settings.kl_coef
        self.optimizer = Optimizer.adamw(
            policy.named_parameters(), settings.lr, moments=moments, head=policy.lm_head_weight
        )
        self.kl_kind = settings.kl_kind
        self.stats = (*STATS, *(["value_loss"] if critic else []), *(["kl_loss"] if self.kl_kind != "k1" else []))
        self.critic_optimizer = None
        if critic is not None:
            named = critic.module.named_parameters()
            self.critic_optimizer = Optimizer.adamw(named, settings.critic_lr, moments=moments)

    def measure(self, examples: Sequence[Example], step: int, offset: int = 0, total: int | None = None) -> Rollouts:
        """Collective: pack this rank's examples (numbers `offset`... of `total` in all) and measure every token."""
        total = len(examples) if total is None else total
        lengths = torch.zeros(total)
        lengths[offset : offset + len(examples)] = torch.tensor([float(len(e.target_ids)) for e in examples])
        self.dist.all_reduce(lengths)
        order = rng.permutation(rng.key(self.seed, "rl/minibatch", "", step), total)
        count = min(self.settings.minibatches, total)
        parts = [order[total * m // count : total * (m + 1) // count] for m in range(count)]
        minibatches, fillers = [], []
        for part in parts:
            mine = [i - offset for i in part if offset <= i < offset + len(examples)]
            groups = bins([examples[i].tokens for i in mine], self.settings.micro_tokens)
            short = self._short(len(groups))  # asked before the passes, which are collective themselves
            minibatches.append([self._measure([mine[i] for i in group], examples) for group in groups])
            fillers.append([self._filler() for _ in range(short)])
        sums = [torch.zeros(len(examples)) for _ in range(2)]
        rollouts = Rollouts(minibatches, [int(lengths[part].sum()) for part in parts], *sums, fillers)
        for b in rollouts.bins:
            rollouts.k1[b.samples] = segment_sum(b.k1, b.batch.cu_targets).cpu()
            rollouts.kl[b.samples] = segment_sum(b.kl, b.batch.cu_targets).cpu()
        return rollouts

    def _short(self, passes: int) -> int:
        """Collective: how many passes fewer than another rank this one has; 0 if ranks need not keep step."""
        if not is_sharded(self.policy):
            return 0
        return int(self.dist.all_reduce(torch.tensor(passes), "max")) - passes

    def _filler(self) -> Bin:
        """A bin of one token for a rank that has no more responses, whose loss is multiplied by zero. Collective."""
        b = self._measure([0], [FILLER])
        b.terms = PolicyTerms(b.logprob, torch.zeros_like(b.logprob), b.ref_logprob, torch.zeros_like(b.logprob))
        return b

    @torch.no_grad()
    def _measure(self, samples: list[int], examples: Sequence[Example]) -> Bin:
        batch, temperature = pack_targets([examples[i] for i in samples], self.policy.device), self.settings.temperature

        def policy(hidden: Tensor, weight: Tensor) -> tuple[Tensor, kernels.LinearLogprob, kernels.LinearKL]:
            rows = hidden.index_select(0, batch.rows)
            own = kernels.linear_logprob(rows, weight, batch.targets, temperature=temperature, entropy=True)
            both = self.reference(
                batch.packed,
                loss=lambda h, w: kernels.linear_kl(
                    rows, weight, h.index_select(0, batch.rows), w, batch.targets, temperature=temperature
                ),
            )
            return rows, own, both

        with together(is_sharded(self.policy)):
            rows, own, both = self.policy(batch.packed, loss=policy)
            values = self.critic(batch, rows) if self.critic else torch.zeros_like(own.logprob)
        return Bin(samples, batch, own.logprob, both.ref_logprob, both.kl, own.entropy, values)

    def set_advantages(self, rollouts: Rollouts, scores: Tensor, groups: Sequence[int] = ()) -> dict[str, float]:
        """Collective: fill in advantages and, for PPO, returns; scores[S] in the examples' order. Returns statistics.

        groups[S]: a number for each example's prompt, for RLOO and GRPO; none is shared with another rank.
        """
        cfg, device, order = self.settings, self.policy.device, rollouts.order
        penalty = self.kl_coef if self.kl_kind == "k1" else 0.0
        k1, lengths = rollouts.flat("k1").to(device), rollouts.flat("lengths").to(device, torch.int64)
        returns = None
        if cfg.algorithm == "ppo":
            cu, values = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), rollouts.flat("values").to(device)
            rewards = losses.token_rewards(scores[order].to(k1), k1, cu, penalty)
            own, returns = advantages.ppo(rewards, values, cu, cfg.gamma, cfg.gae_lambda, self.dist)
            stats = {"explained_variance": losses.explained_variance(values, returns, self.dist)}
            stats["returns"] = float(global_moments(returns, None, self.dist)[0])
        else:
            rewards = scores - penalty * rollouts.k1
            each = {"rloo": advantages.rloo, "grpo": advantages.grpo}[cfg.algorithm](rewards, groups)
            own = each[order].to(k1).repeat_interleave(lengths)
            shown = {"returns": rewards, "zero_advantage": (each == 0).float()}  # what nothing is learned from
            stats = {k: float(global_moments(v.to(device), None, self.dist)[0]) for k, v in shown.items()}
        sizes = [b.k1.shape[0] for b in rollouts.bins]
        targets = [None] * len(sizes) if returns is None else returns.split(sizes)
        for b, advantage, target in zip(rollouts.bins, own.split(sizes), targets, strict=True):
            b.terms = PolicyTerms(b.logprob, advantage, b.ref_logprob, target)
        return stats

    def update(self, rollouts: Rollouts, factor: float) -> dict[str, float]:
        """Collective: all epochs over all minibatches at `factor` times the learning rates; mean statistics.

        Stops at the first gradient that is not finite, before it reaches the weights; "grad_norm" is then not finite.
        """
        means, norm, critic_norm, first_gap = Mean(), 0.0, 0.0, math.nan
        for _ in range(self.settings.epochs):
            for minibatch, fillers, tokens in zip(rollouts.minibatches, rollouts.fillers, rollouts.tokens, strict=True):
                stats = self._accumulate(minibatch, 1.0 / tokens, fillers)
                first_gap = stats["ratio_gap"] if math.isnan(first_gap) else first_gap
                with together(is_sharded(self.policy)):
                    norm = float(self.optimizer.clip(self.settings.max_grad_norm))
                    if self.critic_optimizer:
                        critic_norm = float(self.critic_optimizer.clip(self.settings.max_grad_norm))
                if not math.isfinite(norm + critic_norm):
                    return {"grad_norm": math.nan}
                for optimizer in self._optimizers():
                    optimizer.step(factor)
                for name, value in stats.items():
                    means.add(name, value)
        own = Distributed(0, 1, torch.device("cpu"))  # every rank holds the same values already
        norms = {"grad_norm": norm} | ({"critic_grad_norm": critic_norm} if self.critic else {})
        return means.reduce(own) | norms | {"first_ratio_gap": first_gap}

    def _optimizers(self) -> list[Optimizer]:
        return [self.optimizer, *([self.critic_optimizer] if self.critic_optimizer else [])]

    def _accumulate(self, minibatch: list[Bin], scale: float, fillers: Sequence[Bin] = ()) -> dict[str, float]:
        """Gradients of one minibatch, summed over bins and ranks; statistics per token."""
        means = Mean()
        for name in self.stats:
            means.add(name, 0.0, 0.0)
        sharded = is_sharded(self.policy)
        for b in minibatch:
            with together(sharded):
                loss, stats = self._loss(b, scale)
                loss.backward()
            for name, (total, count) in stats.items():
                means.add(name, total, count)
        for b in fillers:
            with together(sharded):
                (self._loss(b, scale)[0] * 0.0).backward()
        for optimizer in self._optimizers():
            optimizer.reduce(self.dist)
        return means.reduce(self.dist)

    def _loss(self, b: Bin, scale: float) -> tuple[Tensor, losses.Stats]:
        cfg, terms = self.settings, b.terms
        sampled = {"kl_coef": self.kl_coef, "kl_estimator": self.kl_kind} if self.kl_kind in ("k2", "k3") else {}

        def policy(hidden: Tensor, weight: Tensor) -> tuple[Tensor, losses.Stats, Tensor]:
            rows = hidden.index_select(0, b.batch.rows)
            loss, stats = losses.policy_loss(
                rows, weight, b.batch, terms, clip_coef=cfg.clip_coef, temperature=cfg.temperature, scale=scale,
                **sampled,
            )  # fmt: skip
            if self.kl_kind == "exact":
                kl = self._exact_kl(rows, weight, b.batch).sum()
                loss = loss + kl * (self.kl_coef * scale)
                stats["kl_loss"] = (kl.detach(), len(rows))
            return loss, stats, rows.detach()

        loss, stats, rows = self.policy(b.batch.packed, loss=policy)
        if self.critic is None:
            return loss, stats
        values, value_stats = losses.value_loss(self.critic(b.batch, rows), terms.returns, scale * cfg.vf_coef)
        return loss + values, stats | value_stats

    def _exact_kl(self, rows: Tensor, weight: Tensor, batch: TargetBatch) -> Tensor:
        """[N] KL(policy || reference) over the vocabulary, differentiable in the policy's states at the batch's rows
        and in its head."""
        found: list[Tensor] = []

        def compare(hidden: Tensor, ref_weight: Tensor) -> Tensor:
            states = hidden.index_select(0, batch.rows)
            found.append(kernels.linear_kl(rows, weight, states, ref_weight, temperature=self.settings.temperature).kl)
            return found[0].detach()  # a sharded model's output, if differentiable, would gather it in the backward

        self.reference(batch.packed, loss=compare)
        return found[0]

    def adapt_kl(self, kl: float) -> None:
        """Steer the KL coefficient to `rl.kl_target` (Ziegler et al. 2019, §2.2); nothing if that is 0."""
        target = self.settings.kl_target
        if target > 0:
            self.kl_coef *= 1.0 + KL_GAIN * min(0.2, max(-0.2, kl / target - 1.0))

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes, by name; the live tensors."""
        tensors: dict[str, Tensor] = {}
        parts = {"policy": (self.policy, self.optimizer)}
        if self.critic:
            parts["critic"] = (self.critic.module, self.critic_optimizer)
        for part, (module, optimizer) in parts.items():
            tensors |= {f"{part}.{name}": p for name, p in module.named_parameters() if p.requires_grad}
            tensors |= {f"optimizer.{part}.{name}": value for name, value in optimizer.state_dict().items()}
        return tensors

    def save(self, states: Checkpoints, step: int, extra: dict[str, float]) -> None:
        """Collective: everything that the rest of the run depends on."""
        states.save(TrainState(step, extra={"kl_coef": self.kl_coef} | extra, tensors=self._tensors()))

    def restore(self, states: Checkpoints, saved: Saved) -> dict[str, float]:
        """Collective: continue from what `save` wrote; returns its `extra`."""
        states.load(saved, self._tensors())
        self.kl_coef = saved.extra["kl_coef"]
        return {name: value for name, value in saved.extra.items() if name != "kl_coef"}
