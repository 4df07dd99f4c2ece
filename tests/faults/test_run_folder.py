"""Run folders that are moved, edited, closed to writing, or taken away between and during the parts of a run.

Other faults: kills in test_resume.py, full disks in test_full_disk.py, random kills in test_campaigns.py; torn journals
in test_records.py, locks and damaged manifests in test_rundir.py, damaged training states in test_checkpoint.py.
"""

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import textworld

from cai_fast import records, rundir

FIRST, MORE = "revise,sft", "revise,sft,compare"


@pytest.fixture(scope="module")
def inputs(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return build_once("text_inputs", textworld.build)


@pytest.fixture(scope="module")
def first(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which stages revise and sft are done."""
    folder = tmp_path_factory.mktemp("first") / "run"
    assert textworld.main(textworld.arguments(inputs, folder, stages=FIRST)) == 0
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path, first: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of the same run after stage compare, undisturbed."""
    folder = Path(shutil.copytree(first, tmp_path_factory.mktemp("whole") / "run"))
    assert textworld.main(textworld.arguments(inputs, folder, stages=MORE)) == 0
    return textworld.results(folder)


def message(capfd: Any) -> str:
    """The one error on stderr."""
    text = capfd.readouterr().err
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    return errors[0]


def flip(path: Path) -> None:
    """Another last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("file", "stage"), [
    ("revisions.jsonl", "revise"), ("tokens/revisions.safetensors", "revise"), ("prompts.jsonl", "revise"),
    ("checkpoints/sl_cai/model.safetensors", "sft"), ("checkpoints/sl_cai/config.json", "sft"),
])  # fmt: skip
def test_an_output_changed_between_stages_is_named(
    file: str, stage: str, inputs: Path, first: Path, tmp_path: Path, capfd: Any
) -> None:
    run = Path(shutil.copytree(first, tmp_path / "run"))
    flip(run / file)
    before = textworld.contents(run)
    assert textworld.main(textworld.arguments(inputs, run, stages=MORE)) == 2
    error = message(capfd)
    assert f"{run / file}: altered since stage {stage} wrote it" in error and f"--restart-from {stage}" in error
    assert textworld.results(run) == textworld.results(first) | {file: before[file]}


def test_a_changed_export_is_made_anew_as_the_message_says(
    inputs: Path, first: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(first, tmp_path / "run"))
    flip(run / "checkpoints/sl_cai/model.safetensors")
    assert textworld.main(textworld.arguments(inputs, run, stages=MORE) + ["--restart-from", "sft"]) == 0
    assert textworld.results(run) == whole


def test_another_base_model_under_the_old_name_is_noticed(
    inputs: Path, first: Path, tmp_path: Path, capfd: Any
) -> None:
    run = Path(shutil.copytree(first, tmp_path / "run"))
    flip(Path(shutil.copytree(inputs / "base", tmp_path / "base")) / "model.safetensors")
    words = textworld.arguments(inputs, run, stages=MORE, model__base=tmp_path / "base")
    assert textworld.main(words) == 2
    assert "--restart-from revise" in message(capfd)
    assert textworld.results(run) == textworld.results(first)


def test_a_moved_run_folder_goes_on(inputs: Path, first: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    shutil.copytree(first, tmp_path / "here")
    (tmp_path / "there").mkdir()
    run = (tmp_path / "here").rename(tmp_path / "there" / "moved")
    assert textworld.main(textworld.arguments(inputs, run, stages=MORE)) == 0
    assert textworld.results(run) == whole and not (tmp_path / "here").exists()
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert {name: record["starts"] for name, record in stages.items()} == {"revise": 1, "sft": 1, "compare": 1}


def test_a_clock_that_goes_backwards(
    inputs: Path, first: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are for people: a run that continues in the year 2001, an hour earlier at every look, has the same bits."""
    run = Path(shutil.copytree(first, tmp_path / "run"))
    for path in run.rglob("*"):
        os.utime(path, (2**32, 2**32))  # written in 2106
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
    assert textworld.main(textworld.arguments(inputs, run, stages=MORE)) == 0
    assert textworld.results(run) == whole and next(hours) >= 3
    assert json.loads((run / "manifest.json").read_text())["stages"]["compare"]["seconds"] >= 0


def test_a_folder_on_a_read_only_disk_is_refused(
    inputs: Path, first: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(first, tmp_path / "run"))
    before, real = textworld.contents(run), os.open

    def read_only(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if str(path).startswith(str(run)) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(rundir.os, "open", read_only)
    assert textworld.main(textworld.arguments(inputs, run, stages=MORE)) == 2
    error = message(capfd)
    assert f"{run}: expected a folder that can be" in error and "Read-only file system" in error
    assert textworld.contents(run) == before


def disturbed(words: list[str], deed: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a run in which `deed` is done before the fifth row of a journal is written."""
    real, rows = records.Journal.append, itertools.count(1)

    def append(journal: records.Journal, row: Any) -> None:
        if next(rows) == 5:
            deed()
        real(journal, row)

    with monkeypatch.context() as patch:
        patch.setattr(records.Journal, "append", append)
        code = textworld.main(words)
    assert next(rows) > 5
    return code


def test_a_disk_that_becomes_read_only(
    inputs: Path, first: Path, whole: dict[str, bytes], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(first, tmp_path / "run"))
    words = textworld.arguments(inputs, run, stages=MORE)

    def refuse() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    assert disturbed(words, refuse, monkeypatch) == 1
    assert "Read-only file system" in (error := message(capfd)) and "same command again" in error
    assert textworld.main(words) == 0
    assert textworld.results(run) == whole


def test_a_run_folder_that_vanishes_and_comes_back(
    inputs: Path, first: Path, whole: dict[str, bytes], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a disk is unmounted: nothing may be written where it was, and nothing is lost."""
    run = Path(shutil.copytree(first, tmp_path / "run"))
    words = textworld.arguments(inputs, run, stages=MORE)
    assert disturbed(words, lambda: run.rename(tmp_path / "away"), monkeypatch) == 1
    assert f"the run folder {run} is gone" in (error := message(capfd)) and "same command again" in error
    assert not run.exists()
    (tmp_path / "away").rename(run)
    assert textworld.main(words) == 0
    assert textworld.results(run) == whole
