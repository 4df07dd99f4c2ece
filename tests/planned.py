"""Steps of training and of PPO as the stages do them, on any device, for comparison with what the plan says of them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import alone
from torch import Tensor, nn

from cai_fast import config, losses, pipeline
from cai_fast.batching import Example, pack, pack_targets
from cai_fast.dpo import STATS
from cai_fast.engine import Engine, Sampling
from cai_fast.fit import FitSettings, Task, accumulate
from cai_fast.model import Model, ModelConfig, ScalarHead, init_random
from cai_fast.model.lora import add_adapters
from cai_fast.optim import Optimizer
from cai_fast.policy_gradient import Critic, PolicyGradient
from cai_fast.runlog import Mean


def settings(folder: Path, model: ModelConfig, length: int, words: str = "") -> config.Config:
    """A configuration whose model.base has only a config.json, and whose sequences have `length` tokens."""
    (folder / "config.json").write_text(json.dumps(model.to_hf("lm")))
    half = ["data.max_prompt_tokens", "revise.max_new_tokens", "compare.max_new_tokens"]
    half += [] if "dpo" in words else ["rl.max_new_tokens"]
    fixed = [f"--model.base {folder} --data.preferences x", *(f"--{name} {length // 2}" for name in half)]
    return config.load(" ".join([*fixed, words]).split())


def made(cfg: config.Config, shape: ModelConfig, seed: int, head: str, device: str) -> Model:
    """A random model in the configuration's type."""
    return init_random(shape, seed, head=head, dtype=pipeline.weight_type(cfg, device)).to(device)


def trainee(cfg: config.Config, shape: ModelConfig, head: str, device: str) -> Model:
    """The model that a stage trains: whole, or its adapters and scalar head."""
    model = made(cfg, shape, 0, head, device)
    if cfg.lora.rank:
        add_adapters(model, cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets, 0)
        if head == "score":
            model.score.requires_grad_(True)
    return model


def recomputing(model: Model, mode: str) -> Model:
    """The model with its layers' activations kept as `mode` says."""
    for block in model.model.layers:
        block.recompute = mode
    return model


def examples(count: int, length: int) -> list[Example]:
    """Each half prompt, half answer, of `length` tokens with the last, which is only predicted."""
    half = length // 2
    return [Example(str(i), list(range(1, half + 1)), [(i + j) % 500 + 1 for j in range(half)]) for i in range(count)]


def sft_task(model: Model, count: int, length: int) -> Task:
    """`count` examples."""
    given = examples(count, length)

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        return losses.sft_loss(model, pack_targets([given[i] for i in items], model.device), scale)

    return Task("sft", [e.tokens for e in given], [length / 2] * count, loss, [e.tokens for e in given])


def pm_task(model: Model, count: int, length: int) -> Task:
    """`count` comparisons."""

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        packed = pack([[(k + j) % 500 for j in range(length)] for i in items for k in (i, i + 1)], model.device)
        prob = torch.full((len(items),), 0.6, device=model.device)
        return losses.preference_loss(model, packed, prob, torch.ones_like(prob), scale)

    return Task("pm", [2 * length] * count, [1.0] * count, loss, [1.0] * count, ("loss", "accuracy", "margin"))


def dpo_task(model: Model, count: int, length: int) -> Task:
    """`count` comparisons of answers."""
    given = examples(2 * count, length)

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        batch = pack_targets([given[2 * i + k] for i in items for k in (0, 1)], model.device)
        prob = torch.full((len(items),), 0.6, device=model.device)
        before = torch.zeros(len(items), 2, device=model.device)
        return losses.dpo_loss(model, batch, before, prob, torch.ones_like(prob), 0.1, scale)

    return Task("rl", [2 * length] * count, [1.0] * count, loss, [1.0] * count, STATS)


def steps(model: Model, task: Task, cfg: config.Config, section: Any, count: int = 2) -> Optimizer:
    """Optimizer steps on all items; the last one's gradients are not applied, so that they can be looked at."""
    size = section.batch_tokens if task.name == "sft" else section.batch_pairs
    fit = FitSettings(0, 1, size, section.micro_tokens, 1e-3, "constant", 0, 0.0, 1.0, 0, cfg.model.moments)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = model.head_weight if model.head == "lm" and model.head_weight.requires_grad else None
    optimizer = Optimizer.adamw(named, 1e-3, moments=cfg.model.moments, head=head)
    for number in range(count):
        accumulate(task, range(len(task.lengths)), fit, optimizer, Mean(), alone())
        if number < count - 1:
            optimizer.step()
    return optimizer


class Actors(NamedTuple):
    """The models of stage rl, the preference model among them."""

    trainer: PolicyGradient
    pm: Model

    @property
    def weights(self) -> list[Tensor]:
        """Of all of them."""
        parts = [
            self.trainer.policy,
            self.trainer.reference,
            self.pm,
            *([self.trainer.critic.module] if self.trainer.critic else []),
        ]
        return [p for part in parts for p in part.parameters()]


def actors(cfg: config.Config, shape: ModelConfig, device: str) -> Actors:
    """As stage rl makes them, without adapters."""
    policy, reference, pm = (made(cfg, shape, n, head, device) for n, head in enumerate(("lm", "lm", "score")))
    for frozen in (reference, pm):
        frozen.requires_grad_(False)
    value: nn.Module = ScalarHead(shape.hidden_size).to(device, policy.dtype)
    if cfg.rl.network in ("own", "pm"):
        value = made(cfg, shape, 3, "score", device)
    critic = Critic(value) if cfg.rl.network else None
    trainer = PolicyGradient(policy, reference, critic, cfg.rl, seed=0, dist=alone(), moments=cfg.model.moments)
    return Actors(trainer, pm)


def answers(cfg: config.Config, trainer: PolicyGradient, length: int) -> tuple[Engine, list[Example]]:
    """The answers of an iteration, from an engine that keeps its cache."""
    room, rows = pipeline.round_up(length), cfg.rl.prompts_per_step
    engine = Engine(trainer.policy, max_len=room, max_batch=cfg.engine.max_batch, deterministic=False)
    given = examples(rows, length)
    done = engine.generate([list(e.prompt_ids) for e in given], Sampling(max_new_tokens=length // 2), keys=range(rows))
    return engine, [Example(e.id, e.prompt_ids, c.token_ids) for e, c in zip(given, done, strict=True)]


def iterations(trainer: PolicyGradient, answered: list[Example], count: int = 2) -> None:
    """Measure the answers and train on them, `count` times."""
    for _ in range(count):
        rollouts = trainer.measure(answered, 0)
        scores = torch.arange(float(len(answered))) % 3
        trainer.set_advantages(rollouts, scores, [i // 2 for i in range(len(answered))])
        assert trainer.update(rollouts, 1.0)["grad_norm"] > 0


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Of their storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
