"""Our side of the end-to-end comparison: the trainer's own losses, accumulation, optimizer, PPO, engine and scorer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.bench_feedback import OPTIONS
from bench.e2e_load import EOS, Settings, Size, Work
from bench.e2e_turns import Done, Step
from cai_fast import losses, rng
from cai_fast.batching import Example, pack, pack_targets
from cai_fast.config_sections import RlConfig
from cai_fast.distributed import Distributed
from cai_fast.dpo import STATS as DPO_STATS
from cai_fast.engine import Engine, Sampling, token_tree
from cai_fast.fit import FitSettings, Task, accumulate
from cai_fast.model import Model, load
from cai_fast.optim import Optimizer
from cai_fast.policy_gradient import Critic, PolicyGradient
from cai_fast.runlog import Mean
from cai_fast.scorer import Scorer

MICRO_TOKENS = 16384  # the trainer's default
CPU_MICRO_TOKENS = {"reward": 2048}  # where a CPU is as fast or faster with less, which takes less memory
MAX_BATCH = 64


@dataclass(frozen=True)
class Place:
    """Where the models lie and where they run. On a GPU weights are bf16 and the optimizer holds the rest of fp32."""

    folder: Path
    device: torch.device
    size: Size
    settings: Settings

    def model(self, name: str, head: str | None = None) -> Model:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return load(self.folder / name, dtype=dtype, device=self.device, head=head)

    def micro_tokens(self, stage: str) -> int:
        return CPU_MICRO_TOKENS.get(stage, MICRO_TOKENS) if self.device.type == "cpu" else MICRO_TOKENS

    @property
    def dist(self) -> Distributed:
        return Distributed(0, 1, self.device)

    def engine(self, model: Model, longest: int) -> Engine:
        """As the stages make it."""
        return Engine(model, max_batch=MAX_BATCH, max_len=-(-longest // 64) * 64,
                      deterministic=self.device.type == "cpu")  # fmt: skip


class Supervised:
    """Steps of `fit.accumulate` and the optimizer. make(model, work) -> this step's task."""

    def __init__(self, place: Place, stage: str, model: Model, make: Callable[[Model, Work], Task]) -> None:
        s = place.settings
        self.model, self.make, self.dist, self.means = model, make, place.dist, Mean()
        self.settings = FitSettings(
            seed=0, epochs=1, batch_size=1, micro_tokens=place.micro_tokens(stage), lr=s.lr,
            schedule="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=s.max_grad_norm, save_every=0,
        )  # fmt: skip
        head = model.head_weight if model.head == "lm" else None
        self.optimizer = Optimizer.adamw(model.named_parameters(), s.lr, betas=s.betas, head=head)

    def __call__(self, work: Work) -> Done:
        task = self.make(self.model, work)
        accumulate(task, range(len(task.lengths)), self.settings, self.optimizer, self.means, self.dist)
        self.optimizer.step()
        return Done(sum(map(int, task.weights)), self.means.reduce(self.dist)["loss"])


def sft(place: Place) -> Step:
    """Every token of a document but its first is a target."""

    def task(model: Model, work: Work) -> Task:
        examples = [Example(str(i), ids[:1], ids[1:]) for i, ids in enumerate(work.sequences)]

        def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
            return losses.sft_loss(model, pack_targets([examples[i] for i in items], place.device), scale)

        lengths = [e.tokens for e in examples]
        return Task("sft", lengths, [e.weight * len(e.target_ids) for e in examples], loss, lengths)

    return Supervised(place, "sft", place.model("policy"), task)


def reward(place: Place) -> Step:
    """The preference model, with a label that is certain."""

    def task(model: Model, work: Work) -> Task:
        pairs = list(zip(work.sequences[::2], work.sequences[1::2], strict=True))

        def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
            packed = pack([ids for i in items for ids in pairs[i]], place.device)
            ones = torch.ones(len(items), device=place.device)
            return losses.preference_loss(model, packed, ones, ones, scale)

        lengths = [len(a) + len(b) for a, b in pairs]
        return Task("pm", lengths, [1.0] * len(pairs), loss, [1.0] * len(pairs))

    run = Supervised(place, "reward", place.model("pm"), task)

    def step(work: Work) -> Done:
        return run(work)._replace(tokens=sum(map(len, work.sequences)))  # both of a pair are read to the end

    return step


class Dpo:
    """Labels that are certain. The reference's log-probabilities are computed before a step's time begins, as the stage
    does for all comparisons before training."""

    def __init__(self, place: Place) -> None:
        self.place, self.reference = place, place.model("policy").requires_grad_(False)
        self.before: list[list[float]] = []
        self.run = Supervised(place, "dpo", place.model("policy"), self.task)

    @staticmethod
    def examples(work: Work) -> list[Example]:
        split = zip(work.sequences, work.starts, strict=True)
        return [Example(str(i), ids[:start], ids[start:]) for i, (ids, start) in enumerate(split)]

    @torch.no_grad()
    def prepare(self, work: Work) -> None:
        batch = pack_targets(self.examples(work), self.place.device)
        found = losses.answer_logprobs(self.reference, batch).tolist()
        self.before = [found[i : i + 2] for i in range(0, len(found), 2)]

    def task(self, model: Model, work: Work) -> Task:
        answers, device = self.examples(work), self.place.device
        pairs = list(zip(answers[::2], answers[1::2], strict=True))

        def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
            batch = pack_targets([e for i in items for e in pairs[i]], device)
            before = torch.tensor([self.before[i] for i in items], device=device)
            ones = torch.ones(len(items), device=device)
            return losses.dpo_loss(model, batch, before, ones, ones, self.place.settings.dpo_beta, scale)

        lengths = [a.tokens + b.tokens for a, b in pairs]
        return Task("rl", lengths, [1.0] * len(pairs), loss, [1.0] * len(pairs), DPO_STATS)

    def __call__(self, work: Work) -> Done:
        return self.run(work)._replace(tokens=sum(map(len, work.sequences)) - sum(work.starts))


class OnPolicy:
    """Sampling by the engine, scores of the preference model, measuring and the update, as stage rl does them."""

    def __init__(self, place: Place, algorithm: str) -> None:
        s, self.place = place.settings, place
        self.policy, reference = place.model("policy"), place.model("policy").requires_grad_(False)
        self.scorer = Scorer(place.model("pm").requires_grad_(False), max_tokens=MICRO_TOKENS,
                             deterministic=place.device.type == "cpu")  # fmt: skip
        cfg = RlConfig(
            algorithm=algorithm, critic="own", temperature=1.0, kl_coef=s.kl_coef, clip_coef=s.clip_coef,
            epochs=s.epochs if algorithm == "ppo" else 1, lr=s.rl_lr, critic_lr=s.rl_lr, vf_coef=0.1,
            micro_tokens=MICRO_TOKENS, samples_per_prompt=place.size.samples,
        )  # fmt: skip
        critic = Critic(place.model("pm")) if algorithm == "ppo" else None
        self.trainer = PolicyGradient(self.policy, reference, critic, cfg, seed=0, dist=place.dist)
        self.engine = place.engine(self.policy, place.size.prompt[1] + place.size.answer[1])
        self.steps = 0

    def __call__(self, work: Work) -> Done:
        repeat = len(work.lengths) // len(work.sequences)
        prompts = [ids for ids in work.sequences for _ in range(repeat)]
        self.engine.invalidate()
        spec = [Sampling(max_new_tokens=n) for n in work.lengths]
        keys = [rng.key(0, "e2e", str(i), self.steps) for i in range(len(prompts))]
        done = self.engine.generate(prompts, spec, keys=keys)
        answers = [c.token_ids for c in done]
        groups = [i // repeat for i in range(len(prompts))]
        scores = self.scorer.scores([[*p, *a[:-1], EOS] for p, a in zip(prompts, answers, strict=True)], groups)
        examples = [Example(str(i), p, a) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
        rollouts = self.trainer.measure(examples, self.steps)
        self.trainer.set_advantages(rollouts, scores, groups)
        self.trainer.update(rollouts, 1.0)
        self.steps += 1
        return Done(sum(map(len, answers)))


def generate(place: Place) -> Step:
    """Tokens in, tokens out."""
    model = place.model("policy").requires_grad_(False)
    engine = place.engine(model, 2 * place.size.prompt[1] + place.size.response[1])

    def step(work: Work) -> Done:
        done = engine.generate(work.sequences, [Sampling(max_new_tokens=n) for n in work.lengths])
        return Done(sum(len(c.token_ids) for c in done))

    return step


def judge(place: Place) -> Step:
    """Probability of the first answer after every question; what the questions of a comparison share is computed
    once, as stage label does it."""
    size = place.size
    longest = size.conversation[1] + size.principle[1] + 2 * size.answer[1] + size.glue
    engine = place.engine(place.model("policy").requires_grad_(False), longest)
    options = torch.tensor(OPTIONS)[:, None]

    def step(work: Work) -> Done:
        trees, leaves, count = [], [], 0
        for start in range(0, len(work.sequences), work.together):
            tree, order = token_tree(work.sequences[start : start + work.together])
            trees.append(tree)
            leaves += [count + leaf for leaf in order]
            count += max(order) + 1
        logprob, _ = engine.score(trees, options, return_mass=True)
        return Done(sum(map(len, work.sequences)), probabilities=logprob[leaves, 0].exp().tolist())

    return step


STEPS: dict[str, Callable[[Place], Step]] = {
    "sft": sft,
    "reward": reward,
    "dpo": Dpo,
    "rloo": lambda place: OnPolicy(place, "rloo"),
    "grpo": lambda place: OnPolicy(place, "grpo"),
    "ppo": lambda place: OnPolicy(place, "ppo"),
    "generate": generate,
    "judge": judge,
}
