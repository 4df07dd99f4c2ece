"""metrics.jsonl survives kills and resumes; progress is visible with and without a terminal."""

import io
import json

import pytest
import rank_worker
import torch
from tiny import tiny_model

from cai_fast.distributed import Distributed
from cai_fast.engine import Engine, Sampling
from cai_fast.runlog import Mean, Progress, RunLog, in_words

ONE = Distributed(0, 1, torch.device("cpu"))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_hold_stage_step_time_and_values(tmp_path):
    log = RunLog(tmp_path / "metrics.jsonl")
    log.metrics("sft", 3, {"sft/loss": torch.tensor(0.5), "sft/tokens": 7, "sft/bad": float("nan")})
    (row,) = rows(log.path)
    assert row.pop("time") > 1e9
    assert row == {"stage": "sft", "step": 3, "sft/loss": 0.5, "sft/tokens": 7, "sft/bad": None}


def test_resume_drops_what_will_be_written_again(tmp_path):
    log = RunLog(tmp_path / "metrics.jsonl")
    for step in range(4):
        log.metrics("sft", step, {})
        log.metrics("pm", step, {})
    log.truncate("sft", 2)
    log.metrics("sft", 2, {"again": 1})
    assert [r["step"] for r in rows(log.path) if r["stage"] == "sft"] == [0, 1, 2]
    assert [r["step"] for r in rows(log.path) if r["stage"] == "pm"] == [0, 1, 2, 3]
    assert rows(log.path)[-1]["again"] == 1


def test_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 0}\n{"stage": "a"{"stage": "a", "step": 1}\n{"stage": "a", "step": 2}')
    log = RunLog(path)
    log.metrics("a", 3, {})
    assert [r["step"] for r in rows(path)] == [0, 3]


def test_other_ranks_are_silent(tmp_path, capsys):
    log = RunLog(tmp_path / "metrics.jsonl", is_main=False)
    log.metrics("a", 0, {})
    log.truncate("a", 0)
    log.info("hello")
    with log.progress(3, "x") as progress:
        progress.update(3)
    assert not log.path.exists()
    assert capsys.readouterr() == ("", "")


def test_mean_weighs_by_count():
    mean = Mean()
    mean.add("loss", torch.tensor(2.0, requires_grad=True), 1)
    mean.add("loss", torch.tensor(10.0), torch.tensor(3))
    mean.add("none", 0.0, 0)
    got = mean.reduce(ONE)
    assert got["loss"] == 3.0 and got["none"] != got["none"]
    assert mean.reduce(ONE) == {}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_has_rate_and_eta_every_10_s():
    clock, out = Clock(), io.StringIO()
    with Progress(100, "revise", "samples", initial=20, file=out, clock=clock) as progress:
        for _ in range(60):
            clock.now += 0.5
            progress.update(1, loss=0.25)
        lines = out.getvalue().splitlines()
        assert len(lines) == 3
        assert lines[0] == "revise: 40/100 samples, 2/s, ETA 00:30, loss 0.25"
        progress.update(20)
    assert out.getvalue().splitlines()[-1].startswith("revise: 100/100 samples") and "took" in out.getvalue()


def test_tokens_move_the_progress_while_a_chunk_is_at_work():
    clock, out = Clock(), io.StringIO()
    engine = Engine(tiny_model(), max_len=64, max_batch=2)
    with Progress(8, "compare", "row", file=out, clock=clock, tokens=lambda: engine.counters["trunk_tokens"]) as bar:
        clock.now += 10.0
        bar.update(1)

        def progress(index, completion):
            clock.now += 4.0
            bar.tick()

        engine.generate([[1, 2, 3]] * 7, Sampling(max_new_tokens=9), progress=progress)
        bar.update(7)
    lines = out.getvalue().splitlines()
    assert lines[0] == "compare: 1/8 row, 0.1/s, ETA 01:10"
    # An answer ends every 4 seconds: lines after the third and the sixth.
    assert [line.split(", ")[0] for line in lines[1:-1]] == ["compare: 1/8 row"] * 2
    speeds = [float(line.split(", ")[3].removesuffix(" tokens/s")) for line in lines[1:]]
    assert speeds[-1] == pytest.approx(engine.counters["trunk_tokens"] / 38.0, rel=0.01) and min(speeds) > 0.5
    assert lines[-1].startswith("compare: 8/8 row, 0.211/s, took 00:38, ")


def test_large_token_rates_are_short_and_stand_before_other_values():
    clock, out, tokens = Clock(), io.StringIO(), iter([1000, 22000, 22000])
    with Progress(2, "rl", "step", file=out, clock=clock, tokens=lambda: next(tokens)) as progress:
        clock.now += 10.0
        progress.update(1, kl=0.5)
    assert out.getvalue().splitlines()[0] == "rl: 1/2 step, 0.1/s, ETA 00:10, 2.10k tokens/s, kl 0.5"


def test_the_last_line_is_shown_once():
    clock, out = Clock(), io.StringIO()
    with Progress(2, "rl", "step", file=out, clock=clock) as progress:
        for more in (1, 1, 0, 0):  # stage rl samples once more after its last step
            clock.now += 10.0
            progress.update(more) if more else progress.tick()
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == ["rl: 1/2 step", "rl: 2/2 step"]
    with Progress(2, "rl", "step", initial=2, file=out, clock=clock):
        pass
    assert len(out.getvalue().splitlines()) == 3


def test_rate_and_eta_are_those_of_all_ranks():
    clock, out = Clock(), io.StringIO()
    with Progress(200, "compare", "row", initial=40, file=out, clock=clock, done=lambda: 60) as progress:
        clock.now += 20.0
        progress.update(30)
    assert out.getvalue().splitlines()[0] == "compare: 100/200 row, 3/s, ETA 00:33"


@pytest.mark.distributed
def test_progress_counts_the_rows_of_other_ranks(tmp_path):
    shown, silent = rank_worker.start("rows", tmp_path)
    lines = [line for line in shown.splitlines() if line.startswith("compare: ")]
    counts = [int(line.removeprefix("compare: ").split("/")[0]) for line in lines]
    assert counts == sorted(counts) and counts[-1] == 12 and "12/12 row" in lines[-1] and "took" in lines[-1]
    assert silent == "", "only rank 0 shows progress"
    made = [len((tmp_path / "journal" / f"compare.{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert sum(made) == 12 and made[0] < made[1]
    # The rows of rank 1 counted as they came.
    assert counts[made[0] - 1] > made[0]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_bar():
    out = Terminal()
    with Progress(4, "sft", "steps", file=out, tokens=iter(range(0, 5000, 100)).__next__) as progress:
        progress.update(4, loss=1.5)
    assert "sft" in out.getvalue() and "100%" in out.getvalue() and "tokens/s, loss 1.5" in out.getvalue()


def test_a_bar_follows_tokens_and_ranks():
    clock, out, rows = Clock(), Terminal(), iter([0, 7, 20])
    with Progress(20, "compare", "row", file=out, clock=clock, done=lambda: next(rows), tokens=lambda: 0) as progress:
        for _ in range(2):
            clock.now += 1.0
            progress.tick()
            progress.tick()  # too early to be shown
    assert " 7/20 " in out.getvalue() and " 20/20 " in out.getvalue() and "tokens" not in out.getvalue()


def test_messages_carry_the_time(tmp_path, capsys):
    RunLog(tmp_path / "metrics.jsonl").warn("low disk")
    assert capsys.readouterr().err == "[00:00] warning: low disk\n"


def test_a_summary_is_said_in_words() -> None:
    summary = {
        "requested": 3,
        "kept": 2,
        "rejected": {"too_long": 1},
        "failed": {},
        "mean_score": 0.123456,
        "judge": "x",
    }
    assert in_words(summary) == "requested 3, kept 2, rejected (too long 1), mean score 0.1235, judge x"


def test_progress_says_no_more_than_it_knows():
    clock, out = Clock(), io.StringIO()
    with Progress(50_000, "prompts", "row", file=out, clock=clock) as progress:
        clock.now += 10.0
        progress.tick()
        clock.now += 10.0
        progress.update(40_000)
    assert out.getvalue().splitlines()[:2] == ["prompts: 0/50000 row", "prompts: 40000/50000 row, 2.00k/s, ETA 00:05"]
