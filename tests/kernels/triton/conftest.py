"""Shared by the tests of the Triton kernels: the repaired interpreter, quiet numpy, guarded memory.

TRITON_INTERPRET is set by tests/conftest.py, before anything imports triton, in every test process; only the
compilation for sm_90 needs a process without it (`sm90.py`).
"""

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _repaired_interpreter() -> None:
    if not torch.cuda.is_available():
        import interpreter

        interpreter.repair()


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    """-inf - -inf and exp2's overflow are ordinary in masked lanes; numpy's warnings would be errors here."""
    with np.errstate(all="ignore"):
        yield
