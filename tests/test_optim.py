"""Optimizers of fp32 and bf16 weights, gradients of micro-batches, clipping, schedules."""

import gc
import weakref

import pytest
import torch
from tiny import alone, tiny_model
from torch import Tensor, nn

from cai_fast import kernels
from cai_fast.optim import FusedAdamW, Muon, Optimizer, SplitAdamW, schedule

HALF = torch.bfloat16


def test_adamw_equals_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer.adamw(ours.named_parameters(), 0.01, weight_decay=0.1)
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}], lr=0.01
    )
    for step in range(5):
        x = torch.randn(7, 5)
        for model in (ours, theirs):
            model(x).square().sum().backward()
        reference.param_groups[0]["lr"] = reference.param_groups[1]["lr"] = 0.01 * (1 + step)
        reference.step()
        reference.zero_grad()
        optimizer.step(1 + step)
        torch.testing.assert_close(ours.weight, theirs.weight)
        torch.testing.assert_close(ours.bias, theirs.bias)
    assert ours.weight.grad is None


def test_half_precision_keeps_small_updates() -> None:
    model = nn.Linear(4, 1, bias=False, dtype=HALF)
    nn.init.ones_(model.weight)
    optimizer = Optimizer.adamw(model.named_parameters(), 1e-4)
    for _ in range(100):
        model(torch.ones(1, 4, dtype=HALF)).sum().backward()
        optimizer.step()
    # Each update is below half a bf16 step at 1.0, so bf16 alone would never move.
    torch.testing.assert_close(model.weight, torch.full((1, 4), 0.99, dtype=HALF))


def masters(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The fp32 weights that bf16 parameters and their remainders are."""
    state = optimizer.state_dict()
    return {n: kernels.join_master(p.detach(), state[f"{n}/remainder"]) for n, p in model.named_parameters()}


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_bf16_weights_move_as_fp32_ones(moments: str, max_norm: float) -> None:
    """On the same gradients, of two micro-batches: matrices decay, vectors do not, all are clipped together."""
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 70)).to(HALF)
    full = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 70))
    full.load_state_dict(half.state_dict())
    start = {n: p.detach().clone() for n, p in full.named_parameters()}
    ours, theirs = (
        Optimizer.adamw(m.named_parameters(), 1e-3, weight_decay=0.5, moments=moments) for m in (half, full)
    )
    for step in range(20):
        for micro in range(2):
            for n, p in half.named_parameters():
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + 10 * micro + len(n)))
                (p * g.to(HALF)).sum().backward()
                (dict(full.named_parameters())[n] * g.to(HALF).float()).sum().backward()
        norms = [float(o.clip(max_norm)) for o in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        for optimizer in (ours, theirs):
            optimizer.step(1.0 / (1 + step))
        assert not any(g is not None for g in ours.gradients.values())
    tolerance = 1e-4 if moments == "float32" else 0.2  # of the way; bf16 moments carry 1 % of noise a step
    for n, master in masters(half, ours).items():
        way, expected = master - start[n], dict(full.named_parameters())[n].detach() - start[n]
        assert (way - expected).norm() <= tolerance * expected.norm(), n
        assert torch.equal(kernels.split_master(master)[0], dict(half.named_parameters())[n].detach())


def test_one_micro_batch_keeps_the_bf16_gradient_and_two_are_summed_in_fp32() -> None:
    model = nn.Linear(2, 1, bias=False, dtype=HALF)
    optimizer = Optimizer.adamw(model.named_parameters(), 0.1)
    inputs = torch.tensor([[1.0, 2.0]], dtype=HALF)
    model(inputs).sum().backward()
    first = optimizer.gradients["weight"]
    assert first.dtype == HALF and first.tolist() == [[1.0, 2.0]] and model.weight.grad is None
    optimizer.reduce(alone())
    assert optimizer.gradients["weight"] is first, "no copy for a world of one"
    for _ in range(3):
        model(inputs * 2**-9).sum().backward()
    grad = optimizer.gradients["weight"]  # in bf16 the first would hide all others
    assert grad.dtype == torch.float32 and grad.tolist() == [[1 + 3 * 2**-9, 2 + 6 * 2**-9]]
    optimizer.step()
    assert optimizer.gradients == {"weight": None}
    model(inputs).sum().backward()
    assert optimizer.gradients["weight"].tolist() == [[1.0, 2.0]], "a step begins anew"


@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_gradient_is_summed_in_fp32_by_the_losses(tied: bool) -> None:
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(HALF)
    targets = torch.tensor([0, 1, 2, 2, 1, 0])

    def head() -> nn.Linear:
        torch.manual_seed(1)
        return nn.Linear(4, 3, bias=False, dtype=HALF)

    def backward(weight: nn.Parameter) -> None:
        rows = hidden + weight[targets] if tied else hidden  # an embedding's gradient comes by autograd
        for part in (slice(0, 1), slice(1, 6)):
            kernels.linear_cross_entropy(rows[part], weight, targets[part], scale=1 / 6).backward(retain_graph=tied)

    ours, plain, exact = head(), head(), head().double()
    optimizer = Optimizer.adamw(ours.named_parameters(), 0.1, head=ours.weight)
    other = Optimizer.adamw(plain.named_parameters(), 0.1)
    rows = hidden.double() + exact.weight[targets] if tied else hidden.double()
    torch.nn.functional.cross_entropy(rows @ exact.weight.t(), targets).backward()
    for _ in range(2):  # the second time after a step
        backward(ours.weight)
        backward(plain.weight)
        grad = optimizer.gradients["weight"]
        assert grad.dtype == torch.float32 and grad is ours.weight.main_grad and ours.weight.grad is None
        errors = [float((o.gradients["weight"] - exact.weight.grad).norm()) for o in (optimizer, other)]
        assert errors[0] < (0.01 if tied else 1e-6) and errors[0] < errors[1] < 0.05
        for o, module in ((optimizer, ours), (other, plain)):
            o.clip(1.0)
            o.step()
            module.weight.data.copy_(head().weight)
        assert not optimizer.gradients["weight"].any()


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_a_later_optimizer_gets_the_gradients(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 3, bias=False, dtype=dtype)
    first = Optimizer.adamw(layer.named_parameters(), 0.1, head=layer.weight)
    second = Optimizer.adamw(layer.named_parameters(), 0.1)
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 4, dtype=dtype)).sum().backward()
    assert float(second.clip(0)) > 0
    second.step()
    assert not torch.equal(layer.weight, before)
    for optimizer in (first, second):
        optimizer.release()
    layer(torch.ones(2, 4, dtype=dtype)).sum().backward()
    assert layer.weight.grad is not None and not hasattr(layer.weight, "main_grad")


def test_what_a_bf16_weight_holds() -> None:
    model = nn.Linear(8, 8, bias=False, dtype=HALF)
    sizes = {}
    for moments in ("float32", "bfloat16"):
        optimizer = Optimizer.adamw(model.named_parameters(), 0.1, moments=moments)
        model.weight.grad = None
        (model.weight * 1).sum().backward()
        optimizer.step()
        state = optimizer.state_dict()
        sizes[moments] = sum(t.element_size() for t in state.values() if t.ndim) + model.weight.element_size()
        assert state["weight/remainder"].dtype == torch.int16 and int(state["weight/step"]) == 1
        model = nn.Linear(8, 8, bias=False, dtype=HALF)
    assert sizes == {"float32": 12, "bfloat16": 8}, "and 2 of the gradient"


def test_rounding_depends_on_name_and_step_alone() -> None:
    """Not on the optimizer, the parameters beside it or earlier draws: ranks and resumed runs agree."""

    def moments(names: list[str], steps: int) -> dict[str, Tensor]:
        parameters = {n: nn.Parameter(torch.zeros(300, dtype=HALF)) for n in names}
        optimizer = Optimizer.adamw(parameters.items(), 0.1, moments="bfloat16")
        for _ in range(steps):
            for p in parameters.values():
                (p * torch.linspace(0.1, 1.0, 300).to(HALF)).sum().backward()
            torch.rand(1)
            optimizer.step()
        return {n: optimizer.state_dict()[f"{n}/exp_avg"] for n in names}

    together, alone_ = moments(["a", "b"], 2), moments(["b"], 2)
    assert torch.equal(together["b"], alone_["b"])
    assert not torch.equal(together["a"], together["b"])


def test_types_that_are_neither_are_refused() -> None:
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        Optimizer.adamw(nn.Linear(2, 2, dtype=torch.float16).named_parameters(), 0.1)
    with pytest.raises(ValueError, match="float32 matrices"):
        named = nn.Linear(2, 2, dtype=HALF).named_parameters()
        Optimizer.muon(named, matrices=["weight"], muon_lr=0.1, lr=0.1)


def test_muon_moves_as_torchs_does() -> None:
    shapes = [(16, 16), (16, 16), (40, 16), (16, 40)]
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    steps = (Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0))
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in steps:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        moved = (b - 1).norm()
        assert (a - b).norm() < 0.02 * moved  # theirs iterates in bf16


@pytest.mark.parametrize("kind", ["adamw", "muon", "bf16", "bf16 moments"])
def test_state_round_trips_bit_for_bit(kind: str) -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        model = tiny_model(3)
        if kind.startswith("bf16"):
            model = model.to(HALF)
        if kind == "muon":
            matrices = [n for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
            return model, Optimizer.muon(model.named_parameters(), matrices=matrices, muon_lr=0.01, lr=0.01)
        moments = "bfloat16" if kind == "bf16 moments" else "float32"
        return model, Optimizer.adamw(model.named_parameters(), 0.01, moments=moments)

    def steps(model: nn.Module, optimizer: Optimizer, numbers: range) -> None:
        for n in numbers:
            generator = torch.Generator().manual_seed(n)
            loss = sum((p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum() for p in model.parameters())
            loss.backward()
            optimizer.clip(0.5)
            optimizer.step()

    model, optimizer = make()
    steps(model, optimizer, range(3))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in optimizer.state_dict().items()}
    steps(model, optimizer, range(3, 6))
    again, restored = make()
    again.load_state_dict(weights)
    for key, value in restored.state_dict().items():
        value.copy_(state[key])
    assert all(torch.equal(value, state[key]) for key, value in restored.state_dict().items())
    assert restored.state_dict().keys() == state.keys()
    steps(again, restored, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    ends = [o.state_dict() for o in (restored, optimizer)]
    assert all(torch.equal(value, ends[1][key]) and value.dtype == ends[1][key].dtype for key, value in ends[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_state_made_in_advance_changes_no_bit(dtype: torch.dtype) -> None:
    """It is what the first step makes, of the same types, for a parameter without a gradient too."""

    def run(early: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        named = {n: nn.Parameter(torch.randn(5, 3).to(dtype)) for n in ("a", "b", "unused")}
        named["vector"] = nn.Parameter(torch.randn(4).to(dtype))
        if dtype == HALF:
            optimizer = Optimizer.adamw(named.items(), 0.1, weight_decay=0.1, moments="bfloat16")
        else:
            optimizer = Optimizer.muon(named.items(), matrices=["a", "unused"], muon_lr=0.1, lr=0.1)
        before = optimizer.state_dict() if early else {}
        assert all(not value.any() for value in before.values())
        assert not early or {key.split("/")[0] for key in before} == set(named)
        for _ in range(3):
            sum(p.float().square().sum() for n, p in named.items() if n != "unused").backward()
            optimizer.step()
        state = optimizer.state_dict()
        assert all(before[key] is value for key, value in state.items() if early), "updated in place"
        return dict(named), state

    for lazy, early in zip(run(False), run(True), strict=True):
        assert lazy.keys() == early.keys()
        assert all(torch.equal(t, early[n]) and t.dtype == early[n].dtype for n, t in lazy.items())
        assert all(t.stride() == early[n].stride() for n, t in lazy.items())


def test_state_made_in_advance_is_that_of_torch() -> None:
    p = nn.Parameter(torch.randn(3, 5).T)
    lazy = torch.optim.AdamW([p], fused=True)
    p.grad = torch.zeros_like(p)
    lazy.step()
    made = FusedAdamW.initial(p)
    assert list(made) == list(lazy.state[p])
    for key, value in lazy.state[p].items():
        assert (value.dtype, value.shape, value.stride()) == (made[key].dtype, made[key].shape, made[key].stride())


def test_schedules() -> None:
    assert [schedule("constant", s, 10, 3) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = [schedule("linear", s, 12, 1) for s in range(12)]
    assert linear[:2] == [0.5, 1.0]
    assert linear[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(linear[1:], linear[2:], strict=False))
    cosine = [schedule("cosine", s, 11, 0, 0.05) for s in range(11)]
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.525)
    assert cosine[-1] == pytest.approx(0.05)
    assert schedule("linear", 0, 1, 0) == 1.0
    with pytest.raises(ValueError, match="expected constant"):
        schedule("step", 1, 2, 0)


def test_clip() -> None:
    named = {n: nn.Parameter(torch.zeros(size)) for n, size in (("a", 1), ("b", 1), ("unused", 3))}
    a, b, optimizer = named["a"], named["b"], Optimizer.adamw(named.items(), 0.1)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert float(optimizer.clip(0)) == 5
    assert (float(a.grad), float(b.grad)) == (3, 4)
    assert float(optimizer.clip(1.0)) == 5
    assert float(torch.cat([a.grad, b.grad]).norm()) == pytest.approx(1, rel=1e-5)
    assert float(optimizer.clip(2.0)) == pytest.approx(1, rel=1e-5)
    assert float(torch.cat([a.grad, b.grad]).norm()) == pytest.approx(1, rel=1e-5), "below: as it was"


def test_clip_of_both_types_is_one_norm_for_one_step() -> None:
    """The bf16 gradient is scaled within the step; afterwards the factor is forgotten."""
    named = {"full": nn.Parameter(torch.zeros(1)), "half": nn.Parameter(torch.zeros(1, dtype=HALF))}
    optimizer = Optimizer.adamw(named.items(), 0.1)

    def gradients() -> None:
        (named["full"] * 3.0).sum().backward()
        (named["half"] * 4.0).sum().backward()

    gradients()
    assert float(optimizer.clip(1.0)) == 5
    assert float(named["full"].grad) == pytest.approx(0.6, rel=1e-5)
    assert float(optimizer.gradients["half"]) == 4, "no pass over it"
    optimizer.step()
    state = optimizer.state_dict()
    assert float(state["half/exp_avg"]) == pytest.approx(0.08, rel=1e-5)
    gradients()
    optimizer.step()
    assert float(state["half/exp_avg"]) == pytest.approx(0.9 * 0.08 + 0.4, rel=1e-5)


def test_the_optimizers_memory_is_not_held_by_the_model() -> None:
    model = nn.Linear(2, 2, dtype=HALF)
    optimizer = Optimizer.adamw(model.named_parameters(), 0.1)
    part = weakref.ref(optimizer._parts[0][0])
    assert isinstance(part(), SplitAdamW)
    del optimizer
    gc.collect()
    assert part() is None
