import subprocess
import sys

import pytest
import torch
from cai_fast.kernels import common

from cai_fast import kernels


def call(backend: str = "auto") -> torch.Tensor:
    return kernels.linear_cross_entropy(
        torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64), backend=backend
    )


def test_triton_is_refused_clearly_until_it_exists() -> None:
    with pytest.raises(ValueError, match=r"linear_cross_entropy: backend 'triton' is not available in this version"):
        call("triton")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'; expected one of auto, chunked, reference"):
        call("cuda")


def test_the_variable_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(common.BACKEND_VARIABLE, "triton")
    with pytest.raises(ValueError, match="not available"):
        call()
    assert torch.equal(call("chunked"), call("reference"))
    monkeypatch.setenv(common.BACKEND_VARIABLE, "reference")
    assert common.select("op", {"reference": lambda: 1, "chunked": lambda: 2}, "auto")() == 1
    monkeypatch.setenv(common.BACKEND_VARIABLE, "auto")
    assert common.select("op", {"reference": lambda: 1, "chunked": lambda: 2}, "auto")() == 2


def test_every_name_of_the_api_is_there() -> None:
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


def test_importing_is_light() -> None:
    """transformers may import the package as top-level `kernels`: no triton, no registration, no version."""
    code = (
        "import sys, kernels; assert not hasattr(kernels, '__version__'); "
        "assert not any(m == 'triton' or m.startswith('cai_fast') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
