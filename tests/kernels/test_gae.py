import pytest
import torch
from cai_fast.kernels import gae

BACKENDS = ("reference", "chunked")


def loop(
    rewards: list[float], values: list[float], bounds: list[int], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    advantages = [0.0] * len(rewards)
    for start, end in zip(bounds, bounds[1:], strict=False):
        carry = 0.0
        for t in reversed(range(start, end)):
            following = values[t + 1] if t + 1 < end else 0.0
            carry = rewards[t] + gamma * following - values[t] + gamma * lam * carry
            advantages[t] = carry
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    # delta = (0 + 0.5*4 - 2, 1 - 4) = (0, -3) and (5 - 1); A_0 = 0 + 0.5*0.5*-3
    advantages, returns = gae(
        torch.tensor([0.0, 1.0, 5.0]),
        torch.tensor([2.0, 4.0, 1.0]),
        torch.tensor([0, 2, 3]),
        gamma=0.5,
        lam=0.5,
        backend=backend,
    )
    torch.testing.assert_close(advantages, torch.tensor([-0.75, -3.0, 4.0]))
    torch.testing.assert_close(returns, torch.tensor([1.25, 1.0, 5.0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5), (0.99, 0.9)])
@pytest.mark.parametrize(
    "bounds",
    [[0, 1], [0, 0, 3, 3, 3, 10, 11, 11], [0, 128, 129, 300], [0, 0], [0], list(range(0, 501, 5))],
)
def test_matches_a_loop(backend: str, gamma: float, lam: float, bounds: list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, bounds[-1], generator=g, dtype=torch.float64)
    expected = loop(rewards.tolist(), values.tolist(), bounds, gamma, lam)
    for cu_dtype in (torch.int32, torch.int64):
        got = gae(rewards, values, torch.tensor(bounds, dtype=cu_dtype), gamma=gamma, lam=lam, backend=backend)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64))


def test_sequences_do_not_leak() -> None:
    rewards, values, bounds = torch.randn(20), torch.randn(20), torch.tensor([0, 7, 20])
    together = gae(rewards, values, bounds)
    changed = gae(torch.where(torch.arange(20) < 7, rewards, 1e6), values * (torch.arange(20) < 7), bounds)
    assert all(torch.equal(a[:7], b[:7]) for a, b in zip(together, changed, strict=True))


def test_fp32_error_over_long_sequences_is_small() -> None:
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 2000, generator=g)
    bounds = [0, 1500, 2000]
    expected = torch.tensor(loop(rewards.tolist(), values.tolist(), bounds, 1.0, 0.95)[0])
    advantages, returns = gae(rewards, values.requires_grad_(), torch.tensor(bounds))
    assert (advantages - expected).abs().max() < 2e-5 and not returns.requires_grad


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"gae: expected rewards and values \[T\], got \[3\] and \[4\]"):
        gae(torch.zeros(3), torch.zeros(4), torch.tensor([0, 3]))
