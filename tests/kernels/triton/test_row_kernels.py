"""The row kernels alone, on logits made by hand: fp64 references, poisoned memory, planted faults."""

import math
import mmap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cai_fast.kernels.triton import rows as kernels
from guarded import BAND, assert_as_exact_as_torch
from mutants import mutant
from torch import Tensor

BLOCK = 16
STATISTICS = (kernels.LOGPROB, kernels.LSE, kernels.ENTROPY)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", BLOCK)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def statistics(z: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, log-sum-exp and entropy by torch, each [C], in the dtype of z."""
    logp = (z / temperature).log_softmax(-1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), (z / temperature).logsumexp(-1), entropy


def without_infinity(z: Tensor) -> Tensor:
    """A copy whose -inf are so low that their probability is 0 (or far below any rounding), for autograd's sake."""
    return z.masked_fill(z == -torch.inf, -300.0)


def run(
    z: Tensor, targets: Tensor, inputs: Tensor, mode: int, write: bool, temperature: float = 1.0,
    grad: torch.dtype | None = None, module: ModuleType = kernels, **policy: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(outputs [8, C], gradient [C, V]) in guarded memory, the same bits for two poisons."""
    results = []
    for poison in (torch.nan, 3e7):
        buffer, out = (torch.full((n + 2 * BAND,), poison, dtype=z.dtype) for n in (z.numel(), 8 * z.shape[0]))
        logits, outputs = buffer[BAND:-BAND].view(z.shape), out[BAND:-BAND].view(8, -1)
        logits.copy_(z)
        gradient = module.gradient_view(logits, grad or z.dtype)
        module.launch_rows(logits, gradient, targets, inputs, outputs, mode, write, 1.0 / temperature, **policy)
        for block in (buffer, out):
            bands = torch.cat((block[:BAND], block[-BAND:])).nan_to_num(5.0)
            assert (bands == (5.0 if math.isnan(poison) else poison)).all(), "written outside the output"
        if not write:
            assert torch.equal(logits.nan_to_num(5.0), z.nan_to_num(5.0)), "logits overwritten"
        results.append((outputs[:3].clone(), gradient.clone()))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.nan_to_num(5.0), second.nan_to_num(5.0))
    return outputs, gradient


def hard_logits(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    vocab = {"one": 1, "two": 2, "exact block": 32}.get(case, 37)
    z, targets = normal(4, vocab, dtype=dtype), torch.tensor([0, vocab - 1, vocab // 2, vocab - 1])
    match case:
        case "peaked tail":
            z[:, -1] += 30  # mass in the last, partly masked block
        case "negative":
            z -= 60  # a column beyond V taken for logit 0 would win
        case "shifted up":
            z += 1e4
        case "shifted down":
            z -= 1e4
        case "first blocks absent":
            z[:, : 2 * BLOCK] = -torch.inf
        case "middle block absent":
            z[:, BLOCK : 2 * BLOCK] = -torch.inf
        case "one left":
            z[:, :-1] = -torch.inf
        case "rising":
            z += torch.arange(vocab) * 0.2  # every block brings a new maximum, and the ones before still count
    return z, targets


CASES = ["one", "two", "exact block", "peaked tail", "negative", "shifted up", "shifted down", "first blocks absent",
         "middle block absent", "one left", "rising"]  # fmt: skip


def check_statistics(case: str, temperature: float = 0.5, module: ModuleType = kernels) -> None:
    z, targets = hard_logits(case, torch.float32)
    outputs, _ = run(z, targets, torch.zeros(4, 4), kernels.STATISTICS, False, temperature, module=module)
    exact, torchs = (statistics(x, targets, temperature) for x in (z.double(), z))
    for row, one, other in zip(STATISTICS, torchs, exact, strict=True):
        assert_as_exact_as_torch(outputs[row], one, other)


def check_gradient(case: str, dtype: torch.dtype, module: ModuleType = kernels) -> None:
    """dL/dlogits for random g, s, e; in fp32 against torch's fp32, in bf16 against the exact one rounded."""
    z, targets = hard_logits(case, torch.float32)
    inputs = torch.cat((normal(3, 4, seed=1), torch.zeros(1, 4))).float()

    def gradient(x: Tensor) -> Tensor:
        x = without_infinity(x).requires_grad_()
        terms = torch.stack(statistics(x, targets, 0.5))
        (dz,) = torch.autograd.grad((terms * inputs[:3].to(x.dtype)).sum(), x)
        return dz

    _, ours = run(z, targets, inputs, kernels.LINEAR, True, 0.5, dtype, module)
    exact = gradient(z.double())
    assert_as_exact_as_torch(ours, gradient(z).to(dtype), exact)
    if dtype == torch.bfloat16:
        assert ((ours - exact).abs() <= exact.abs() * 2**-8 + 2e-6).all()


@pytest.mark.parametrize("case", CASES)
def test_statistics(case: str) -> None:
    check_statistics(case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient(case: str, dtype: torch.dtype) -> None:
    check_gradient(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_vocabulary_in_the_kernels_own_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16384)
    z, targets = normal(1, 128_256 - 3, dtype=torch.float32) * 4, torch.tensor([128_252])
    inputs = torch.tensor([[1.0], [0.5], [0.0], [0.0]])
    outputs, dz = run(z, targets, inputs, kernels.LINEAR, True, 1.0, dtype)
    for row, one, other in zip(STATISTICS, statistics(z, targets), statistics(z.double(), targets), strict=True):
        assert_as_exact_as_torch(outputs[row], one, other)
    exact = -0.5 * z.double().softmax(-1)
    exact[0, -1] += 1
    assert_as_exact_as_torch(dz, exact.float().to(dtype), exact)


def test_a_row_without_any_probability_is_nan_as_in_torch() -> None:
    z, targets = torch.full((1, 20), -torch.inf), torch.tensor([3])
    outputs, _ = run(z, targets, torch.zeros(4, 1), kernels.STATISTICS, False)
    assert outputs[kernels.LOGPROB].isnan() and outputs[kernels.LSE] == -torch.inf


def test_all_modes_give_the_same_bits() -> None:
    z, targets = normal(5, 37, dtype=torch.float32), torch.arange(5) * 9
    inputs = normal(4, 5, seed=3, dtype=torch.float32)
    modes = [(kernels.STATISTICS, False), (kernels.LINEAR, True), (kernels.POLICY, False), (kernels.POLICY, True)]
    results = [run(z, targets, inputs, mode, write, 0.7)[0][:3] for mode, write in modes]
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone, _ = run(z[2:3], targets[2:3], inputs[:, 2:3].clone(), kernels.STATISTICS, False, 0.7)
    assert torch.equal(alone[:3], results[0][:, 2:3])


def test_the_gradient_of_a_log_probability_sums_to_zero() -> None:
    z, targets = normal(4, 37, dtype=torch.float32) * 3, torch.tensor([0, 5, 36, 36])
    inputs = torch.zeros(4, 4)
    inputs[0], inputs[2] = 1.0, torch.tensor([0.0, 1.0, -2.0, 0.5])
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        _, dz = run(z, targets, inputs, kernels.LINEAR, True, 1.0, dtype)
        assert (dz.double().sum(1).abs() <= bound * dz.double().abs().sum(1)).all()


def test_row_offsets_need_64_bits() -> None:
    """Row 3 of a matrix of stride 2^30 starts beyond 2^31 elements; the memory is reserved but hardly touched."""
    vocab, stride = 20, 2**30
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    with mmap.mmap(-1, (3 * stride + vocab) * 4, flags=flags) as memory:
        z = torch.frombuffer(memory, dtype=torch.float32).as_strided((4, vocab), (stride, 1))
        z[3] = normal(vocab, dtype=torch.float32)
        expected = statistics(z[3:].clone(), torch.tensor([4]))
        outputs = torch.empty(8, 4)
        kernels.launch_rows(z, z, torch.tensor([0, 0, 0, 4]), torch.zeros(4, 4), outputs, kernels.LINEAR, True, 1.0)
        torch.testing.assert_close(outputs[:3, 3:], torch.stack(expected), atol=1e-6, rtol=1e-6)
        assert not z[3].any()  # g = s = e = 0
        del z


class _Row(torch.autograd.Function):
    """The kernel as a differentiable function of the logits, for gradcheck: returns L, differentiates by its dz."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, launch: Callable[[Tensor], Tensor]) -> Tensor:
        gradient = z.detach().clone()
        result = launch(gradient)
        ctx.save_for_backward(gradient)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * upstream, None


@pytest.mark.parametrize("mode", ["linear", "k2", "k3", "kl"])
def test_gradcheck(mode: str) -> None:
    z, targets = normal(3, 17).requires_grad_(), torch.tensor([0, 16, 7])
    logprob = statistics(z.detach(), targets, 0.7)[0]
    inputs = normal(4, 3, seed=2)
    inputs[0] = logprob + 0.1 * inputs[0]
    inputs[3] = logprob - 0.5 * inputs[3]
    reference = normal(3, 17, seed=4)

    def launch(memory: Tensor) -> Tensor:
        outputs = torch.full((8, 3), torch.nan, dtype=torch.float64)
        if mode == "kl":
            kernels.launch_kl_rows(memory, reference, memory, None, None, outputs, True, 1 / 0.7)
            return outputs[0].sum()
        if mode == "linear":
            kernels.launch_rows(memory, memory, targets, inputs, outputs, kernels.LINEAR, True, 1 / 0.7)
            return (outputs[:3] * inputs[[0, 1, 2]]).sum()
        settings = {"clip_coef": 0.2, "kl_coef": 0.3, "has_ref": True, "k3": mode == "k3"}
        kernels.launch_rows(memory, memory, targets, inputs, outputs, kernels.POLICY, True, 1 / 0.7, **settings)
        return outputs[kernels.LOSS].sum()

    assert torch.autograd.gradcheck(lambda x: _Row.apply(x, launch), (z,))


def check_kl(case: str, grad: torch.dtype = torch.float32, module: ModuleType = kernels) -> None:
    p, targets = hard_logits(case, torch.float32)
    q = (p + normal(*p.shape, seed=6).float()).flip(0) if "absent" not in case else p * 0.7
    upstream = normal(4, seed=7, dtype=torch.float32)

    def reference(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        absent = x.gather(1, targets[:, None]).squeeze(1) == -torch.inf
        x = without_infinity(x).requires_grad_()
        a, b = (v.div(0.5).log_softmax(-1) for v in (x, without_infinity(y)))
        kl = (a.exp() * (a - b)).sum(-1)
        (dz,) = torch.autograd.grad((kl * upstream.to(kl.dtype)).sum(), x)
        logprobs = (s.detach().gather(1, targets[:, None]).squeeze(1) for s in (a, b))
        return kl.detach(), *(v.masked_fill(absent, -torch.inf) for v in logprobs), dz

    exact, torchs = reference(p.double(), q.double()), reference(p, q)
    outputs, memory = torch.full((3, 4), torch.nan), p.clone()
    dz = module.gradient_view(memory, grad)
    module.launch_kl_rows(memory, q, dz, targets, upstream, outputs, True, 2.0)
    for ours, one, other in zip((*outputs, dz), (*torchs[:3], torchs[3].to(grad)), exact, strict=True):
        assert_as_exact_as_torch(ours, one, other)


@pytest.mark.parametrize("case", [c for c in CASES if c != "one left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl(case: str, dtype: torch.dtype) -> None:
    check_kl(case, dtype)


def test_kl_of_identical_models_is_exactly_zero() -> None:
    z = normal(3, 37, dtype=torch.float32) * 5
    outputs, memory = torch.empty(3, 3), z.clone()
    kernels.launch_kl_rows(memory, z, memory, None, None, outputs, True, 1.0)
    assert not outputs[0].any() and not memory.any()


FAULTS = {
    "columns beyond V count as logit 0": (
        'tl.constexpr(-float("inf"))', "tl.constexpr(0.0)", lambda m: check_statistics("negative", module=m)
    ),
    "the sum is not rescaled": (
        "total * keep + tl.sum(p, 0), spread", "total + tl.sum(p, 0), spread",
        lambda m: check_statistics("rising", module=m),
    ),
    "the entropy's sum is not moved to the new maximum": (
        "keep * (spread + total * (top - new_top))", "keep * spread", lambda m: check_statistics("rising", module=m)
    ),
    "the maximum is scaled before it is taken off": (
        "d = z - new_top\n    p = tl.exp2(d * scale2)",
        "d = z - new_top\n    p = tl.exp2(z * scale2 - new_top * scale2)",
        lambda m: check_statistics("shifted up", module=m),
    ),
    "the target is off by one": (
        "tl.where(at == target, g, 0.0)", "tl.where(at == target + 1, g, 0.0)",
        lambda m: check_gradient("two", torch.float32, m),
    ),
    "the gradient lacks the temperature": (
        "(dz * inv_t).to(", "dz.to(", lambda m: check_gradient("two", torch.float32, m)
    ),
    "one percent of the entropy's gradient": (
        "s - g - e * (d", "s - g - 1.01 * e * (d", lambda m: check_gradient("exact block", torch.float32, m)
    ),
    "the half-precision gradient has the wrong stride": (
        "grad + i * grad_stride\n    target", "grad + i * stride\n    target",
        lambda m: check_gradient("two", torch.bfloat16, m),
    ),
    "the last column is not written": (
        "(dz * inv_t).to(grad.dtype.element_ty), mask=at < vocab)",
        "(dz * inv_t).to(grad.dtype.element_ty), mask=at < vocab - 1)",
        lambda m: check_gradient("peaked tail", torch.float32, m),
    ),
    "a row is written beyond its end": (
        "(dz * inv_t).to(grad.dtype.element_ty), mask=at < vocab)",
        "(dz * inv_t).to(grad.dtype.element_ty), mask=at < vocab + 1)",
        lambda m: check_gradient("peaked tail", torch.float32, m),
    ),
    "the KL's sign of the reference": (
        "offset = ref_log_total - log_total", "offset = log_total - ref_log_total", lambda m: check_kl("two", module=m)
    ),
    "the reference's maximum does not move": (
        "(top - new_top) - (ref_top - new_ref_top)", "(top - new_top)", lambda m: check_kl("rising", module=m)
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(tmp_path: Path, fault: str) -> None:
    old, new, check = FAULTS[fault]
    with mutant(kernels, tmp_path, old, new) as module:
        module.MAX_BLOCK = BLOCK
        with pytest.raises(AssertionError):
            check(module)
