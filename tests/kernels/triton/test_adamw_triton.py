"""AdamW on Triton: fp64 on the masters, the chunked backend's random bits, memory left alone, the sm_90 code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cai_fast.kernels import adamw, adamw_step, gradient_norm, join_master, split_master
from cai_fast.kernels.triton import adamw as kernel
from guarded import assert_as_exact_as_torch, guarded, same_under_poison
from mutants import mutant
from sm90 import Case, check, compile_all
from torch import Tensor

HALF, FULL = torch.bfloat16, torch.float32
KEY = 0x7EDCBA9876543210
SETTINGS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.5, "step": 3, "key": KEY}
# One; odd; a tail in the last quarter; exactly one program; one more; several programs.
SIZES = [(1,), (3, 5), (3 * adamw.QUARTER + 1,), (4 * adamw.QUARTER,), (4 * adamw.QUARTER + 1,), (61, 211)]
State = list[Tensor]  # param, remainder, exp_avg, exp_avg_sq


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(moments: torch.dtype, shape: tuple[int, ...]) -> State:
    """In the middle of training; allocated with torch.empty, so that `guarded` watches it."""
    values = [*split_master(normal(*shape)), normal(*shape, seed=1).to(moments), normal(*shape, seed=2).abs()]
    values[3] = values[3].to(moments)
    return [torch.empty(v.shape, dtype=v.dtype).copy_(v) for v in values]


def stepped(backend: str, s: State, grad: Tensor, clip: float | None = 0.7, **changes: object) -> State:
    scalar = None if clip is None else torch.tensor(clip)
    adamw_step(s[0], s[1], grad, s[2], s[3], clip=scalar, backend=backend, **(SETTINGS | changes))
    return s


def fp64(s: State, grad: Tensor, clip: float | None) -> list[Tensor]:
    """(master, exp_avg, exp_avg_sq) after the step, from the same inputs."""
    (beta1, beta2), lr, step = SETTINGS["betas"], SETTINGS["lr"], SETTINGS["step"]
    w, m, v = join_master(s[0], s[1]).double(), s[2].double(), s[3].double()
    g = grad.double() * torch.tensor(1.0 if clip is None else clip).double()
    m, v = m * beta1 + g * (1 - beta1), v * beta2 + g**2 * (1 - beta2)
    w = w * (1 - lr * SETTINGS["weight_decay"])
    w -= lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + SETTINGS["eps"])
    return [w, m, v]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("moments", [FULL, HALF], ids=str)
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("clip", [None, 0.7])
def test_as_exact_as_torch(
    dtype: torch.dtype, moments: torch.dtype, shape: tuple[int, ...], clip: float | None
) -> None:
    grad = normal(*shape, seed=3).to(dtype)
    exact = fp64(state(moments, shape), grad, clip)
    plain = stepped("reference", state(moments, shape), grad, clip)
    ours = same_under_poison(lambda: tuple(stepped("triton", state(moments, shape), grad, clip)))
    masters = [join_master(*s[:2]) for s in (ours, plain)]
    assert_as_exact_as_torch(*masters, exact[0])
    assert torch.equal(ours[0], split_master(masters[0])[0]), "the nearest bf16"
    for triple in zip(ours[2:], plain[2:], exact[1:], strict=True):
        assert_as_exact_as_torch(*triple)
        if moments == HALF:  # a neighbour, and but for rounding errors the one that the same word chooses
            assert (triple[0] != triple[1]).sum() <= 1 + triple[0].numel() // 1000
            assert ((triple[0].double() - triple[2]).abs() <= 2.0**-7 * triple[2].abs()).all()


@pytest.mark.parametrize("shape", SIZES)
def test_the_random_bits_are_those_of_the_other_backends(shape: tuple[int, ...]) -> None:
    """With betas 0 and moments 0 the values to round are exactly g and g^2, so that every bit must agree."""
    grad = normal(*shape, seed=3)
    for key in (0, 5, KEY):
        results = []
        for backend in ("triton", "chunked", "reference"):
            s = state(HALF, shape)
            s[2].zero_(), s[3].zero_()
            results.append(stepped(backend, s, grad, None, betas=(0.0, 0.0), key=key)[2:])
        for a, b, c in zip(*results, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("moments", [FULL, HALF], ids=str)
def test_strides_of_the_gradient_change_nothing(moments: torch.dtype) -> None:
    grad = normal(211, 61, 2)[..., 1].t()
    strided, plain = (stepped("triton", state(moments, (61, 211)), g) for g in (grad, grad.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


def test_a_weight_depends_on_its_index_and_not_on_how_many_there_are() -> None:
    grad = normal(9000)
    whole = stepped("triton", state(HALF, (9000,)), grad)
    part = [t[:5001].clone() for t in state(HALF, (9000,))]
    assert all(torch.equal(a, b[:5001]) for a, b in zip(stepped("triton", part, grad[:5001]), whole, strict=True))


def test_what_is_not_finite_stays_so() -> None:
    ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(FULL)  # a NaN whose payload is all ones
    grad = torch.cat((ones, torch.tensor([torch.inf, 1.0])))
    ours, plain = (stepped(backend, state(HALF, (3,)), grad, None) for backend in ("triton", "reference"))
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a[b.isinf()], b[b.isinf()])
    assert ours[0].isnan().tolist() == [True, True, False]
    assert ours[2].isnan().tolist() == [True, False, False]


def test_whole_numbers_are_as_good_as_floats() -> None:
    grad = normal(5)
    for changes in ({"lr": 1, "weight_decay": 0, "betas": (0, 0)}, {"lr": 0, "eps": 1, "weight_decay": 1}):
        ours, plain = (stepped(backend, state(FULL, (5,)), grad, **changes) for backend in ("triton", "reference"))
        torch.testing.assert_close(join_master(*ours[:2]), join_master(*plain[:2]))


@pytest.mark.parametrize("share", [kernel.SHARE, 2 * kernel.BLOCK])
def test_norm(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SHARE", share)
    sizes = (1, 3 * kernel.BLOCK + 7, kernel.BLOCK, 4 * kernel.BLOCK + 1)
    for dtype in (FULL, HALF):
        grads = [normal(n, seed=n).to(dtype) for n in sizes]
        exact = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
        plain = gradient_norm(grads, backend="chunked")
        (ours,) = same_under_poison(lambda grads=grads: (gradient_norm(grads, backend="triton"),))
        assert ours.shape == () and ours.dtype == FULL
        assert abs(ours.double() - exact) <= 2 * abs(plain.double() - exact) + 1e-6 * exact
        strided = [torch.stack((g, g + 1), -1)[:, 0] for g in grads]
        assert torch.equal(gradient_norm(strided, backend="triton"), ours)
    grads[2][-1] = torch.nan
    assert gradient_norm(grads, backend="triton").isnan()


def test_norm_of_many_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """More partial sums than the second pass takes at once."""
    monkeypatch.setattr(kernel, "BLOCK", 16)
    monkeypatch.setattr(kernel, "SHARE", 16)
    grads = [torch.full((3,), float(n)) for n in range(1, 40)]
    exact = (3 * sum(n * n for n in range(1, 40))) ** 0.5
    assert float(gradient_norm(grads, backend="triton")) == pytest.approx(exact, rel=1e-6)


@contextmanager
def planted(monkeypatch: pytest.MonkeyPatch, folder: Path, old: str, new: str) -> Iterator[None]:
    with mutant(kernel, folder, old, new) as module:
        for name, table in (("adamw_step", adamw._STEP), ("gradient_norm", adamw._NORM)):
            monkeypatch.setitem(table, "triton", getattr(module, name))
        yield


FAULTS = {
    "the update's sign": ("w -= decay", "w += decay"),
    "the decay is left out": ("w -= decay * w + size", "w -= size"),
    "the bias correction of exp_avg_sq is left out": ("root * tl.sqrt(v)", "tl.sqrt(v)"),
    "the clip is ignored": ("scale = tl.load(clip)", "scale = 1.0"),
    "the words' halves are exchanged": ("_rounded(m, word & 0xFFFF), _rounded(v, word >> 16)",
                                        "_rounded(m, word >> 16), _rounded(v, word & 0xFFFF)"),
    "two words are exchanged": ("word_2, word_3 = tl.philox", "word_3, word_2 = tl.philox"),
    "two quarters are exchanged": ("at + 2 * QUARTER, total, scale, word_2", "at + 3 * QUARTER, total, scale, word_2"),
    "rounding to nearest": ("random.to(tl.int32)", "0x8000"),
    "one weight beyond the end": ("inside = at < total", "inside = at < total + 1"),
    "the last weight is left out": ("inside = at < total", "inside = at < total - 1"),
    "a remainder without its carry": ("high = (bits + 0x8000) >> 16", "high = bits >> 16"),
    "ties toward zero": ("(bits + 0x8000)", "(bits + 0x7FFF)"),
    "the words of the counter are exchanged": ("low, high = (counter", "high, low = (counter"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    def whole_test() -> None:
        test_the_random_bits_are_those_of_the_other_backends((61, 211))
        test_as_exact_as_torch(HALF, HALF, (61, 211), 0.7)
        test_as_exact_as_torch(HALF, FULL, (3 * adamw.QUARTER + 1,), None)
        test_ties_go_away_from_zero()

    with planted(monkeypatch, tmp_path, *FAULTS[fault]), pytest.raises(AssertionError):
        whole_test()


def test_ties_go_away_from_zero() -> None:
    """Masters in the middle of two bf16 numbers, which a step of size 0 leaves where they are."""
    bits = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, 0x00008000], dtype=torch.int32)
    s = [*split_master(bits.view(FULL)), torch.zeros(4), torch.ones(4)]
    stepped("triton", s, torch.zeros(4), None, lr=0.0)
    assert torch.equal(join_master(*s[:2]).view(torch.int32), bits)
    assert torch.equal(s[0].view(torch.int16), ((bits + 0x8000) >> 16).to(torch.int16))


NORM_FAULTS = {
    "the tail is not masked": ("mask=at < total, other=0.0", "mask=at < total + 1, other=0.0"),
    "the last partial sum is left out": ("mask=at < count", "mask=at < count - 1"),
    "every gradient writes to the first sums": ("partials + first + program", "partials + program"),
    "no root": ("tl.sqrt_rn(tl.sum(sums, 0))", "tl.sum(sums, 0)"),
}


@pytest.mark.parametrize("fault", NORM_FAULTS)
def test_planted_faults_in_the_norm_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    def whole_test() -> None:
        with guarded(torch.nan):
            data = torch.empty(5)  # what lies behind it is poison
            data[:] = torch.arange(1.0, 6.0)
            ours = gradient_norm([data, torch.ones(2)], backend="triton")
        assert float(ours) == pytest.approx(57**0.5)

    whole_test()
    with planted(monkeypatch, tmp_path, *NORM_FAULTS[fault]), pytest.raises(AssertionError):
        whole_test()


def step_case(grad: str, rounded: bool) -> Case:
    moment, scalars = ("*i16" if rounded else "*fp32"), adamw.Factors._fields
    signature = {"param": "*i16", "remainder": "*i16", "grad": grad, "exp_avg": moment, "exp_avg_sq": moment}
    signature |= {"clip": "*fp32", "total": "i64", "key": "i64"} | dict.fromkeys(scalars, "fp32")
    constants = {"ROUNDED": rounded, "QUARTER": adamw.QUARTER}
    return Case("adamw:_step", signature, constants, aligned=("total",))


def test_sm_90(tmp_path: Path) -> None:
    sums = {"partials": "*fp32", "total": "i64", "first": "i32"}
    sizes = {"SHARE": kernel.SHARE, "BLOCK": kernel.BLOCK}
    cases = [step_case("*bf16", True), step_case("*bf16", False), step_case("*fp32", True)]
    cases += [
        Case("adamw:_square_sums", sums | {"grad": grad}, sizes, aligned=("total",)) for grad in ("*bf16", "*fp32")
    ]
    merge = {"partials": "*fp32", "norm_out": "*fp32", "count": "i32"}
    cases.append(Case("adamw:_root_of_sum", merge, {"BLOCK": kernel.BLOCK}))
    for report in compile_all(cases, tmp_path):
        check(report)
        if "_root" not in report.case["kernel"]:
            assert report.sass.count("LDG.E.128") >= 4, "16 bytes at a time"


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_a_step_counts_as_a_change_of_the_weights(backend: str) -> None:
    """Whoever made something with the weights, such as cached keys, can see that they are other weights now."""
    param, remainder = split_master(torch.ones(5))
    state = [torch.zeros(5), torch.zeros(5)]
    before = [t._version for t in (param, remainder, *state)]
    adamw_step(
        param, remainder, torch.ones(5), *state, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, step=1,
        backend=backend,
    )  # fmt: skip
    assert all(t._version > b for t, b in zip((param, remainder, *state), before, strict=True))
