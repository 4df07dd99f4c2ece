"""`--plan`: what each stage will hold in memory, write to disk, and compute, before anything is allocated.

Estimates from shapes alone: weights, gradients, AdamW's state, KV cache and head buffers are exact products;
activations are 34 bytes per token, layer and hidden unit at fp32 (Korthikanti et al. 2022, arXiv 2205.05198, without
the attention matrix), and time is 2 floating-point operations per parameter and token (6 in training) at a stated
fraction of the device's peak. Prompt counts are read from the sources.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from cai_fast import pipeline, readers
from cai_fast.config import Config
from cai_fast.errors import InputError
from cai_fast.model import ModelConfig
from cai_fast.model.hf import read_config

GIB = 2**30
HEAD_ROWS = 2048  # rows of fp32 logits held at once by the LM head
CPU_RATE, GPU_RATE = 5e10, 4e14  # floating-point operations per second assumed: two cores; one H200 at 40 %


@dataclass(frozen=True)
class StagePlan:
    """One line of the table: bytes and tokens."""

    name: str
    weights: float
    training: float
    cache: float
    activations: float
    disk: float
    tokens: float
    flops: float

    @property
    def memory(self) -> float:
        """Peak bytes on one device."""
        return self.weights + self.training + self.cache + self.activations


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `params` counts all weights."""

    config: ModelConfig
    params: int

    @property
    def cache_per_token(self) -> int:
        """Elements of keys and values per token."""
        return 2 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim


def plan_lines(config: Config) -> list[str]:
    """The table of `--plan`."""
    shape = _shape(config)
    gpu = _uses_gpu(config)
    rate = GPU_RATE if gpu else CPU_RATE
    plans = _plans(config, shape, weight_width(config))
    lines = [
        f"model.base: {shape.params:,} parameters, {shape.config.num_layers} layers, hidden {shape.config.hidden_size}",
        f"{'stage':10} {'weights':>9} {'training':>9} {'KV':>9} {'activ.':>9} {'peak':>9}  "
        f"{'disk':>9} {'tokens':>9} {'hours':>7}   (GiB; peak per device)",
    ]
    for plan in plans:
        sizes = [plan.weights, plan.training, plan.cache, plan.activations, plan.memory]
        row = " ".join(f"{size / GIB:9.3f}" for size in sizes)
        hours = plan.flops / rate / 3600
        lines.append(f"{plan.name:10} {row}  {plan.disk / GIB:9.3f} {_short(plan.tokens):>9} {hours:7.2f}")
    total = sum(plan.flops for plan in plans) / rate / 3600
    lines.append(f"{'total':10} {'':49}  {sum(p.disk for p in plans) / GIB:9.3f} {'':9} {total:7.2f}")
    lines.append(f"Time assumes {rate:.0e} floating-point operations per second and device; no work was done.")
    return lines


def check_memory(config: Config) -> str:
    """A line to print, or InputError if some stage's weights and optimizer alone exceed one device's memory."""
    import torch

    if _uses_gpu(config):
        memory, where = torch.cuda.mem_get_info()[1], "GPU"
    else:
        memory, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine"
    worst = max(_plans(config, _shape(config), weight_width(config)), key=lambda plan: plan.weights + plan.training)
    floor = worst.weights + worst.training
    if floor > memory:
        raise InputError(
            f"Stage {worst.name} needs at least {floor / GIB:.1f} GiB for weights and optimizer, this {where} has "
            f"{memory / GIB:.1f} GiB. Use a smaller model.base or a larger {where}"
            + ("." if config.rl.critic == "detached" or worst.name != "rl" else ", or set rl.critic = detached.")
        )
    return f"memory        {floor / GIB:.2f} GiB for weights and optimizer in stage {worst.name}, of {memory / GIB:.0f}"


def _short(count: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{suffix}"
    return f"{count:.0f}"


def _uses_gpu(config: Config) -> bool:
    import torch

    return config.model.device != "cpu" and torch.cuda.is_available()


def weight_width(config: Config) -> int:
    """Bytes per weight of the models on the device that this configuration runs on: 2 or 4."""
    return pipeline.weight_type(config, "cuda" if _uses_gpu(config) else "cpu").itemsize


def _trained_bytes(config: Config, width: int, step_tokens: float, micro_tokens: int) -> tuple[int, int]:
    """Bytes per trained weight: (gradient and AdamW's state, the state alone).

    fp32 weights: fp32 gradient, two fp32 moments. bf16 weights: the 16-bit remainder of the exact fp32 weight, moments
    as `model.moments` says, and a gradient that is bf16 unless several micro-batches are summed, in fp32 (that of the
    language-model head always is: `_plans` adds it).
    """
    if width == 4:
        return 4 + 8, 8
    state = 2 + (8 if config.model.moments == "float32" else 4)
    return (2 if step_tokens <= micro_tokens else 4) + state, state


def _shape(config: Config) -> Shape:
    """Shape of model.base, from its config.json alone."""
    from cai_fast.model import Model

    if config.model.base == pipeline.TOY:
        from cai_fast.toy.pretrain import model_config

        model = model_config()
    else:
        model = ModelConfig.from_hf(read_config(Path(config.model.base)))
    import torch

    with torch.device("meta"):
        return Shape(model, sum(p.numel() for p in Model(model, "lm").parameters()))


def _counts(config: Config) -> dict[str, int]:
    """Prompts and comparisons, from the sources."""
    data, counts = config.data, {}
    for kind, limit in (("red_team", data.num_red_team), ("helpful", data.num_helpful)):
        prompts = pipeline.prompt_source(config, kind)[0]
        train = sum(p.split == "train" for p in prompts)
        counts[kind] = min(limit or train, train)
        counts[kind + "_eval"] = len(prompts) - train
    counts["preferences"] = 500
    if data.preferences not in ("", pipeline.TOY):
        rows, _ = readers.read_comparisons(data.preferences, max_bad_fraction=data.max_bad_fraction)
        counts["preferences"] = len(rows)
    return counts


def _limit(setting: int, available: int) -> int:
    return min(setting or available, available)


def _plans(config: Config, shape: Shape, width: int) -> list[StagePlan]:
    """One plan per requested stage; `width` is bytes per weight while computing."""
    n, prompt = _counts(config), config.data.max_prompt_tokens
    revise, compare, label, rl, evaluate = config.revise, config.compare, config.label, config.rl, config.evaluate
    weights, text = shape.params * width, 6.0  # bytes of JSON per token
    red = _limit(revise.num_red_team, n["red_team"])
    helpful = _limit(revise.num_helpful, n["helpful"]) * revise.helpful_samples
    steps = 2 if revise.critique else 1
    answered = prompt + revise.max_new_tokens
    chain = (1 + revise.rounds * steps) * answered
    pairs = _limit(compare.num_prompts, n["red_team"]) * compare.pairs_per_prompt
    asked = label.principles * (2 if label.orders == "both" else 1) * (label.cot_samples if label.cot else 1)
    question = prompt + 2 * compare.max_new_tokens + (label.cot_max_new_tokens if label.cot else 0)
    rollouts = rl.steps * rl.prompts_per_step * rl.samples_per_prompt
    answer = prompt + rl.max_new_tokens
    held_out = _limit(evaluate.num_red_team, n["red_team_eval"]) + _limit(evaluate.num_helpful, n["helpful_eval"])
    tokens = {
        "base": config.base.steps * config.base.tokens_per_step,
        "revise": red * chain + helpful * answered,
        "sft": (red * revise.rounds + helpful) * answered * config.sft.epochs,
        "compare": 2 * pairs * (prompt + compare.max_new_tokens),
        "label": pairs * asked * question,
        "pm": 2 * (pairs + n["preferences"]) * (prompt + compare.max_new_tokens) * config.pm.epochs,
        "rl": rollouts * answer,
        "evaluate": (3 + chain // answered) * held_out * (prompt + evaluate.max_new_tokens),
        "report": 0,
    }
    micro = {"base": config.base.tokens_per_step, "sft": config.sft.micro_tokens, "pm": config.pm.micro_tokens,
             "rl": rl.micro_tokens}  # fmt: skip
    step = {"base": micro["base"], "sft": config.sft.batch_tokens, "rl": rollouts * answer / rl.steps / rl.minibatches,
            "pm": 2 * config.pm.batch_pairs * (prompt + compare.max_new_tokens)}  # fmt: skip
    models = {"rl": 4, "compare": 2 if compare.base_fraction else 1, "report": 0}
    trained = {"base": 1, "sft": 1, "pm": 1, "rl": 1 if rl.critic == "detached" else 2}
    passes = {"rl": 2 + 2 + 6 * rl.epochs + 2, "base": 6, "sft": 6, "pm": 6}
    plans = []
    for stage in config.stages:
        copies = trained.get(stage, 0)
        held, kept = _trained_bytes(config, width, step.get(stage, 0), micro.get(stage, 0))
        waiting = min(revise.chunk, red) * revise.critique * (stage == "revise")  # critiques whose keys are kept
        slots = 0 if stage in ("base", "sft", "pm", "report") else config.engine.max_batch
        head = min(HEAD_ROWS, micro.get(stage, HEAD_ROWS)) * shape.config.vocab_size * 4 if stage != "report" else 0
        main_grad = (
            4 * shape.config.vocab_size * shape.config.hidden_size if width == 2 and stage in ("sft", "rl") else 0
        )
        active = 34 / 2 * width * micro.get(stage, 0) * shape.config.num_layers * shape.config.hidden_size
        plans.append(StagePlan(
            name=stage,
            weights=models.get(stage, 1) * weights,
            training=copies * shape.params * held + main_grad,
            cache=(slots * max(question, answer, chain // max(1, revise.rounds))
                   + waiting * (answered + revise.critique_max_new_tokens)) * shape.cache_per_token * width,
            activations=active + head,
            disk=tokens[stage] * text / 2 * (stage not in ("base", "sft", "pm"))
            + copies * shape.params * (2 * width + kept),  # the exported model, and the state with its weights
            tokens=tokens[stage],
            flops=passes.get(stage, 2) * shape.params * tokens[stage],
        ))  # fmt: skip
    return plans
