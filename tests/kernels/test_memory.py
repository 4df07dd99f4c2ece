"""Peak memory of the chunked head, measured in a process of its own."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from cai_fast.kernels import linear_cross_entropy, linear_logprob
torch.set_num_threads(2)
N, V, H = {rows}, {vocab}, {width}
hidden, weight = torch.randn(N, H).requires_grad_(), (torch.randn(V, H) * 0.1).requires_grad_()
targets = torch.randint(0, V, (N,))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
linear_cross_entropy(hidden[:64], weight, targets[:64]).backward()  # the libraries' own start-up memory
hidden.grad = weight.grad = None
before = peak()
{call}
print((peak() - before) / (N * V * 4))
"""
CALLS = {
    "cross entropy": "linear_cross_entropy(hidden, weight, targets, scale=1 / N).backward()",
    "logprob": "o = linear_logprob(hidden, weight, targets, entropy=True); (o.logprob + o.entropy).sum().backward()",
}
FULL = "torch.nn.functional.cross_entropy(hidden @ weight.t(), targets).backward()"


def peak_share(call: str, rows: int, vocab: int, width: int) -> float:
    """Growth of the peak resident memory, as a share of the full fp32 logits [rows, vocab]."""
    script = SCRIPT.format(rows=rows, vocab=vocab, width=width, call=call)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    return float(run.stdout)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_quarter_of_the_logits_is_never_held(call: str) -> None:
    assert peak_share(call, 8192, 16384, 32) <= 0.25


@pytest.mark.slow
def test_peak_at_the_stated_size() -> None:
    assert peak_share(CALLS["cross entropy"], 16384, 32768, 256) <= 0.25


def test_the_measurement_sees_full_logits() -> None:
    assert peak_share(FULL, 4096, 16384, 32) > 0.9
