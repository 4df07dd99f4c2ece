"""Rendered prompts through an engine that computes what they share once: few-shot blocks, kept requests, questions."""

from collections.abc import Callable, Hashable, Sequence
from os.path import commonprefix  # of any sequences

import torch

from cai_fast.engine import Completion, Engine, Prefix, Sampling, Tree, token_tree
from cai_fast.tokenizer import Options, Rendered


class Prefixes:
    """The few-shot blocks an engine has prefilled, one handle per distinct block; `progress` as `Engine.generate`."""

    def __init__(self, engine: Engine, progress: Callable[[int, Completion], None] | None = None) -> None:
        self.engine, self.progress = engine, progress
        self._handles: dict[tuple[int, ...], Prefix] = {}

    def handle(self, tokens: Sequence[int]) -> Prefix | None:
        """Handle of a shared prefix; None for an empty one."""
        block = tuple(tokens)
        if not block:
            return None
        if block not in self._handles:
            self._handles[block] = self.engine.prefix(list(block))
        return self._handles[block]

    def generate(
        self,
        rendered: Sequence[Rendered],
        spec: Sampling,
        keys: Sequence[int],
        *,
        after: Sequence[Prefix | None] | None = None,
        keep: bool = False,
        groups: Sequence[Hashable] | None = None,
    ) -> list[Completion]:
        """One completion per rendered prompt, in order.

        after: a kept handle per prompt; the tokens that it and the prompt both begin with are not computed again.
        groups (instead): what the prompts of one group share is computed once, as in `score`.
        """
        if groups is not None:
            starts = self._branches(rendered, groups)
        else:
            starts = [self._start(r, kept) for r, kept in zip(rendered, after or [None] * len(rendered), strict=True)]
        prompts, handles = [ids for _, ids in starts], [handle for handle, _ in starts]
        return self.engine.generate(prompts, spec, keys=list(keys), prefix=handles, keep=keep, progress=self.progress)

    def _start(self, r: Rendered, kept: Prefix | None) -> tuple[Prefix | None, list[int]]:
        """The handle that covers most of a prompt, and the tokens after it (at least one of a kept handle's)."""
        shared = 0 if kept is None else len(commonprefix([kept.token_ids, (*r.prefix, *r.ids[:-1])]))
        if shared <= len(r.prefix):
            return self.handle(r.prefix), r.ids
        return kept.cut(shared), r.ids[shared - len(r.prefix) :]

    def _branches(
        self, rendered: Sequence[Rendered], groups: Sequence[Hashable]
    ) -> list[tuple[Prefix | None, list[int]]]:
        """For each prompt the handle of all that it shares with others of its group, and the tokens after it."""
        members: dict[tuple[tuple[int, ...], Hashable], list[int]] = {}
        for index, (r, group) in enumerate(zip(rendered, groups, strict=True)):
            members.setdefault((tuple(r.prefix), group), []).append(index)
        level: list[tuple[Tree, Prefix | None]] = []
        planned = []
        for (prefix, _), indices in members.items():
            tree, order = token_tree([rendered[index].ids for index in indices])
            level.append((tree, self.handle(prefix)))
            planned.append((indices, _leaves(tree), order))
        before: dict[int, Prefix | None] = {}
        while level:
            before |= {id(tree): handle for tree, handle in level}
            inner = [(tree, handle) for tree, handle in level if tree.children]
            full = [(tree, handle) for tree, handle in inner if tree.token_ids]
            made = self.engine.prefixes([tree.token_ids for tree, _ in full], [handle for _, handle in full])
            own = {id(tree): handle for (tree, _), handle in zip(full, made, strict=True)}
            level = [(child, own.get(id(tree), handle)) for tree, handle in inner for child in tree.children]
        starts: dict[int, tuple[Prefix | None, list[int]]] = {}
        for indices, leaves, order in planned:
            for index, leaf in zip(indices, order, strict=True):
                starts[index] = before[id(leaves[leaf])], leaves[leaf].token_ids
        return [starts[index] for index in range(len(rendered))]

    def score(
        self, rendered: Sequence[Rendered], options: Options, groups: Sequence[Hashable]
    ) -> tuple[list[list[float]], list[float]]:
        """Log-probabilities [B][K] over the options after each prompt, and the options' share [B] of all tokens.

        groups [B]: prompts of one group are scored as a tree. Nothing is shared between groups, so that a prompt's
        bits do not depend on which other groups are asked about.
        """
        if options.sequences:
            return self._score_sequences(rendered, options.sequences)
        logprobs, masses = [[0.0]] * len(rendered), [0.0] * len(rendered)
        alike: dict[tuple[int, ...], dict[Hashable, list[int]]] = {}
        for index, (r, group) in enumerate(zip(rendered, groups, strict=True)):
            alike.setdefault(tuple(r.prefix), {}).setdefault(group, []).append(index)
        for prefix, members in alike.items():
            trees, leaves, count = [], {}, 0
            for indices in members.values():
                tree, order = token_tree([rendered[index].ids + options.suffix for index in indices])
                trees.append(tree)
                leaves |= {index: count + leaf for index, leaf in zip(indices, order, strict=True)}
                count += max(order) + 1
            scored, mass = self.engine.score(trees, options.option_ids, prefix=self.handle(prefix), return_mass=True)
            values, shares = scored.tolist(), mass.tolist()
            for index, leaf in leaves.items():
                logprobs[index], masses[index] = values[leaf], shares[leaf]
        return logprobs, masses

    def _score_sequences(
        self, rendered: Sequence[Rendered], sequences: Sequence[Sequence[int]]
    ) -> tuple[list[list[float]], list[float]]:
        """The same where no single token tells the options apart: whole options, normalised over them."""
        prompts = [[*r.prefix, *r.ids] for r in rendered for _ in sequences]
        scored = self.engine.logprobs(prompts, [s for _ in rendered for s in sequences])
        totals = torch.tensor([sum(row) for row in scored], dtype=torch.float64).view(len(rendered), len(sequences))
        mass = totals.logsumexp(1)
        return (totals - mass[:, None]).tolist(), mass.exp().tolist()


def _leaves(tree: Tree) -> list[Tree]:
    """Leaves of a tree, depth first."""
    return [leaf for child in tree.children for leaf in _leaves(child)] if tree.children else [tree]
