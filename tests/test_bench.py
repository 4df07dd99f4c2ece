"""The measuring programs run where they can; what they say about a GPU can only be checked on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ops, ops_head
from bench.contest import OURS, Absent, Contest, errors, gather, measure, table
from bench.gpu_suite import sections
from bench.measure import extra_memory, interleaved
from cai_fast import kernels

CPU = torch.device("cpu")
FP32_ERROR = 1e-4  # sums over a few dozen rows
OPERATIONS = {
    "head": {"linear_cross_entropy", "linear_policy_loss", "linear_logprob", "linear_kl"},
    "preference": {"score_options", "preference_labels", "preference_loss", "gae", "policy statistics"},
    "decode": {"paged_attention", "shared_attention", "merge_attention", "sample_tokens", "sample_tokens top-p"},
    "block": {"rms_norm", "rms_norm + residual", "rope", "swiglu", "adamw_step", "gradient_norm"},
}
LEFT_OUT = {  # not installed for the tests, or for a GPU only
    "cut-cross-entropy", "Liger", "Liger, fp32 sums", "TRL log-softmax", "TRL fused", "cai_fast, one kernel",
}  # fmt: skip


def test_the_gpu_suite_without_a_gpu_says_so_and_succeeds() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_suite"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "bench.gpu_suite: no CUDA GPU here, nothing to measure."
    ]


@pytest.mark.parametrize("group", ops.GROUPS)
def test_all_contestants_agree_with_fp64(group: str) -> None:
    seen = set()
    for contest in ops.GROUPS[group].contests("tiny", CPU, compile=False):
        result = measure(contest, CPU, 0.0, rounds=1)
        assert not set(result["missing"]) - LEFT_OUT - ({OURS} if contest.op == "policy statistics" else set())
        assert result["contestants"][contest.baseline]["ratio"] == 1
        assert contest.flops + contest.bytes > 0
        for name, row in result["contestants"].items():
            bound = 0.05 if "bf16" in name else FP32_ERROR
            assert all(error <= bound for error in row["errors"].values()), (contest.name, name, row["errors"])
        if OURS in result["contestants"]:
            assert bool(result["contestants"][OURS]["errors"]) != contest.op.startswith("sample_tokens"), contest.name
        seen.add(contest.op)
    assert seen == OPERATIONS[group]


def test_every_operation_has_a_contest() -> None:
    public = {name for name in kernels.__all__ if name.islower()}
    measured = {op.split()[0] for ops in OPERATIONS.values() for op in ops}
    assert public - measured == {"philox_uniform", "split_master", "join_master"}


def test_a_wrong_contestant_shows() -> None:
    contest = next(ops_head.contests("tiny", CPU, compile=False))
    right = contest.works[OURS]
    off = {OURS: lambda x: {name: value * 1.01 for name, value in right(x).items()}}
    found = measure(Contest("op", "size", contest.inputs, off, OURS, exact=contest.exact), CPU, 0.0, rounds=1)
    assert all(error > 5e-3 for error in found["contestants"][OURS]["errors"].values())
    nan = errors({"loss": torch.tensor(torch.nan)}, {"loss": torch.zeros((), dtype=torch.float64)})
    assert nan["loss"] == float("inf")


def test_who_is_absent_or_fails_is_named_and_the_others_are_measured() -> None:
    def away() -> None:
        raise Absent("package x is not installed")

    def breaks(_: object) -> None:
        raise RuntimeError("no kernel image\nsecond line")

    works, absent = gather({"x": away, "y": lambda: breaks})
    contest = Contest("op", "size", [None], {"base": lambda _: None, **works}, "base", absent=absent)
    result = measure(contest, CPU, 0.0, rounds=1)
    assert result["missing"] == {"x": "package x is not installed", "y": "failed: RuntimeError: no kernel image"}
    assert set(result["contestants"]) == {"base"}
    assert "x                          not measured: package x is not installed" in table(result)


def test_inputs_rotate() -> None:
    seen: list[int] = []
    contest = Contest("op", "size", [1, 2], {"base": lambda x: seen.append(x)}, "base")
    measure(contest, CPU, 0.0, rounds=4)
    assert len(seen) >= 5 and seen[1:] == [1, 2, 1, 2, 1, 2][: len(seen) - 1]  # seen[0] was compared with fp64


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(works, CPU, rounds=3)
    assert calls == [*"abc", *"abc", *"bca", *"cab"]
    assert all(t.p10 <= t.median <= t.p90 for t in times.values())


def test_memory_is_the_peak_not_the_sum() -> None:
    def work() -> torch.Tensor:
        first = torch.ones(2**18)  # 1 MiB
        del first
        return torch.ones(2**19)

    assert extra_memory(work, CPU) == pytest.approx(2, abs=0.1)


def test_the_program_writes_a_table_json_and_a_chart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.ops", "--scale", "tiny", "--only", "gae", "--seconds", "0", "--no-compile"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "## gae, 3x5" in done.stdout
    (path,) = tmp_path.glob("ops-*.json")
    report = json.loads(path.read_text())
    assert report["versions"]["torch"] and report["commit"] and [c["op"] for c in report["contests"]] == ["gae"]
    assert "gae, 3x5" in path.with_suffix(".svg").read_text()


@pytest.mark.parametrize("section", ["correctness", "head Llama-3-8B N8192", "decode", "1 varlen gqa"])
def test_every_section_has_a_name(section: str) -> None:
    assert section in sections()
    assert next(iter(sections())) == "correctness"
