"""A rank that stalls, that never comes, or that is gone is named, with its phase and sample."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ranks
import sharded
from ranks import Ended

from cai_fast import heartbeat
from cai_fast.heartbeat import Heartbeat


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heartbeat]:
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    heart = Heartbeat(0, 1, None, stall_s=0.1, timeout_s=0)
    yield heart
    heart.stop()


def until_reported(heart: Heartbeat, since: float) -> None:
    while heart._reported != since:
        time.sleep(0.01)


def test_one_process_reports_each_stall_once(alone: Heartbeat, capsys: pytest.CaptureFixture[str]) -> None:
    heartbeat.at("sft", "step 3")
    until_reported(alone, heartbeat._here[0].since)
    time.sleep(0.1)  # ten more looks
    heartbeat.at("sft", "step 4")
    until_reported(alone, heartbeat._here[0].since)
    alone.stop()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "rank 0" in line] == lines[1::2]
    assert ["sft, step 3: at work" in lines[1], "sft, step 4: at work" in lines[3], len(lines)] == [True, True, 4]


@pytest.mark.parametrize(("moves_on", "waits", "reported"), [(True, False, False), (False, False, True),
                                                             (True, True, True)])  # fmt: skip
def test_waiting_for_a_rank_that_moves_on_is_no_stall(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moves_on: bool, waits: bool, reported: bool
) -> None:
    heart = Heartbeat(0, 1, None, stall_s=600, timeout_s=0)
    heart.stop()
    mine = {"phase": "base", "item": "", "since": 1.0, "waiting": True, "still": 700.0, "gone": ""}
    other = mine | {"item": "step 9", "waiting": waits, "still": 1.0 if moves_on and not waits else 650.0}
    monkeypatch.setattr(heart, "ranks", lambda: [mine, other])
    assert heart._report() == reported
    assert ("rank 1    base, step 9" in capsys.readouterr().err) == reported


def test_the_place_is_kept_while_waiting() -> None:
    heartbeat.at("pm", "step 1")
    before = heartbeat._here[0]
    with heartbeat.waiting():
        assert heartbeat._here[0].waiting and str(heartbeat._here[0]) == "pm, step 1"
    after = heartbeat._here[0]
    assert after[:2] == before[:2] and not after.waiting and after.since > before.since


def ended(words: list[object]) -> list[Ended]:
    with ExitStack() as stack:
        return [process.wait() for process in [stack.enter_context(p) for p in ranks.start(words)]]


@pytest.mark.distributed
def test_a_rank_that_does_not_come_to_a_pass_of_a_sharded_model_is_named(tmp_path: Path) -> None:
    sharded.write_models(tmp_path)
    with ExitStack() as stack:
        waits, sleeps = (stack.enter_context(p) for p in ranks.start(["tests/heart_worker.py", "hang", tmp_path]))
        code, text = waits.wait()
        sleeps.process.kill()
        text += sleeps.wait().text
    assert code == 1
    [line] = [line for line in text.splitlines() if line.startswith("error")]
    assert "rank 0 has waited 3 s for the other ranks in sft, step" in line
    assert re.search(r"never arrived: rank 1 \(sft, step \d: at work for \d s\)", line)


@pytest.mark.distributed
def test_a_stalled_rank_is_named_once_and_then_given_up() -> None:
    with ExitStack() as stack:
        waits, sleeps = (stack.enter_context(p) for p in ranks.start(["tests/heart_worker.py", "stall"]))
        code, text = waits.wait()
        sleeps.process.kill()
        text += sleeps.wait().text
    assert code == 1
    assert text.count("no progress for 1 s") == 1
    table = text[text.index("no progress") :].splitlines()[1:3]
    assert table[0].startswith("  rank 0    rl: sampling, prompt p17: waiting for others for ")
    assert table[1].startswith("  rank 1    rl: sampling, prompt p17: at work for ")
    assert text.count("never arrived: rank 1 (rl: sampling, prompt p17: at work for ") == 1
    assert "Traceback" not in text


@pytest.mark.distributed
@pytest.mark.parametrize(("how", "code", "said", "blamed"), [
    ("kill", -9, "", "rank 0 lost rank 1 (sft, step 13: at work for "),
    ("bug", 1, "KeyError: 'planted'", "rank 0 lost rank 1 (KeyError: 'planted')"),
    ("input", 2, "error: only rank 1 sees this\n", "rank 0 lost rank 1 (InputError: only rank 1 sees this)"),
])  # fmt: skip
def test_a_lost_rank_is_named_and_its_own_error_is_shown(
    tmp_path: Path, how: str, code: int, said: str, blamed: str
) -> None:
    first, second = ended(["tests/heart_worker.py", how, tmp_path])
    assert second.code == code and said in second.text, second.text
    assert first.code == 1
    assert first.text.startswith("error: " + blamed) and first.text.count("\n") == 1
    assert "it was itself in sft, step 12" in first.text


@pytest.mark.distributed
def test_a_thread_of_a_library_does_not_abort_a_rank_that_is_done() -> None:
    for code, text in ended(["tests/heart_worker.py", "leave"]):
        # The host of the store may leave first, which the other's thread then complains about.
        assert code == 0 and "all is done" in text and "terminate called" not in text, text
