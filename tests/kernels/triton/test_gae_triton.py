import pytest
import torch
import triton.language as tl
from cai_fast.kernels import gae
from cai_fast.kernels.triton import gae as kernel
from guarded import assert_as_exact_as_torch, same_under_poison
from sm90 import Case, check, compile_all

BOUNDS = [[0, 1], [0, 0, 3, 3, 3, 10, 11, 11], [0, 127, 256, 513, 769, 770], list(range(0, 41, 5)), [0]]


def inputs(total: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, total, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).unbind()


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_torch(bounds: list[int], gamma: float, lam: float, dtype: torch.dtype) -> None:
    rewards, values = inputs(bounds[-1], dtype)
    arguments = torch.tensor(bounds, dtype=torch.int32)
    exact = gae(rewards.double(), values.double(), arguments, gamma=gamma, lam=lam, backend="reference")
    plain = gae(rewards, values, arguments, gamma=gamma, lam=lam, backend="reference")
    ours = gae(rewards, values, arguments, gamma=gamma, lam=lam, backend="triton")
    for triple in zip(ours, plain, exact, strict=True):
        assert_as_exact_as_torch(*triple)


def test_fp64_is_exact() -> None:
    rewards, values = inputs(770, torch.float64)
    bounds = torch.tensor(BOUNDS[2])
    ours, exact = (gae(rewards, values, bounds, gamma=0.99, backend=b) for b in ("triton", "reference"))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_strides_poison_and_repetition() -> None:
    bounds = torch.tensor([[0, 9], [5, 9], [300, 9]])[:, 0]
    rewards, values = inputs(600)
    rewards, values = rewards[::2], values[1].expand(300)
    plain = gae(rewards.contiguous(), values.contiguous(), bounds.contiguous(), backend="triton")
    strided = same_under_poison(lambda: gae(rewards, values, bounds, backend="triton"))
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    rewards, values = inputs(400)
    together = gae(rewards, values, torch.tensor([0, 7, 307, 400]), backend="triton")
    alone = gae(rewards[7:307], values[7:307], torch.tensor([0, 300]), backend="triton")
    assert all(torch.equal(a[7:307], b) for a, b in zip(together, alone, strict=True))


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a composition in the wrong order, and a carry that is taken from the wrong lane."""

    def wrong(decay_1, delta_1, decay_2, delta_2):
        return decay_1 * decay_2, delta_1 + decay_1 * delta_2

    monkeypatch.setattr(kernel._after, "fn", wrong)
    with pytest.raises(AssertionError):
        test_as_exact_as_torch([0, 3], 1.0, 0.95, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(kernel.tl, "sum", lambda x, axis, keep_dims: tl.max(x, axis, keep_dims=keep_dims))
    with pytest.raises(AssertionError):
        test_as_exact_as_torch([0, 513], 1.0, 0.95, torch.float32)


def test_sm_90(tmp_path) -> None:
    pointers = ("rewards", "values", "advantages", "returns")
    signature = {**dict.fromkeys(pointers, "*fp32"), "cu_seqlens": "*i64"}
    signature |= dict.fromkeys(("reward_stride", "value_stride", "bound_stride"), "i32")
    (report,) = compile_all(
        [Case("gae:_gae", signature, {"GAMMA": 1.0, "DECAY": 0.95, "BLOCK": kernel.BLOCK})], tmp_path
    )
    check(report)
