"""The end-to-end comparison without its peer: equal work on both sides, turns, ratios, what is said when one fails."""

import argparse
import dataclasses
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import e2e_floor, e2e_ours, e2e_trl, end_to_end
from bench.e2e_load import EOS, PRESETS, SPECIAL, STAGES, Settings, Size, Work, draw, make_folders, text_of, tokenizer
from bench.e2e_ours import Place
from bench.e2e_turns import Differs, Done, Seconds, Turns, compare, rate, ratios, report
from cai_fast.model import load

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 4,
}  # fmt: skip
SMALL = Size(
    SHAPE, document=(4, 12), prompt=(3, 6), response=(2, 8), answer=(2, 5), row=24, rows=2, pairs=4, prompts=3,
    samples=2, requests=5, comparisons=3, principles=2, conversation=(4, 8), principle=(2, 4), glue=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("models")
    make_folders(SMALL, folder, torch.float32)
    yield Place(folder, CPU, SMALL, Settings())


def asked(work: Work, stage: str) -> int:
    """Tokens that a work asks for, counted from its definition alone."""
    if work.lengths is not None:
        return sum(work.lengths)
    if stage == "sft":
        return sum(len(ids) - 1 for ids in work.sequences)
    if stage == "dpo":
        return sum(len(ids) - start for ids, start in zip(work.sequences, work.starts, strict=True))
    return sum(map(len, work.sequences))


@pytest.mark.parametrize("stage", STAGES)
def test_our_side_does_the_work_that_is_asked_for(place: Place, stage: str) -> None:
    step = e2e_ours.STEPS[stage](place)
    first, second = draw(SMALL, stage, 2)
    for work in (first, second, first):
        if hasattr(step, "prepare"):
            step.prepare(work)
        done = step(work)
        assert done.tokens == asked(work, stage)
    losses = stage in ("sft", "reward", "dpo")
    assert (done.loss is not None) == losses and (done.probabilities is not None) == (stage == "judge")


def test_our_supervised_losses_are_those_of_plain_torch(place: Place) -> None:
    """Before the first update: what the peer's loss on the same tokens is compared with."""
    policy, pm = load(place.folder / "policy").requires_grad_(False), load(place.folder / "pm").requires_grad_(False)

    def states(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
        return model.hidden(torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)])).double()

    documents, pairs = draw(SMALL, "sft", 1)[0], draw(SMALL, "reward", 1)[0]
    terms = []
    for ids in documents.sequences:
        logits = states(policy, ids) @ policy.lm_head_weight.double().t()
        terms.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
    expected = float(sum(terms)) / asked(documents, "sft")
    assert e2e_ours.sft(place)(documents).loss == pytest.approx(expected, rel=1e-5)
    scores = [states(pm, ids)[-1] @ pm.score.weight[0].double() for ids in pairs.sequences]
    margins = [float(a - b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    expected = float(-torch.tensor(margins).sigmoid().log().mean())
    assert e2e_ours.reward(place)(pairs).loss == pytest.approx(expected, rel=1e-5)
    # DPO starts at its reference
    step, work = e2e_ours.Dpo(place), draw(SMALL, "dpo", 1)[0]
    step.prepare(work)
    assert step(work).loss == pytest.approx(0.6931472, rel=1e-5)
    assert step(work).loss < 0.69314


def test_our_judge_gives_each_question_its_own_probability(place: Place) -> None:
    """In the order of the questions, though the engine computes them as trees, and also where one is asked twice."""
    policy, judge = load(place.folder / "policy").requires_grad_(False), e2e_ours.judge(place)

    def alone(ids: list[int]) -> float:
        hidden = policy.hidden(torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)]))[-1]
        return float((hidden @ policy.lm_head_weight[list(e2e_ours.OPTIONS)].t()).softmax(-1)[0])

    work = draw(SMALL, "judge", 1)[0]
    branches = [[7, 8, 9], [7, 10], [7, 8, 11], [7, 8, 9], [12, 13], [14], [12, 15], [12]]
    for asked in (work, Work(branches, together=4)):
        expected = [alone(ids) for ids in asked.sequences]
        assert judge(asked).probabilities == pytest.approx(expected, abs=1e-5)
    assert len({alone(ids) for ids in work.sequences}) == len(work.sequences) == 3 * 2 * 2


def test_draws_are_reproducible_and_within_their_bounds() -> None:
    for stage in STAGES:
        works = draw(SMALL, stage, 2)
        assert works == draw(SMALL, stage, 3)[:2] and works[0] != works[1] and works != draw(SMALL, stage, 2, seed=1)
        for work in works:
            plain = [t for ids in work.sequences for t in ids if t != EOS]
            assert len(SPECIAL) <= min(plain) and max(plain) < SHAPE["vocab_size"]
            assert all(SMALL.answer[0] <= n <= SMALL.response[1] for n in work.lengths or [])
    group, alone = draw(SMALL, "grpo", 1)[0], draw(SMALL, "ppo", 1)[0]
    assert (len(group.sequences), len(group.lengths)) == (3, 6) and len(alone.sequences) == len(alone.lengths) == 6
    pairs = draw(SMALL, "dpo", 1)[0]
    shared = zip(pairs.sequences[::2], pairs.sequences[1::2], pairs.starts[::2], strict=True)
    assert all(a[:start] == b[:start] and a[-1] == b[-1] == EOS for a, b, start in shared)


def test_a_text_and_its_tokens_are_the_same() -> None:
    wrapped = tokenizer(64)
    ids = [5, 63, 3, 3, EOS]
    assert wrapped(text_of(ids), add_special_tokens=False)["input_ids"] == ids
    assert wrapped.decode(ids[:-1]) == text_of(ids[:-1])
    assert wrapped(text_of([7]) + text_of([8]), add_special_tokens=False)["input_ids"] == [7, 8]


def test_turns_alternate_and_leave_the_warm_up_out() -> None:
    calls, works = [], [Work([[n]]) for n in range(5)]

    def ours(work: Work) -> Done:
        calls.append(("ours", work.sequences[0][0]))
        return Done(10, loss=2.0)

    def floor(work: Work) -> Done:
        calls.append(("floor", work.sequences[0][0]))
        return Done(0)

    turns = Turns(CPU, warmup=2, rounds=2, ours=ours, floor=floor)
    turns.start()
    for work in works:  # one more than is wanted: the peer may not stop at once
        turns(work, Done(10, loss=2.00001))
    assert calls == [(side, n) for n in range(4) for side in ("ours", "floor")]
    assert turns.steps == 4 and turns.works == works[:4] and turns.tokens == [10, 10]
    assert len(turns.peer_seconds) == len(turns.our_seconds) == len(turns.floor_seconds) == 2
    assert turns.gaps == pytest.approx([5e-6] * 4, rel=1e-3)


def test_the_peers_time_excludes_our_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bench.e2e_turns.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("bench.e2e_turns.time.process_time", lambda: now[0] / 2)

    def ours(_: Work) -> Done:
        now[0] += 4.0
        return Done(10)

    def floor(_: Work) -> Done:
        now[0] += 1.0
        return Done(0)

    turns = Turns(CPU, warmup=1, rounds=3, ours=ours, floor=floor)
    turns.start()
    for taken in (100.0, 6.0, 8.0, 12.0):
        now[0] += taken
        turns(Work([[1]]), Done(10))
    assert turns.peer_seconds == [Seconds(6.0, 3.0), Seconds(8.0, 4.0), Seconds(12.0, 6.0)]
    found = report(turns)
    assert found["ratio"] == {"median": 2.0, "min": 1.5, "max": 3.0} == found["ratio of cpu time"]
    assert found["floor ratio"]["median"] == 8.0 and found["share of floor"] == 0.25
    assert found["tokens/s"] == {"peer": 30 / 26, "ours": 30 / 12, "floor": 30 / 3}
    assert found["largest gap"] is None and found["checked"] == 4


def test_unequal_work_or_results_are_refused() -> None:
    assert compare(Done(3), Done(3, loss=1.0), 0.0) == []
    assert compare(Done(3, probabilities=[0.5, 0.25]), Done(3, probabilities=[0.5, 0.25]), 0.0) == [0.0]
    assert compare(Done(3, loss=1.0), Done(3, loss=1.01), 0.02) == pytest.approx([0.01 / 1.01])
    with pytest.raises(Differs, match="3 tokens on our side and 4"):
        compare(Done(3), Done(4), 1e-3)
    with pytest.raises(Differs, match="equal losses"):
        compare(Done(3, loss=1.0), Done(3, loss=1.01), 1e-3)
    with pytest.raises(Differs, match="equal losses"):
        compare(Done(3, loss=float("nan")), Done(3, loss=1.0), 1e-3)
    with pytest.raises(Differs, match="equal probabilities"):
        compare(Done(1, probabilities=[0.5]), Done(1, probabilities=[0.51]), 1e-3)


def test_ratios_are_of_neighbouring_steps() -> None:
    # as many times as long in every pair, though steps differ: no spread
    assert ratios([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert rate([10, 30], [1.0, 3.0]) == 10.0
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


class Counted(e2e_floor.Products):
    """Counts multiply-adds instead of multiplying."""

    total = 0

    def _product(self, rows: int, weight: torch.Tensor, backward: bool) -> None:
        self.total += rows * weight.numel() * (3 if backward else 1)


def test_floors_multiply_each_weight_with_the_rows_of_the_work(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Counted] = []
    monkeypatch.setattr(e2e_floor, "Products", lambda place: made.append(Counted(place)) or made[-1])
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24
    trunk, head = 2 * layer, 16 * 64

    def total(stage: str, work: Work) -> int:
        e2e_floor.floor(place, stage)(work)
        return made[-1].total

    assert total("sft", Work([[1, 2, 3], [4, 5]])) == 3 * 3 * (trunk + head)
    assert total("reward", Work([[1, 2, 3], [4, 5]])) == 3 * 5 * trunk
    assert total("dpo", Work([[1, 2, 3], [1, 5]], starts=[1, 1])) == 3 * 3 * (trunk + head)
    # two prompts of 3 tokens in all; answers of 3 and 1: the second token and the third are decoded in one row each
    assert total("generate", Work([[1, 2], [3]], lengths=[3, 1])) == 3 * trunk + 2 * head + 2 * (trunk + head)
    assert total("judge", Work([[1, 2, 3], [1, 2, 4, 5]], together=2)) == 5 * trunk + 2 * head
    # one prompt of 2 tokens, two answers of 2: packed without the last tokens 2 x 3 rows
    group, rows = Work([[1, 2]], lengths=[2, 2]), 6
    sampled = 2 * trunk + 2 * head + 2 * (trunk + head)
    expected = sampled + (2 + 4) * trunk + rows * trunk + 4 * head + 3 * (rows * trunk + 4 * head)
    assert total("rloo", group) == total("grpo", group) == expected
    alone = Work([[1, 2], [1, 2]], lengths=[2, 2])  # prompts of their own
    assert total("ppo", alone) == expected + 2 * 2 * trunk + 3 * rows * trunk
    assert e2e_floor.distinct([[1, 2, 3], [1, 2], [1, 4]]) == 4


def test_further_epochs_are_ppos_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's other algorithms take one pass over their answers, whatever --epochs says."""
    made: list[Counted] = []
    monkeypatch.setattr(e2e_floor, "Products", lambda place: made.append(Counted(place)) or made[-1])
    twice = dataclasses.replace(place, settings=Settings(epochs=2))
    work = {stage: draw(SMALL, stage, 1)[0] for stage in ("rloo", "grpo", "ppo")}
    for stage, more in (("rloo", False), ("grpo", False), ("ppo", True)):
        assert e2e_ours.STEPS[stage](twice).trainer.settings.epochs == 1 + more
        for chosen in (place, twice):
            e2e_floor.floor(chosen, stage)(work[stage])
        assert (made[-1].total > made[-2].total) == more


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_tokens_that_the_peer_sampled_are_counted(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    stand_in = types.SimpleNamespace(LogitsProcessorList=list)
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    prompts = torch.tensor([[0, 5], [6, 7]])
    answers = [[[8, EOS, 0], [8, 9, EOS]], [[8, 9, 9], [8, EOS, 0]]]  # in the second call a row has no end

    def generate(input_ids: torch.Tensor, **_: object) -> object:
        out = torch.cat([input_ids, torch.tensor(answers.pop(0))], dim=1)
        return types.SimpleNamespace(sequences=out) if wrapped else out

    model = types.SimpleNamespace(generate=generate)
    forced = e2e_trl.ForcedLengths(model, [[2, 3], [2, 2]])
    for counted in (5, 5):
        model.generate(input_ids=prompts, attention_mask=torch.tensor([[0, 1], [1, 1]]))
        work, done = forced.done()
        assert work.sequences == [[5], [6, 7]] and done.tokens == counted
    assert sum(work.lengths) == 4  # was asked for: `compare` will refuse


def test_a_floor_runs(place: Place) -> None:
    for stage in STAGES:
        assert e2e_floor.floor(place, stage)(draw(SMALL, stage, 1)[0]) == Done(0)


def test_presets_describe_models_that_can_be_made() -> None:
    for size in PRESETS.values():
        shape = size.shape
        assert shape["num_heads"] * shape["head_dim"] == shape["hidden_size"] and size.pairs % 8 == 0
        longest = max(*size.document, size.conversation[1] + size.principle[1] + 2 * size.answer[1] + size.glue)
        assert longest < 8192 and size.document[1] + 1 <= size.row


def test_a_missing_peer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trl.py").write_text("import no_such_module_for_trl\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    monkeypatch.setattr(sys, "argv", ["end_to_end"])
    for name, value in e2e_trl.QUIET.items():
        monkeypatch.setenv(name, value)
    assert end_to_end.main() == 2
    said = "bench.end_to_end: no_such_module_for_trl is not installed here: "
    assert capsys.readouterr().err == said + "pip install trl transformers accelerate datasets\n"


def found_of(gap: float | None = None) -> dict:
    turns = Turns(CPU, 1, 1, works=[Work([[1]])], tokens=[100], gaps=[] if gap is None else [gap])
    turns.peer_seconds, turns.our_seconds, turns.floor_seconds = [Seconds(4, 4)], [Seconds(2, 2)], [Seconds(1, 1)]
    return report(turns) | {"works": [w.json() for w in turns.works]}


def test_a_stage_is_timed_before_its_memory_is_taken_on_the_same_works(tmp_path: Path) -> None:
    parts = []

    def run(chosen: argparse.Namespace, folder: Path, stage: str, part: str) -> dict:
        parts.append(part)
        if part == "turns":
            return found_of(1e-7)
        assert json.loads(end_to_end.works_file(folder, stage).read_text())[0]["sequences"] == [[1]]
        return {"peak": {"ours": 300.0, "peer": 700.0}[part], "imports": 200.0}

    found = end_to_end.run_stage(end_to_end.options([]), tmp_path, "sft", run)
    assert parts == ["turns", "ours", "peer"] and "works" not in found
    row = end_to_end.line("sft", found)
    assert row.split() == [
        "sft", "trained", "50", "25", "2.00", "(2.00..2.00)", "2.00", "4.00", "50%", "300", "(100)", "700", "(500)",
        "1e-07",
    ]  # fmt: skip
    failed = end_to_end.run_stage(end_to_end.options([]), tmp_path, "ppo", lambda *_: {"failed": "Absent: no PPO"})
    assert failed == {"failed": "Absent: no PPO"} and "not measured: Absent: no PPO" in end_to_end.line("ppo", failed)


def test_a_stage_that_was_not_measured_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(e2e_trl, "peer", lambda: None)
    monkeypatch.setattr(end_to_end, "make_folders", lambda *_: None)
    monkeypatch.setattr("bench.e2e_chart.draw", lambda *_: None)
    out = tmp_path / "new" / "folder"
    monkeypatch.setattr(sys, "argv", ["end_to_end", "--only", "sft", "--out", str(out)])
    memory, failed = {"peak": 1.0, "imports": 0.0}, {"failed": "Killed"}
    for parts, code in (
        ([{"failed": "Differs: not the same"}], 1),
        ([found_of(), failed, memory], 1),
        ([found_of(), memory, failed], 1),
        ([found_of(), memory, memory], 0),
    ):
        given = iter(parts)
        monkeypatch.setattr(end_to_end, "in_process", lambda *_, given=given: dict(next(given)))
        assert end_to_end.main() == code
        written = json.loads((out / "end_to_end-cpu.json").read_text())["stages"]["sft"]
        assert written.get("failed") == parts[0].get("failed")
    assert "not measured: Differs" in capsys.readouterr().out


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = end_to_end.options(["--only", "sft,ppo", "--ppo-trl-path", "/somewhere"])
    assert "--only sft,ppo" in end_to_end.command(chosen) and "/somewhere" not in end_to_end.command(chosen)
    for wrong in (["--only", "sft,nothing"], ["--rounds", "0"], ["--warmup", "0"], ["--peer", "other"]):
        with pytest.raises(SystemExit):
            end_to_end.options(wrong)
    assert "expected stages among sft, reward" in capsys.readouterr().err


def test_every_stage_has_two_sides() -> None:
    assert set(e2e_ours.STEPS) == set(e2e_trl.RUNS) == set(STAGES)
    assert {f.name for f in dataclasses.fields(Work)} == set(draw(SMALL, "sft", 1)[0].json())
