import subprocess
import sys

import pytest
import torch
from cai_fast.kernels import common

from cai_fast import kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def call(backend: str = "auto") -> torch.Tensor:
    return kernels.linear_cross_entropy(
        torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64), backend=backend
    )


def chosen(*names: str, backend: str = "auto", device: torch.device = CPU) -> str:
    return common.select("op", {name: (lambda name=name: name) for name in names}, backend, device)()


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'; expected one of auto, chunked, reference"):
        call("cuda")


def test_the_variable_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(common.BACKEND_VARIABLE, "triton")
    with pytest.raises(ValueError, match="op: backend 'triton' is not available in this version"):
        chosen("reference", "chunked")
    assert torch.equal(call("chunked"), call("reference"))
    monkeypatch.setenv(common.BACKEND_VARIABLE, "reference")
    assert chosen("reference", "chunked") == "reference"
    monkeypatch.setenv(common.BACKEND_VARIABLE, "auto")
    assert chosen("reference", "chunked") == "chunked"


def test_auto_takes_triton_on_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(common.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(common, "_has_triton", lambda: True)
    assert chosen("chunked", "triton", device=CUDA) == "triton"
    assert chosen("chunked", "triton") == "chunked"
    assert chosen("chunked", device=CUDA) == "chunked"
    monkeypatch.setattr(common, "_has_triton", lambda: False)
    assert chosen("chunked", "triton", device=CUDA) == "chunked"


def test_triton_on_cpu_works_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "_has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen("chunked", "triton", backend="triton") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="op: backend 'triton' needs CUDA tensors, got cpu"):
        chosen("chunked", "triton", backend="triton")
    monkeypatch.setattr(common, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="op: backend 'triton' needs the package triton"):
        chosen("chunked", "triton", backend="triton", device=CUDA)


def test_every_name_of_the_api_is_there() -> None:
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


@pytest.mark.parametrize("package", ["kernels", "cai_fast.kernels"])
def test_importing_is_light(package: str) -> None:
    """transformers may import the package as top-level `kernels`: no triton, no registration, no version."""
    code = (
        f"import sys, {package} as kernels; assert not hasattr(kernels, '__version__'); "
        f"assert not any(m == 'triton' or m.startswith('cai_fast') and '{package}' == 'kernels' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
