"""metrics.jsonl survives kills and resumes; progress is visible with and without a terminal."""

import io
import json

import torch

from cai_fast.distributed import Distributed
from cai_fast.runlog import Mean, Progress, RunLog

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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_bar():
    out = Terminal()
    with Progress(4, "sft", "steps", file=out) as progress:
        progress.update(4, loss=1.5)
    assert "sft" in out.getvalue() and "100%" in out.getvalue() and "loss 1.5" in out.getvalue()


def test_messages_carry_the_time(tmp_path, capsys):
    RunLog(tmp_path / "metrics.jsonl").warn("low disk")
    assert capsys.readouterr().err == "[00:00] warning: low disk\n"
