"""Peak memory of the chunked head, measured in a process of its own, gradients included."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, re, torch
from cai_fast.kernels import linear_cross_entropy, linear_kl, linear_logprob, linear_policy_loss
torch.set_num_threads(2)

def inputs(N, V, H):
    return torch.randn(N, H).requires_grad_(), (torch.randn(V, H) * 0.1).requires_grad_(), torch.randint(0, V, (N,))

def run(call, hidden, weight, targets):
    N, zeros = len(hidden), torch.zeros(len(hidden))
    exec(call)
    assert hidden.grad is not None and (weight.grad is None) == hasattr(weight, "main_grad")
    hidden.grad = weight.grad = None

def peak():  # not ru_maxrss, which starts with the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

calls = {calls}
for call in calls:  # the libraries' own start-up memory
    run(call, *inputs(64, 64, {width}))
hidden, weight, targets = inputs({rows}, {vocab}, {width})
if {main_grad}:
    main_grad = weight.main_grad = torch.zeros_like(weight).fill_(1.0)  # written and kept, so that it is resident
before, growth = peak(), []
for call in calls:
    run(call, hidden, weight, targets)
    growth.append(peak() - before)
    if call == {last_with_main_grad}:
        del weight.main_grad
print(json.dumps(growth))
"""
CALLS = {
    "cross entropy": "linear_cross_entropy(hidden, weight, targets, scale=1 / N).backward()",
    "policy loss": "linear_policy_loss(hidden, weight, targets, zeros, zeros + 1, scale=1 / N).loss.backward()",
    "logprob": "o = linear_logprob(hidden, weight, targets, entropy=True); (o.logprob + o.entropy).sum().backward()",
    "kl": "linear_kl(hidden, weight, 0.5 * hidden.detach(), weight.detach(), targets).kl.mean().backward()",
    "kl by rows": "(linear_kl(hidden, weight, 0.5 * hidden.detach(), weight.detach()).kl * zeros).sum().backward()",
}
FULL = "torch.nn.functional.cross_entropy(hidden @ weight.t(), targets).backward()"


def peak_growth(
    calls: list[str], rows: int, vocab: int, width: int, last_with_main_grad: str | None = None
) -> list[int]:
    """Bytes by which the peak resident memory had grown after each of the calls, which follow one another. The weight
    has a main_grad up to the call named."""
    script = SCRIPT.format(
        rows=rows, vocab=vocab, width=width, calls=calls, main_grad=last_with_main_grad is not None,
        last_with_main_grad=repr(last_with_main_grad),
    )  # fmt: skip
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what a call has freed is not resident any more
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800, env=environment)
    return json.loads(run.stdout)


def test_a_quarter_of_the_logits_is_never_held() -> None:
    logits = 4096 * 8192 * 4
    *ours, full = peak_growth([*CALLS.values(), FULL], 4096, 8192, 32)
    assert all(growth <= 0.25 * logits for growth in ours), dict(zip(CALLS, ours, strict=True))
    assert full > 0.9 * logits, "the measurement does not see full logits"


@pytest.mark.slow
def test_peak_at_the_stated_size() -> None:
    ours = peak_growth(list(CALLS.values()), 16384, 32768, 256)
    assert all(growth <= 0.25 * 16384 * 32768 * 4 for growth in ours), dict(zip(CALLS, ours, strict=True))


def test_with_main_grad_there_is_no_second_gradient_of_the_weight() -> None:
    """A weight four times as large as a chunk of logits, so that another [V, H] would be seen."""
    gradient, chunk = 16384 * 1024 * 4, 256 * 16384 * 4
    names = ["cross entropy", "policy loss", "logprob"]  # the last two hold a second chunk, for the entropy
    calls = [CALLS[name] for name in names]
    one, *two, plain = peak_growth(
        [*calls, calls[0] + "  # main_grad is gone"], 256, 16384, 1024, last_with_main_grad=calls[-1]
    )
    assert one <= chunk + gradient // 2 and all(growth <= 2 * chunk + gradient // 2 for growth in two), (one, two)
    assert plain > gradient, "the measurement does not see the weight's gradient"
