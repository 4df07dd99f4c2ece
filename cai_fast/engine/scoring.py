"""Scoring without generation: options after prompts or trees of prompts, and log-probs of given responses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cai_fast import kernels
from cai_fast.engine.prefix import Prefix
from cai_fast.engine.requests import Tree
from cai_fast.engine.trunk import Trunk
from cai_fast.errors import InputError


@dataclass
class _Node:
    """One tree node on its level: its tokens, its parent, its number among the leaves (None inside the tree)."""

    token_ids: list[int]
    parent: "_Node | None"
    leaf: int | None
    chain: list[Tensor] = field(default_factory=list)  # keys and values up to its end, (layers, 2, Hkv, n, D) each


def bins(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Consecutive indices in groups of at most `max_tokens` tokens (a longer single item is its own group)."""
    groups: list[list[int]] = []
    used = 0
    for i, length in enumerate(lengths):
        if not groups or used + length > max_tokens:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += length
    return groups


def _size(tree: Tree) -> int:
    """Tokens of a tree, each shared token counted once."""
    return len(tree.token_ids) + sum(_size(child) for child in tree.children)


def _longest(tree: Tree) -> int:
    """Tokens of a tree's longest prompt."""
    return len(tree.token_ids) + max((_longest(child) for child in tree.children), default=0)


def _separate(tree: Tree, before: int) -> int:
    """Tokens of all prompts of a tree, `before` of each before its root."""
    before += len(tree.token_ids)
    return sum(_separate(child, before) for child in tree.children) if tree.children else before


def _levels(trees: Sequence[Tree], first_leaf: int, root: list[Tensor]) -> tuple[list[list[_Node]], int]:
    """Nodes of some trees by depth, leaves numbered depth first from `first_leaf`; and the next leaf number."""
    by_depth: list[list[_Node]] = []
    leaf = first_leaf

    def visit(tree: Tree, parent: _Node, depth: int) -> None:
        nonlocal leaf
        if not tree.children and not tree.token_ids:
            raise InputError("engine: a prompt to score (or a leaf of a tree) has no tokens")
        node = _Node(list(tree.token_ids), parent, None if tree.children else leaf)
        leaf += not tree.children
        if depth == len(by_depth):
            by_depth.append([])
        by_depth[depth].append(node)
        for child in tree.children:
            visit(child, node, depth + 1)

    top = _Node([], None, None, root)
    for tree in trees:
        visit(tree, top, 0)
    return by_depth, leaf


def _level(trunk: Trunk, nodes: list[_Node], last: list[Tensor]) -> None:
    """Compute one level after its parents: leaves append their last hidden state, others keep their keys."""
    inner = any(node.leaf is None for node in nodes)
    full = [node for node in nodes if node.token_ids]
    for node in nodes:
        node.chain = node.parent.chain
    if not full:
        return
    token_ids, contexts = [node.token_ids for node in full], [node.chain for node in full]
    if inner:
        hidden, kvs = trunk.collect(token_ids, contexts)
        for node, kv in zip(full, kvs, strict=True):
            node.chain = [*node.chain, kv]
    else:
        hidden = trunk.packed(token_ids, contexts)
    trunk.counters["prefill_tokens"] += hidden.shape[0]
    ends = hidden[trunk.tensor([len(tokens) for tokens in token_ids]).cumsum(0) - 1]
    for node, row in zip(full, ends, strict=True):
        if node.leaf is not None:
            last[node.leaf] = row


def leaf_states(trunk: Trunk, trees: Sequence[Tree], root: list[Tensor], max_tokens: int) -> list[Tensor]:
    """[H] at the last token of every leaf, depth first: level by level, so that a shared token is computed once."""
    last: list[Tensor] = []
    for group in bins([_size(tree) for tree in trees], max_tokens):
        levels, leaves = _levels([trees[i] for i in group], len(last), root)
        last += [torch.empty(0)] * (leaves - len(last))
        for nodes in levels:
            _level(trunk, nodes, last)
    return last


def score(
    trunk: Trunk,
    items: Sequence[Tree | Sequence[int]],
    option_ids: Tensor,
    prefix: Prefix | None,
    *,
    max_len: int,
    max_tokens: int,
    return_mass: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `Engine.score`."""
    trees = [item if isinstance(item, Tree) else Tree(list(item)) for item in items]
    before = 0 if prefix is None else len(prefix)
    for i, tree in enumerate(trees):
        if before + _longest(tree) > max_len:
            raise InputError(
                f"engine: prompt {i} to score has {before + _longest(tree)} tokens, more than max_len "
                f"{max_len}. Shorten it or raise engine.max_len"
            )
    trunk.counters["prompt_tokens"] += sum(_separate(tree, before) for tree in trees)
    last = leaf_states(trunk, trees, [] if prefix is None else list(prefix.stretches), max_tokens)
    weight, option_ids = trunk.model.lm_head_weight, option_ids.to(trunk.device)
    if not last:
        none = weight.new_zeros(0, option_ids.shape[0], dtype=torch.float32)
        return (none, none[:, 0]) if return_mass else none
    hidden = trunk.padded(torch.stack(last))
    logprob = kernels.score_options(hidden, weight, option_ids)[: len(last)]
    return (logprob, _mass(hidden, weight, option_ids)[: len(last)]) if return_mass else logprob


def _mass(hidden: Tensor, weight: Tensor, option_ids: Tensor) -> Tensor:
    """Full-vocabulary probability [B] of all options together."""
    ids = option_ids[option_ids >= 0].unique()
    lse = kernels.linear_logprob(hidden, weight, ids[:1].expand(hidden.shape[0]), tiled=True).lse
    logits = (hidden.float()[:, None] * weight[ids].float()).sum(2)  # the bits of a GEMM depend on its number of rows
    return torch.exp(torch.logsumexp(logits, 1) - lse)


def logprobs(
    trunk: Trunk,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float,
    *,
    max_tokens: int,
) -> list[list[float]]:
    """See `Engine.logprobs`: the trainer's own packed attention, and its head without a chunk of logits."""
    if len(prompts) != len(responses):
        raise InputError(f"engine: {len(responses)} responses for {len(prompts)} prompts")
    if not all(prompts):
        raise InputError(f"engine: prompt {[len(p) for p in prompts].index(0)} is empty; it needs at least one token")
    result: list[list[float]] = [[] for _ in prompts]
    model = trunk.model
    # The last token of a response predicts nothing that is asked for: one-token answers to a prompt are one input.
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        if r:
            alike.setdefault((*p, *r[:-1]), []).append(i)
    inputs = list(alike)
    for group in bins([len(tokens) for tokens in inputs], max_tokens):
        lens = [len(inputs[n]) for n in group]
        asked = [i for n in group for i in alike[inputs[n]]]
        rows, start = [], 0
        for n in group:
            start += len(inputs[n])
            for i in alike[inputs[n]]:
                rows += range(start - len(responses[i]), start)
        flat = trunk.tensor([token for n in group for token in inputs[n]])
        positions = trunk.tensor([p for n in lens for p in range(n)])
        cu = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(trunk.device)
        hidden = model.hidden(flat, positions, cu, lens=lens)[trunk.tensor(rows)]
        trunk.counters["trunk_tokens"] += sum(lens)
        trunk.counters["head_rows"] += len(rows)
        targets = trunk.tensor([token for i in asked for token in responses[i]])
        head = kernels.linear_logprob(hidden, model.lm_head_weight, targets, temperature=temperature, tiled=True)
        values = head.logprob.tolist()
        for i in asked:
            result[i] = values[: len(responses[i])]
            del values[: len(responses[i])]
    return result
