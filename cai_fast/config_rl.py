"""The settings of reinforcement learning and of its guards; see config_sections.py, which has all others."""

import types
from dataclasses import dataclass
from typing import ClassVar

from cai_fast.config_schema import SCHEDULES, Section, opt
from cai_fast.errors import InputError

OF_CRITIC = ("critic", "gamma", "gae_lambda", "vf_coef", "critic_lr")
OF_DPO = ("dpo_beta", "batch_pairs")
SHARED = ("epochs", "lr", "schedule", "warmup_steps", "max_grad_norm", "micro_tokens", "save_every")  # by DPO too


@dataclass(frozen=True)
class RlConfig(Section):
    """Stage rl: from SL-CAI against the preference model (ppo, rloo, grpo), or on the comparisons themselves (dpo)."""

    section: ClassVar[str] = "rl"
    algorithm: str = opt(
        "ppo",
        "ppo: clipped policy gradient, advantages by a critic; rloo: an answer's reward minus the mean of the other "
        "answers to its prompt; grpo: reward minus the mean of the prompt's answers, divided by their deviation; dpo: "
        "no sampling and no preference model, soft labels fitted offline: reads dpo_beta, batch_pairs, epochs, lr, "
        "schedule, warmup_steps, max_grad_norm, micro_tokens, save_every and the weights of section pm, nothing else",
        choices=("ppo", "rloo", "grpo", "dpo"),
        source="P 4.1: ppo; arXiv 2402.14740; 2402.03300; 2305.18290",
    )
    critic: str = opt(
        "detached",
        "of ppo. detached: value head on the policy's hidden states, no gradient into them; own: separate network from "
        "SL-CAI; pm: separate network from the PM",
        choices=("detached", "own", "pm"),
    )
    steps: int = opt(1000, "iterations (sample, then update)", lo=1)
    prompts_per_step: int = opt(512, "prompts per iteration", lo=1)
    samples_per_prompt: int = opt(
        1, "answers per prompt; rloo and grpo compare them and need 2", lo=1, hi=1024, source="B App. B.1"
    )
    red_team_fraction: float = opt(0.5, "share of red-team prompts", lo=0.0, hi=1.0, source="P 4.2: 0.525")
    temperature: float = opt(1.0, "sampling temperature", lo=0.01, hi=10.0, source="P 3.2")
    top_k: int = opt(0, "must be 0: the ratios need the log-probability of the whole distribution", lo=0, hi=0)
    top_p: float = opt(1.0, "must be 1, for the same reason", lo=1.0, hi=1.0)
    max_new_tokens: int = opt(128, "longest answer in tokens", lo=1, source="B App. B.1")
    kl_coef: float = opt(0.001, "weight of the KL penalty, in the reward or in the loss", lo=0.0, source="B 4.1")
    kl_estimator: str = opt(
        "auto",
        "k1 is part of the reward, so that the score function carries the gradient of the whole answer's KL(policy || "
        "SL-CAI). The others are part of the loss, and ignore what a token does to later ones: k2's gradient is on "
        "average that of KL(policy || SL-CAI) at each token; k3's that of KL(SL-CAI || policy); exact sums the first "
        "over the vocabulary, at the price of a pass of SL-CAI in every epoch. auto: k3 for grpo, else k1",
        choices=("auto", "k1", "k2", "k3", "exact"),
        source="B 4.1: k1; arXiv 2402.03300: k3",
    )
    kl_target: float = opt(0.0, "nats per answer that an adaptive kl_coef steers to; 0: kl_coef is fixed", lo=0.0)
    clip_coef: float = opt(
        0.2, "clip range of the ratio to the policy that sampled", lo=0.0, hi=1.0, source="B App. B.1"
    )
    gamma: float = opt(1.0, "discount of ppo", lo=0.0, hi=1.0, source="B App. B.1")
    gae_lambda: float = opt(0.95, "GAE lambda of ppo", lo=0.0, hi=1.0)
    vf_coef: float = opt(0.5, "weight of the value loss of ppo", lo=0.0)
    epochs: int = opt(
        4, "passes over the samples of one iteration; dpo: over the comparisons", lo=1, hi=64,
        source="B App. B.1: 1, 2 or 4",
    )  # fmt: skip
    minibatches: int = opt(1, "optimizer steps per pass", lo=1)
    lr: float = opt(1e-6, "learning rate of the policy", lo=0.0, source="B App. B.1: 0.01 x the pretraining rate")
    critic_lr: float = opt(1e-5, "learning rate of the critic", lo=0.0)
    schedule: str = opt("linear", "learning-rate schedule", choices=SCHEDULES)
    warmup_steps: int = opt(
        0, "linear warm-up, in iterations; dpo: in optimizer steps", lo=0, source="B App. B.1: 25,000 samples"
    )
    max_grad_norm: float = opt(1.0, "gradient clipping; 0: off", lo=0.0)
    reward_transform: str = opt(
        "none",
        "standardise: subtract mean, divide by deviation of PM scores of SL-CAI",
        choices=("none", "standardise"),
        source="B 4.1: raw score",
    )
    missing_eos_penalty: float = opt(0.0, "subtracted from the reward of an answer that never stops", lo=0.0)
    micro_tokens: int = opt(16384, "tokens per forward pass", lo=16, work=True)
    save_every: int = opt(
        50, "iterations (dpo: steps) between states, from which the stage continues and of which a guard's rollback "
        "exports the best; 0: only at the end", lo=0,
    )  # fmt: skip
    snapshot_every: int = opt(
        0, "iterations between exports of the policy so far, as checkpoints/rl_cai_step_00010; 0: none", lo=0,
        source="P Fig. 8",
    )  # fmt: skip
    dpo_beta: float = opt(
        0.1, "dpo: a difference of log-ratios to SL-CAI times this is the logit of the label", lo=0.0,
        source="arXiv 2305.18290",
    )  # fmt: skip
    batch_pairs: int = opt(64, "dpo: comparisons per optimizer step", lo=1, source="arXiv 2305.18290")

    def check_together(self, s: types.SimpleNamespace) -> None:
        if s.algorithm in ("rloo", "grpo") and s.samples_per_prompt < 2:
            raise InputError(
                f"rl.algorithm = {s.algorithm} compares the answers to a prompt: rl.samples_per_prompt must be at "
                f"least 2. Got {s.samples_per_prompt}."
            )
        if s.algorithm == "dpo" and not s.dpo_beta:
            raise InputError("rl.dpo_beta must be greater than 0: with 0 the loss does not depend on the policy.")

    def idle(self) -> set[str]:
        """Keys of this section that its algorithm does not read."""
        if self.algorithm == "dpo":
            return set(self.values()) - {"algorithm", *OF_DPO, *SHARED}
        return set(OF_DPO) | (set() if self.algorithm == "ppo" else set(OF_CRITIC))

    @property
    def network(self) -> str:
        """The kind of critic: rl.critic, or "" where the algorithm has none."""
        return self.critic if self.algorithm == "ppo" else ""

    @property
    def kl_kind(self) -> str:
        """The KL estimator in use: "k1" in the reward, "k2", "k3" or "exact" in the loss."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k3" if self.algorithm == "grpo" else "k1"


ACTIONS = ("off", "warn", "stop", "rollback")
GUARD_OF = {
    "max_kl": "kl", "max_kl_jump": "kl_jump", "max_refusal_rate": "refusals", "min_entropy": "entropy",
    "min_entropy_share": "entropy", "max_divergence": "divergence", "max_length_change": "length",
    "max_length_slope": "length", "max_boilerplate_rise": "boilerplate", "max_logprob_gap": "logprob_gap",
}  # fmt: skip
"""The guard that each limit is for."""


@dataclass(frozen=True)
class GuardsConfig(Section):
    """Signs of reward hacking in stage rl, judged at every iteration before its answers are trained on."""

    section: ClassVar[str] = "guards"
    # Rollback where the policy is lost; a warning where a healthy run may also get, or where one iteration may err.
    kl: str = opt(
        "rollback",
        "guard of KL to SL-CAI. All guards: warn says so once; stop ends training and exports the newest policy saved; "
        "rollback exports, of the states saved at an iteration at which no guard tripped, the best: by pm_eval if it "
        "is measured, else by reward",
        choices=ACTIONS,
    )
    max_kl: float = opt(100.0, "nats per answer", lo=0.0, source="B 4.1")
    kl_jump: str = opt("warn", "guard of a sudden rise of KL", choices=ACTIONS)
    max_kl_jump: float = opt(
        5.0, "times the median KL of the 10 iterations before, which counts as at least 0.2 nats per answer", lo=1.0
    )
    refusals: str = opt("rollback", "guard of refusals, of red-team and of helpful prompts", choices=ACTIONS)
    max_refusal_rate: float = opt(0.9, "share of the answers to either kind", lo=0.0, hi=1.0, source="P 4.4")
    entropy: str = opt("warn", "guard of a policy that says always the same", choices=ACTIONS)
    min_entropy: float = opt(0.0, "nats per token", lo=0.0)
    min_entropy_share: float = opt(0.2, "times the entropy of SL-CAI", lo=0.0, hi=1.0)
    divergence: str = opt(
        "warn", "guard of a preference model that is optimised beyond what pm_eval agrees to", choices=ACTIONS,
        source="B 4.2",
    )  # fmt: skip
    max_divergence: float = opt(
        0.5, "gain of pm minus gain of pm_eval since the start, each in deviations of its scores of SL-CAI's answers",
        lo=0.0,
    )  # fmt: skip
    pm_eval_every: int = opt(
        1, "iterations between scores by pm_eval, which is then held in memory; states that are saved always get one; "
        "0: never", lo=0,
    )  # fmt: skip
    length: str = opt("warn", "guard of answers that grow or shrink, and of a score that is paid by the token",
                      choices=ACTIONS)  # fmt: skip
    max_length_change: float = opt(2.0, "times longer or shorter than SL-CAI's answers", lo=1.0)
    max_length_slope: float = opt(
        0.9, "slope of score on length within either kind of prompt, in deviations of both: 1 if length explains the "
        "score; of a hundred answers a healthy run may see 0.8 once", lo=0.0, hi=1.0,
    )  # fmt: skip
    boilerplate: str = opt(
        "warn", "guard of phrases that are appended to most answers", choices=ACTIONS, source="P 4.3"
    )
    max_boilerplate_rise: float = opt(
        0.1, "rise since the start of the share of tokens in phrases of five tokens that answers to a fifth of the "
        "prompts share", lo=0.0, hi=1.0,
    )  # fmt: skip
    logprob_gap: str = opt("warn", "guard of log-probabilities on which engine and trainer disagree", choices=ACTIONS)
    max_logprob_gap: float | str = opt(
        "auto", "nats per token, mean size; auto: 0.001 with float32, 0.05 with bfloat16", lo=0.0, choices=("auto",)
    )

    def check_together(self, s: types.SimpleNamespace) -> None:
        if s.kl != "off" and not s.max_kl:
            raise InputError(
                "guards.max_kl = 0 would end every run at once: to do without this guard set guards.kl = off."
            )

    def unwatched(self, typed: frozenset[str]) -> list[str]:
        """Limits among the keys that were typed, such as "guards.max_kl", whose guard is off."""
        off = [f"guards.{limit}" for limit, guard in GUARD_OF.items() if vars(self)[guard] == "off"]
        return sorted(typed.intersection(off))
