"""AdamW on split masters: exact halves, torch's AdamW on fp32 weights, unbiased keyed rounding, the global norm."""

import pytest
import torch
from cai_fast.kernels import adamw, adamw_step, gradient_norm, join_master, split_master
from cai_fast.kernels.sampling import philox4x32
from torch import Tensor

BACKENDS = ("reference", "chunked")
DEFAULTS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "step": 1}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that the chunked backend needs several."""
    monkeypatch.setattr(adamw, "_PIECE", 4 * adamw.QUARTER)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Weights:
    """A parameter with its remainder and moments."""

    def __init__(self, master: Tensor, moments: torch.dtype = torch.float32) -> None:
        self.param, self.remainder = split_master(master)
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(master, dtype=moments) for _ in range(2))

    @property
    def master(self) -> Tensor:
        return join_master(self.param, self.remainder)

    def tensors(self) -> list[Tensor]:
        return [self.param, self.remainder, self.exp_avg, self.exp_avg_sq]

    def step(self, grad: Tensor, backend: str, **changes: object) -> "Weights":
        adamw_step(
            self.param, self.remainder, grad, self.exp_avg, self.exp_avg_sq, backend=backend, **(DEFAULTS | changes)
        )
        return self


def test_every_master_is_split_into_its_nearest_bf16_and_joined_again() -> None:
    """All high halves with the low halves about a tie and at the ends: every exponent, both signs, subnormals, +-0."""
    high = torch.arange(2**16).to(torch.int16).int() << 16
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF])
    low = torch.cat((low, torch.randint(2**16, (22,), generator=torch.Generator().manual_seed(0))))
    bits = (high[:, None] | low[None].int()).reshape(-1)
    master = bits.view(torch.float32)
    param, remainder = split_master(master)
    assert (param.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    known = ~master.isnan()
    assert torch.equal(join_master(param, remainder).view(torch.int32)[known], bits[known])
    ties = (bits & 0xFFFF) == 0x8000
    assert torch.equal(param[known & ~ties], master.bfloat16()[known & ~ties])
    # A tie goes away from zero: never below what the conversion to even gives.
    assert (param[known & ties].float().abs() >= master.bfloat16()[known & ties].float().abs()).all()
    distance = (param.double() - master.double()).abs()
    to_even = (master.bfloat16().double() - master.double()).abs()
    finite = known & param.isfinite()
    assert torch.equal(distance[finite], to_even[finite]), "the nearest"
    assert param[~known].isnan().all() and not remainder[~known].any()


def test_the_ends_of_the_range() -> None:
    largest, smallest = torch.finfo(torch.float32).max, 2.0**-149
    master = torch.tensor([0.0, -0.0, largest, -largest, torch.inf, -torch.inf, smallest, -smallest, 1 + 2**-8])
    param, remainder = split_master(master)
    assert torch.equal(join_master(param, remainder).view(torch.int32), master.view(torch.int32))
    assert param.tolist() == [0.0, 0.0, torch.inf, -torch.inf, torch.inf, -torch.inf, 0.0, 0.0, 1 + 2**-7]
    assert param[:2].signbit().tolist() == [False, True]
    assert remainder[[2, 6, 8]].tolist() == [-1, 1, -(2**15)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 0.25])
def test_masters_move_as_torchs_adamw(
    backend: str, dtype: torch.dtype, weight_decay: float, clip: float | None
) -> None:
    start = normal(3, 2111)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=weight_decay)
    ours = Weights(start)
    for step in range(1, 41):
        grad = normal(3, 2111, seed=step).to(dtype)
        theirs.grad = grad.float() * (clip or 1.0)
        lr = optimizer.param_groups[0]["lr"] = 1e-2 / step
        optimizer.step()
        scalar = None if clip is None else torch.tensor(clip)
        ours.step(grad, backend, lr=lr, weight_decay=weight_decay, clip=scalar, step=step)
        assert torch.equal(ours.param.float(), split_master(ours.master)[0].float())
    state = optimizer.state[theirs]
    for a, b in ((ours.master, theirs), (ours.exp_avg, state["exp_avg"]), (ours.exp_avg_sq, state["exp_avg_sq"])):
        torch.testing.assert_close(a, b.detach(), rtol=3e-6, atol=3e-7)
    moved = (theirs.detach() - start).abs().mean()
    assert moved > 1e4 * (ours.master - theirs.detach()).abs().mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_far_below_a_bf16_step_add_up(backend: str) -> None:
    ours, grad = Weights(torch.ones(5)), torch.ones(5, dtype=torch.bfloat16)
    for step in range(1, 401):
        ours.step(grad, backend, lr=1e-5, step=step)
        if step == 100:
            assert torch.equal(ours.param, torch.ones(5).bfloat16()), "0.001 is below half a step of bf16 at 1"
    torch.testing.assert_close(ours.master, torch.full((5,), 0.996), atol=1e-5, rtol=0)
    assert torch.equal(ours.param, torch.full((5,), 1 - 2**-8).bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_without_a_gradient(backend: str) -> None:
    ours = Weights(torch.tensor([1.0, -3.0]))
    ours.step(torch.zeros(2), backend, lr=0.5, weight_decay=0.1)
    torch.testing.assert_close(ours.master, torch.tensor([0.95, -2.85]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_moments_are_unbiased_and_keyed(backend: str) -> None:
    """The mean over keys comes to the fp32 moments; every result is one of the two neighbours in bf16."""
    count, keys = 500, 400
    grad, exact = normal(count), Weights(torch.zeros(count))
    exact.step(grad, backend)
    total, before = torch.zeros(2, count, dtype=torch.float64), None
    for key in range(keys):
        ours = Weights(torch.zeros(count), torch.bfloat16).step(grad, backend, key=key << 40 | 5)
        for row, moment in zip(total, (ours.exp_avg, ours.exp_avg_sq), strict=True):
            row += moment.double()
        if before is not None:
            assert not torch.equal(ours.exp_avg, before), "another key, other bits"
        before = ours.exp_avg
        again = Weights(torch.zeros(count), torch.bfloat16).step(grad, backend, key=key << 40 | 5)
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), again.tensors(), strict=True))
        for moment, value in ((ours.exp_avg, exact.exp_avg), (ours.exp_avg_sq, exact.exp_avg_sq)):
            down = (value.view(torch.int32) >> 16 << 16).view(torch.float32)
            up = ((value.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
            assert ((moment.float() == down) | (moment.float() == up)).all()
    for row, value in zip(total / keys, (exact.exp_avg, exact.exp_avg_sq), strict=True):
        step = value.abs().log2().floor().exp2() * 2.0**-7  # between neighbours
        deviations = (row - value.double()) / (step / (2 * keys**0.5))  # in standard errors, at most
        assert deviations.abs().max() < 5
        assert abs(deviations.mean()) < 4 / count**0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_halves_of_a_weights_word_round_its_two_moments(backend: str) -> None:
    """Over several pieces. With betas 0 and moments 0 the values to round are exactly g and g^2."""
    count, key = 9 * adamw.QUARTER + 3, 1 << 45 | 9
    grad = normal(count)
    ours = Weights(torch.zeros(count), torch.bfloat16).step(grad, backend, betas=(0.0, 0.0), key=key)
    words = adamw.random_words(key, 0, count, torch.device("cpu"))
    for moment, value, random in ((ours.exp_avg, grad, words % 2**16), (ours.exp_avg_sq, grad * grad, words // 2**16)):
        magnitude = value.abs().view(torch.int32).long() + random
        expected = (magnitude // 2**16 * 2**16).int().view(torch.float32).copysign(value)
        assert torch.equal(moment.float(), expected)


def test_the_words_are_philoxs() -> None:
    """Weight 4 QUARTER b + QUARTER q + l has word q of counter QUARTER b + l, wherever a piece starts."""
    quarter, key = adamw.QUARTER, 0x0123456789ABCDEF
    words = adamw.random_words(key, 0, 9 * quarter + 3, torch.device("cpu"))
    assert words.shape == (9 * quarter + 3,) and ((words >= 0) & (words < 2**32)).all()
    for block, part, lane in ((0, 0, 0), (0, 3, 5), (1, 2, quarter - 1), (2, 1, 2)):
        counter = [torch.tensor([c]) for c in (quarter * block + lane, 0, 0, 0)]
        halves = torch.tensor([key & 0xFFFFFFFF]), torch.tensor([key >> 32])
        expected = philox4x32(tuple(counter), halves)[part]
        assert words[(4 * block + part) * quarter + lane] == expected
    late = adamw.random_words(key, 4 * quarter, 5, torch.device("cpu"))
    assert torch.equal(late, words[4 * quarter : 4 * quarter + 5])
    far = adamw.random_words(key, 2**36, 1, torch.device("cpu"))  # counter 2^34: its high word counts
    counter = [torch.tensor([c]) for c in (0, 4, 0, 0)]
    assert far == philox4x32(tuple(counter), halves)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_so(backend: str) -> None:
    ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a NaN whose payload is all ones
    grad = torch.cat((ones, torch.tensor([torch.inf, 1.0])))
    for key in range(3):
        ours = Weights(torch.ones(3), torch.bfloat16).step(grad, backend, key=key)
        assert ours.exp_avg.isnan().tolist() == [True, False, False]
        assert ours.exp_avg[1] == ours.exp_avg_sq[1] == torch.inf
        assert ours.param.isnan().tolist() == [True, True, False], "inf / inf"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (), (1,), (4097,), (7, 1201)])
def test_shapes_and_strides(backend: str, moments: torch.dtype, shape: tuple[int, ...]) -> None:
    grad = normal(*shape[::-1], 2)[..., 1].permute(tuple(reversed(range(len(shape)))))
    strided, plain = (Weights(normal(*shape), moments) for _ in range(2))
    strided.step(grad, backend, key=3)
    plain.step(grad.contiguous(), backend, key=3)
    assert all(torch.equal(a, b) for a, b in zip(strided.tensors(), plain.tensors(), strict=True))
    assert strided.param.shape == shape


def test_bad_arguments_are_refused() -> None:
    def attempt(words: str, grad: Tensor | None = None, weights: Weights | None = None, **changes: object) -> None:
        with pytest.raises(ValueError, match=f"adamw_step: .*{words}"):
            (weights or Weights(torch.ones(2, 3))).step(torch.ones(2, 3) if grad is None else grad, "auto", **changes)

    attempt("grad", torch.ones(3, 2))
    attempt("grad of type bfloat16 or float32", torch.ones(2, 3).half())
    attempt("step", step=0)
    attempt("key", key=-1)
    attempt("clip must be one float32", clip=torch.ones(2))
    wrong = Weights(torch.ones(2, 3))
    wrong.exp_avg = wrong.exp_avg.bfloat16()
    attempt("exp_avg_sq of type bfloat16", weights=wrong)
    wrong = Weights(torch.ones(2, 3))
    wrong.param = wrong.param.float()
    attempt("param of type bfloat16", weights=wrong)
    wrong = Weights(torch.ones(2, 3))
    wrong.remainder = torch.zeros(3, 2, dtype=torch.int16).t()
    attempt("remainder is updated in place", weights=wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm(backend: str) -> None:
    shapes = [(5000,), (3, 4, 5), (1,), (0, 3), (101, 97)]
    for dtype in (torch.float32, torch.bfloat16):
        grads = [normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
        exact = torch.cat([g.double().flatten() for g in grads]).norm()
        norm = gradient_norm([grads[0], None, *grads[1:]], backend=backend)
        assert norm.dtype == torch.float32 and norm.shape == ()
        assert abs(float(norm) / float(exact) - 1) < 1e-6
        strided = [torch.stack((g, g + 1), -1)[..., 0] for g in grads[:-1]] + [grads[-1].t().contiguous().t()]
        assert torch.equal(gradient_norm(strided, backend=backend), norm), "strides change nothing"
    grads[1].view(-1)[0] = torch.nan
    assert gradient_norm(grads, backend=backend).isnan()
    mixed = gradient_norm([torch.full((1,), 3.0), torch.full((1,), 4.0).bfloat16()], backend=backend)
    assert float(mixed) == 5.0


def test_norm_of_nothing_is_zero() -> None:
    for nothing in ([], [None], [torch.ones(0)]):
        assert torch.equal(gradient_norm(nothing), torch.zeros(()))
