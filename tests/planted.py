"""An engine whose answers and preferences are written by the test: it sees prompts as text and replies with text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cai_fast.engine import Completion, Sampling, Tree
from cai_fast.tokenizer import Renderer

Reply = Callable[[str], str | None]  # prompt -> text; None: never stops
Prefer = Callable[[str], float]  # question -> probability of the first option


def leaves(tree: Tree) -> list[list[int]]:
    """The prompts of a tree, depth first."""
    if not tree.children:
        return [list(tree.token_ids)]
    return [[*tree.token_ids, *ids] for child in tree.children for ids in leaves(child)]


@dataclass
class PlantedEngine:
    """Stands in for `Engine` in a stage; `prompts`, `questions` and `keys` hold what it was asked, in order."""

    renderer: Renderer
    reply: Reply = lambda prompt: "Yes."
    prefer: Prefer = lambda question: 0.5
    mass: float = 0.25
    prompts: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)

    def prefix(self, token_ids: Sequence[int]) -> list[int]:
        """A handle is the tokens themselves."""
        return list(token_ids)

    def prefixes(self, token_ids: Sequence[Sequence[int]], after: Sequence[list[int] | None]) -> list[list[int]]:
        """Handles behind handles."""
        return [[*(before or []), *ids] for ids, before in zip(token_ids, after, strict=True)]

    def _text(self, prefix: Sequence[int] | None, ids: Sequence[int]) -> str:
        return self.renderer.tokenizer.decode([*(prefix or []), *ids])

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[int],
                 prefix: Sequence[list[int] | None] | None = None, keep: bool = False,
                 progress: Any = None) -> list[Completion]:  # fmt: skip
        """One reply per prompt, ended by the stop token."""
        done = []
        for ids, before in zip(prompts, prefix or [None] * len(prompts), strict=True):
            self.prompts.append(self._text(before, ids))
            text = self.reply(self.prompts[-1])
            tokens = self.renderer.tokenizer.encode("and so on" if text is None else " " + text)
            tokens += [] if text is None else [self.renderer.stop_id]
            done.append(Completion(tokens, [0.0] * len(tokens), "length" if text is None else "stop"))
        self.keys += keys
        return done

    def score(self, trees: Sequence[Tree], option_ids: Any, *, prefix: list[int] | None,
              return_mass: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probabilities [B, 2] of the options, and their planted share of all tokens."""
        asked = [self._text(prefix, ids) for tree in trees for ids in leaves(tree)]
        self.questions += asked
        first = torch.tensor([self.prefer(question) for question in asked], dtype=torch.float64)
        return torch.stack([first.log(), torch.log1p(-first)], 1), torch.full_like(first, self.mass)
