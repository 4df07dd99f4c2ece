"""What callers hand to the engine and get back: sampling specification, completion, judge tree."""

from dataclasses import dataclass, field

from cai_fast.engine.prefix import Prefix
from cai_fast.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How one response is drawn.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `max_new_tokens` counts the stop token.
    A response ends with the first of `stop_token_ids`, or with the token that completes one of `stop_strings`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop_strings, str):
            raise InputError(
                f"sampling: stop_strings must be a tuple of strings, found the string {self.stop_strings!r}"
            )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"sampling: temperature must be >= 0 and finite (0 = greedy), found {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"sampling: top_k must be >= 0 (0 = off), found {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"sampling: top_p must lie in (0, 1] (1 = off), found {self.top_p}")
        if self.max_new_tokens < 0:
            raise InputError(f"sampling: max_new_tokens must be >= 0, found {self.max_new_tokens}")
        if any(token < 0 for token in self.stop_token_ids):
            raise InputError(f"sampling: stop_token_ids must be >= 0, found {self.stop_token_ids}")
        if "" in self.stop_strings:
            raise InputError("sampling: a stop string is empty; every response would end at once")


@dataclass(frozen=True)
class Completion:
    """One response: its tokens (with the token that ended it), their log-probs, and why it ended.

    `logprobs[i]` is the log-probability of `token_ids[i]` in nats under the distribution it was drawn from; `kept` is
    a handle over the prompt's keys, and those of the response where they are kept too (see `Engine.generate`).
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" | "length"
    kept: Prefix | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Tree:
    """Prompts that share prefixes: a leaf's prompt is the concatenation of `token_ids` from the root down."""

    token_ids: list[int]
    children: list["Tree"] = field(default_factory=list)
