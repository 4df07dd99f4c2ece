"""Copies of metrics.jsonl: each value once, at its step, whatever was killed, resumed or restarted in between."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from cai_fast import config, preflight, sinks, train
from cai_fast.errors import InputError
from cai_fast.runlog import RunLog


def opened(folder: Path, *arguments: str, anew: bool = False) -> RunLog:
    """The log of a process that works on the run in `folder`."""
    cfg = config.load(arguments)
    return RunLog(folder / "metrics.jsonl", True, sinks.open_all(cfg, folder, anew=anew))


def scalars(folder: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a stage: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / stage), purge_orphaned_data=True)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_nothing_is_imported_or_written_unless_asked_for(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.metrics("sft", 0, {"sft/loss": 1.0})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"] and log.sinks == []


@pytest.mark.parametrize("key, value", [("tensorboard", "true"), ("wandb", "project")])
def test_a_missing_package_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"log.{key} needs the package {key}.*\[{key}\]"):
        preflight.check(config.load([f"--log.{key}", value]))


def test_sinks_change_no_result() -> None:
    plain, copied = config.load([]), config.load(["--log.tensorboard", "true", "--log.wandb", "x"])
    for stage in config.STAGES:
        assert config.stage_settings(plain, stage) == config.stage_settings(copied, stage)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard (pip install -e '.[tensorboard]')")
    return tmp_path


TO_BOARD = ("--log.tensorboard", "true")


def test_tensorboard_shows_every_value_by_stage(board: Path) -> None:
    log = opened(board, *TO_BOARD)
    for step in range(3):
        log.metrics("sft", step, {"sft/loss": 1.0 / (step + 1), "perf/tokens_per_s": 5.0, "sft/bad": float("nan")})
        log.metrics("rl", 10 * step, {"rl/kl": step, "perf/tokens_per_s": 7.0})
    log.close()
    found = scalars(board, "sft")
    assert found["sft/loss"] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))] and "sft/bad" not in found
    assert found["perf/tokens_per_s"] == [(0, 5), (1, 5), (2, 5)]
    assert scalars(board, "rl") == {
        "rl/kl": [(0, 0), (10, 1), (20, 2)],
        "perf/tokens_per_s": [(s, 7) for s in (0, 10, 20)],
    }


def test_a_resumed_run_shows_no_step_twice_and_has_no_gap(board: Path) -> None:
    log = opened(board, *TO_BOARD)
    for step in range(6):
        log.metrics("rl", step, {"rl/kl": float(step)})
    for sink in log.sinks:  # a killed process: what its writer still held is lost, a line is torn
        sink.close()
    (next((board / "tensorboard" / "rl").iterdir())).write_bytes(b"")
    with open(log.path, "a") as file:
        file.write('{"stage": "rl", "st')
    log = opened(board, *TO_BOARD)
    log.truncate("rl", 4)
    for step in (4, 5, 6):
        log.metrics("rl", step, {"rl/kl": 10.0 * step})
    log.close()
    assert scalars(board, "rl")["rl/kl"] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_a_restarted_stage_starts_afresh_and_history_can_be_added_later(board: Path) -> None:
    log = opened(board)
    log.metrics("sft", 0, {"sft/loss": 2.0})
    log.metrics("rl", 0, {"rl/kl": 9.0})
    opened(board, *TO_BOARD).close()
    assert scalars(board, "sft")["sft/loss"] == [(0, 2)] and scalars(board, "rl")["rl/kl"] == [(0, 9)]
    log.truncate("rl", 0)  # as --restart-from rl does before the log is opened
    log = opened(board, *TO_BOARD, anew=True)
    assert scalars(board, "sft")["sft/loss"] == [(0, 2)] and scalars(board, "rl").get("rl/kl", []) == []
    log.metrics("rl", 0, {"rl/kl": 1.0})
    log.close()
    assert scalars(board, "rl")["rl/kl"] == [(0, 1)]


class FakeWandb(types.ModuleType):
    """Keeps what a server would: per run id, rows by step; a step that is not above the last one is dropped."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.Settings = dict
        self.store: dict[str, dict[int, dict[str, float]]] = {}
        self.asked: list[dict[str, Any]] = []
        self.axes: dict[str, Any] = {}
        self.dropped, self.finished, self.refusal = 0, 0, ""

    def init(self, **asked: Any) -> "FakeRun":
        if self.refusal:
            raise self.errors.Error(self.refusal)
        self.asked.append(asked)
        return FakeRun(self, self.store.setdefault(asked["id"], {}))


class FakeRun:
    def __init__(self, server: FakeWandb, rows: dict[int, dict[str, float]]) -> None:
        self.server, self.rows = server, rows

    @property
    def step(self) -> int:
        return max(self.rows, default=-1) + 1

    def define_metric(self, name: str, **more: Any) -> None:
        self.server.axes[name] = more

    def log(self, row: dict[str, float], step: int) -> None:
        if step < self.step:
            self.server.dropped += 1
        else:
            self.rows[step] = row

    def finish(self) -> None:
        self.server.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


TO_WANDB = ("--log.wandb", "a-project")


def test_wandb_gets_settings_axes_and_rows(tmp_path: Path, wandb: FakeWandb) -> None:
    log = opened(tmp_path, *TO_WANDB, "--rl.lr", "0.25")
    log.metrics("pm", 3, {"pm/loss": 0.5, "pm_eval/loss": 0.25, "perf/mfu": 0.125, "pm/bad": float("inf")})
    log.close()
    (asked,) = wandb.asked
    assert (asked["project"], asked["resume"], asked["dir"]) == ("a-project", "allow", str(tmp_path))
    assert asked["config"]["rl"]["lr"] == 0.25 and asked["config"]["seed"] == 0 and json.dumps(asked["config"])
    assert wandb.store[asked["id"]] == {
        0: {"pm/loss": 0.5, "pm/pm_eval/loss": 0.25, "pm/perf/mfu": 0.125, "pm/step": 3}
    }
    assert wandb.axes["pm/*"] == {"step_metric": "pm/step"} and wandb.finished == 1


def test_a_resumed_run_goes_on_in_wandb_without_doubles(tmp_path: Path, wandb: FakeWandb) -> None:
    log = opened(tmp_path, *TO_WANDB)
    for step in range(5):
        log.metrics("rl", step, {"rl/kl": float(step)})
    log.truncate("rl", 3)  # in the same process
    for step in (3, 4):
        log.metrics("rl", step, {"rl/kl": float(step)})
    log = opened(tmp_path, *TO_WANDB)  # after a kill
    log.truncate("rl", 2)
    for step in range(2, 8):
        log.metrics("rl", step, {"rl/kl": float(step)})
    (rows,) = wandb.store.values()
    assert {place: row["rl/step"] for place, row in rows.items()} == {n: n for n in range(8)}
    assert len({asked["id"] for asked in wandb.asked}) == 1 and wandb.dropped == 0
    log = opened(tmp_path, *TO_WANDB, anew=True)  # restarted from a stage: another run, with what was kept
    assert len(wandb.store) == 2 and len(list(wandb.store.values())[1]) == 8


def test_a_refusal_of_wandb_is_one_message(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.refusal = "no API key"
    with pytest.raises(InputError, match="log.wandb = a-project: no API key.*WANDB_MODE=offline"):
        opened(tmp_path, *TO_WANDB)


def test_a_line_that_is_no_row_is_one_message_with_sinks_too(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "smoke", "--stages", "report", "--run-dir", str(tmp_path / "run"), *TO_WANDB]
    assert train.main(words) == 0
    (tmp_path / "run" / "metrics.jsonl").write_text('{"loss": 1}\n')
    assert train.main(words) == train.BAD_INPUT
    assert "metrics.jsonl, line 1: expected an object with stage and step" in capsys.readouterr().err


def test_a_run_opens_and_closes_its_sinks(tmp_path: Path, wandb: FakeWandb) -> None:
    words = ["--config", "smoke", "--stages", "report", "--run-dir", str(tmp_path / "run"), *TO_WANDB]
    for more in ([], [], ["--restart-from", "report"]):
        assert train.main([*words, *more]) == 0
    first, second, third = (asked["id"] for asked in wandb.asked)
    assert first == second != third and wandb.finished == 3
