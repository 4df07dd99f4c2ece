"""The entry point with stages made for the test: order, skipping, exit codes, one message for each problem."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cai_fast
from cai_fast import config, distributed, train
from cai_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


class FakeStage:
    """A stage that reads one setting, writes one file, and can be made to fail."""

    def __init__(self, name: str, ran: list[str]):
        self.name, self.ran, self.failure, self.summary = name, ran, None, {}

    def inputs(self, ctx: Any) -> dict[str, Any]:
        return {"settings": config.stage_settings(ctx.config, self.name)}

    def run(self, ctx: Any) -> None:
        if self.failure:
            raise self.failure
        section = getattr(ctx.config, self.name)
        assert section.lr > 0
        ctx.run.path(f"{self.name}.txt").write_text("made")
        ctx.run.finish(self.name, [f"{self.name}.txt"], self.summary)
        self.ran.append(self.name)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Stages sft, pm, rl are fakes; nothing needs checking; runs go to tmp_path/run."""
    ran: list[str] = []
    stages = {name: FakeStage(name, ran) for name in ("sft", "pm", "rl")}
    for name, stage in stages.items():
        monkeypatch.setitem(sys.modules, f"cai_fast.stages.{name}", stage)
    fake = SimpleNamespace(
        check=lambda cfg, *, here: ["checked"],
        open_context=lambda cfg, run, log, dist: SimpleNamespace(config=cfg, run=run, log=log, dist=dist),
        summary_lines=lambda run: ["the table"],
    )
    monkeypatch.setitem(sys.modules, "cai_fast.pipeline", fake)
    monkeypatch.setitem(sys.modules, "cai_fast.plan", SimpleNamespace(plan_lines=lambda cfg: ["planned"]))
    monkeypatch.setattr(cai_fast, "pipeline", fake, raising=False)
    arguments = ["--run-dir", str(tmp_path / "run"), "--stages", "rl,sft,pm"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}  # main() sets others
    yield SimpleNamespace(ran=ran, stages=stages, arguments=arguments, folder=tmp_path / "run", pipeline=fake)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_stages_run_in_order_and_are_skipped_the_next_time(world: SimpleNamespace, capsys: Any) -> None:
    assert train.main(world.arguments) == 0
    assert world.ran == ["sft", "pm", "rl"]
    assert capsys.readouterr().out == "the table\n"
    assert train.main(world.arguments) == 0
    assert world.ran == ["sft", "pm", "rl"]
    assert train.main([*world.arguments, "--restart-from", "pm"]) == 0
    assert world.ran == ["sft", "pm", "rl", "pm", "rl"]


def test_a_changed_setting_of_a_finished_stage_is_refused(world: SimpleNamespace, capsys: Any) -> None:
    assert train.main(world.arguments) == 0
    capsys.readouterr()
    assert train.main([*world.arguments, "--pm.lr", "0.5"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "stage pm" in message and "--restart-from pm" in message


def test_check_and_plan_do_no_work(world: SimpleNamespace, capsys: Any) -> None:
    assert train.main([*world.arguments, "--check"]) == 0
    assert train.main([*world.arguments, "--plan"]) == 0
    assert "checked" in (text := capsys.readouterr().out) and "planned" in text
    assert not world.ran and not world.folder.exists()


def test_bad_input_found_by_the_check_is_one_message_and_no_work(world: SimpleNamespace, capsys: Any) -> None:
    def check(cfg: config.Config, *, here: bool) -> list[str]:
        raise InputError("line 3 of red.jsonl is not JSON")

    world.pipeline.check = check
    assert train.main(world.arguments) == 2
    assert capsys.readouterr().err == "error: line 3 of red.jsonl is not JSON\n"
    assert not world.ran and not world.folder.exists()


def test_a_setting_that_nothing_reads_is_an_error(world: SimpleNamespace, capsys: Any) -> None:
    assert train.main([*world.arguments, "--pm.lr", "0.5", "--rl.vf_coef", "0.7"]) == 2
    assert world.ran == ["sft", "pm", "rl"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert "rl.vf_coef" in last and "pm.lr" not in last


def test_a_setting_that_is_not_read_because_a_guard_ended_the_stage_is_none(world: SimpleNamespace) -> None:
    world.stages["rl"].summary = {"guard": "iteration 0: the score follows the length of answers"}
    assert train.main([*world.arguments, "--rl.vf_coef", "0.7"]) == 0


def test_a_full_disk_is_one_message_and_the_run_continues_later(world: SimpleNamespace, capsys: Any) -> None:
    world.stages["pm"].failure = OSError(errno.ENOSPC, "No space left on device", "shard")
    assert train.main(world.arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no space left writing shard")
    world.stages["pm"].failure = None
    assert train.main(world.arguments) == 0
    assert world.ran == ["sft", "pm", "rl"]


def test_a_stop_signal_ends_with_143(world: SimpleNamespace, capsys: Any) -> None:
    world.stages["rl"].failure = distributed.Stopped("rl")
    with pytest.raises(SystemExit) as stopped:
        train.main(world.arguments)
    assert stopped.value.code == 143
    assert "Run the same command again" in capsys.readouterr().err.splitlines()[-1]


def test_a_bug_is_not_hidden(world: SimpleNamespace) -> None:
    world.stages["sft"].failure = KeyError("bug")
    with pytest.raises(KeyError):
        train.main(world.arguments)


def test_only_the_first_process_speaks() -> None:
    command = [sys.executable, str(ROOT / "cai_fast" / "train.py"), "--sede", "1"]
    other = subprocess.run(command, env={**os.environ, "RANK": "1"}, capture_output=True, timeout=60, check=False)
    assert (other.returncode, other.stdout, other.stderr) == (2, b"", b"")


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "cai_fast" / "train.py"), "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_file_starts_from_any_folder_and_hides_top_level_kernels(tmp_path: Path) -> None:
    code = (
        "import runpy, sys, importlib.util; sys.argv = ['train.py', '--help']\n"
        f"sys.path[0] = {str(ROOT / 'cai_fast')!r}\n"
        "try:\n    runpy.run_path(sys.path[0] + '/train.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "import cai_fast.kernels\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_threads_soon_wait_asleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert train.main(["--help"]) == 0 and os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert train.main(["--help"]) == 0 and os.environ["GOMP_SPINCOUNT"] == "20000"
    heavy = "import sys; from cai_fast import train; print('torch' in sys.modules)"  # it would be too late then
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
