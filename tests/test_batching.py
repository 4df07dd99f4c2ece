"""Packing, bins and even batches."""

import random

import pytest
import torch

from cai_fast.batching import Example, bins, pack, pack_targets, segment_sum, split_even


def test_pack_places_sequences_end_to_end() -> None:
    packed = pack([[5, 6, 7], [8], [9, 4]])
    assert packed.token_ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.lens == (3, 1, 2)


@pytest.mark.parametrize("bad", [[], [[1], []]])
def test_pack_refuses_nothing(bad: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="pack: expected"):
        pack(bad)


def test_rows_predict_the_targets_and_the_last_token_is_not_read() -> None:
    batch = pack_targets([Example("a", [1, 2, 3], [10, 11]), Example("b", [4], [12, 13, 14], weight=0.5)])
    assert batch.packed.token_ids.tolist() == [1, 2, 3, 10, 4, 12, 13]
    assert batch.rows.tolist() == [2, 3, 4, 5, 6]
    assert batch.targets.tolist() == [10, 11, 12, 13, 14]
    assert batch.weights.tolist() == [1, 1, 0.5, 0.5, 0.5]
    assert batch.cu_targets.tolist() == [0, 2, 5]
    # Every row that is not an example's last one is followed by the token it predicts.
    for row, target in [(2, 10), (4, 12), (5, 13)]:
        assert batch.packed.token_ids[row + 1] == target


@pytest.mark.parametrize("seed", range(20))
def test_bins_hold_every_item_once_within_the_limit(seed: int) -> None:
    random.seed(seed)
    lengths = [random.randint(1, 40) for _ in range(random.randint(0, 60))]
    groups = bins(lengths, 32)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= 32
    assert groups == bins(list(lengths), 32)
    if lengths:
        assert len(groups) <= 11 / 9 * max(1, sum(min(n, 32) for n in lengths) / 16) + 1


@pytest.mark.parametrize("seed", range(20))
def test_even_batches(seed: int) -> None:
    random.seed(seed)
    sizes = [random.randint(1, 9) for _ in range(random.randint(1, 80))]
    order = random.sample(range(len(sizes)), len(sizes))
    parts = split_even(order, sizes, 25)
    assert [i for part in parts for i in part] == order, "consecutive, nothing lost"
    totals = [sum(sizes[i] for i in part) for part in parts]
    assert max(totals) - min(totals) <= 2 * max(sizes)
    assert len(parts) == min(len(sizes), -(-sum(sizes) // 25))
    counts = [len(part) for part in split_even(order, [1] * len(sizes), 25)]
    assert max(counts) - min(counts) <= 1


def test_segment_sum() -> None:
    values = torch.arange(1.0, 7)
    assert segment_sum(values, torch.tensor([0, 2, 2, 6])).tolist() == [3, 0, 18]
