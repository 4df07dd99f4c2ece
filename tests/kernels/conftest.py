"""Shared by the kernel tests: small chunks, so that every test crosses chunk borders, and random heads."""

from collections.abc import Callable

import pytest
import torch
from cai_fast.kernels import common
from torch import Tensor


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "chunk_rows", lambda vocab, device: 32)


@pytest.fixture
def head() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def make(
        rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        return hidden, weight, torch.randint(0, vocab, (rows,), generator=g)

    return make
