"""python -m pytest bench/bench_ops.py --benchmark-enable [-k TEXT]: every operation through pytest-benchmark, on the
CPU, at sizes that fit a test machine. Compare the rows of one group: the ratio counts, not the machine's milliseconds.
"""

import pytest
import torch

from bench.contest import Contest
from bench.ops import contests


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per contest and contestant."""
    torch.set_num_threads(1)
    made = list(contests("cpu", torch.device("cpu"), compile=False))
    cases = [pytest.param(c, name, id=f"{c.name}-{name}") for c in made for name in c.works]
    metafunc.parametrize(("contest", "contestant"), cases)


def test_operation(benchmark, contest: Contest, contestant: str) -> None:
    benchmark.group = contest.name
    benchmark(contest.works[contestant], contest.inputs[0])
