"""The measuring programs run where they can; what they say about a GPU can only be checked on one."""

import os
import subprocess
import sys

import pytest
import torch

from bench import gpu_heads
from bench.measure import interleaved


def test_the_gpu_suite_without_a_gpu_says_so_and_succeeds() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_suite"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "bench.gpu_suite: no CUDA GPU here, nothing to measure."
    ]


def test_a_head_is_timed_and_checked() -> None:
    result = gpu_heads.head_shape(32, 200, 70, torch.device("cpu"), seconds=0.1)
    assert set(result["ms"]) >= {"3 bare GEMMs", "cross entropy", "policy loss", "exact KL with grad"}
    assert all(t["median"] > 0 for t in result["ms"].values())
    assert result["ratio to bare GEMMs"]["3 bare GEMMs"] == 1
    assert result["max logprob error"]["ours"] < 1e-5


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(works, torch.device("cpu"), rounds=3)
    assert calls == [*"abc", *"abc", *"bca", *"cab"]
    assert all(t.p10 <= t.median <= t.p90 for t in times.values())


@pytest.mark.parametrize("section", ["fp32 output", "1 varlen gqa", "head H4096 V128256", "small operations"])
def test_every_section_has_a_name(section: str) -> None:
    from bench.gpu_suite import sections

    assert section in sections()
