"""Work shared by all ranks that is not worth a journal: scores, divergences, first samples.

It is cut into chunks by what it consists of, whatever the number of ranks, so that every result has the same bits on
one rank as on many.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from cai_fast import heartbeat
from cai_fast.batching import bins
from cai_fast.pipeline import Context
from cai_fast.scorer import MICRO_TOKENS

Item = TypeVar("Item")
PIECES = 32  # chunks at least, where there is work for as many: enough to keep several ranks equally busy
SMALLEST = 1024  # tokens of a chunk that is worth a pass of its own


def shared(
    ctx: Context,
    name: str,
    items: Sequence[Item],
    chunks: Sequence[Sequence[int]],
    process: Callable[[list[Item]], Sequence[Any]],
) -> list[Any]:
    """One JSON result per item, in the order of `items`, on every rank. Collective; nothing is kept for a restart.

    chunks: indices of items, each index once; ranks pull them from one counter. `process(items of a chunk)` gives
    their results in their order. InputError and stop signals as in `Distributed.share`. `name` is shown to the user.
    """
    if not items:
        return []
    order = [index for chunk in chunks for index in chunk]
    if sorted(order) != list(range(len(items))):
        raise RuntimeError(f"{name}: the chunks hold {len(order)} indices, not those of {len(items)} items")
    counter = ctx.dist.fresh("items")
    with ctx.progress(len(items), name, "item", done=lambda: ctx.dist.add(counter, 0)) as bar:

        def work(number: int) -> list[Any]:
            heartbeat.at(name, f"chunk {number + 1} of {len(chunks)}")
            results = list(process([items[index] for index in chunks[number]]))
            if len(results) != len(chunks[number]):
                raise RuntimeError(f"{name}: {len(results)} results for {len(chunks[number])} items")
            ctx.dist.add(counter, len(results))
            bar.update(len(results))
            return results

        made = ctx.dist.share(len(chunks), work)
    by_index = dict(zip(order, (result for results in made for result in results), strict=True))
    return [by_index[index] for index in range(len(items))]


def even(total: int, size: int) -> list[list[int]]:
    """Chunks of `size` items each, the last one of the rest."""
    return [list(range(start, min(start + size, total))) for start in range(0, total, size)]


def token_chunks(tokens: Sequence[int], groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Chunks of items by their tokens: at most what one pass computes, less where there are few.

    The items of a group, which share computation, stay together and in their order.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(range(len(tokens)) if groups is None else groups):
        members.setdefault(group, []).append(index)
    whole = list(members.values())
    sizes = [sum(tokens[index] for index in group) for group in whole]
    limit = min(MICRO_TOKENS, max(SMALLEST, -(-sum(sizes) // PIECES)))
    return [[index for number in chunk for index in whole[number]] for chunk in bins(sizes, limit)]
