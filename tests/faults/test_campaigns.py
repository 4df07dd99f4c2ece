"""Long campaigns: random kills of the whole loop, and the loop on two ranks. Results of full runs: bench/results/."""

from pathlib import Path

import pytest

from bench import kill_campaign, two_rank_toy, two_ranks


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_random_kills_leave_the_same_bits(kills: int, tmp_path: Path) -> None:
    result = kill_campaign.campaign(tmp_path, kills, seed=1)
    assert result["problems"] == []
    assert result["kills"] == kills == sum(result["by_stage"].values())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_do_what_one_does_and_survive_signals(tmp_path: Path) -> None:
    result = two_ranks.measure(tmp_path)
    assert result["problems"] == []
    assert max(result["largest_difference"].values()) > 0, "the work was not shared"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_toy_world_on_two_ranks_is_as_on_one(tmp_path: Path) -> None:
    assert two_rank_toy.measure(tmp_path)["problems"] == []
