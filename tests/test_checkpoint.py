"""TrainState on disk: exact round trips, and the last complete step through kills, full disks and bit rot."""

import builtins
import dataclasses
import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cai_fast import checkpoint
from cai_fast.checkpoint import TrainState, latest, save
from cai_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def same(a, b) -> bool:
    """Equal types, values and bits."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
            and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        )  # fmt: skip
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


EXAMPLES = {  # one value that is not the default for every annotation TrainState uses
    "int": 41,
    "dict[str, Tensor]": {"a.0": torch.randn(3, 5).T, "b": torch.tensor(2.5), "empty": torch.zeros(0, 4)},
    "dict[str, Any]": {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(7).bfloat16()}, 1: {}},
        "groups": [{"lr": 1e-4 / 3, "betas": (0.9, 0.999), "flag": True, "none": None, "params": [0, 1]}],
        "mask": torch.tensor([True, False, True]), "ids": torch.tensor([[2**62, -1]]), "nan": float("nan"),
        "a": [torch.ones(1)], "a.0": torch.zeros(1), "__tensor__": "a name that needs escaping", "inf": -float("inf"),
    },
}  # fmt: skip


def test_every_field_round_trips(tmp_path):
    by_type = {}
    for f in dataclasses.fields(TrainState):
        kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
        kind = "int" if kind == "int" else "dict[str, Any]" if "Any" in str(f.type) else "dict[str, Tensor]"
        by_type[f.name] = EXAMPLES[kind]
    state = TrainState(**by_type)
    assert not any(same(getattr(state, f.name), getattr(TrainState(), f.name)) for f in dataclasses.fields(state))
    save(tmp_path, state)
    loaded = latest(tmp_path)
    for f in dataclasses.fields(TrainState):
        assert same(getattr(loaded, f.name), getattr(state, f.name)), f.name


def test_file_is_plain_safetensors(tmp_path):
    step = save(tmp_path, TrainState(model={"w": torch.arange(3, dtype=torch.int8), "x": torch.randn(5)}))
    tensors = load_file(step / "tensors.safetensors")
    assert torch.equal(tensors["model.w"], torch.arange(3, dtype=torch.int8))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Muon])
def test_resumed_optimizer_goes_on_bit_for_bit(tmp_path, optimizer):
    def start():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 4, bias=False))
        return model, optimizer(model.parameters(), lr=0.01)

    def steps(model, optim, which):
        for i in which:
            optim.zero_grad()
            model(torch.randn(8, 6, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            optim.step()

    straight, optim = start()
    steps(straight, optim, range(6))
    model, optim = start()
    steps(model, optim, range(3))
    save(tmp_path, TrainState(step=3, model=model.state_dict(), optimizer=optim.state_dict()))
    state = latest(tmp_path)
    resumed, fresh = start()
    resumed.load_state_dict(state.model)
    fresh.load_state_dict(state.optimizer)
    assert same(fresh.state_dict(), optim.state_dict())
    steps(resumed, fresh, range(state.step, 6))
    assert same(dict(resumed.state_dict()), dict(straight.state_dict()))


def test_pruning_keeps_the_newest(tmp_path):
    for step in (9, 10, 11, 12):
        save(tmp_path, TrainState(step=step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_11", "step_12"]
    save(tmp_path, TrainState(step=12, epoch=5))  # the same step again
    assert [p.name for p in tmp_path.iterdir()] == ["step_12.1"]
    assert latest(tmp_path).epoch == 5
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, TrainState(step=13), keep=0)


class FullDisk:
    """A file that takes `room` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room[0] -= len(data)
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 500, 4300, 4500])  # header, first tensor, second, state.json, manifest
def test_full_disk_keeps_the_last_step(tmp_path, monkeypatch, room):
    tensors = {"a": torch.randn(512), "b": torch.randn(512)}
    save(tmp_path, TrainState(step=1, model=tensors))
    left, real = [room], builtins.open
    monkeypatch.setattr(
        checkpoint, "open", lambda p, mode="r": FullDisk(real(p, mode), left) if "w" in mode else real(p, mode),
        raising=False,
    )  # fmt: skip
    with pytest.raises(OSError, match="No space left") as error:
        save(tmp_path, TrainState(step=2, model=tensors))
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]  # nor does the failed attempt keep its bytes
    assert latest(tmp_path).step == 1
    save(tmp_path, TrainState(step=2, model=tensors))
    assert latest(tmp_path).step == 2


def test_damaged_and_incomplete_steps_are_passed_over(tmp_path, caplog):
    assert latest(tmp_path / "absent") is None
    for step in range(1, 6):
        save(tmp_path, TrainState(step=step, model={"w": torch.full((64,), float(step))}), keep=5)
    (tmp_path / "step_6.tmp").mkdir()
    file = tmp_path / "step_5" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (tmp_path / "step_4" / "manifest.json").unlink()
    (tmp_path / "step_3" / "state.json").write_bytes(b"{}")
    os.truncate(tmp_path / "step_2" / "manifest.json", 20)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path).step == 1
    assert all(f"step_{n}" in caplog.text for n in (2, 3, 4, 5))
    save(tmp_path, TrainState(step=2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_2.1"]


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"extra\.x\.1: cannot store a set"):
        save(tmp_path, TrainState(extra={"x": [0, {1}]}))
    with pytest.raises(TypeError, match=r"extra\.z: cannot store torch.complex64"):
        save(tmp_path, TrainState(extra={"z": torch.zeros(1, dtype=torch.complex64)}))
    assert list(tmp_path.iterdir()) == []


def test_state_of_another_version_is_refused(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Older:
        step: int = 1

    save(tmp_path, Older())
    with pytest.raises(InputError, match="another version .*epoch"):
        latest(tmp_path)


KILLED = """
import sys, torch
from cai_fast.checkpoint import TrainState, save
for step in range(1, 10**9):
    save(sys.argv[1], TrainState(step=step, model={str(i): torch.full((2000,), float(step)) for i in range(20)}))
    print(step, flush=True)
"""


def test_sigkill_at_any_instant_leaves_a_complete_step(tmp_path):
    for attempt in range(2):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        worker = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], env=env, stdout=subprocess.PIPE, text=True)
        worker.stdout.readline()
        time.sleep(0.013 + 0.018 * attempt)
        worker.send_signal(signal.SIGKILL)
        printed = worker.communicate(timeout=30)[0].split()
        state = latest(tmp_path)
        assert state.step >= max(map(int, printed), default=1)
        assert all(torch.equal(t, torch.full((2000,), float(state.step))) for t in state.model.values())
