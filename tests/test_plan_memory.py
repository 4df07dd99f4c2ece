"""What the plan says a device holds, against the tensors that training, PPO and the engine really make."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import LiveBytes
from tiny import alone
from torch import Tensor, nn
from torch.utils import checkpoint

from cai_fast import config, losses, pipeline, workload
from cai_fast.batching import Example, pack, pack_targets
from cai_fast.capacity import Machine
from cai_fast.engine import Engine, Sampling
from cai_fast.fit import FitSettings, Task, accumulate
from cai_fast.memory import Layout, Memory
from cai_fast.model import Model, ModelConfig, ScalarHead, init_random
from cai_fast.model.lora import add_adapters
from cai_fast.moments import Moments
from cai_fast.optim import Optimizer
from cai_fast.ppo import Critic, Ppo
from cai_fast.runlog import Mean

LENGTH = 128  # tokens of every sequence: a padded length of the CPU's attention, and half of them answered
CPU = Machine("cpu", 1, 2**36)
pytestmark = pytest.mark.usefixtures("one_thread")


def shaped(layers: int = 4, **changes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_layers=layers, num_heads=4, num_kv_heads=2,
        head_dim=32, max_position_embeddings=256,
    ).replace(**changes)  # fmt: skip


def settings(folder: Path, model: ModelConfig, words: str = "") -> config.Config:
    """A configuration whose model.base has only a config.json."""
    (folder / "config.json").write_text(json.dumps(model.to_hf("lm")))
    half = ("data.max_prompt_tokens", "revise.max_new_tokens", "compare.max_new_tokens", "rl.max_new_tokens")
    fixed = [f"--model.device cpu --model.base {folder} --data.preferences x", *(f"--{n} {LENGTH // 2}" for n in half)]
    return config.load(" ".join([*fixed, words]).split())


def examples(count: int) -> list[Example]:
    half = LENGTH // 2
    return [Example(str(i), list(range(1, half + 1)), [(i + j) % 500 + 1 for j in range(half)]) for i in range(count)]


def nbytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def fit_settings(cfg: Any, section: Any) -> FitSettings:
    size = section.batch_tokens if hasattr(section, "batch_tokens") else section.batch_pairs
    return FitSettings(0, 1, size, section.micro_tokens, 1e-3, "constant", 0, 0.0, 1.0, 0, cfg.model.moments)


def adamw(model: Model, cfg: config.Config) -> Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = model.head_weight if model.head == "lm" and model.head_weight.requires_grad else None
    return Optimizer.adamw(named, 1e-3, moments=cfg.model.moments, head=head)


def sft_task(model: Model, count: int) -> Task:
    made = examples(count)

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        return losses.sft_loss(model, pack_targets([made[i] for i in items]), scale)

    return Task("sft", [e.tokens for e in made], [LENGTH / 2] * count, loss, [e.tokens for e in made])


def pm_task(model: Model, count: int) -> Task:
    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        packed = pack([list(range(k, k + LENGTH)) for i in items for k in (i + 1, i + 2)])
        half = torch.full((len(items),), 0.6)
        return losses.preference_loss(model, packed, half, torch.ones(len(items)), scale)

    return Task("pm", [2 * LENGTH] * count, [1.0] * count, loss, [1.0] * count, ("loss", "accuracy", "margin"))


@pytest.mark.parametrize("words", [
    "",
    "--model.dtype bfloat16 --sft.batch_tokens 512 --sft.micro_tokens 512",
    "--model.dtype bfloat16 --sft.batch_tokens 1024 --sft.micro_tokens 512",
    "--model.dtype bfloat16 --model.moments bfloat16 --sft.batch_tokens 512 --sft.micro_tokens 512",
    "--lora.rank 8",
    "--lora.rank 8 --model.dtype bfloat16 --sft.batch_tokens 1024 --sft.micro_tokens 512",
])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_optimizer_are_those_of_the_live_objects(words: str, tied: bool, tmp_path: Path) -> None:
    cfg = settings(tmp_path, shaped(tie_word_embeddings=tied), words)
    layout = Layout(cfg, CPU)
    model = init_random(
        shaped(tie_word_embeddings=tied), 0, dtype=torch.bfloat16 if layout.width == 2 else torch.float32
    )
    whole = nbytes(model.parameters())
    if cfg.lora.rank:
        add_adapters(model, cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets, 0)
    optimizer = adamw(model, cfg)
    count = 8 if cfg.sft.batch_tokens == 1024 else 4
    accumulate(sft_task(model, count), range(count), fit_settings(cfg, cfg.sft), optimizer, Mean(), alone())
    gradients = nbytes(optimizer.gradients.values())
    optimizer.step()
    held = layout.trained("sft", "base") + Memory(weights=layout.frozen("base") if cfg.lora.rank else 0)
    assert held.weights == nbytes(model.parameters()) and layout.frozen("base") == whole
    assert held.gradients == gradients
    assert held.optimizer == pytest.approx(nbytes(optimizer.state_dict().values()), rel=0.01)  # it has step counts


def wrapped(model: Model, mode: str) -> Model:
    """Every layer recomputed in the backward pass: wholly, or all but its products and attention."""
    products = [torch.ops.aten.mm.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]
    context = partial(checkpoint.create_selective_checkpoint_contexts, products)
    chosen = {"context_fn": context} if mode == "selective" else {}
    for block in model.model.layers if mode != "none" else []:
        block.forward = partial(checkpoint.checkpoint, block.forward, use_reentrant=False, **chosen)
    return model


@pytest.mark.parametrize(("mode", "words", "changes"), [
    ("none", "", {}), ("none", "", {"qk_norm": True, "model_type": "qwen3"}), ("none", "--model.dtype bfloat16", {}),
    ("none", "--lora.rank 8", {}), ("none", "--lora.rank 8 --lora.targets [\"q_proj\",\"up_proj\"]", {}),
    ("selective", "", {}), ("full", "", {}), ("full", "--model.dtype bfloat16", {}),
])  # fmt: skip
def test_activations_per_token_and_layer_are_those_kept_for_the_backward_pass(
    mode: str, words: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    cfg = settings(tmp_path, shaped(**changes), words)
    layout, batch = Layout(cfg, CPU), pack([list(range(1, LENGTH + 1))] * 8)

    def kept(layers: int) -> int:
        kind = torch.bfloat16 if layout.width == 2 else torch.float32
        model = init_random(shaped(layers, **changes), 0, dtype=kind)
        if cfg.lora.rank:
            add_adapters(model, cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets, 0)
        wrapped(model, mode)
        with LiveBytes(list(model.parameters())) as live:
            before = live.now
            hidden = model(batch)
            assert hidden.requires_grad
            return live.now - before

    measured = (kept(6) - kept(3)) / 3 / (8 * LENGTH)
    assert layout.kept(shaped(**changes), mode) == pytest.approx(measured, rel=0.03)


def step_peak(model: Model, task: Task, cfg: config.Config, section: Any) -> int:
    """Bytes at the peak of two steps, models included."""
    with LiveBytes(list(model.parameters())) as live:
        optimizer, count = adamw(model, cfg), len(task.lengths)
        for _ in range(2):
            accumulate(task, range(count), fit_settings(cfg, section), optimizer, Mean(), alone())
            optimizer.step()
    return live.peak


@pytest.mark.parametrize("stage", ["sft", "pm"])
@pytest.mark.parametrize("words", [
    "", "--model.dtype bfloat16", "--lora.rank 8", "--parallel.recompute full", "--parallel.recompute selective",
])  # fmt: skip
def test_the_peak_of_a_training_step(stage: str, words: str, tmp_path: Path) -> None:
    tokens = 16 * LENGTH
    sizes = (
        f"--sft.batch_tokens {2 * tokens} --sft.micro_tokens {tokens} --pm.batch_pairs 16 --pm.micro_tokens {tokens}"
    )
    cfg = settings(tmp_path, shaped(), f"{sizes} {words}")
    kind = torch.bfloat16 if cfg.model.dtype == "bfloat16" else torch.float32
    model = init_random(shaped(), 0, head="lm" if stage == "sft" else "score", dtype=kind)
    if cfg.lora.rank:
        add_adapters(model, cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets, 0)
        if stage == "pm":
            model.score.requires_grad_(True)
    wrapped(model, cfg.parallel.recompute)
    task = sft_task(model, 32) if stage == "sft" else pm_task(model, 16)
    measured = step_peak(model, task, cfg, getattr(cfg, stage))
    planned = next(m for m in Moments(cfg, CPU, {}).of(stage) if m.moment == "update").total
    assert 0.95 <= planned / measured <= 1.15


def ppo_of(cfg: config.Config, model: ModelConfig) -> tuple[Ppo, Iterator[Tensor]]:
    """Policy, reference and critic as stage rl has them, and all models' weights, the preference model's included."""
    kind = torch.bfloat16 if cfg.model.dtype == "bfloat16" else torch.float32
    policy, reference, pm = (init_random(model, n, head=h, dtype=kind) for n, h in enumerate(("lm", "lm", "score")))
    for frozen in (reference, pm):
        frozen.requires_grad_(False)
    critic: nn.Module = ScalarHead(model.hidden_size).to(kind)
    if cfg.rl.critic != "detached":
        critic = init_random(model, 3, head="score", dtype=kind)
    weights = [p for part in (policy, reference, pm, critic) for p in part.parameters()]
    return Ppo(policy, reference, Critic(critic), cfg.rl, seed=0, dist=alone(), moments=cfg.model.moments), weights


@pytest.mark.parametrize("words", [
    "--rl.critic detached", "--rl.critic pm", "--rl.critic pm --model.dtype bfloat16",
])  # fmt: skip
def test_the_peak_of_an_iteration_of_ppo(words: str, tmp_path: Path) -> None:
    """Sampling with an engine, measuring, two updates; the cache stays."""
    rows = 16
    sizes = f"--rl.prompts_per_step {rows} --rl.micro_tokens {rows * LENGTH // 2} --rl.epochs 1 --engine.max_batch 8"
    cfg = settings(tmp_path, shaped(), f"{sizes} {words}")
    ppo, weights = ppo_of(cfg, shaped())
    made = examples(rows)
    with LiveBytes(weights) as live:
        room = pipeline.round_up(LENGTH)
        engine = Engine(ppo.policy, max_len=room, max_batch=8, deterministic=False)
        prompts = [list(e.prompt_ids) for e in made]
        done = engine.generate(prompts, Sampling(max_new_tokens=LENGTH // 2), keys=range(rows))
        answered = [Example(e.id, e.prompt_ids, c.token_ids) for e, c in zip(made, done, strict=True)]
        for _ in range(2):
            rollouts = ppo.measure(answered, 0)
            ppo.set_advantages(rollouts, torch.zeros(rows))
            assert math.isfinite(ppo.update(rollouts, 1.0)["grad_norm"])
    moments = Moments(cfg, CPU, {"rl": [workload._rl(cfg, 1)]})
    update = next(m for m in moments.of("rl") if m.moment == "update")
    assert update.weights == nbytes(weights) and update.cache == engine._cache.kv.nbytes
    assert 0.95 <= update.total / live.peak <= 1.15
    assert moments.peak("rl") == update
