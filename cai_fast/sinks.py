"""Copies of metrics.jsonl for TensorBoard and Weights & Biases; rank 0 only.

The file stays the record: a sink that opens first replays it, so it may be switched on at any time, has no gap where a
process was killed, and shows no step twice. The packages are imported only where they are asked for.
"""

import importlib
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cai_fast.config import Config
from cai_fast.config_sections import SECTIONS
from cai_fast.errors import InputError
from cai_fast.inputs import parse_json, read_bytes
from cai_fast.records import content_id

Row = Mapping[str, Any]  # {stage, step, time, <name>: value}, as a line of metrics.jsonl
START = 1  # SessionLog.START: everything from this event's step on is void


class Sink(Protocol):
    """Where rows go besides the file."""

    def add(self, row: Row) -> None:
        """One more row of metrics.jsonl."""

    def truncate(self, stage: str, step: int) -> None:
        """The rows of `stage` from `step` on will be written again."""

    def close(self) -> None:
        """No more will come."""


def check(config: Config) -> None:
    """InputError if a package that `[log]` asks for is not installed."""
    wanted = {"tensorboard": config.log.tensorboard, "wandb": bool(config.log.wandb)}
    for package in (name for name, asked in wanted.items() if asked):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"log.{package} needs the package {package}, which is not installed: pip install -e '.[{package}]', or "
                f"leave log.{package} out."
            )


def open_all(config: Config, folder: Path, *, anew: bool = False) -> list[Sink]:
    """The sinks that `[log]` asks for, with all of the run's metrics.jsonl in them; `anew`: the run goes another way
    than before (--restart-from)."""
    check(config)
    rows = recorded(folder / "metrics.jsonl")
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", rows))
    if config.log.wandb:
        settings = {name: getattr(config, name).values() for name in SECTIONS} | {"seed": config.seed}
        sinks.append(WeightsAndBiases(config.log.wandb, folder, rows, settings, anew=anew))
    return sinks


def recorded(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a torn one."""
    rows = []
    for line in read_bytes(path).splitlines() if path.is_file() else []:
        try:
            rows.append(parse_json(line, path))
        except InputError:  # torn by a kill
            continue
    return rows


def numbers(row: Row) -> dict[str, float]:
    """The measured values of a row; what was not finite is left out."""
    return {name: value for name, value in row.items() if "/" in name and type(value) in (int, float)}


class TensorBoard:
    """Event files, one folder a stage: `perf/` metrics and steps are each stage's own."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self.summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self.files = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self.writers: dict[str, Any] = {}
        for old in sorted(folder.iterdir()) if folder.is_dir() else []:
            self._writer(old.name)
        for row in rows:
            self.add(row)

    def _writer(self, stage: str) -> Any:
        """The writer of a stage; a new one declares void what an earlier process wrote."""
        if stage not in self.writers:
            self.writers[stage] = self.files.EventFileWriter(str(self.folder / stage))
            self.truncate(stage, 0)
        return self.writers[stage]

    def add(self, row: Row) -> None:
        """One event with all values of the row, at the row's own time."""
        values = [self.summaries.Summary.Value(tag=k, simple_value=v) for k, v in numbers(row).items()]
        event = self.events.Event(wall_time=row["time"], step=row["step"], summary=self.summaries.Summary(value=values))
        self._writer(row["stage"]).add_event(event)

    def truncate(self, stage: str, step: int) -> None:
        """Write the event after which TensorBoard forgets the steps from `step` on."""
        log = self.events.SessionLog(status=START)
        self._writer(stage).add_event(self.events.Event(wall_time=time.time(), step=step, session_log=log))

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers = {}


class WeightsAndBiases:
    """One W&B run, continued under the identity that the file wandb_id in the run folder holds.

    A row's place in metrics.jsonl is its W&B step. W&B can forget nothing, so rows that come again after a resume (the
    same bits in the deterministic mode) are not sent again, and a run that is restarted from a stage becomes a new W&B
    run. Each stage has an axis of its own. Offline (WANDB_MODE), every process leaves the whole run: upload the newest.
    """

    def __init__(self, project: str, folder: Path, rows: list[dict[str, Any]], settings: Mapping[str, Any], *,
                 anew: bool = False) -> None:  # fmt: skip
        wandb = importlib.import_module("wandb")
        identity = folder / "wandb_id"
        if anew or not identity.is_file():
            identity.write_text(content_id(str(folder.resolve()), time.time_ns()), encoding="utf-8")
        quiet = wandb.Settings(console="off", disable_code=True, disable_git=True)
        try:
            self.run = wandb.init(
                project=project, id=identity.read_text(encoding="utf-8"), resume="allow", name=folder.name,
                dir=str(folder), config=dict(settings), settings=quiet,
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise InputError(
                f"log.wandb = {project}: {str(error).rstrip('.')}; leave log.wandb out, or set WANDB_MODE=offline."
            ) from error
        self.axes: set[str] = set()
        self.known = self.run.step  # rows that W&B has, at first those of earlier processes
        self.steps: list[tuple[str, int]] = []  # of the rows in the file
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Send the row, unless W&B has it."""
        stage, axis, place = row["stage"], f"{row['stage']}/step", len(self.steps)
        if axis not in self.axes:
            self.axes.add(axis)
            self.run.define_metric(axis, hidden=True)
            self.run.define_metric(f"{stage}/*", step_metric=axis)
        if place >= self.known:
            named = {k if k.startswith(f"{stage}/") else f"{stage}/{k}": v for k, v in numbers(row).items()}
            self.run.log(named | {axis: row["step"]}, step=place)
            self.known = place + 1
        self.steps.append((stage, row["step"]))

    def truncate(self, stage: str, step: int) -> None:
        """The file is shorter now; what was sent stays."""
        self.steps = [(name, at) for name, at in self.steps if name != stage or at < step]

    def close(self) -> None:
        self.run.finish()
