"""Optimizers, schedules, clipping."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

from cai_fast.optim import Muon, Optimizer, clip_grad_norm, schedule


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
    model = nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = Optimizer.adamw(model.named_parameters(), 1e-4)
    for _ in range(100):
        for _ in range(2):  # two micro-batches
            model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        assert optimizer.params[0].grad.tolist() == [[2.0] * 4], "micro-batches are summed in fp32"
        optimizer.step()
    # Each update is below half a bf16 step at 1.0, so bf16 alone would never move.
    torch.testing.assert_close(model.weight, torch.full((1, 4), 0.99, dtype=torch.bfloat16))


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


@pytest.mark.parametrize("kind", ["adamw", "muon", "bf16"])
def test_state_round_trips_bit_for_bit(kind: str) -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        model = tiny_model(3)
        if kind == "bf16":
            model = model.to(torch.bfloat16)
        if kind == "muon":
            matrices = [n for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
            return model, Optimizer.muon(model.named_parameters(), matrices=matrices, muon_lr=0.01, lr=0.01)
        return model, Optimizer.adamw(model.named_parameters(), 0.01)

    def steps(model: nn.Module, optimizer: Optimizer, numbers: range) -> None:
        for n in numbers:
            generator = torch.Generator().manual_seed(n)
            loss = sum((p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum() for p in model.parameters())
            loss.backward()
            optimizer.step()

    model, optimizer = make()
    steps(model, optimizer, range(3))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in optimizer.state_dict().items()}
    steps(model, optimizer, range(3, 6))
    again, restored = make()
    again.load_state_dict(weights)
    restored.load_state_dict(state)
    steps(again, restored, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="unknown parameters"):
        restored.load_state_dict({"nope/step": torch.zeros(())})


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


def test_clip_grad_norm() -> None:
    a, b, unused = (torch.zeros(n, requires_grad=True) for n in (1, 1, 3))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert float(clip_grad_norm([a, b, unused], 0)) == 5
    assert (float(a.grad), float(b.grad)) == (3, 4)
    assert float(clip_grad_norm([a, b, unused], 1.0)) == 5
    assert float(torch.cat([a.grad, b.grad]).norm()) == pytest.approx(1, rel=1e-5)
