"""Requests of a `generate` call: one prompt each, checked before anything is computed."""

from collections.abc import Hashable, Sequence

from cai_fast.engine.prefix import Prefix
from cai_fast.engine.requests import Sampling
from cai_fast.errors import InputError


class Request:
    """One prompt of a `generate` call."""

    __slots__ = ("index", "key", "length", "prefix", "prompt", "sampling", "twin")

    def __init__(self, index: int, prompt: list[int], sampling: Sampling, key: int, prefix: Prefix | None) -> None:
        self.index, self.prompt, self.sampling, self.key, self.prefix = index, prompt, sampling, key, prefix
        self.length = len(prompt) + (0 if prefix is None else len(prefix))
        self.twin: int | None = None  # row of an earlier request with this prompt

    @property
    def alike(self) -> Hashable:
        """Equal for requests whose prompts and prefixes are."""
        return id(self.prefix), tuple(self.prompt)

    @property
    def total(self) -> int:
        """Positions reserved for it: the worst case."""
        return self.length + self.sampling.max_new_tokens


def make_requests(
    prompts: Sequence[list[int]],
    sampling: Sampling | Sequence[Sampling],
    keys: Sequence[int] | None,
    prefix: Prefix | Sequence[Prefix | None] | None,
    max_len: int,
    vocab_size: int,
    has_tokenizer: bool,
) -> list[Request]:
    """Check the arguments of `generate` and put them together."""
    count = len(prompts)
    samplings = [sampling] * count if isinstance(sampling, Sampling) else list(sampling)
    prefixes = [prefix] * count if prefix is None or isinstance(prefix, Prefix) else list(prefix)
    keys = list(range(count)) if keys is None else list(keys)
    for name, values in (("sampling", samplings), ("keys", keys), ("prefix", prefixes)):
        if len(values) != count:
            raise InputError(f"engine: {name} has {len(values)} entries for {count} prompts")
    requests = [Request(*r) for r in zip(range(count), prompts, samplings, keys, prefixes, strict=True)]
    for r in requests:
        if not r.prompt and (r.prefix is None or r.prefix.last_hidden is None):
            raise InputError(
                f"engine: prompt {r.index} is empty; a prompt needs at least one token, except after a "
                "whole handle of Engine.prefix"
            )
        if r.prompt and not 0 <= min(r.prompt) <= max(r.prompt) < vocab_size:
            raise InputError(
                f"engine: prompt {r.index} has token ids from {min(r.prompt)} to {max(r.prompt)}; the model's are 0 to "
                f"{vocab_size - 1}"
            )
        if r.total > max_len:
            raise InputError(
                f"engine: prompt {r.index} has {r.length} tokens; with max_new_tokens "
                f"{r.sampling.max_new_tokens} that exceeds max_len {max_len}. Shorten the "
                "prompt, lower max_new_tokens or raise engine.max_len"
            )
        if r.sampling.stop_strings and not has_tokenizer:
            raise InputError("engine: stop strings need a tokenizer; pass tokenizer= to Engine")
    return requests
