"""Models of real shapes with random weights, made where they are measured, and the least time that their work takes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.contest import known_ceilings
from cai_fast import capacity
from cai_fast.model import Model, ModelConfig, Rope

STD = 0.02


@dataclass(frozen=True)
class Shape:
    """A model's shape, and what the project wants to reach with it on an H200."""

    config: ModelConfig
    step_ms: float | None = None
    """A decode step of 256 rows with 512 cached tokens each, sampling included."""
    comparisons: float | None = None
    """Comparisons a second, judged by one principle in both orders."""


_ROPE = Rope(theta=500000.0)
_LLAMA_1B = ModelConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8,
    head_dim=64, max_position_embeddings=4096, rms_norm_eps=1e-5, rope=_ROPE, tie_word_embeddings=True,
)  # fmt: skip
_LLAMA_8B = ModelConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-5, rope=_ROPE,
)  # fmt: skip
_TINY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip
SHAPES = {"1b": Shape(_LLAMA_1B, 2.4), "8b": Shape(_LLAMA_8B, 11.0, 25.0), "tiny": Shape(_TINY)}
"""tiny: to try the measuring programs on a CPU; its times mean nothing."""


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Model:
    """N(0, STD^2) weights and norms of 1, made on the device: neither the host nor fp32 ever holds them."""
    with torch.device("meta"):
        model = Model(config).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, STD, generator=generator)
        else:
            parameter.fill_(1.0)
    return model


def twin(model: Model) -> Any:
    """transformers' model on the same tensors, without a copy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = model.config.to_hf("lm")
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    # Tied or not, their head is a name of its own.
    theirs.load_state_dict({**model.state_dict(), "lm_head.weight": model.lm_head_weight}, assign=True)
    theirs.tie_weights()
    # Its frequencies are no parameter: on the meta device they were never computed.
    with model.device:
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    return theirs.eval().requires_grad_(False)


class Ceilings(NamedTuple):
    """What a device does at best."""

    flops: float
    bandwidth: float
    source: str


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Of a device by its name, as a plain product and copy reached them; else from a data sheet or measured now."""
    known = known_ceilings(device)
    if known is not None:
        return Ceilings(*known, "plain products and copies on such a device")
    rates = capacity.rates(device, dtype)
    return Ceilings(rates.flops, rates.bandwidth, rates.source)


def layer_weights(config: ModelConfig) -> int:
    """Weights of the matrices in all blocks."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def step_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: the blocks' and the head's. An embedding is looked up."""
    return layer_weights(config) + config.vocab_size * config.hidden_size


class Floor(NamedTuple):
    """Milliseconds that a decode step takes at least: to read the weights, or to multiply with them, and to read keys
    and values."""

    weights: float
    products: float
    cached: float

    @property
    def total(self) -> float:
        return max(self.weights, self.products) + self.cached


def decode_floor(config: ModelConfig, rows: int, cached: float, limits: Ceilings, width: int = 2) -> Floor:
    """cached: different tokens in the cache whose keys and values are read; width: bytes of a number."""
    params = step_weights(config)
    return Floor(
        1e3 * params * width / limits.bandwidth,
        1e3 * 2 * params * rows / limits.flops,
        1e3 * cached * capacity.token_bytes(config, width) / limits.bandwidth,
    )


def pass_seconds(config: ModelConfig, tokens: float, limits: Ceilings) -> float:
    """Seconds that a pass of the blocks over so many tokens takes at least; attention and head not counted."""
    return 2 * layer_weights(config) * tokens / limits.flops
