"""The smallest model that has every part: two layers, two key-value heads for four queries, 32 hidden, 64 tokens."""

from pathlib import Path

import torch
from support import byte_tokenizer
from torch import Tensor

from cai_fast.batching import Example, pack_targets
from cai_fast.distributed import Distributed
from cai_fast.model import Model, ModelConfig, init_random
from cai_fast.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip


def tiny_model(seed: int = 0, head: str = "lm", std: float = 0.2) -> Model:
    """Random weights; `std` is large enough that logits are not uniform."""
    return init_random(CONFIG, seed, head=head, std=std)


def byte_checkpoint(folder: Path) -> Path:
    """A checkpoint of that size in `folder`/base, with a byte-level tokenizer."""
    tokenizer = Tokenizer.load(byte_tokenizer(folder / "tokenizer"))
    init_random(CONFIG.replace(vocab_size=tokenizer.vocab_size), 0, std=0.1).save(folder / "base", tokenizer=tokenizer)
    return folder / "base"


def alone() -> Distributed:
    """A world of one."""
    return Distributed(0, 1, torch.device("cpu"))


def gradients(model: Model) -> dict[str, Tensor]:
    """Copies of all gradients."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest ||a - b|| / ||b|| over the tensors."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-12)) for name in a)


def log_probs(model: Model, example: Example, temperature: float) -> Tensor:
    """[N, V] in fp64 of the states before each target."""
    batch = pack_targets([example])
    return (model(batch.packed)[batch.rows].double() @ model.lm_head_weight.double().t() / temperature).log_softmax(-1)
