import math

import pytest
import torch
from cai_fast.kernels import common, linear_logprob

BACKENDS = ("reference", "chunked")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_by_hand(backend: str) -> None:
    # logits (0, log 3) at temperature 1; (0, log 9) at temperature 1/2.
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [math.log(3.0)]])
    targets = torch.tensor([0, 1])
    for temperature, p in ((1.0, 0.75), (0.5, 0.9)):
        out = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True, backend=backend)
        torch.testing.assert_close(out.logprob, torch.tensor([math.log(1 - p), math.log(p)]))
        torch.testing.assert_close(out.lse, torch.full((2,), -math.log(1 - p)))
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        torch.testing.assert_close(out.entropy, torch.full((2,), entropy))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("rows,vocab", [(0, 5), (1, 257), (33, 1), (70, 2), (127, 1000)])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_matches_fp64_with_fp32_inputs(head, rows: int, vocab: int, temperature: float) -> None:
    hidden, weight, targets = head(rows, 16, vocab, torch.float32)
    out = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True)
    z = hidden.double() @ weight.double().t() / temperature
    logp = z.log_softmax(-1)
    tolerance = 2e-5 * max(1.0, z.abs().max().item() / 32 if rows else 1.0)
    close = {"atol": tolerance, "rtol": 0.0, "check_dtype": False}
    torch.testing.assert_close(out.logprob, logp.gather(1, targets[:, None]).squeeze(1), **close)
    torch.testing.assert_close(out.lse, z.logsumexp(-1), **close)
    torch.testing.assert_close(out.entropy, -(logp.exp() * logp).sum(-1), **close)
    assert out.logprob.dtype == torch.float32 and (out.logprob <= 0).all()
    assert (out.entropy >= -tolerance).all() and (out.entropy <= math.log(vocab) + tolerance).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck_of_all_three_results(head, backend: str, temperature: float) -> None:
    hidden, weight, targets = head(34, 3, 5)
    targets = torch.where(torch.arange(34) % 7 == 3, -1, targets)
    assert torch.autograd.gradcheck(
        lambda h, w: tuple(linear_logprob(h, w, targets, temperature=temperature, entropy=True, backend=backend)),
        (hidden, weight),
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("which", ["logprob", "lse", "entropy"])
def test_each_result_alone_has_the_reference_gradient(head, which: str) -> None:
    hidden, weight, targets = head(70, 8, 40)
    upstreams = torch.randn(70, dtype=torch.float64), torch.ones((), dtype=torch.float64).expand(70)  # stride 0
    for upstream in upstreams:
        ours, theirs = (
            torch.autograd.grad(
                getattr(linear_logprob(hidden, weight, targets, entropy=True, backend=backend), which),
                (hidden, weight),
                upstream,
            )
            for backend in ("chunked", "reference")
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_targets_outside_the_vocabulary_give_zero_and_no_gradient(head) -> None:
    hidden, weight, _ = head(4, 3, 5)
    out = linear_logprob(hidden, weight, torch.tensor([-1, 0, 4, 5]))
    assert out.logprob[0] == 0 and out.logprob[3] == 0 and (out.logprob[1:3] < 0).all()
    (d_hidden,) = torch.autograd.grad(out.logprob.sum(), hidden)
    assert not d_hidden[[0, 3]].any() and d_hidden[[1, 2]].any()
    assert (out.lse != 0).all()


@pytest.mark.parametrize("width,vocab", [(96, 300), (128, 2), (16, 1), (1024, 64)])
def test_a_row_does_not_depend_on_the_rows_around_it(head, width: int, vocab: int) -> None:
    hidden, weight, targets = head(600, width, vocab, torch.float32)
    with torch.no_grad():
        together = linear_logprob(hidden, weight, targets, entropy=True)
        for start, stop in ((0, 1), (7, 8), (599, 600), (3, 36), (100, 420)):
            alone = linear_logprob(hidden[start:stop], weight, targets[start:stop], entropy=True)
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a, b[start:stop]), (start, stop)


@pytest.mark.parametrize("width", [96, 300])
def test_chunk_size_does_not_change_a_bit(head, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    hidden, weight, targets = head(333, width, 300, torch.float32)
    results = []
    for rows in (32, 64, 256, 512):
        monkeypatch.setattr(common, "chunk_rows", lambda vocab, device, rows=rows: rows)
        results.append(linear_logprob(hidden, weight, targets, entropy=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_frozen_weight_leaves_the_gradient_of_the_hidden_states(head) -> None:
    hidden, weight, targets = head(70, 6, 20)
    ours = linear_logprob(hidden, weight.detach(), targets).logprob.sum()
    reference = linear_logprob(hidden, weight, targets, backend="reference").logprob.sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (ours, reference)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiled_is_the_same_without_a_gradient(head, backend: str) -> None:
    hidden, weight, targets = head(70, 6, 20)
    expected = linear_logprob(hidden, weight, targets, temperature=0.7, entropy=True, backend=backend)
    call = {"temperature": 0.7, "entropy": True, "tiled": True, "backend": backend}
    with torch.no_grad():
        quiet = linear_logprob(hidden, weight, targets, **call)
    detached = linear_logprob(hidden.detach(), weight.detach(), targets, **call)
    for a, b, c in zip(quiet, detached, expected, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c) and not (a.requires_grad or b.requires_grad)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_tiled_refuses_to_lose_a_gradient(head, backend: str) -> None:
    hidden, weight, targets = head(3, 6, 20)
    for h, w in ((hidden, weight.detach()), (hidden.detach(), weight)):
        with pytest.raises(ValueError, match="tiled=True forms no gradient.* torch.no_grad"):
            linear_logprob(h, w, targets, tiled=True, backend=backend)


def test_temperature_must_be_positive(head) -> None:
    hidden, weight, targets = head(2, 2, 2)
    with pytest.raises(ValueError, match="linear_logprob: temperature must be a finite number > 0, got 0"):
        linear_logprob(hidden, weight, targets, temperature=0)
