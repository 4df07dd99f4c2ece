"""Check a checkpoint folder without reading its weights: architecture, tensor names, shapes and types.

Of the embedding, rows can be read that a chat template depends on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cai_fast.model.config import ModelConfig
from cai_fast.model.decoder import Model
from cai_fast.model.hf import check_names, check_piece, declared_head, pieces, read_model_config

_WEAK = 0.01  # of the usual norm; weight decay without gradients leaves orders of magnitude less


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
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found, unexpected = set(), []
    for file, name, piece in pieces(folder):
        tied = name == "lm_head.weight" and config.tie_word_embeddings and head == "lm"
        if tied or name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in wanted:
            unexpected.append(name)
            continue
        check_piece(file, name, piece, wanted[name])
        found.add(name)
    check_names(folder, head, sorted(set(wanted) - found), sorted(unexpected))
    return Summary(config, sum(p.numel() for p in model.parameters()), head)


def untrained(path: str | Path, tokens: Sequence[int], ordinary: Sequence[int]) -> list[int]:
    """Those of `tokens` whose rows of the input embedding no training has touched: (nearly) zero beside the rows of the
    `ordinary` tokens, or equal to one another. Only these rows are read."""
    rows, usual = _embedding_rows(Path(path), tokens), _embedding_rows(Path(path), ordinary).norm(dim=1).median()
    alike = (rows[:, None] == rows).all(-1).sum(1) > 1
    return [token for token, bad in zip(tokens, alike | (rows.norm(dim=1) < _WEAK * usual), strict=True) if bad]


def _embedding_rows(folder: Path, tokens: Sequence[int]) -> Tensor:
    """[tokens, H] float32."""
    piece = next(piece for _, name, piece in pieces(folder) if name == "model.embed_tokens.weight")
    return torch.stack([piece[token : token + 1][0].float() for token in tokens])
