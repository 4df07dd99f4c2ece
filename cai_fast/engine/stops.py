"""Stop strings: which tokens may complete one, and whether the decoded tail of a response holds one."""

from typing import Protocol

import torch
from torch import Tensor


class Decodes(Protocol):
    """The part of a tokenizer that stop strings need."""

    vocab_size: int

    def decode(self, ids: list[int]) -> str:
        """Text of the tokens."""
        ...


class StopStrings:
    """Checks responses for stop strings across token borders, looking only where one may have ended.

    A token can complete a stop string only if its own text holds the string's last character, so a table over
    the vocabulary picks the few rows worth decoding.
    """

    def __init__(self, tokenizer: Decodes, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._texts: list[str] = []
        self._tables: dict[tuple[str, ...], Tensor] = {}

    def table(self, stops: tuple[str, ...]) -> Tensor:
        """bool [V], on the host: tokens after which a response with these stop strings must be looked at."""
        if stops not in self._tables:
            if not self._texts:
                known = range(min(self.tokenizer.vocab_size, self.vocab_size))
                self._texts = [self.tokenizer.decode([token]) for token in known]
            ends = {stop[-1] for stop in stops}
            # Decoders may drop a blank at the start, and a piece of a multi-byte character decodes to nothing sure.
            if any(end.isspace() and end != "\n" or not end.isascii() for end in ends):
                flags = [True] * self.vocab_size
            else:
                flags = [any(end in text for end in ends) for text in self._texts]
                flags += [False] * (self.vocab_size - len(flags))
            self._tables[stops] = torch.tensor(flags)
        return self._tables[stops]

    @staticmethod
    def tail(stops: tuple[str, ...]) -> int:
        """Tokens that surely cover a stop string ending in the last of them (a token is at least one byte)."""
        return max(len(stop.encode()) for stop in stops) + 8

    def found(self, stops: tuple[str, ...], tail_ids: list[int]) -> bool:
        """Whether the decoded tail holds a stop string (an earlier one would have ended the response)."""
        text = self.tokenizer.decode(tail_ids)
        return any(stop in text for stop in stops)
