"""Work shared by ranks: whoever does it, the results are the same, and a failure or a signal ends it for all."""

import gc
import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_worker
import sharing_worker
import textworld
from sharing_worker import MANY, NUMBERS, STAGES
from tiny import alone, tiny_model

from cai_fast import measure, pipeline, sharing
from cai_fast.distributed import Distributed
from cai_fast.measure import Answer
from cai_fast.model import Model
from cai_fast.records import Prompt, Turn
from cai_fast.scorer import MICRO_TOKENS, Scorer

WRITTEN = ("prompts.jsonl", "revisions.jsonl", "helpful.jsonl", "comparisons.jsonl", "labels.jsonl", "answers.jsonl",
           "evaluation.json", "tokens/revisions.safetensors", "tokens/comparisons.safetensors")  # fmt: skip


def context(dist: Distributed) -> pipeline.Context:
    """All that shared work asks of a context: ranks, and a bar that nobody sees."""
    log = SimpleNamespace(progress=lambda *_, **__: SimpleBar())
    return pipeline.Context(config=None, run=None, log=log, dist=dist, constitution=None)


class SimpleBar:
    """Counts what it is told."""

    count = 0

    def update(self, n: int) -> None:
        self.count += n

    def __enter__(self) -> "SimpleBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("helper")
    rank_worker.start("helper", folder, world=3, script=sharing_worker.__file__)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.distributed
def test_results_come_in_the_order_of_the_items_with_all_their_digits(three_ranks: list[dict[str, Any]]) -> None:
    for out in three_ranks:
        assert out["uneven"] == [[n, NUMBERS[n % len(NUMBERS)]] for n in range(20)]
    done = [out["mine"] for out in three_ranks]
    assert sorted(itertools.chain(*done)) == list(range(20)), "every item once"
    assert 0 < len(done[0]) < min(len(done[1]), len(done[2])), "a slow rank does less"


@pytest.mark.distributed
def test_there_may_be_more_ranks_than_items(three_ranks: list[dict[str, Any]]) -> None:
    for out in three_ranks:
        assert out["one"] == ["only item"] and out["none"] == []


@pytest.mark.distributed
def test_an_error_of_one_rank_ends_the_work_of_all(three_ranks: list[dict[str, Any]]) -> None:
    assert [out["error"] for out in three_ranks] == [["InputError", "item 4 is broken"]] * 3
    assert sum(out["began_before_error"] for out in three_ranks) < MANY
    assert [out["journal_error"] for out in three_ranks] == ["item 4 is broken"] * 3


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all(three_ranks: list[dict[str, Any]]) -> None:
    assert [out["stopped"][0] for out in three_ranks] == ["Stopped"] * 3
    assert sum(out["began_before_stop"] for out in three_ranks) < MANY


def test_lost_work_is_noticed() -> None:
    ctx = context(alone())
    with pytest.raises(RuntimeError, match="2 indices, not those of 3 items"):
        sharing.shared(ctx, "x", "abc", [[0], [2]], list)
    with pytest.raises(RuntimeError, match="2 indices, not those of 2 items"):
        sharing.shared(ctx, "x", "ab", [[0], [0]], list)
    with pytest.raises(RuntimeError, match="1 results for 2 items"):
        sharing.shared(ctx, "x", "abc", [[0], [1, 2]], lambda items: items[:1])
    numbers = iter([0, 2, 3])  # a counter that leaves one out
    ctx.dist.next_item = lambda name: next(numbers)
    with pytest.raises(RuntimeError, match="1 of 3 shared pieces of work were lost, e.g. number 1"):
        sharing.shared(ctx, "x", "abc", [[0], [1], [2]], list)


def test_lists_of_one_name_are_apart() -> None:
    ctx = context(alone())
    for items in ("abc", "de"):
        assert sharing.shared(ctx, "x", items, sharing.even(len(items), 2), list) == list(items)


def test_chunks_keep_groups_whole_and_are_many_or_full() -> None:
    tokens = [700, 10000, 300, 5000, 2000, 100, 9000, 4500] * 20
    groups = [n % 50 for n in range(160)]
    parts = sharing.token_chunks(tokens, groups)
    assert sorted(itertools.chain(*parts)) == list(range(160))
    for group in range(50):
        mine = [n for n in range(160) if groups[n] == group]
        inside = [[n for n in part if groups[n] == group] for part in parts]
        assert [part for part in inside if part] == [mine], "whole, in the order of the items"
    assert sharing.PIECES <= len(parts) <= 50
    few = sharing.token_chunks([100] * 40)
    assert sorted(map(len, few)) == [10] * 4, "no less than is worth a pass"
    large = sharing.token_chunks([1000] * 1000)
    assert max(map(len, large)) == MICRO_TOKENS // 1000 and len(large) == 125
    assert sharing.token_chunks([]) == [] and sharing.token_chunks([9], ["a"]) == [[0]]
    assert sharing.even(5, 2) == [[0, 1], [2, 3], [4]] and sharing.even(0, 3) == []


def test_answers_in_other_tokens_are_scored_by_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are letters here; the model in role `foreign` has another alphabet."""
    renderers = {
        name: SimpleNamespace(
            tokenizer=SimpleNamespace(hash=name.split()[0]),
            response_ids=lambda text: [*map(ord, text), 0],
            preference=lambda turns, ids: [*ids, 1],
        )
        for name in ("pm_eval", "foreign")
    }
    renderers["own"] = renderers["pm_eval"]
    ctx, seen = context(alone()), []
    monkeypatch.setattr(pipeline.Context, "renderer", lambda self, role: renderers[role])
    monkeypatch.setattr(measure, "scores", lambda ctx, name, scorer, sequences, groups: seen.append(sequences) or [0.0])
    prompt = Prompt("p", "red_team", (Turn("human", "?"),), "test", "eval")
    rows = [Answer(prompt, "ab", [5, 6, 2], True), Answer(prompt, "c", [7], False)]
    for role in ("own", "foreign"):
        measure.score_answers(ctx, "x", Scorer(tiny_model(head="score")), role, rows)
    assert seen == [[[5, 6, 2, 1], [7, 1]], [[97, 98, 0, 1], [99, 1]]]


@pytest.fixture(scope="module")
def runs(
    build_once: Callable[[str, Callable[[Path], None]], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """The stages from the same checkpoints on one rank and on two, in one/ and two/; and how many models stage evaluate
    held on the single rank whenever it had loaded another."""
    inputs = build_once("text_inputs", textworld.build)
    folder = tmp_path_factory.mktemp("shared")
    sharing_worker.write_checkpoints(inputs, folder / "checkpoints")
    alive: weakref.WeakSet[Model] = weakref.WeakSet()
    held: list[int] = []
    load, run = pipeline.load_model, STAGES["evaluate"].run

    def loaded(*arguments: Any, **named: Any) -> Model:
        made = load(*arguments, **named)
        alive.add(made)
        held.append(len(alive))
        return made

    def evaluated(ctx: pipeline.Context) -> None:
        gc.collect()
        alive.clear()
        patch.setattr(pipeline, "load_model", loaded)
        run(ctx)
        patch.setattr(pipeline, "load_model", load)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "SMALLEST", sharing_worker.SMALLEST)
        patch.setattr(STAGES["evaluate"], "run", evaluated)
        (folder / "one").mkdir()
        sharing_worker.stages(inputs, folder / "checkpoints", folder / "one", alone())
    (folder / "two").mkdir()
    arguments = (inputs, folder / "checkpoints", folder / "two")
    rank_worker.start("stages", *arguments, script=sharing_worker.__file__)
    return folder, held


@pytest.mark.distributed
def test_two_ranks_write_the_bytes_of_one(runs: tuple[Path, list[int]]) -> None:
    one, two = runs[0] / "one", runs[0] / "two"
    for name in WRITTEN:
        assert (one / "text" / name).read_bytes() == (two / "text" / name).read_bytes(), name
    assert (one / "toy/preferences.jsonl").read_bytes() == (two / "toy/preferences.jsonl").read_bytes()
    results = [(folder / name).read_text() for folder, name in
               ((one, "held_out.0.json"), (two, "held_out.0.json"), (two, "held_out.1.json"))]  # fmt: skip
    assert results[0] == results[1] == results[2]
    evaluation = json.loads((two / "text/evaluation.json").read_text())
    for policy in ("base", "rl_cai"):  # what was shared is there
        assert all(evaluation["policies"][policy][group]["kl"]["mean"] > 0 for group in ("red_team", "benign"))
    assert evaluation["policies"]["rl_cai"]["red_team"]["pm_score"]["mean"] != 0
    assert {kind: row["count"] for kind, row in json.loads(results[0]).items()} == {"harmless": 10, "helpful": 10}


@pytest.mark.distributed
def test_both_ranks_work_in_every_stage(runs: tuple[Path, list[int]]) -> None:
    ranks = [json.loads((runs[0] / "two" / f"seen.{rank}.json").read_text()) for rank in range(2)]
    for stage, lists in ranks[0].items():
        assert len(lists) == len(ranks[1][stage])
        for mine, other in zip(lists, ranks[1][stage], strict=True):
            assert sorted(mine + other) == list(range(len(mine) + len(other))), f"{stage}: every piece once"
        assert any(map(len, lists)) and any(map(len, ranks[1][stage])), f"{stage}: one rank was left out"
    # Three policies' answers and divergences, chains, verdicts, multiple choice, scores of answers, revisions, pairs.
    assert len(ranks[0]["evaluate"]) == 3 + 3 + 6
    assert all(len(a) + len(b) > 1 for a, b in zip(ranks[0]["evaluate"], ranks[1]["evaluate"], strict=True))


def test_evaluation_holds_two_models_at_most(runs: tuple[Path, list[int]]) -> None:
    held = runs[1]
    assert len(held) == 3 + 3 + 1 + 1 + 1 + 1  # answers, divergences (three models), chains, verdicts, choices, scores
    assert max(held) == 2 and held.count(2) == 2
