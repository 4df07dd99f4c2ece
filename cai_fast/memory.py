"""Bytes of models, of their training and of forward passes on one device, from shapes alone.

Three layouts. Alone or replicated: bf16 weights with a 16-bit remainder in the optimizer, or fp32 ones. LoRA: a frozen
trunk, and adapters that are trained in its type. Sharded (FSDP2): fp32 weights, gradients and moments divided by the
ranks, and what is gathered of them for a while in the type of computation.
H hidden size, L layers, V vocabulary, T tokens of a pass, w bytes a number.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from cai_fast import pipeline
from cai_fast.capacity import Machine
from cai_fast.config import Config
from cai_fast.distributed import GRAD_BUCKET
from cai_fast.kernels import chunk_rows
from cai_fast.model import Model, ModelConfig
from cai_fast.model.hf import read_config

TRAINED = ("base", "sft", "pm", "rl")
GATHERED = 2  # layers of a sharded model that are whole at a time: one in use, one on its way


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at one moment of a stage."""

    moment: str = ""
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    cache: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.cache + self.activations

    def __add__(self, other: "Memory") -> "Memory":
        """Sums; the moment is that of whichever names one."""
        names = [field.name for field in dataclasses.fields(self)][1:]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Memory(self.moment or other.moment, **sums)


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `params` counts the weights of the language model, `trunk` those without a head of its own."""

    config: ModelConfig
    params: int
    trunk: int

    def count(self, head: str) -> int:
        """Weights under an "lm" or a "score" head."""
        return self.params if head == "lm" else self.trunk + self.config.hidden_size

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of an LM head."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return (self.trunk - self.embedding - self.config.hidden_size) // self.config.num_layers

    def root(self, head: str) -> int:
        """Weights outside the layers."""
        return self.count(head) - self.layer * self.config.num_layers


@cache
def shape(name: str, *toy: int) -> Shape:
    """Of a checkpoint folder, from its config.json alone, or of the toy model of this width and so many layers."""
    if name == pipeline.TOY:
        from cai_fast.toy.pretrain import model_config

        model = model_config(*toy)
    else:
        model = ModelConfig.from_hf(read_config(Path(name)))
    with torch.device("meta"):
        params = sum(p.numel() for p in Model(model, "lm").parameters())
    own_head = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return Shape(model, params, params - own_head)


def role_shape(config: Config, role: str) -> Shape:
    """Of the model in a role."""
    return shape(config.role(role), config.base.hidden_size, config.base.layers)


def step_tokens(config: Config) -> dict[str, tuple[float, int, int]]:
    """(tokens per optimizer step, tokens per forward pass, tokens of the longest item) of the stages that train."""
    prompt, rl = config.data.max_prompt_tokens, config.rl
    rollout = rl.prompts_per_step * rl.samples_per_prompt * (prompt + rl.max_new_tokens)
    pair = 2 * (prompt + config.compare.max_new_tokens)
    return {
        "base": (config.base.tokens_per_step, config.base.tokens_per_step, 0),
        "sft": (config.sft.batch_tokens, config.sft.micro_tokens, prompt + config.revise.max_new_tokens),
        "pm": (config.pm.batch_pairs * pair, config.pm.micro_tokens, pair),
        "rl": (
            (rl.batch_pairs * pair, rl.micro_tokens, pair) if rl.algorithm == "dpo"
            else (rollout / rl.minibatches, rl.micro_tokens, prompt + rl.max_new_tokens)
        ),
    }  # fmt: skip


class Layout:
    """How the models of a configuration lie on a machine, and what passes over them take."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config, self.machine, self.cuda = config, machine, machine.kind == "cuda"
        self.width = pipeline.weight_type(config, machine.kind).itemsize
        self.rank = config.lora.rank
        self.sharded = config.shards(machine.count)

    def shape(self, role: str) -> Shape:
        """Of the model in a role."""
        return role_shape(self.config, role)

    def __str__(self) -> str:
        kind = {2: "bfloat16", 4: "float32"}[self.width]
        if self.rank:
            return f"one frozen {kind} trunk, adapters of rank {self.rank} trained"
        if self.sharded:
            return f"trained models in float32 shards of 1/{self.machine.count}, computing in {kind}"
        return f"whole {kind} models trained" + (", replicated" if self.machine.count > 1 else "")

    # Weights, gradients, optimizer

    def frozen(self, role: str, head: str = "lm", sharded: bool = False) -> float:
        """Weights of a model that is not trained."""
        whole, sizes = self.shape(role).count(head) * self.width, self.shape(role)
        if not sharded:
            return whole
        return whole / self.machine.count + (sizes.root(head) + GATHERED * sizes.layer) * self.width

    def adapters(self, sizes: Shape) -> int:
        """Weights of one set of adapters."""
        return self.rank * sum(a + b for a, b in self._targets(sizes.config).values()) * sizes.config.num_layers

    def _targets(self, model: ModelConfig) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every layer that gets an adapter."""
        hidden, middle = model.hidden_size, model.intermediate_size
        queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        known = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys),
                 "o_proj": (queries, hidden), "gate_proj": (hidden, middle), "up_proj": (hidden, middle),
                 "down_proj": (middle, hidden)}  # fmt: skip
        return {name: sizes for name, sizes in known.items() if name in self.config.lora.targets}

    def per_weight(self, stage: str) -> tuple[int, int]:
        """Bytes per trained weight of an unsharded model: (gradient, optimizer).

        fp32 weights: fp32 gradient, two fp32 moments. bf16 weights: the 16-bit remainder of the exact fp32 weight,
        moments as `model.moments` says, and a gradient that is bf16 unless several micro-batches are summed, in fp32.
        """
        if self.width == 4:
            return 4, 8
        step, micro, _ = step_tokens(self.config)[stage]
        return 2 if step / self.machine.count <= micro else 4, 2 + (8 if self.config.model.moments == "float32" else 4)

    def main_grad(self, stage: str, sizes: Shape) -> float:
        """The gradient of the LM head, which the losses sum in fp32 where weights are bf16; it is never freed."""
        kept = self.width == 2 and stage in ("sft", "rl") and not self.rank and not self.sharded
        return 4 * sizes.embedding if kept else 0

    def trained(self, stage: str, role: str, head: str = "lm") -> Memory:
        """Weights, gradients and optimizer of a model that `stage` trains; of adapters without their trunk."""
        sizes = self.shape(role)
        count = sizes.count(head)
        if self.rank:
            count = self.adapters(sizes) + (sizes.config.hidden_size if head == "score" else 0)
        gradient, state = self.per_weight(stage)
        if self.sharded and stage != "base":
            own, root = -(-count // self.machine.count), sizes.root(head)
            weights = 4 * own + (root + GATHERED * sizes.layer) * self.width
            # The gathered gradient is summed over the ranks in fp32.
            return Memory("", weights, 4 * own + (root + sizes.layer) * self.width + 4 * sizes.layer, 8 * own)
        main = self.main_grad(stage, sizes) if head == "lm" else 0
        return Memory("", count * self.width, gradient * (count - main / 4) + main, count * state)

    def exchange(self, stage: str, role: str, head: str = "lm") -> float:
        """More gradients while replicas sum them over ranks: fp32 copies of bf16 ones, and a bucket."""
        count = self.adapters(self.shape(role)) if self.rank else self.shape(role).count(head)
        return 4 * min(count, GRAD_BUCKET) + (4 * count if self.per_weight(stage)[0] == 2 else 0)

    # Activations

    def micro(self, stage: str) -> int:
        """Tokens of the largest training pass on one rank: a longer item is alone in its pass."""
        step, micro, longest = step_tokens(self.config)[stage]
        return int(min(step, max(min(micro, step / self.machine.count), longest)))

    def kept(self, model: ModelConfig, recompute: str) -> float:
        """Bytes per token and layer that a forward pass keeps for the backward pass (Korthikanti et al. 2022,
        arXiv 2205.05198, for this decoder and without the attention matrix)."""
        hidden, middle, w = model.hidden_size, model.intermediate_size, self.width
        queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        lse, low = 4 * model.num_heads, self.rank * len(self._targets(model)) * w
        if recompute == "full":
            return hidden * w
        if recompute == "selective":  # the layer's input, the outputs of products and attention
            return (3 * hidden + 2 * queries + 2 * keys + 2 * middle) * w + lse
        attention = 2 * queries + 2 * keys + (0 if self.cuda else queries)  # a CPU's output is gathered into a copy
        if model.qk_norm:
            attention += queries + keys
        statistics = 2 * 4 + lse + (4 * (model.num_heads + model.num_kv_heads) if model.qk_norm else 0)
        tables = model.head_dim * w if w == 2 else 0  # cosines and sines, which fp32 layers share
        return (4 * hidden + attention + 3 * middle - self._unneeded(model)) * w + statistics + tables + low

    def _unneeded(self, model: ModelConfig) -> int:
        """Inputs of frozen products without an adapter, which their backward pass does without."""
        if not self.rank:
            return 0
        has = self._targets(model)
        inputs = {model.hidden_size: ("q_proj", "k_proj", "v_proj")}, {model.hidden_size: ("gate_proj", "up_proj")}
        skipped = sum(size for part in inputs for size, names in part.items() if not set(names) & set(has))
        skipped += model.intermediate_size if "down_proj" not in has else 0
        return skipped + (model.num_heads * model.head_dim if "o_proj" not in has and not self.cuda else 0)

    def training(self, stage: str, role: str, head: str = "lm") -> float:
        """Activations at the peak of a forward and backward pass, head and its buffers included."""
        model, tokens, w = self.shape(role).config, self.micro(stage), self.width
        hidden, mode = model.hidden_size, self.config.parallel.recompute
        ends = (2 * hidden + (0 if head == "score" else 2 * hidden)) * w + 4 * model.head_dim
        again = self.kept(model, "none") - self.kept(model, mode)  # of the layer whose backward pass is at work
        temporary = (2 * hidden + 2 * model.intermediate_size) * w
        own = tokens * (self.kept(model, mode) * model.num_layers + ends)
        if head == "score":
            return own + tokens * (again + temporary)
        buffer, gradient = self.logits(model, tokens, 1 if self.cuda or stage != "rl" else 2), 0.0
        if not self.rank and not self.main_grad(stage, self.shape(role)):
            gradient = 4 * self.shape(role).embedding  # in fp32, until autograd has multiplied and cast it
            buffer = max(buffer, gradient)
        return own + gradient + max(buffer, tokens * (again + temporary))

    def logits(self, model: ModelConfig, tokens: int, buffers: int) -> float:
        """fp32 logits of the rows that the LM head has at once."""
        rows = min(tokens, chunk_rows(model.vocab_size, torch.device(self.machine.kind)))
        return 4.0 * buffers * rows * model.vocab_size

    def forward(self, model: ModelConfig, tokens: int) -> float:
        """Activations of a pass without a gradient: states and what one layer has at once."""
        heads = 2 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        return tokens * (3 * model.hidden_size + max(heads, 3 * model.intermediate_size)) * self.width

    def generating(self, model: ModelConfig, tokens: int) -> float:
        """Activations of an engine: of its largest prefill, or of the logits of a decode step and their fp32 copy."""
        rows = self.config.engine.max_batch
        decode = rows * model.vocab_size * (self.width + 4) + self.forward(model, rows)
        return max(self.forward(model, min(tokens, self.config.engine.prefill_tokens)), decode)
