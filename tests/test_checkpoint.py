"""TrainState on disk: exact round trips, and the last complete step through kills, full disks and bit rot."""

import builtins
import dataclasses
import errno
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import alone
from torch import Tensor

from cai_fast import checkpoint
from cai_fast.checkpoint import Checkpoints, TrainState
from cai_fast.errors import InputError
from cai_fast.optim import Optimizer

ROOT = Path(__file__).resolve().parents[1]


def same(a: Any, b: Any) -> bool:
    """Equal types, values and bits."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
            and torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))
        )  # fmt: skip
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def read(states: Checkpoints) -> TrainState | None:
    """The newest state with its tensors."""
    saved = states.latest()
    if saved is None:
        return None
    tensors = {name: torch.empty_like(t, device="cpu").fill_(1) for name, t in saved.tensors.items()}
    states.load(saved, tensors)
    return TrainState(**{f.name: getattr(saved, f.name) for f in dataclasses.fields(TrainState)} | {"tensors": tensors})


def save(folder: Path, *states: TrainState, keep: int = 1, background: bool = False) -> None:
    with Checkpoints(folder, alone(), keep=keep, background=background) as checkpoints:
        for state in states:
            checkpoints.save(state)


def latest(folder: Path) -> TrainState | None:
    with Checkpoints(folder, alone()) as checkpoints:
        return read(checkpoints)


EXAMPLES = {  # one value that is not the default for every annotation TrainState uses
    "int": 41,
    "dict[str, Tensor]": {
        "a.0": torch.randn(3, 5).T, "b/exp_avg": torch.tensor(2.5), "empty": torch.zeros(0, 4),
        "count": torch.tensor([[2**62, -1]]), "step": torch.tensor(7), "mask": torch.tensor([True, False, True]),
        "half": torch.randn(3, 3).bfloat16(), "remainder": torch.arange(-3, 4, dtype=torch.int16),
        "nan": torch.tensor([float("nan"), -0.0]),
    },
    "dict[str, Any]": {
        "groups": [{"lr": 1e-4 / 3, "flag": True, "none": None, "ids": [0, 2**62]}], "nan": float("nan"),
        "inf": -float("inf"), "text": "\u00e9\n", "empty": {}, "list": [],
    },
}  # fmt: skip


@pytest.mark.parametrize("background", [False, True])
def test_every_field_round_trips(tmp_path: Path, background: bool) -> None:
    by_type = {}
    for f in dataclasses.fields(TrainState):
        kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
        kind = "int" if kind == "int" else "dict[str, Any]" if "Any" in str(f.type) else "dict[str, Tensor]"
        by_type[f.name] = EXAMPLES[kind]
    state = TrainState(**by_type)
    assert not any(same(getattr(state, f.name), getattr(TrainState(), f.name)) for f in dataclasses.fields(state))
    save(tmp_path, state, background=background)
    loaded = latest(tmp_path)
    for f in dataclasses.fields(TrainState):
        assert same(getattr(loaded, f.name), getattr(state, f.name)), f.name


def test_file_is_plain_safetensors(tmp_path: Path) -> None:
    save(tmp_path, TrainState(tensors={"w": torch.arange(3, dtype=torch.int8), "x": torch.randn(5)}))
    tensors = load_file(tmp_path / "step_0" / "shard-0.safetensors")
    assert torch.equal(tensors["w"], torch.arange(3, dtype=torch.int8))
    assert {p.suffix for p in (tmp_path / "step_0").iterdir()} == {".safetensors", ".json"}, "no pickle"


@pytest.mark.parametrize("kind", ["adamw", "bf16", "muon"])
def test_resumed_optimizer_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """One parameter never has a gradient."""

    def start() -> tuple[torch.nn.Module, Optimizer, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in ((6, 5), (5, 4), (4, 4))))
        model = model.bfloat16() if kind == "bf16" else model
        if kind == "muon":
            optimizer = Optimizer.muon(model.named_parameters(), matrices=["0.weight", "2.weight"], muon_lr=0.1, lr=0.1)
        else:
            optimizer = Optimizer.adamw(model.named_parameters(), 0.01, weight_decay=0.1)
        return model, optimizer, dict(model.named_parameters()) | optimizer.state_dict()

    def steps(model: torch.nn.Module, optimizer: Optimizer, which: range) -> None:
        for i in which:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i)).to(model[0].weight.dtype)
            model[1](model[0](x)).float().square().mean().backward()
            optimizer.clip(1.0)
            optimizer.step()

    straight, optimizer, expected = start()
    steps(straight, optimizer, range(6))
    model, optimizer, tensors = start()
    steps(model, optimizer, range(3))
    save(tmp_path, TrainState(step=3, tensors=tensors))
    resumed, fresh, targets = start()
    with Checkpoints(tmp_path, alone()) as states:
        states.load(states.latest(), targets)
    assert same(fresh.state_dict(), optimizer.state_dict())
    steps(resumed, fresh, range(3, 6))
    assert same(targets, expected)
    assert not same(targets, tensors)


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    save(tmp_path, *(TrainState(step=step) for step in (9, 10, 11, 12)), keep=2, background=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_11", "step_12"]
    save(tmp_path, TrainState(step=12, epoch=5))  # the same step again
    assert [p.name for p in tmp_path.iterdir()] == ["step_12.1"]
    assert latest(tmp_path).epoch == 5
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, alone(), keep=0)


class Gate:
    """Holds every write of the thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened, real = threading.Event(), threading.Event(), checkpoint._write

        def write(*args: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return real(*args)

        monkeypatch.setattr(checkpoint, "_write", write)


def test_what_training_changes_meanwhile_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, extra = Gate(monkeypatch), {"list": [1]}
    tensors = {"w": torch.ones(4), "view": torch.ones(4, 4).T[1:], "count": torch.tensor(1)}
    with Checkpoints(tmp_path, alone(), background=True) as states:
        states.save(TrainState(step=1, extra=extra, tensors=tensors))
        assert gate.reached.wait(60)
        for t in tensors.values():  # while the thread is at its first write
            t.add_(1)
        extra["list"].append(2)
        assert not (tmp_path / "step_1").exists()
        gate.opened.set()
        state = read(states)  # which waits for the write
    assert state.extra == {"list": [1]}
    assert all(torch.equal(t, torch.ones_like(t)) for t in state.tensors.values())


def test_a_state_is_finished_even_if_the_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, alone(), background=True) as states:
        states.save(TrainState(step=1))
        assert gate.reached.wait(60)
        threading.Timer(0.05, gate.opened.set).start()
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


class FullDisk:
    """A file on a disk that takes `room` more writes and half of the next one."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room[0] -= 1
        if self.room[0] < 0:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function after whose call the disk takes so many more writes of states."""

    def fill(room: int) -> list[int]:
        left, real = [room], builtins.open
        monkeypatch.setattr(
            checkpoint, "open", lambda p, mode="r": FullDisk(real(p, mode), left) if "w" in mode else real(p, mode),
            raising=False,
        )  # fmt: skip
        return left

    return fill


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("room", range(5))  # header, two tensors, state.json, manifest.json
def test_full_disk_keeps_the_last_step(tmp_path: Path, fill_disk: Any, room: int, background: bool) -> None:
    tensors = {"a": torch.randn(512), "b": torch.randn(512)}
    save(tmp_path, TrainState(step=1, tensors=tensors))
    fill_disk(room)
    with pytest.raises(OSError, match="No space left") as error:
        save(tmp_path, TrainState(step=2, tensors=tensors), background=background)
    assert error.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]  # nor does the failed attempt keep its bytes
    assert latest(tmp_path).step == 1
    left = fill_disk(5)
    save(tmp_path, TrainState(step=2, tensors=tensors))
    assert latest(tmp_path).step == 2 and left == [0], "there are no other writes"


@pytest.mark.parametrize("call", ["save", "wait", "latest", "close"])
def test_a_failed_background_write_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill_disk: Any, call: str
) -> None:
    states = Checkpoints(tmp_path, alone(), background=True)
    states.save(TrainState(step=1))
    states.wait()
    fill_disk(1)
    states.save(TrainState(step=2))
    states._pending.exception(60)  # the thread is done
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"], "its bytes come back at once"
    monkeypatch.undo()
    arguments = [TrainState(step=3)] if call == "save" else []
    with pytest.raises(OSError, match="No space left") as error:
        getattr(states, call)(*arguments)
    assert error.value.errno == errno.ENOSPC
    states.save(TrainState(step=4))
    states.close()
    assert [p.name for p in tmp_path.iterdir()] == ["step_4"]


def test_damaged_and_incomplete_steps_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest(tmp_path / "absent") is None
    steps = [TrainState(step=step, tensors={"w": torch.full((64,), float(step))}) for step in range(1, 8)]
    save(tmp_path, *steps, keep=7)
    (tmp_path / "step_8.tmp").mkdir()
    file = tmp_path / "step_7" / "shard-0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (tmp_path / "step_6" / "shard-0.safetensors").unlink()
    (tmp_path / "step_5" / "manifest.json").write_text("{}")
    (tmp_path / "step_4" / "manifest.json").unlink()
    (tmp_path / "step_3" / "state.json").write_bytes(b"{}")
    os.truncate(tmp_path / "step_2" / "manifest.json", 20)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path).step == 1
    assert all(f"step_{n}" in caplog.text for n in range(2, 8))
    assert "shard-0.safetensors does not match its hash" in caplog.text
    save(tmp_path, TrainState(step=2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_2.1"]


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    for extra, message in (
        ({"x": [0, {1}]}, r"extra\.x\.1: cannot store a set"), ({"x": (1, 2)}, r"extra\.x: cannot store a tuple"),
        ({"x": {1: 2}}, r"extra\.x: keys must be str, got 1"), ({"x": torch.ones(1)}, r"extra\.x: cannot store a T"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            save(tmp_path, TrainState(extra=extra))
    with pytest.raises(TypeError, match=r"cannot store torch.complex64 \(z\)"):
        save(tmp_path, TrainState(tensors={"z": torch.zeros(1, dtype=torch.complex64)}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("tensors", "message"), [
    ({"a": torch.ones(3)}, r"tensor b/x: expected no such tensor, found int64\[\]"),
    ({"a": torch.ones(3), "b/x": torch.tensor(1), "c": torch.ones(2, 2)},
     r"tensor c: expected float32\[2, 2\], found no such tensor"),
    ({"a": torch.ones(1, 3), "b/x": torch.tensor(1)}, r"tensor a: expected float32\[1, 3\], found float32\[3\]"),
    ({"a": torch.ones(3).bfloat16(), "b/x": torch.tensor(1)}, r"tensor a: expected bfloat16\[3\], found float32\[3\]"),
])  # fmt: skip
def test_a_state_of_other_tensors_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save(tmp_path, TrainState(tensors={"a": torch.zeros(3), "b/x": torch.tensor(0)}))
    before = {name: t.clone() for name, t in tensors.items()}
    with Checkpoints(tmp_path, alone()) as states, pytest.raises(InputError, match=message) as error:
        states.load(states.latest(), tensors)
    assert "step_0" in str(error.value) and "--restart-from" in str(error.value)
    assert same(tensors, before)


def test_state_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Older:
        step: int = 1
        tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    with monkeypatch.context() as older:
        older.setattr(checkpoint, "TrainState", Older)
        save(tmp_path, Older())
    with pytest.raises(InputError, match="another version .*epoch"):
        latest(tmp_path)


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from cai_fast.checkpoint import Checkpoints, TrainState
from cai_fast.distributed import Distributed

def save(folder, step, background):
    with Checkpoints(folder, Distributed(0, 1, torch.device("cpu")), background=background) as states:
        states.save(TrainState(step=step, tensors={str(i): torch.full((20,), float(step)) for i in range(3)}))

def child(folder, background, last, done):
    count, real = 0, os.fsync
    def event(name, arguments):
        nonlocal count
        if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "fsync", "shutil.rmtree"):
            if name in ("fsync", "os.rmdir", "os.remove") or str(folder) in str(arguments[0]):
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = lambda fd: (event("fsync", ()), real(fd), event("fsync", ()))
    sys.addaudithook(event)
    for step in (2, 3):
        save(folder, step, background)
        os.write(done, bytes([step]))
    os._exit(0)

for background in (False, True):
    for last in range(1, 1000):
        folder = Path(sys.argv[1]) / f"{background}{last}"
        save(folder, 1, False)
        (folder / "step_9.tmp").mkdir()
        (folder / "step_9.tmp" / "left").touch()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(folder, background, last, writing)
        status = os.waitpid(pid, 0)[1]
        os.close(writing)
        finished = max(os.read(reading, 9) or b"\\1")
        os.close(reading)
        with Checkpoints(folder, Distributed(0, 1, torch.device("cpu"))) as states:
            saved = states.latest()
            tensors = {str(i): torch.zeros(20) for i in range(3)}
            states.load(saved, tensors)
        assert finished <= saved.step <= finished + 1, (last, finished, saved.step)
        assert all(torch.equal(t, torch.full((20,), float(saved.step))) for t in tensors.values())
        print(os.waitstatus_to_exitcode(status), saved.step, flush=True)
        if status == 0:
            break
"""


def test_sigkill_at_every_instant_leaves_the_last_complete_step(tmp_path: Path) -> None:
    """Killed before each access to the folder and around each fsync of two saves in turn, until none is left."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    ends = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert ends.count((0, 3)) == 2
    kept = [step for code, step in ends if code == -9]
    assert {step: kept.count(step) >= 8 for step in (1, 2, 3)} == {1: True, 2: True, 3: True}, kept
