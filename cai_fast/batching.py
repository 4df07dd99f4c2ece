"""Packed batches: sequences laid end to end without padding, cut into bins of bounded size.

T packed tokens, S sequences, N target tokens (those that a loss is computed on).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Sequences end to end, as `Model.forward` takes them."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [S+1] int32, where each sequence starts
    lens: tuple[int, ...]  # S lengths, on the host


@dataclass(frozen=True)
class Example:
    """Training tokens: `target_ids` (with their stop token) follow `prompt_ids`; `weight` multiplies their loss."""

    id: str
    prompt_ids: Sequence[int]
    target_ids: Sequence[int]
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model: the last target is predicted, never read."""
        return len(self.prompt_ids) + len(self.target_ids) - 1


@dataclass(frozen=True)
class TargetBatch:
    """Examples packed together with the rows of hidden states that predict their targets."""

    packed: Packed
    rows: Tensor  # [N] int64 into T: row i predicts target i
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32
    cu_targets: Tensor  # [S+1] int64, where each example's targets start


def pack(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Packed:
    """Lay token sequences (none of them empty) end to end."""
    if not sequences or not all(sequences):
        raise ValueError(f"pack: expected at least one sequence and none empty, got lengths {[*map(len, sequences)]}")
    lens = tuple(len(s) for s in sequences)
    flat = torch.tensor([token for sequence in sequences for token in sequence])
    bounds = torch.zeros(len(lens) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lens), 0, out=bounds[1:])
    positions = torch.arange(flat.shape[0]) - torch.repeat_interleave(bounds[:-1], torch.tensor(lens))
    return Packed(flat.to(device), positions.to(device), bounds.to(device, torch.int32), lens)


def pack_targets(examples: Sequence[Example], device: torch.device | str = "cpu") -> TargetBatch:
    """Pack examples without their last token, which no target needs, and locate the rows of their targets."""
    for e in examples:
        if not e.prompt_ids or not e.target_ids:
            raise ValueError(f"pack_targets: example {e.id} is {len(e.prompt_ids)} + {len(e.target_ids)} tokens")
    packed = pack([[*e.prompt_ids, *e.target_ids[:-1]] for e in examples], device)
    rows, weights, cu, start = [], [], [0], 0
    for e, length in zip(examples, packed.lens, strict=True):
        first = start + len(e.prompt_ids) - 1
        rows += range(first, first + len(e.target_ids))
        weights += [e.weight] * len(e.target_ids)
        cu.append(len(rows))
        start += length
    targets = [token for e in examples for token in e.target_ids]
    return TargetBatch(
        packed,
        torch.tensor(rows, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
        torch.tensor(cu, device=device),
    )


def bins(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of items grouped so that each group has at most `max_tokens` tokens; a longer item is alone.

    First fit, longest first, ties by index: near the fewest possible groups, and the same ones every time.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        g = next((g for g, free in enumerate(room) if lengths[i] <= free), len(groups))
        if g == len(groups):
            groups.append([])
            room.append(max_tokens)
        groups[g].append(i)
        room[g] -= lengths[i]
    return groups


def split_even(order: Sequence[int], sizes: Sequence[float], limit: float) -> list[list[int]]:
    """`order` cut into consecutive batches of about equal total size, as few as keep the average within `limit`.

    sizes[i] belongs to item i. Even batches leave no small remainder, whose gradient would be noise at full step size.
    """
    total = sum(sizes[i] for i in order)
    count = min(len(order), max(1, int(-(-total // limit))))
    batches: list[list[int]] = [[] for _ in range(count)]
    before = 0.0
    for i in order:
        middle = before + sizes[i] / 2
        batches[min(count - 1, int(middle * count / total)) if total else 0].append(i)
        before += sizes[i]
    return [batch for batch in batches if batch]


def segment_sum(values: Tensor, cu: Tensor) -> Tensor:
    """Sums of values[N] over the segments that cu[S+1] bounds -> [S]; always in the same order of addition."""
    return torch.segment_reduce(values, "sum", lengths=cu.diff())
