"""Answers for RL: who samples what, and that it makes no difference."""

import itertools
import json
from pathlib import Path

import pytest
import rank_worker
import torch
from tiny import alone

from cai_fast import guards, records
from cai_fast.records import Prompt
from cai_fast.sampler import Answers, Item, pieces


def test_pieces_cover_everything_once_and_shrink_to_a_batch() -> None:
    for total, world, batch, together in itertools.product((1, 7, 64, 1000), (1, 2, 8), (1, 16, 64), (1, 4, 100)):
        parts = pieces(total, world, batch, together)
        assert [i for part in parts for i in range(total)[part]] == list(range(total))
        sizes = [part.stop - part.start for part in parts]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) >= min(world, total // together)
        smallest = min(batch, -(-total // world))
        assert all(size >= smallest for size in sizes[:-1])
        assert together > smallest or not any(part.start % together for part in parts)
    assert [part.stop for part in pieces(64, 2, 8, 1)] == [16, 28, 37, 45, 53, 61, 64]
    assert [part.stop for part in pieces(64, 2, 64, 1)] == [32, 64]  # less than a batch each: an even share


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stage rl with the same weights on one rank, and on two of which one is slow."""
    folder = tmp_path_factory.mktemp("runs")
    rank_worker.write_inputs(folder)
    rank_worker.work(folder, folder / "one", alone(), 0.0)
    rank_worker.start("work", folder, folder / "two", 0.7)
    return folder / "one", folder / "two"


def seen(run: Path, what: str) -> list[list[list[int]]]:
    """The numbers of the answers that each rank worked on, call by call."""
    return [json.loads(path.read_text())[what] for path in sorted(run.glob("seen.*.json"))]


@pytest.mark.distributed
def test_rollouts_do_not_depend_on_who_sampled_them(runs: tuple[Path, Path]) -> None:
    for name in ("rollouts.jsonl", "tokens/rollouts.safetensors"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    rows = [json.loads(line) for line in (runs[0] / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 15 and len({row["reward"] for row in rows}) > 40
    tokens = records.read_tokens(runs[0] / "tokens" / "rollouts.safetensors")
    assert sum(len(logprobs) for _, logprobs in tokens.values()) > 300
    halves = [[*range(6)], [*range(6, 15)]]  # never between the samples of a prompt
    for what in ("scored", "held_out"):
        assert seen(runs[1], what) == [[half] * 3 for half in halves], "each trains on its own, whoever sampled it"


@pytest.mark.distributed
def test_guards_see_the_same_numbers_on_any_number_of_ranks(runs: tuple[Path, Path]) -> None:
    one, two = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs)
    watched = {rule.metric for rule in guards.RULES} | {f"rl/{name}" for name in guards.START} | {"rl/length_slope"}
    for row, other in zip(one, two, strict=True):
        assert watched <= row.keys()
        for name in watched:
            assert row[name] == other[name] or row[name] == pytest.approx(
                other[name], rel=1e-5, abs=1e-7, nan_ok=True
            ), name
    assert one[0]["rl/length_slope"] != 0 and one[0]["rl/pm_eval_deviation"] > 0
    assert one[1]["rl/pm_divergence"] != 0


@pytest.mark.distributed
def test_a_slow_rank_samples_less(runs: tuple[Path, Path]) -> None:
    assert seen(runs[0], "sampled") == [[[*range(15)]] * 3], "one call an iteration where there is one rank"
    first, second = (list(itertools.chain(*calls)) for calls in seen(runs[1], "sampled"))
    assert sorted(first + second) == sorted([*range(15)] * 3)
    assert 0 < len(second) < len(first) / 2


def test_answers_of_a_prompt_are_one_group() -> None:
    prompts = [Prompt(name, "helpful", (), "written", "train") for name in "aba"]  # one of them twice in an iteration
    items = [Item(n, prompts[n // 3], n // 6, n % 3) for n in range(9)]
    answers = Answers(items[3:], 9, [], [], torch.zeros(6))
    assert answers.groups == [3, 3, 3, 6, 6, 6], "also where a rank's first answer is not the iteration's"
