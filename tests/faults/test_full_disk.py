"""A disk that fills while stages run: exit code 1, whole files stay whole, and running again completes the run."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import textworld
from safetensors import SafetensorError

from cai_fast import checkpoint, records
from cai_fast.model import hf

STAGES = "revise,sft,compare,label,pm"


@pytest.fixture(scope="module")
def inputs(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return build_once("text_inputs", textworld.build)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert textworld.main(textworld.arguments(inputs, folder, stages=STAGES)) == 0
    return textworld.results(folder)


def torn_append(journal: records.Journal, row: Any) -> None:
    """What a full disk leaves of a row: its beginning."""
    os.write(journal._file.fileno(), b'{"id": "torn')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("count", [7, 25, 50, 80])  # in revise twice, compare, label
def test_a_disk_that_fills_in_a_journal(
    count: int, inputs: Path, whole: dict[str, bytes], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = {"revise.chunk": 3, "compare.chunk": 5, "label.chunk": 4}
    words = textworld.arguments(inputs, tmp_path / "run", stages=STAGES, **chunks)
    real, written = records.Journal.append, []

    def append(journal: records.Journal, row: Any) -> None:
        (real if len(written) < count else torn_append)(journal, row)
        written.append(row["id"])

    with monkeypatch.context() as full:
        full.setattr(records.Journal, "append", append)
        assert textworld.main(words) == 1
    assert_full(capfd)
    redone: list[str] = []
    with monkeypatch.context() as watch:
        watch.setattr(records.Journal, "append", lambda j, row: (redone.append(row["id"]), real(j, row))[1])
        assert textworld.main(words) == 0
    assert not set(redone) & set(written[:count])
    assert textworld.results(tmp_path / "run") == whole


def assert_full(capfd: Any) -> None:
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no space left" in errors[0] and "same command again" in errors[0]


@pytest.mark.parametrize("target", ["revisions.jsonl", "comparisons.safetensors", "labels.jsonl", "manifest.json"])
def test_a_disk_that_fills_in_a_file(
    target: str, inputs: Path, whole: dict[str, bytes], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier files stay whole, the new one is absent or old, and running again completes the run."""
    words = textworld.arguments(inputs, tmp_path / "run", stages=STAGES)
    real = os.replace
    calls: list[str] = []

    def replace(source: Any, destination: Any) -> None:
        calls.append(Path(destination).name)
        if calls[-1] == target and (target != "manifest.json" or calls.count(target) == 4):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))
        real(source, destination)

    with monkeypatch.context() as full:
        full.setattr(os, "replace", replace)
        assert textworld.main(words) == 1
    assert_full(capfd)
    left = textworld.results(tmp_path / "run")
    made = {name: data for name, data in left.items() if not name.startswith("journal/")}
    assert made.items() <= whole.items() and "prompts.jsonl" in made
    assert not [name for name in left if name.endswith(".tmp")]
    assert target == "manifest.json" or not any(name.endswith(target) for name in made)
    assert textworld.main(words) == 0
    assert textworld.results(tmp_path / "run") == whole


def test_a_disk_that_fills_in_a_checkpoint(
    inputs: Path, whole: dict[str, bytes], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that writes weights hides ENOSPC in an error of its own."""
    words = textworld.arguments(inputs, tmp_path / "run", stages=STAGES)

    def save_half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as full:
        full.setattr(hf, "save_file", save_half)
        assert textworld.main(words) == 1
    assert_full(capfd)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert textworld.main(words) == 0
    assert textworld.results(tmp_path / "run") == whole


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("call", [1, 5])  # the first state of sft, the description of pm's
def test_a_disk_that_fills_in_a_training_state(
    call: int, background: bool, inputs: Path, whole: dict[str, bytes], tmp_path: Path, capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = {"sft.save_every": 1, "checkpoint.background": background}
    words = textworld.arguments(inputs, tmp_path / "run", stages=STAGES, **settings)
    real, calls = checkpoint._write, iter(range(1, 10**6))

    def write(path: Path, chunks: Any) -> dict[str, Any]:
        if next(calls) == call:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, chunks)

    with monkeypatch.context() as full:
        full.setattr(checkpoint, "_write", write)
        assert textworld.main(words) == 1
    assert_full(capfd)
    assert not list((tmp_path / "run" / "journal").rglob("*.tmp"))
    assert textworld.main(words) == 0
    assert textworld.results(tmp_path / "run") == whole
