"""Prompts as a tree: what several prompts share is found in their token ids, whatever put it there."""

from collections.abc import Sequence
from os.path import commonprefix  # of any sequences

from cai_fast.engine.requests import Tree

# An inner node costs a pass of its own for its level and, in every layer, an attention call for its length. On a CPU
# two prompts that share 16 tokens take as long either way at hidden size 128; less is two answers that open alike.
MIN_SHARED = 16


def token_tree(prompts: Sequence[Sequence[int]], min_shared: int = MIN_SHARED) -> tuple[Tree, list[int]]:
    """A tree with these prompts as leaves, and each prompt's leaf, counted depth first.

    Tokens are shared where at least `min_shared` in a row are. Equal prompts have the same leaf; of a prompt that
    others continue, the last token is a leaf of its own. Leaves stand in the order of the prompts as far as sharing
    lets them. A prompt without tokens is left to whoever scores it to refuse.
    """
    leaves: list[tuple[int, ...]] = []

    def grow(group: list[tuple[int, ...]], start: int) -> list[Tree]:
        """Trees of different prompts that are alike up to `start`, without those tokens."""
        if len(group) == 1:
            leaves.append(group[0])
            return [Tree(list(group[0][start:]))]
        # Every leaf keeps a token: its hidden state is what is read.
        shared = max(start, min(len(commonprefix(group)), min(map(len, group)) - 1))
        inner = shared if shared - start >= min_shared else start
        parts: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for prompt in group:
            parts.setdefault((len(prompt) == shared + 1, *prompt[shared : shared + 1]), []).append(prompt)
        children = [tree for part in parts.values() for tree in grow(part, inner)]
        return children if inner == start else [Tree(list(group[0][start:inner]), children)]

    different = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    trees = grow(different, 0) if different else []
    where = {prompt: leaf for leaf, prompt in enumerate(leaves)}
    return trees[0] if len(trees) == 1 else Tree([], trees), [where[tuple(prompt)] for prompt in prompts]
