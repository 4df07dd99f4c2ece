"""Ranks: a world of one needs nothing; two gloo ranks agree with one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from cai_fast import distributed
from cai_fast.distributed import Distributed, Stopped, global_moments
from cai_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
ONE = Distributed(0, 1, torch.device("cpu"))

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from cai_fast import config, distributed
from cai_fast.distributed import global_moments
from cai_fast.errors import InputError
from cai_fast.optim import Optimizer
from cai_fast.rundir import RunDir
from cai_fast.runlog import Mean

distributed.install_signal_handlers()
d = distributed.init("cpu")
out = {"items": []}
while (item := d.next_item("revise/0")) < 20:
    out["items"].append(item)
out["other"] = d.next_item("label/0")
x = torch.linspace(1e6, 1e6 + 1, 11, dtype=torch.float64)
w = torch.arange(11) % 3
half = slice(0, 8) if d.rank == 0 else slice(8, None)
out["moments"] = [float(v) for v in global_moments(x[half], w[half], d)]
empty = slice(0, 11 if d.rank == 0 else 0)
out["moments_empty"] = [float(v) for v in global_moments(x[empty], w[empty], d)]
out["sum"] = d.all_reduce_sum({"a": 1.5, "b": d.rank} if d.rank else {"b": 0, "a": 2.0})
mean = Mean()
mean.add("loss", torch.tensor(6.0), 2 if d.rank else 1)
mean.add("unused", 0.0, 0)
out["mean"] = mean.reduce(d)
p = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
(p[0].sum() * (d.rank + 1) + (p[1] * p[1]).sum() * d.rank).backward()  # p[2], p[3]: unused everywhere
if d.rank == 0:
    p[1].grad = None
q = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
grads = [*(r.grad for r in p), torch.full((2,), 2.0**-9 if d.rank else 1.0, dtype=torch.bfloat16)]
sums = d.all_reduce_grads(grads, [*p, q])
out["grads"] = [None if g is None else g.tolist() for g in sums]
out["types"] = [None if g is None else str(g.dtype) for g in sums]
named = {"full": torch.nn.Parameter(torch.ones(2, 2)), "half": torch.nn.Parameter(torch.ones(2, 2).bfloat16()),
         "rare": torch.nn.Parameter(torch.ones(2).bfloat16()), "unused": torch.nn.Parameter(torch.ones(2).bfloat16())}
optimizer = Optimizer.adamw(named.items(), 0.1, weight_decay=0.5, moments="bfloat16")
total = named["full"].sum() * (d.rank + 1) + named["half"].sum() * (2.0**-9 if d.rank else 1.0)
(total + (named["rare"].sum() if d.rank else 0.0)).backward()
optimizer.reduce(d)
out["reduced"] = {n: None if g is None else g.flatten()[0].item() for n, g in optimizer.gradients.items()}
out["norm"] = float(optimizer.clip(1.0))
optimizer.step()
out["state"] = {n: t.tolist() for n, t in (optimizer.state_dict() | named).items()}
out["object"] = d.broadcast_object({"from": d.rank, "t": (1, "x")})
def fail():
    raise InputError("broken on rank %d" % d.rank)
try:
    d.on_main(fail)
except InputError as error:
    out["error"] = str(error)
out["main"] = d.on_main(lambda: d.rank)
out["gathered"] = d.gather_objects(lambda: {"rank": d.rank, "x": [0.1] * (1 + 3 * d.rank)})
try:
    d.gather_objects(lambda: fail() if d.rank else "fine")
except InputError as error:
    out["gather_error"] = str(error)
out["added"] = d.add("rows", 10 + d.rank)
run = RunDir.open(sys.argv[1] + "/run", config.load([]), dist=d)
done = [run.is_done("revise", {"n": 1})]
run.begin("revise", {"n": 1})
with run.journal("revise", d.rank) as journal:
    journal.append({"id": d.rank})
d.barrier()
out["journals"] = [p.name for p in run.progress("revise")]
if d.rank == 0:
    run.path("revisions.jsonl").write_text("{}")
run.finish("revise", ["revisions.jsonl"], {})
out["done"] = [*done, run.is_done("revise", {"n": 1})]
out["hash"] = run.output_hash("revisions.jsonl")
try:
    run.is_done("revise", {"n": 2})
except InputError as error:
    out["refused"] = str(error)
out["stop_before"] = d.stop_agreed()
d.barrier()
if d.rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
out["stop_after"] = d.stop_agreed()
import torch.distributed.nn  # as parts of PyTorch do when they are first used
distributed.shutdown()
out["left"] = [name for name in map(Path.read_text, Path("/proc/self/task").glob("*/comm")) if "gloo" in name]
open(sys.argv[1] + "/rank%d.json" % d.rank, "w").write(json.dumps(out))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                           "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
    workers = [
        subprocess.Popen([sys.executable, folder / "worker.py", folder], env=common | {"RANK": str(rank)},
                         stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_work_items_are_dealt_once(two_ranks):
    assert sorted(two_ranks[0]["items"] + two_ranks[1]["items"]) == list(range(20))
    assert sorted([two_ranks[0]["other"], two_ranks[1]["other"]]) == [0, 1]  # lists are independent


def test_moments_of_two_ranks_equal_one(two_ranks):
    x, w = torch.linspace(1e6, 1e6 + 1, 11, dtype=torch.float64), torch.arange(11) % 3
    expected = [float(v) for v in global_moments(x, w, ONE)]
    for out in two_ranks:
        assert out["moments"] == pytest.approx(expected, rel=1e-12)
        assert out["moments_empty"] == pytest.approx(expected, rel=1e-12)


def test_sums_means_and_gradients(two_ranks):
    for out in two_ranks:
        assert out["sum"] == {"a": 3.5, "b": 1.0}
        assert out["mean"]["loss"] == 4.0  # (6 + 6) / (1 + 2)
        assert out["mean"]["unused"] != out["mean"]["unused"]
        # One rank has no gradient of the second; the sum of the last is no number of bf16.
        assert out["grads"] == [[3.0] * 3, [2.0] * 3, None, None, [1 + 2.0**-9] * 2]
        assert out["types"] == ["torch.float32"] * 2 + [None] * 2 + ["torch.float32"]


def test_an_optimizer_of_both_types_steps_alike_on_all_ranks(two_ranks):
    for out in two_ranks:
        assert out["reduced"] == {"full": 3.0, "half": 1 + 2.0**-9, "rare": 1.0, "unused": None}
        assert out["norm"] == pytest.approx((4 * 9 + 4 * (1 + 2.0**-9) ** 2 + 2) ** 0.5, rel=1e-6)
        assert out["state"]["unused"] == [1.0, 1.0] and out["state"]["unused/step"] == 0
        assert out["state"]["half"] != [[1.0] * 2] * 2
    assert two_ranks[0]["state"] == two_ranks[1]["state"]


def test_rank_0_speaks_for_all(two_ranks):
    for out in two_ranks:
        assert out["object"] == {"from": 0, "t": [1, "x"]}
        assert out["error"] == "broken on rank 0"
        assert out["main"] == 0


def test_every_rank_hears_from_all(two_ranks):
    for out in two_ranks:
        assert out["gathered"] == [{"rank": 0, "x": [0.1]}, {"rank": 1, "x": [0.1] * 4}]
        assert out["gather_error"] == "broken on rank 1"
    assert sorted(out["added"] for out in two_ranks) in ([10, 21], [11, 21])


def test_ranks_share_a_run_folder(two_ranks):
    assert two_ranks[0]["hash"] == two_ranks[1]["hash"]
    for out in two_ranks:
        assert out["done"] == [False, True]
        assert out["journals"] == ["revise.0.jsonl", "revise.1.jsonl"]
        assert "n: 1 -> 2" in out["refused"]


def test_one_ranks_signal_stops_both(two_ranks):
    assert [(out["stop_before"], out["stop_after"]) for out in two_ranks] == [(False, True)] * 2


def test_no_thread_of_the_group_is_left_behind(two_ranks):
    assert [out["left"] for out in two_ranks] == [[], []]  # one that is may abort the process at its end


def test_world_of_one_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    d = distributed.init("cpu")
    assert (d.rank, d.world, d.is_main, d.device.type) == (0, 1, True, "cpu")
    assert not torch.distributed.is_initialized()
    assert [d.next_item("a"), d.next_item("a"), d.next_item("b")] == [0, 1, 0]
    assert d.all_reduce_sum([1, 2.5]) == [1.0, 2.5]
    assert d.broadcast_object((1, 2)) == [1, 2]
    assert d.gather_objects(lambda: (1, 2)) == [[1, 2]]
    assert [d.add("rows", 3), d.add("rows", 0)] == [3, 3]
    d.barrier()
    distributed.shutdown()


def test_signal_sets_a_flag_only():
    old = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        distributed.install_signal_handlers()
        assert not ONE.stop_agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ONE.stop_agreed()
        distributed.install_signal_handlers()
        os.kill(os.getpid(), signal.SIGINT)
        assert ONE.stop_agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    finally:
        signal.signal(signal.SIGTERM, old[0])
        signal.signal(signal.SIGINT, old[1])
        distributed._signals.clear()


def test_stopped_exits_with_143():
    error = Stopped()
    assert error.code == 143 and "same command" in str(error)


def test_missing_gpu_is_the_users_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="no usable CUDA GPU"):
        distributed.init("cuda")


def test_moments_by_hand():
    mean, var = global_moments(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([1.0, 3.0, 0.0]), ONE)
    assert (float(mean), float(var)) == (2.5, 0.75)
    assert [float(v) for v in global_moments(torch.tensor([7.0]), None, ONE)] == [7.0, 0.0]
    assert [float(v) for v in global_moments(torch.zeros(0), None, ONE)] == [0.0, 0.0]
