"""What the plan says a device holds, against the tensors that training, PPO and the engine really make."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import LiveBytes
from planned import (
    actors,
    answers,
    dpo_task,
    iterations,
    nbytes,
    pm_task,
    recomputing,
    settings,
    sft_task,
    steps,
    trainee,
)

from cai_fast import workload
from cai_fast.batching import pack
from cai_fast.capacity import Machine, machine
from cai_fast.config import Config
from cai_fast.config_sections import HardwareConfig
from cai_fast.memory import Layout, Memory
from cai_fast.model import ModelConfig
from cai_fast.moments import Moments

LENGTH = 128  # tokens of every sequence: a padded length of the CPU's attention, and half of them answered
CPU = Machine("cpu", 1, 2**36)
pytestmark = pytest.mark.usefixtures("one_thread")


def shaped(layers: int = 4, **changes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_layers=layers, num_heads=4, num_kv_heads=2,
        head_dim=32, max_position_embeddings=256,
    ).replace(**changes)  # fmt: skip


def small(folder: Path, words: str, model: ModelConfig | None = None) -> Config:
    return settings(folder, model or shaped(), LENGTH, f"--model.device cpu {words}")


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
    shape = shaped(2, tie_word_embeddings=tied)
    cfg = small(tmp_path, words, shape)
    layout = Layout(cfg, CPU)
    model = trainee(cfg, shape, "lm", "cpu")
    optimizer = steps(model, sft_task(model, 8 if cfg.sft.batch_tokens == 1024 else 4, LENGTH), cfg, cfg.sft)
    held = layout.trained("sft", "base") + Memory(weights=layout.frozen("base") if cfg.lora.rank else 0)
    assert held.weights == nbytes(model.parameters())
    assert held.gradients == nbytes(optimizer.gradients.values())
    assert held.optimizer == pytest.approx(nbytes(optimizer.state_dict().values()), rel=0.01)  # it has step counts


@pytest.mark.parametrize(("mode", "words", "changes"), [
    ("none", "", {}), ("none", "", {"qk_norm": True, "model_type": "qwen3"}), ("none", "--model.dtype bfloat16", {}),
    ("none", "--lora.rank 8", {}), ("none", '--lora.rank 8 --lora.targets ["q_proj","up_proj"]', {}),
    ("selective", "", {}), ("full", "", {}), ("full", "--model.dtype bfloat16", {}),
])  # fmt: skip
def test_activations_per_token_and_layer_are_those_kept_for_the_backward_pass(
    mode: str, words: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    cfg = small(tmp_path, words, shaped(**changes))
    batch = pack([list(range(1, LENGTH + 1))] * 8)

    def kept(layers: int) -> int:
        model = recomputing(trainee(cfg, shaped(layers, **changes), "lm", "cpu"), mode)
        with LiveBytes(list(model.parameters())) as live:
            before = live.now
            hidden = model(batch)
            assert hidden.requires_grad
            return live.now - before

    measured = (kept(6) - kept(3)) / 3 / (8 * LENGTH)
    assert Layout(cfg, CPU).kept(shaped(**changes), mode) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("stage", ["sft", "pm"])
@pytest.mark.parametrize("words", [
    "", "--model.dtype bfloat16", "--lora.rank 8", "--parallel.recompute full", "--parallel.recompute selective",
])  # fmt: skip
def test_the_peak_of_a_training_step(stage: str, words: str, tmp_path: Path) -> None:
    tokens = 8 * LENGTH
    sizes = f"--sft.batch_tokens {2 * tokens} --sft.micro_tokens {tokens} --pm.batch_pairs 8 --pm.micro_tokens {tokens}"
    cfg = small(tmp_path, f"{sizes} {words}")
    model = recomputing(trainee(cfg, shaped(), "lm" if stage == "sft" else "score", "cpu"), cfg.parallel.recompute)
    task = sft_task(model, 16, LENGTH) if stage == "sft" else pm_task(model, 8, LENGTH)
    with LiveBytes(list(model.parameters())) as live:
        steps(model, task, cfg, getattr(cfg, stage))
    planned = next(m for m in Moments(cfg, CPU, {}).of(stage) if m.moment == "update").total
    assert 0.95 <= planned / live.peak <= 1.15


def rl_moments(cfg: Config, where: Machine) -> Moments:
    return Moments(cfg, where, {"rl": [workload._rl(cfg, 1)]})


@pytest.mark.parametrize("words", [
    "--rl.critic detached", "--rl.critic pm", "--rl.critic pm --model.dtype bfloat16", "--rl.algorithm rloo",
    "--rl.critic pm --rl.kl_estimator exact", "--rl.algorithm grpo --rl.kl_estimator exact",
])  # fmt: skip
def test_the_peak_of_iterations_of_ppo(words: str, tmp_path: Path) -> None:
    """The plan takes every row for an answer's, and here half of them are a prompt's: it is up to 15 % above."""
    rows = 8
    sizes = f"--rl.prompts_per_step {rows} --rl.micro_tokens {rows * LENGTH // 2} --rl.epochs 1 --engine.max_batch 8"
    asked = f"--rl.samples_per_prompt {1 + ('algorithm' in words)} --guards.pm_eval_every 0"
    cfg = small(tmp_path, f"{sizes} {asked} {words}")
    made = actors(cfg, shaped(), "cpu")
    engine, answered = answers(cfg, made.trainer, LENGTH)
    with LiveBytes([*made.weights, engine._cache.kv]) as live:
        iterations(made.trainer, answered)
    moments = rl_moments(cfg, CPU)
    peak = moments.peak("rl")
    assert peak.moment == "update" and peak.weights == nbytes(made.weights)
    assert peak.cache == engine._cache.kv.nbytes
    assert 0.95 <= peak.total / live.peak <= 1.15


@pytest.mark.parametrize("words", ["", "--model.dtype bfloat16", "--lora.rank 8"])
def test_the_peak_of_dpo_has_no_other_model_and_no_cache(words: str, tmp_path: Path) -> None:
    tokens = 8 * LENGTH
    sizes = f"--rl.algorithm dpo --rl.batch_pairs 8 --rl.micro_tokens {tokens}"
    cfg = small(tmp_path, f"{sizes} {words}")
    model = trainee(cfg, shaped(), "lm", "cpu")
    with LiveBytes(list(model.parameters())) as live:
        steps(model, dpo_task(model, 8, LENGTH), cfg, cfg.rl)
    only = dataclasses.replace(cfg, stages=("rl",))
    assert workload.works(only, {}, lambda role: None, cpu=True) == {}, "nothing is sampled"
    moments = Moments(cfg, CPU, {})
    update = next(m for m in moments.of("rl") if m.moment == "update")
    assert update.cache == 0 and 0.9 <= update.total / live.peak <= 1.15
    assert moments.of("rl")[0].weights == moments.layout.frozen("base"), "SL-CAI, before there is a policy"


def on_gpu(work: Any) -> int:
    """Bytes allocated at the peak of some work, what was there before included."""
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["sft", "pm", "rl"])
@pytest.mark.parametrize("words", ["", "--model.moments bfloat16"])
def test_the_peak_on_a_gpu_is_the_plans(stage: str, words: str, tmp_path: Path) -> None:
    """300 M random weights, passes of 8192 tokens, caches on pages."""
    length, tokens = 512, 8192
    shape = ModelConfig(
        vocab_size=32768, hidden_size=1024, intermediate_size=4096, num_layers=16, num_heads=16, num_kv_heads=8,
        head_dim=64, max_position_embeddings=length,
    )  # fmt: skip
    sizes = (
        f"--sft.batch_tokens {2 * tokens} --sft.micro_tokens {tokens} --pm.batch_pairs 16 --pm.micro_tokens {tokens}"
    )
    sizes += f" --rl.prompts_per_step 32 --rl.micro_tokens {tokens} --rl.epochs 1 --rl.critic pm --engine.max_batch 32"
    sizes += " --guards.pm_eval_every 0"
    cfg = settings(tmp_path, shape, length, f"{sizes} {words}")
    here = machine(HardwareConfig(), "cuda")
    torch.cuda.empty_cache()
    if stage == "rl":
        made = actors(cfg, shape, "cuda")

        def work() -> None:
            engine, answered = answers(cfg, made.trainer, length)
            iterations(made.trainer, answered)
            assert engine.pages.total  # it lives until here

        measured = on_gpu(work)
        planned = rl_moments(cfg, here).peak("rl").total
    else:
        model = trainee(cfg, shape, "lm" if stage == "sft" else "score", "cuda")
        task = sft_task(model, 32, length) if stage == "sft" else pm_task(model, 16, length)
        measured = on_gpu(lambda: steps(model, task, cfg, getattr(cfg, stage)))
        planned = next(m for m in Moments(cfg, here, {}).of(stage) if m.moment == "update").total
    assert planned == pytest.approx(measured, rel=0.1)
