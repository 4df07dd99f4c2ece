"""A prompt prefix whose keys and values are computed once and shared by any number of prompts."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """Handle made by `Engine.prefix`; valid for the weights it was made with."""

    token_ids: tuple[int, ...]
    kv: Tensor  # (layers, 2, kv_heads, n, head_dim)
    last_hidden: Tensor  # [H] after the final norm: predicts the first token after the prefix
    version: tuple[int, ...]  # weights version

    def __len__(self) -> int:
        return len(self.token_ids)
