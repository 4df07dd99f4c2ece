"""Offsets beyond 2^31 elements: rows, pages and tokens so far apart that their addresses do not fit 32-bit arithmetic.

The memory between them is never touched, so the tests hold gigabytes of addresses and a few pages of memory. A kernel
that multiplied in 32 bits would read elsewhere, hence a process of its own in the test that plants that.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cai_fast.kernels import sample_tokens, score_options
from cai_fast.kernels.triton import attention as paged
from cai_fast.kernels.triton import rows as kernels
from torch import Tensor

APART = 2**30  # elements between rows: fits an int32, while two rows further on does not


def apart(near: Tensor) -> Tensor:
    """A copy of near [n, ...] whose first axis has a stride of APART elements."""
    inner = near[0].contiguous()
    memory = torch.empty((near.shape[0] - 1) * APART + inner.numel(), dtype=near.dtype)
    far = memory.as_strided(near.shape, (APART, *inner.stride()))
    for target, source in zip(far, near, strict=True):
        target.copy_(source)
    return far


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def row_kernel(place: object) -> list[Tensor]:
    logits = place(random(3, 20))
    inputs, outputs = torch.ones(4, 3), torch.empty(kernels.OUTPUTS, 3)
    kernels.launch_rows(logits, logits, torch.tensor([1, 2, 3]), inputs, outputs, kernels.LINEAR, True, 1.0)
    return [outputs[: kernels.PG], logits]


def kl_row_kernel(place: object) -> list[Tensor]:
    policy, reference, outputs = place(random(3, 20)), place(random(3, 20).flip(0)), torch.empty(3, 3)
    kernels.launch_kl_rows(policy, reference, policy, torch.tensor([1, 2, 3]), None, outputs, True, 1.0)
    return [outputs, policy]


def sampling(place: object) -> list[Tensor]:
    keys = torch.arange(3)
    return list(sample_tokens(place(random(3, 20)), keys, keys, top_p=0.9, backend="triton"))


def scoring(place: object) -> list[Tensor]:
    ids = torch.tensor([[0, 2], [1, -1]])
    return [score_options(place(random(3, 32)), place(random(3, 32).flip(0)), ids, backend="triton")]


def attention(place: object) -> list[Tensor]:
    k, v = place(random(3, 1, 16, 16, dtype=torch.bfloat16)), place(random(3, 1, 16, 16, dtype=torch.bfloat16).flip(0))
    # Page numbers are 32-bit, as the engine keeps them.
    table, lengths = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32), torch.tensor([20, 32])
    query = random(2, 2, 16, dtype=torch.bfloat16)
    return list(paged.paged_attention(query, k, v, table, lengths, 0.25))


def shared_prefix(place: object) -> list[Tensor]:
    query = place(random(3, 1, 16, dtype=torch.bfloat16))
    k, v = place(random(3, 1, 16, 16, dtype=torch.bfloat16)), place(random(3, 1, 16, 16, dtype=torch.bfloat16).flip(0))
    tables, tile = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([[2, 1, 0]], dtype=torch.int32)
    group = torch.zeros(1, dtype=torch.int32)
    return list(paged.shared_attention(query, k, v, tables, torch.tensor([20]), group, tile, 0.25))


CASES = {f.__name__: f for f in (row_kernel, kl_row_kernel, sampling, scoring, attention, shared_prefix)}


@pytest.mark.parametrize("case", CASES)
def test_rows_far_apart_give_the_same_bits(case: str) -> None:
    near, far = CASES[case](lambda t: t.clone()), CASES[case](apart)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


PLANTED = """
import os, sys
sys.path[:0] = [{folder!r}, {root!r}]
os.environ["TRITON_INTERPRET"] = "1"
from pathlib import Path
import interpreter, test_offsets
from mutants import mutant
interpreter.repair()
with mutant(test_offsets.{module}, Path({scratch!r}), *{fault!r}) as changed:
    test_offsets.{module} = changed
    test_offsets.test_rows_far_apart_give_the_same_bits({case!r})
"""
ROW = ("i = tl.program_id(0).to(tl.int64)", "i = tl.program_id(0)")
FAULTS = {
    "row_kernel": ("kernels", ROW),
    "kl_row_kernel": ("kernels", ROW),
    "attention": ("paged", ("other=0).to(tl.int64)\n", "other=0)\n")),
    "shared_prefix": ("paged", ("other=-1).to(tl.int64)\n", "other=-1)\n")),
}


@pytest.mark.parametrize("case", FAULTS)
def test_32_bit_offsets_are_found(case: str, tmp_path: Path) -> None:
    here, (module, fault) = Path(__file__).resolve(), FAULTS[case]
    script = PLANTED.format(
        folder=str(here.parent), root=str(here.parents[3]), scratch=str(tmp_path), case=case, module=module, fault=fault
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "nothing to plant" not in done.stderr
    assert done.returncode != 0 and ("AssertionError" in done.stderr or done.returncode < 0), done.stderr[-2000:]
