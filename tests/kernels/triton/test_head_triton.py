"""The head operations on Triton: fp64 references, the chunked backend's contract, and the compilation for sm_90."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cai_fast.kernels import common, linear_cross_entropy, linear_kl, linear_logprob, linear_policy_loss
from cai_fast.kernels.triton import head as heads
from cai_fast.kernels.triton import rows as kernels
from cai_fast.kernels.triton import sums
from guarded import guarded
from mutants import mutant
from sm90 import Case, check, compile_all
from torch import Tensor

ROWS, WIDTH, VOCAB = 9, 6, 37
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks so small that every test crosses their borders."""
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16)
    monkeypatch.setattr(common, "chunk_rows", lambda vocab, device: 4)


def problem(dtype: torch.dtype, vocab: int = VOCAB, rows: int = ROWS) -> dict[str, Tensor]:
    """Non-contiguous hidden and weight, a peaked last column, per-row numbers of the policy loss."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 2 * WIDTH, generator=g, dtype=torch.float64).to(dtype)[:, 1 : WIDTH + 1]
    weight = torch.randn(WIDTH, vocab, generator=g, dtype=torch.float64)
    weight[:, -1] *= 4
    numbers = torch.randn(4, rows, generator=g, dtype=torch.float64)
    return {
        "hidden": hidden,
        "weight": weight.to(dtype).t(),
        "targets": torch.randint(0, vocab, (2 * rows,), generator=g)[::2],
        "ref_hidden": hidden + 0.3 * numbers[0, :, None].to(dtype),
        "advantage": numbers[1],
        "old": 0.3 * numbers[2],
        "ref": 0.5 * numbers[3],
        "weights": torch.linspace(0.5, 2.0, rows, dtype=torch.float64),
    }


def base(p: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    hidden, weight = p["hidden"].double(), p["weight"].double()
    return linear_logprob(hidden, weight, p["targets"], temperature=0.7, backend="reference").logprob.to(dtype)


def cross_entropy(p: dict[str, Tensor], h: Tensor, w: Tensor, backend: str) -> list[Tensor]:
    scale = torch.tensor(0.3, dtype=common.accumulate_dtype(h.dtype))
    return [linear_cross_entropy(h, w, p["targets"], weights=p["weights"], scale=scale, backend=backend)]


def logprob(p: dict[str, Tensor], h: Tensor, w: Tensor, backend: str) -> list[Tensor]:
    return list(linear_logprob(h, w, p["targets"], temperature=0.7, entropy=True, backend=backend))


def policy(p: dict[str, Tensor], h: Tensor, w: Tensor, backend: str, **settings: object) -> list[Tensor]:
    start = base(p, torch.float64)
    result = linear_policy_loss(
        h, w, p["targets"], start + p["old"], p["advantage"], weights=p["weights"], ref_logprob=start + p["ref"],
        **{"kl_coef": 0.3, "temperature": 0.7, "scale": 0.1, "backend": backend} | settings,
    )  # fmt: skip
    return [result.loss, result.logprob, *result.stats.values()]


def policy_k3(p: dict[str, Tensor], h: Tensor, w: Tensor, backend: str) -> list[Tensor]:
    return policy(p, h, w, backend, kl_estimator="k3")


def kl(p: dict[str, Tensor], h: Tensor, w: Tensor, backend: str) -> list[Tensor]:
    return list(
        linear_kl(h, w, p["ref_hidden"].to(h.dtype), w.detach(), p["targets"], temperature=0.7, backend=backend)
    )


OPS = (cross_entropy, logprob, policy, policy_k3, kl)


def upstream_of(results: list[Tensor], kind: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    if kind == "expanded":
        return [r.new_tensor(-1.5).expand(r.shape) for r in results]
    return [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r.dtype) for r in results]


def results_of(op: Callable, p: dict[str, Tensor], dtype: torch.dtype, backend: str, kind: str) -> list[Tensor]:
    """Every result of the op, then the gradients of hidden and weight for a non-trivial upstream gradient."""
    h, w = (p[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight"))
    results = op(p, h, w, backend)
    differentiable = [r for r in results if r.requires_grad]
    return [*results, *torch.autograd.grad(differentiable, (h, w), upstream_of(differentiable, kind))]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["expanded", "random"])
def test_as_exact_as_torch(op: Callable, dtype: torch.dtype, kind: str) -> None:
    p = problem(dtype)
    exact = results_of(op, p, torch.float64, "reference", kind)
    torchs = results_of(op, p, dtype, "reference", kind)
    for poison in (torch.nan, 3e7):
        with guarded(poison):
            ours = results_of(op, p, dtype, "triton", kind)
        for number, (a, b, c) in enumerate(zip(ours, torchs, exact, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape
            slack = (1e-3 if a.dtype == torch.bfloat16 else 1e-6) * max(1.0, c.abs().max().item())
            error, torch_error = ((x.double() - c).abs().max().item() for x in (a, b))
            assert error <= 2 * torch_error + slack, (number, error, torch_error)
            if a.dtype == torch.bfloat16:  # small gradients, whose errors the absolute bound would hide
                assert (a.double() - c).norm() <= 4e-3 * c.norm(), number


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_fp64_is_the_reference(op: Callable) -> None:
    p = problem(torch.float64)
    for ours, exact in zip(
        *(results_of(op, p, torch.float64, b, "random") for b in ("triton", "reference")), strict=True
    ):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("rows,vocab", [(0, 5), (1, 1), (2, 1)])
def test_no_rows_and_one_token(op: Callable, rows: int, vocab: int) -> None:
    p = problem(torch.float32, vocab, rows)
    for ours, exact in zip(
        *(results_of(op, p, torch.float32, b, "random") for b in ("triton", "reference")), strict=True
    ):
        torch.testing.assert_close(ours, exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_ignored_rows(op: Callable) -> None:
    """Targets outside [0, V) and, in the losses, rows of weight 0 whose hidden state is NaN."""
    p = problem(torch.float64)
    p["targets"] = p["targets"].clone()
    p["targets"][1], p["targets"][8] = -100, VOCAB
    if op not in (logprob, kl):
        p["weights"][4] = 0.0
        p["hidden"] = torch.where(torch.tensor([i in (1, 4, 8) for i in range(ROWS)])[:, None], torch.nan, p["hidden"])
    ours, exact = (results_of(op, p, torch.float64, b, "random") for b in ("triton", "reference"))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_kept(rows: int) -> None:
    p = problem(torch.float32, rows=rows)
    h, w = (p[name].detach().requires_grad_() for name in ("hidden", "weight"))
    zeros = torch.zeros(rows)
    out = linear_policy_loss(h, w, p["targets"], zeros, zeros, weights=zeros, backend="triton")
    assert out.loss.item() == 0 and not any(v.item() for v in out.stats.values()) and not out.logprob.any()
    assert not any(g.any() for g in torch.autograd.grad(out.loss, (h, w)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_exactly_one(dtype: torch.dtype, temperature: float) -> None:
    p = problem(dtype, rows=13)
    hidden, weight, targets = p["hidden"], p["weight"].detach().requires_grad_(), p["targets"]
    with torch.no_grad():
        old = linear_logprob(hidden, weight, targets, temperature=temperature, backend="triton").logprob
    # The update sees a subset of the rows, in other chunks: still the same bits.
    for index in (torch.arange(13), torch.arange(12, -1, -2)):
        out = linear_policy_loss(
            hidden[index], weight, targets[index], old[index], torch.ones(len(index)), temperature=temperature,
            backend="triton",
        )  # fmt: skip
        assert torch.equal(out.logprob, old[index])
        assert out.stats["ratio"].item() == out.stats["ratio_sq"].item() == len(index)
        assert out.stats["clipped"].item() == 0


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shifting_all_logits_changes_nothing(shift: float) -> None:
    p = problem(torch.float64)
    hidden = torch.cat((p["hidden"], torch.ones(ROWS, 1)), 1)
    outs = []
    for constant in (0.0, shift):
        weight = torch.cat((p["weight"], torch.full((VOCAB, 1), constant)), 1)
        outs.append(linear_logprob(hidden, weight, p["targets"], entropy=True, backend="triton"))
    torch.testing.assert_close(outs[1].logprob, outs[0].logprob, atol=1e-10, rtol=0)
    torch.testing.assert_close(outs[1].entropy, outs[0].entropy, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "advantage,move,active",
    [(1, 0.5, False), (1, -0.5, True), (-1, 0.5, True), (-1, -0.5, False), (1, 0.05, True), (-1, 1000, False)],
)
def test_clip_on_both_sides(advantage: int, move: float, active: bool) -> None:
    p = problem(torch.float64, rows=1)
    h, w = (p[name].detach().requires_grad_() for name in ("hidden", "weight"))
    old = linear_logprob(h, w, p["targets"], backend="triton").logprob.detach() - move
    numbers = torch.tensor([float(advantage)], dtype=torch.float64)
    outs = [linear_policy_loss(h, w, p["targets"], old, numbers, backend=b) for b in ("triton", "reference")]
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    assert outs[0].stats["clipped"] == outs[1].stats["clipped"]
    (d_hidden,) = torch.autograd.grad(outs[0].loss, h)
    assert bool(d_hidden.any()) is active


def test_frozen_parts() -> None:
    p = problem(torch.float64)
    h, w = (p[name].detach().requires_grad_() for name in ("hidden", "weight"))
    expected = torch.autograd.grad(2 * cross_entropy(p, h, w, "reference")[0], (h, w))
    (d_hidden,) = torch.autograd.grad(2 * cross_entropy(p, h, w.detach(), "triton")[0], h)
    (d_weight,) = torch.autograd.grad(2 * cross_entropy(p, h.detach(), w, "triton")[0], w)
    for ours, exact in zip((d_hidden, d_weight), expected, strict=True):
        torch.testing.assert_close(ours, exact)
    assert not cross_entropy(p, h.detach(), w.detach(), "triton")[0].requires_grad


def test_without_gradients_nothing_is_written_and_the_results_are_the_same() -> None:
    p = problem(torch.float32)
    for op in OPS:
        with torch.no_grad():
            quiet = op(p, p["hidden"], p["weight"], "triton")
        loud = op(p, p["hidden"].detach().requires_grad_(), p["weight"], "triton")
        assert all(torch.equal(a, b) for a, b in zip(quiet, loud, strict=True))


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temperature left out, and targets of the neighbouring rows."""
    launch = kernels.launch_rows

    def without_temperature(*arguments: object, **policy: object) -> None:
        launch(*arguments[:-1], 1.0, **policy)

    def neighbours(*arguments: object, **policy: object) -> None:
        launch(*arguments[:2], arguments[2].roll(1), *arguments[3:], **policy)

    for fault in (without_temperature, neighbours):
        monkeypatch.setattr(heads.kernels, "launch_rows", fault)
        for dtype in DTYPES:
            with pytest.raises(AssertionError):
                test_as_exact_as_torch(policy, dtype, "random")


FAULTS = {
    "the clip's bounds are exchanged": ("_bounded(ratio, low, high)", "_bounded(ratio, high, low)", policy),
    "a clipped row keeps its gradient": ("_LIMIT) | clipped, 0.0", "_LIMIT), 0.0", policy),
    "the sign of the k2 gradient": ("0.0, power), -d)", "0.0, power), d)", policy),
    "the gradient of the other k3": ("1.0 - tl.where(tl.abs(d)", "tl.where(tl.abs(d)", policy_k3),
    "one percent of the policy's gradient": ("* factor, g * factor", "* factor, g * factor * 1.01", policy),
    "two statistics exchanged": ("outputs + 5 * n, kl", "outputs + 6 * n, kl", policy),
    "the weight is left out of the loss": ("kl_coef * kl) * factor, g", "kl_coef * kl), g", policy),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_in_the_policy_loss_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    old, new, op = FAULTS[fault]
    with mutant(kernels, tmp_path, old, new) as module:
        module.MAX_BLOCK = 16
        monkeypatch.setattr(heads, "kernels", module)
        for dtype in DTYPES:
            with pytest.raises(AssertionError):
                test_as_exact_as_torch(op, dtype, "random")


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["cross entropy", "policy loss"])
def test_gpu_memory_is_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """At most a quarter of the fp32 logits, gradients included."""
    monkeypatch.undo()
    rows, vocab, width = 16384, 32768, 256
    g = torch.Generator("cuda").manual_seed(0)
    h, w = (torch.randn(n, width, generator=g, device="cuda").bfloat16().requires_grad_() for n in (rows, vocab))
    targets = torch.randint(0, vocab, (rows,), generator=g, device="cuda")
    zeros = torch.zeros(rows, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if op == "cross entropy":
        linear_cross_entropy(h, w, targets, backend="triton").backward()
    else:
        linear_policy_loss(h, w, targets, zeros, zeros, backend="triton").loss.backward()
    assert torch.cuda.max_memory_allocated() - before <= rows * vocab * 4 / 4


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_agrees_with_chunked(monkeypatch: pytest.MonkeyPatch, op: Callable, dtype: torch.dtype) -> None:
    """At the kernels' own block sizes, on a vocabulary that no block divides."""
    monkeypatch.undo()
    p = {name: value.cuda() for name, value in problem(dtype, 40000, 300).items()}
    for ours, chunked in zip(*(results_of(op, p, dtype, b, "expanded") for b in ("triton", "chunked")), strict=True):
        difference = (ours.double() - chunked.double()).norm()
        assert difference <= (8e-3 if ours.dtype == torch.bfloat16 else 1e-4) * chunked.double().norm().clamp_min(1e-3)


@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_cold_and_hot(temperature: float) -> None:
    p = problem(torch.float32)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        h, w = (p[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight"))
        old = base(p, dtype) + p["old"].to(dtype)
        own = linear_logprob(h, w, p["targets"], temperature=temperature, entropy=True, backend=backend)
        loss = linear_policy_loss(
            h, w, p["targets"], old, p["advantage"].to(dtype), temperature=temperature, backend=backend
        ).loss
        kl = linear_kl(h, w, p["ref_hidden"].to(dtype), w.detach(), temperature=temperature, backend=backend).kl
        total = own.logprob.sum() + own.entropy.sum() + loss + kl.sum()
        return [*own, loss, kl, *torch.autograd.grad(total, (h, w))]

    exact, torchs = run(torch.float64, "reference"), run(torch.float32, "reference")
    for ours, plain, truth in zip(run(torch.float32, "triton"), torchs, exact, strict=True):
        error, torch_error = ((x.double() - truth).abs().max().item() for x in (ours, plain))
        assert error <= 2 * torch_error + 1e-6 * max(1.0, truth.abs().max().item())


def test_a_ratio_at_the_bound_is_not_clipped_and_no_advantage_gives_no_gradient() -> None:
    p = problem(torch.float32)
    h, w = (p[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    old = linear_logprob(h.detach(), w.detach(), p["targets"], backend="triton").logprob
    advantage = p["advantage"].float()
    loss = linear_policy_loss(h, w, p["targets"], old, advantage, clip_coef=0.0, backend="triton")
    assert float(loss.stats["clipped"]) == 0 and float(loss.stats["ratio"]) == ROWS
    chosen = linear_logprob(h, w, p["targets"], backend="reference").logprob
    expected = torch.autograd.grad(-(advantage * chosen).sum(), (h, w))
    for ours, plain in zip(torch.autograd.grad(loss.loss, (h, w)), expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    none = linear_policy_loss(h, w, p["targets"], old - 0.5, torch.zeros_like(advantage), backend="triton").loss
    assert float(none.detach()) == 0 and not any(g.any() for g in torch.autograd.grad(none, (h, w)))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_nan_shows_where_torch_shows_it(op: Callable, where: str) -> None:
    """A kernel that dropped a NaN would train on; hidden's belongs to one row, weight's to all."""
    p = problem(torch.float32)
    clean = dict(p)
    p[where] = p[where].clone()
    p[where][2, 1] = torch.nan
    patched = {**p, "hidden": clean["hidden"], "weight": clean["weight"]}  # the old log-probs stay finite

    def run(backend: str) -> list[Tensor]:
        h, w = (p[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
        results = op(patched, h, w, backend)
        differentiable = [r for r in results if r.requires_grad]
        return [*results, *torch.autograd.grad(differentiable, (h, w), [torch.ones_like(r) for r in differentiable])]

    for ours, torchs in zip(run("triton"), run("chunked"), strict=True):
        assert torch.equal(ours.isnan(), torchs.isnan())
    assert run("triton")[0].isnan().any()


def row_cases() -> list[Case]:
    integers = ("n", "mode", "write", "has_ref", "k3")
    sizes = {"vocab": "i32", "stride": "i32", "grad_stride": "i32"}
    scalars = dict.fromkeys(("inv_t", "low", "high", "kl_coef"), "fp32")
    row = {"logits": "*fp32", "targets": "*i64", "inputs": "*fp32", "outputs": "*fp32"}
    row |= sizes | dict.fromkeys(integers, "i32") | scalars
    pair = dict.fromkeys(("policy", "reference", "upstream", "outputs"), "*fp32") | {"targets": "*i64"}
    pair |= sizes | dict.fromkeys(("n", "has_targets", "has_upstream", "write"), "i32") | {"inv_t": "fp32"}
    return [
        Case(name, signature | {"grad": grad}, {"BLOCK": block}, warps=32, aligned=tuple(sizes))
        for name, signature, block in (("rows:_row", row, 16384), ("rows:_kl_row", pair, 8192))
        for grad in ("*fp32", "*bf16")
    ]


def sum_cases() -> list[Case]:
    results = {"loss": "*fp32", "stats": "*fp32"}
    rows = {"outputs": "*fp32", "weights": "*fp32"} | results | {"n": "i32", "stride": "i32"}
    return [
        Case("sums:_policy_sums", rows, {"ROWS": sums.ROWS}),
        Case("sums:_merge", {"partials": "*fp32"} | results | {"blocks": "i32"}, {"MERGED": sums.MERGED}),
    ]


def barrier_between_reading_and_writing(sass: str) -> bool:
    """Whether a barrier stands between the last load of a block and the first store of its gradient.

    That store is the first 16-byte one: before it only single numbers are written.
    """
    before = sass[: sass.index("STG.E.128" if "STG.E.128" in sass else "STG.E.64")]
    return "BAR.SYNC" in before[before.rindex("LDG.E.128") :]


def test_sm_90(tmp_path: Path) -> None:
    for report in compile_all(row_cases() + sum_cases(), tmp_path):
        check(report)
        if report.case["kernel"].startswith("rows:"):
            assert report.sass.count("LDG.E.128") >= 4, "a vocabulary divisible by 16 is read 16 bytes at a time"
            assert barrier_between_reading_and_writing(report.sass)
