"""`--plan`: what each stage will hold in memory, write to disk, and compute, before anything is allocated.

Estimates from shapes alone: weights, gradients, AdamW's state, KV cache and head buffers are exact products;
activations are 34 bytes per token, layer and hidden unit at fp32 (Korthikanti et al. 2022, arXiv 2205.05198, without
the attention matrix). What the engine does is in workload.py, how long it takes in capacity.py; training takes 6
floating-point operations per parameter and token. Prompt counts are read from the sources.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from cai_fast import capacity, pipeline, readers, workload
from cai_fast.capacity import Pool
from cai_fast.config import Config
from cai_fast.errors import InputError
from cai_fast.model import Model, ModelConfig
from cai_fast.model.hf import read_config
from cai_fast.workload import Work

GIB = 2**30
HEAD_ROWS = 2048  # rows of fp32 logits held at once by the LM head
TEXT_BYTES = 3  # on disk, per token computed
ROLES = {"revise": "assistant", "label": "judge"}  # of the model a stage works with; else base


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `params` counts all weights."""

    config: ModelConfig
    params: int


@dataclass(frozen=True)
class StagePlan:
    """One line of the table: bytes, tokens, seconds."""

    name: str
    weights: float
    training: float
    cache: float
    activations: float
    disk: float
    trained: int
    prefill: int
    decode: int
    seconds: float

    @property
    def memory(self) -> float:
        """Peak bytes on one device."""
        return self.weights + self.training + self.cache + self.activations


def plan_lines(config: Config) -> list[str]:
    """The tables of `--plan`."""
    planner = Planner(config)
    base = planner.shape("base")
    plans = [planner.stage(stage) for stage in config.stages]
    lines = [
        f"model.base: {base.params:,} parameters, {base.config.num_layers} layers, hidden {base.config.hidden_size}",
        f"{'stage':10}{'weights':>9}{'training':>9}{'KV':>9}{'activ.':>9}{'peak':>9}{'disk':>10}"
        f"{'trained':>10}{'prefill':>9}{'decode':>9}{'time':>10}",
    ]
    for plan in plans:
        sizes = (plan.weights, plan.training, plan.cache, plan.activations, plan.memory)
        row = "".join(f"{size / GIB:9.3f}" for size in sizes) + f"{plan.disk / GIB:10.3f}"
        tokens = f"{_short(plan.trained):>10}{_short(plan.prefill):>9}{_short(plan.decode):>9}"
        lines.append(f"{plan.name:10}{row}{tokens}{_time(plan.seconds):>10}")
    disk, spent = sum(p.disk for p in plans) / GIB, sum(p.seconds for p in plans)
    lines += [f"{'total':10}{'':45}{disk:10.3f}{'':28}{_time(spent):>10}", *_cache_lines(planner)]
    return [
        *lines,
        "Sizes in GiB, peak per device; tokens at most: every prompt and text as long as allowed; time on one device.",
        *str(planner.rates).splitlines(),
        "No work was done.",
    ]


def _cache_lines(planner: "Planner") -> list[str]:
    """The table of the engines' caches."""
    head = f"{'KV cache':20}{'rows':>6}{'longest':>9}  {'pages':24}"
    lines = [head + f"{'MiB each':>9}{'shared':>8}{'in use':>8}{'GiB':>9}"]
    for stage, work in ((s, w) for s, works in planner.works.items() for w in works if w.phases):
        pool = planner.pool(stage, work)
        name = work.name if work.engines == 1 else f"{work.name} (each of {work.engines})"
        pages = f"{pool.pages:,} {'pages' if pool.paged else 'slots'} of {pool.size}"
        lines.append(
            f"{name:20}{pool.rows:6}{work.room:9}  {pages:24}{pool.page_bytes / 2**20:9.2f}{pool.shared:8}"
            f"{pool.used(work):8}{pool.nbytes / GIB:9.3f}"
        )
    return lines if len(lines) > 1 else []


def check_memory(config: Config) -> str:
    """A line to print, or InputError if some stage's weights and optimizer alone exceed one device's memory."""
    memory, where = _memory(config), "GPU" if uses_gpu(config) else "machine"
    floors = {stage: sum(held(config, stage)) for stage in config.stages}
    worst = max(floors, key=lambda stage: floors[stage])
    floor = floors[worst]
    if floor > memory:
        raise InputError(
            f"Stage {worst} needs at least {floor / GIB:.1f} GiB for weights and optimizer, this {where} has "
            f"{memory / GIB:.1f} GiB. Use a smaller model.base or a larger {where}"
            + ("." if config.rl.critic == "detached" or worst != "rl" else ", or set rl.critic = detached.")
        )
    return f"memory        {floor / GIB:.2f} GiB for weights and optimizer in stage {worst}, of {memory / GIB:.0f}"


class Planner:
    """The engines' work of a configuration, on the device that it runs on."""

    def __init__(self, config: Config) -> None:
        self.config, self.width, gpu = config, weight_width(config), uses_gpu(config)
        self.counts = prompt_counts(config)
        self.works = workload.works(config, self.counts, workload.renderers(config), cpu=not gpu)
        self.passes = workload.passes(config, self.counts)
        self.rates = capacity.rates(torch.device("cuda" if gpu else "cpu"), pipeline.weight_type(config, _kind(config)))

    def shape(self, role: str) -> Shape:
        """Of the model in a role."""
        return shape(self.config.role(role))

    def pool(self, stage: str, work: Work, taken: int = 0) -> Pool:
        """The cache of one engine of a stage, made when the stage's models are loaded and `taken` bytes more."""
        free = None
        if uses_gpu(self.config):
            free = _memory(self.config) - int(held(self.config, stage)[0]) - taken
        return capacity.pool(self.config.engine, self.shape(work.role).config, self.width, work, free)

    def _others(self, stage: str, work: Work, first: Pool) -> int:
        """Bytes of the caches of a stage's further equal engines, each of which finds less memory."""
        total = 0
        for _ in range(1, work.engines):
            total += self.pool(stage, work, taken=first.nbytes + total).nbytes
        return total

    def stage(self, stage: str) -> StagePlan:
        """The plan of one stage."""
        config, width, works, passes = self.config, self.width, self.works.get(stage, []), self.passes[stage]
        weights, training = held(config, stage)
        base = self.shape(ROLES.get(stage, "base"))
        micro = _steps(config).get(stage, (0, 0))[1]
        head = min(HEAD_ROWS, micro or HEAD_ROWS) * base.config.vocab_size * 4 if stage != "report" else 0
        active = 34 / 2 * width * micro * base.config.num_layers * base.config.hidden_size
        caches, spent = [0], 0.0
        for work in works:
            cache, model = self.pool(stage, work), self.shape(work.role)
            outside = (work.kept + sum(work.blocks)) * capacity.token_bytes(model.config, width)
            caches.append(cache.nbytes + self._others(stage, work, cache) + outside)
            spent += capacity.seconds(work, cache, model.params, width, self.rates)
        networks = _networks(config, stage)
        spent += self.rates.packed(base.params * (6 * networks * passes.trained + 2 * passes.scored))
        prefill, decode = sum(w.prefill for w in works), sum(w.decode for w in works)
        exported = networks * base.params * (2 * width + _trained_bytes(config, width, stage)[1])  # and its state
        disk = TEXT_BYTES * (prefill + decode) + exported
        return StagePlan(
            stage, weights, training, max(caches), active + head, disk, passes.trained, prefill, decode, spent
        )


def _networks(config: Config, stage: str) -> int:
    """How many a stage trains at a time."""
    return {"base": 1, "sft": 1, "pm": 1, "rl": 1 if config.rl.critic == "detached" else 2}.get(stage, 0)


def held(config: Config, stage: str) -> tuple[float, float]:
    """Bytes on one device of a stage's models; of gradients and optimizer."""
    width, sizes = weight_width(config), shape(config.role(ROLES.get(stage, "base")))
    networks, model = _networks(config, stage), sizes.config
    models = {
        "compare": 2 if config.compare.base_fraction else 1,
        "rl": networks + 2,  # the reference and the preference model are not trained
        "evaluate": 4,  # three policies and the preference model
        "report": 0,
    }.get(stage, 1)
    main_grad = 4 * model.vocab_size * model.hidden_size if width == 2 and stage in ("sft", "rl") else 0
    training = networks * sizes.params * _trained_bytes(config, width, stage)[0] + main_grad
    return models * sizes.params * width, training


def _steps(config: Config) -> dict[str, tuple[float, int]]:
    """(tokens per optimizer step, tokens per forward pass) of the stages that train."""
    prompt, rl = config.data.max_prompt_tokens, config.rl
    rollout = rl.prompts_per_step * rl.samples_per_prompt * (prompt + rl.max_new_tokens)
    return {
        "base": (config.base.tokens_per_step, config.base.tokens_per_step),
        "sft": (config.sft.batch_tokens, config.sft.micro_tokens),
        "pm": (2 * config.pm.batch_pairs * (prompt + config.compare.max_new_tokens), config.pm.micro_tokens),
        "rl": (rollout / rl.minibatches, rl.micro_tokens),
    }


def _trained_bytes(config: Config, width: int, stage: str) -> tuple[int, int]:
    """Bytes per trained weight: (gradient and AdamW's state, the state alone).

    fp32 weights: fp32 gradient, two fp32 moments. bf16 weights: the 16-bit remainder of the exact fp32 weight, moments
    as `model.moments` says, and a gradient that is bf16 unless several micro-batches are summed, in fp32 (that of the
    language-model head always is: `held` adds it).
    """
    if width == 4:
        return 4 + 8, 8
    state = 2 + (8 if config.model.moments == "float32" else 4)
    step, micro = _steps(config).get(stage, (0, 0))
    return (2 if step <= micro else 4) + state, state


def _short(count: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{suffix}"
    return f"{count:.0f}"


def _time(seconds: float) -> str:
    for limit, unit in ((3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.1f} s"


def uses_gpu(config: Config) -> bool:
    """Whether this configuration runs on a GPU here."""
    return config.model.device != "cpu" and torch.cuda.is_available()


def _kind(config: Config) -> str:
    return "cuda" if uses_gpu(config) else "cpu"


def _memory(config: Config) -> int:
    """Bytes of memory of the GPU, or else of the machine."""
    if uses_gpu(config):
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def weight_width(config: Config) -> int:
    """Bytes per weight of the models on the device that this configuration runs on: 2 or 4."""
    return pipeline.weight_type(config, _kind(config)).itemsize


@cache
def shape(name: str) -> Shape:
    """Of a checkpoint folder, from its config.json alone, or of the toy model."""
    if name == pipeline.TOY:
        from cai_fast.toy.pretrain import model_config

        model = model_config()
    else:
        model = ModelConfig.from_hf(read_config(Path(name)))
    with torch.device("meta"):
        return Shape(model, sum(p.numel() for p in Model(model, "lm").parameters()))


def prompt_counts(config: Config) -> dict[str, int]:
    """Prompts by kind and split, and helpfulness comparisons, from the sources."""
    data, counts = config.data, {}
    for kind, limit in (("red_team", data.num_red_team), ("helpful", data.num_helpful)):
        prompts = pipeline.prompt_source(config, kind)[0]
        train = sum(p.split == "train" for p in prompts)
        counts[kind] = min(limit or train, train)
        counts[kind + "_eval"] = len(prompts) - train
    counts["preferences"] = config.base.comparisons if data.preferences else 0
    if data.preferences not in ("", pipeline.TOY):
        rows, _ = readers.read_comparisons(data.preferences, max_bad_fraction=data.max_bad_fraction)
        counts["preferences"] = len(rows)
    return counts
