"""A prompt prefix whose keys and values are computed once and shared by any number of prompts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """Handle made by `Engine.prefix` or kept by `Engine.generate`; valid for the weights it was made with.

    A kept handle shares the stretches of the prefix that its request began with and owns the rest: 2 x layers x
    kv_heads x head_dim numbers a token, for as long as it or a part cut from it lives.
    """

    token_ids: tuple[int, ...]
    stretches: tuple[Tensor, ...]  # (layers, 2, kv_heads, n, head_dim) each, one after the other
    last_hidden: Tensor | None  # [H] after the final norm: predicts the first token after the prefix; None: not known
    version: tuple[int, ...]  # weights version

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def kv(self) -> Tensor:
        """All keys and values as one stretch (a copy if there are several)."""
        return self.stretches[0] if len(self.stretches) == 1 else torch.cat(self.stretches, dim=3)

    def cut(self, length: int) -> "Prefix":
        """Its first `length` tokens, without a copy."""
        if length >= len(self):
            return self
        stretches, left = [], length
        for kv in self.stretches:
            # A whole stretch stays the same object: that is how rows are seen to share it.
            stretches.append(kv if kv.shape[3] <= left else kv[:, :, :, :left])
            left -= stretches[-1].shape[3]
            if left == 0:
                break
        return Prefix(self.token_ids[:length], tuple(stretches), None, self.version)
