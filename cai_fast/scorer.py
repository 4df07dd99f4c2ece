"""Scores of a preference model: what the sequences of a group share, such as their prompt, is computed once."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from cai_fast import losses
from cai_fast.batching import bins, pack
from cai_fast.engine import Tree, token_tree
from cai_fast.engine.scoring import leaf_states
from cai_fast.engine.trunk import Trunk
from cai_fast.model import Model

MICRO_TOKENS = 8192


class Scorer:
    """A preference model with the work that it has done; `max_tokens` bounds one pass.

    deterministic: as for `Engine`. `counters` are those of an engine: its heads' rows are not counted, they are one
    product a sequence.
    """

    def __init__(self, model: Model, *, max_tokens: int = MICRO_TOKENS, deterministic: bool = True) -> None:
        self.model, self.max_tokens, self._trunk = model, max_tokens, Trunk(model, deterministic, max_tokens)

    @property
    def counters(self) -> dict[str, int]:
        """As `Engine.counters`."""
        return self._trunk.counters

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> Tensor:
        """[B] fp32 on the CPU: the score at the last token of each sequence (its end-of-context token).

        groups [B]: the sequences of one group are scored as a tree. Nothing is shared between groups, so that a
        sequence's bits do not depend on which other groups are scored. Where a group shares nothing, its sequences are
        packed whole, with the bits that they have alone.
        """
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        trees: list[Tree] = []
        branched: list[list[int]] = []  # by leaf of the trees: the sequences that end there, all equal
        whole: list[list[int]] = []
        for indices in members.values():
            tree, order = token_tree([sequences[i] for i in indices])
            leaves: list[list[int]] = [[] for _ in range(max(order) + 1)]
            for index, leaf in zip(indices, order, strict=True):
                leaves[leaf].append(index)
            if _shares(tree):
                trees.append(tree)
                branched += leaves
            else:
                whole += leaves
        self.counters["prompt_tokens"] += sum(map(len, sequences))
        result = torch.zeros(len(sequences))
        self._score_whole(sequences, whole, result)
        if trees:
            states = torch.stack(leaf_states(self._trunk, trees, [], self.max_tokens))
            for equal, score in zip(branched, self.model.score(states).tolist(), strict=True):
                result[equal] = score
        return result

    def _score_whole(self, sequences: Sequence[Sequence[int]], whole: list[list[int]], result: Tensor) -> None:
        """Fill in the scores of sequences that share nothing, by the trainer's own forward."""
        lengths = [len(sequences[equal[0]]) for equal in whole]
        for group in bins(lengths, self.max_tokens):
            packed = pack([sequences[whole[n][0]] for n in group], self.model.device)
            for n, score in zip(group, losses.scores(self.model, packed).tolist(), strict=True):
                result[whole[n]] = score
        for name in ("trunk_tokens", "prefill_tokens"):
            self.counters[name] += sum(lengths)


def _shares(tree: Tree) -> bool:
    """Whether tokens of a tree serve more than one leaf."""
    return bool(tree.children) and (bool(tree.token_ids) or any(map(_shares, tree.children)))
