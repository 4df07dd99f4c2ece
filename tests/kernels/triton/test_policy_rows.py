"""Which rows the policy loss counts, what the host learns of them, and in which chunks they are multiplied."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from cai_fast.kernels import PolicyLoss, common, linear_cross_entropy, linear_logprob, linear_policy_loss
from torch import Tensor

ROWS, WIDTH, VOCAB = 13, 6, 37
BACKENDS = ("reference", "chunked", "triton")
IGNORED = [0, 5, 12]


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "chunk_rows", lambda vocab, device: 4)


def problem(rows: int = ROWS, dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes: int) -> list[Tensor]:
    """hidden, weight, targets, old_logprob, advantage, ref_logprob."""
    g = torch.Generator().manual_seed(0)
    width, vocab = sizes.get("width", WIDTH), sizes.get("vocab", VOCAB)
    hidden, weight = torch.randn(rows, width, generator=g), torch.randn(vocab, width, generator=g) / width**0.5
    numbers = torch.randn(3, rows, generator=g) - torch.tensor([[4.0], [0.0], [4.0]])
    inputs = [hidden.to(dtype), weight.to(dtype), torch.randint(0, vocab, (rows,), generator=g), *numbers]
    inputs = [x.to(device) for x in inputs]
    return [*(x.requires_grad_() for x in inputs[:2]), *inputs[2:]]


def loss_of(inputs: list[Tensor], backend: str, weights: Tensor | None = None, estimator: str = "k2") -> PolicyLoss:
    *others, ref = inputs
    return linear_policy_loss(
        *others, weights=weights, ref_logprob=ref, kl_coef=0.3, kl_estimator=estimator, temperature=0.7, scale=0.1,
        backend=backend,
    )  # fmt: skip


def results(inputs: list[Tensor], out: PolicyLoss) -> list[Tensor]:
    return [out.loss, out.logprob, *out.stats.values(), *torch.autograd.grad(out.loss, inputs[:2])]


def with_ignored_rows(dtype: torch.dtype) -> list[Tensor]:
    """Targets outside [0, V), whose numbers are NaN or infinite."""
    inputs = problem(dtype=dtype)
    inputs[2][IGNORED] = torch.tensor([-1, VOCAB, -100])
    for numbers, value in zip(inputs[3:], (torch.nan, torch.inf, torch.nan), strict=True):
        numbers[IGNORED] = value
    return inputs


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_without_weights_rows_that_do_not_count_stay_and_add_nothing(backend: str, estimator: str) -> None:
    inputs = with_ignored_rows(torch.float64)
    keep = torch.tensor([i not in IGNORED for i in range(ROWS)])
    out = loss_of(inputs, backend, estimator=estimator)
    kept = [x if i == 1 else x.detach()[keep].requires_grad_(i == 0) for i, x in enumerate(inputs)]
    alone = loss_of(kept, "reference", estimator=estimator)
    loss, logprob, *stats, d_hidden, d_weight = results(inputs, out)
    assert not logprob[~keep].any() and not d_hidden[~keep].any()
    counted = (loss, logprob[keep], *stats, d_hidden[keep], d_weight)
    for ours, exact in zip(counted, results(kept, alone), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)
    assert out.stats["count"] == keep.sum()


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_without_weights_there_may_be_nothing_to_count(backend: str, rows: int) -> None:
    inputs = problem(rows)
    inputs[2] -= 100
    assert not any(x.any() for x in results(inputs, loss_of(inputs, backend)))


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
def test_valid_targets_give_the_same_bits_with_weights_of_one(backend: str) -> None:
    inputs = problem()
    plain, weighted = (results(inputs, loss_of(inputs, backend, w)) for w in (None, torch.ones(ROWS)))
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))


READS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "is_nonzero")


@contextmanager
def no_host_reads() -> Iterator[None]:
    """On the CPU: whatever would read a tensor's value on the host, and so wait for a GPU, fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the host read a tensor")

    with mock.patch.multiple(Tensor, **dict.fromkeys(READS, refuse)), mock.patch("torch.nonzero", refuse):
        yield


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("main_grad", [False, True])
def test_without_weights_the_host_reads_nothing(backend: str, main_grad: bool) -> None:
    inputs, scale = problem(), torch.tensor(0.1)
    if main_grad:
        inputs[1].main_grad = torch.zeros(VOCAB, WIDTH)
    with no_host_reads():
        out = linear_policy_loss(*inputs[:5], ref_logprob=inputs[5], kl_coef=0.1, scale=scale, backend=backend)
        out.loss.backward()
    assert inputs[0].grad.any() and main_grad == (inputs[1].grad is None)
    with no_host_reads(), pytest.raises(AssertionError, match="the host read a tensor"):
        loss_of(inputs, backend, torch.ones(ROWS))


def logit_products(call: Callable[[], object], weight: Tensor) -> list[tuple[torch.Size, ...]]:
    """(left, right, out) shapes of every product with the head's weight, in order."""
    shapes, product = [], common._mm

    def recorded(left: Tensor, right: Tensor, out: Tensor) -> None:
        if right.shape == weight.t().shape:
            shapes.append((left.shape, right.shape, out.shape, left.stride(), right.stride()))
        product(left, right, out)

    with mock.patch.object(common, "_mm", recorded):
        call()
    return shapes


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_the_update_multiplies_the_chunks_that_the_old_log_probabilities_did(backend: str) -> None:
    """Which is when CUDA's library rounds them alike; ignored rows do not change that."""
    hidden, weight, targets, *_, advantage, _ = with_ignored_rows(torch.float32)

    def measure() -> Tensor:
        with torch.no_grad():
            return linear_logprob(hidden, weight, targets, temperature=0.7, backend=backend).logprob

    def update(weights: Tensor | None = None) -> PolicyLoss:
        return linear_policy_loss(
            hidden, weight, targets, measure(), advantage, weights=weights, temperature=0.7, backend=backend
        )

    before, both = (logit_products(call, weight) for call in (measure, update))
    assert len(before) == 4 and both == before + before
    assert update().stats["ratio"] == update().stats["count"] == ROWS - len(IGNORED)
    assert logit_products(lambda: update(torch.ones(ROWS)), weight) != both, "dropped rows change the chunks"


def test_planted_fault_numbers_multiplied_by_zero_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "masked_fill", lambda x, mask, _: x * ~mask)
    with pytest.raises(AssertionError):
        test_without_weights_rows_that_do_not_count_stay_and_add_nothing("chunked", "k2")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_gpu_never_waits(backend: str) -> None:
    inputs = problem(3000, torch.bfloat16, "cuda", width=64, vocab=1000)
    inputs[2][7] = -1
    scale = torch.tensor(0.1, device="cuda")
    for mode in ("default", "error"):  # first a call that may compile and allocate
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for main_grad in (False, True):
                if main_grad:
                    inputs[1].main_grad = torch.zeros(1000, 64, device="cuda")
                linear_policy_loss(*inputs[:5], scale=scale, backend=backend).loss.backward()
            del inputs[1].main_grad
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("rows", [1, 2047, 2049, 5000])
def test_gpu_first_ratio_is_exactly_one(backend: str, rows: int) -> None:
    """In bf16, for numbers of rows that leave a last chunk of another size, with rows that do not count."""
    hidden, weight, targets, _, advantage, _ = problem(rows, torch.bfloat16, "cuda", width=512, vocab=4099)
    targets[3::7] = -100
    with torch.no_grad():
        old = linear_logprob(hidden, weight, targets, backend=backend).logprob
    out = linear_policy_loss(hidden, weight, targets, old, advantage, backend=backend)
    assert torch.equal(out.logprob, old)
    stats = {name: value.item() for name, value in out.stats.items()}
    assert stats["ratio"] == stats["ratio_sq"] == stats["count"] == (targets >= 0).sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["cross entropy", "policy loss"])
def test_gpu_memory_does_not_grow_with_the_rows(op: str) -> None:
    """Beyond its inputs and gradients a loss holds one chunk of fp32 logits, whatever the number of rows."""
    vocab, width, extra = 32768, 256, {}
    chunk = common.chunk_rows(vocab, torch.device("cuda")) * vocab * 4
    for rows in (4096, 4096, 16384):  # the first call is for the libraries' own workspaces
        hidden, weight, targets, old, advantage, _ = problem(rows, torch.bfloat16, "cuda", width=width, vocab=vocab)
        weight.main_grad = torch.zeros(vocab, width, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if op == "cross entropy":
            loss = linear_cross_entropy(hidden, weight, targets, backend="triton")
        else:
            loss = linear_policy_loss(hidden, weight, targets, old, advantage, backend="triton").loss
        loss.backward()
        gradients = 2 * rows * width * 2  # of the hidden states: as formed, and times the upstream gradient
        extra[rows] = torch.cuda.max_memory_allocated() - before - gradients
        del loss
    assert extra[16384] <= 1.1 * chunk, extra
    assert abs(extra[16384] - extra[4096]) <= 0.05 * chunk, extra
