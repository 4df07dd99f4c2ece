"""Check a checkpoint folder without reading its weights: architecture, tensor names, shapes and types."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cai_fast.errors import InputError
from cai_fast.model.config import ModelConfig
from cai_fast.model.decoder import Model
from cai_fast.model.hf import check_names, declared_head, pieces, read_model_config


@dataclass(frozen=True)
class Summary:
    """What `check` found."""

    config: ModelConfig
    num_parameters: int
    head: str  # "lm" or "score"


def check(path: str | Path) -> Summary:
    """The checkpoint's shape; InputError for anything that `load` would refuse, bar damaged tensor contents."""
    folder = Path(path)
    raw, config = read_model_config(folder)
    head = declared_head(raw, folder)
    with torch.device("meta"):
        model = Model(config, head)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, unexpected = set(), []
    for file, name, piece in pieces(folder):
        tied = name == "lm_head.weight" and config.tie_word_embeddings and head == "lm"
        if tied or name.endswith("rotary_emb.inv_freq"):
            continue
        shape, kind = tuple(piece.get_shape()), piece.get_dtype()
        if name not in wanted:
            unexpected.append(name)
        elif shape != wanted[name] or kind not in ("F32", "BF16", "F16"):
            expected = f"float32, bfloat16 or float16 {wanted[name]} (does config.json belong to these weights?)"
            raise InputError(f"{file}: tensor {name} is {kind} {shape}; expected {expected}")
        found.add(name)
    check_names(folder, head, sorted(set(wanted) - found), sorted(unexpected))
    return Summary(config, sum(p.numel() for p in model.parameters()), head)
