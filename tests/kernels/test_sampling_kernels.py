import math

import pytest
import torch
from cai_fast.kernels import linear_logprob, philox_uniform, sample_tokens
from cai_fast.kernels.sampling import philox4x32

KEYS = torch.arange(5000) * 0x1234567890ABCD + 17


def draw(probabilities: list[float], n: int = 5000, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.tensor(probabilities).log().expand(n, -1)
    return sample_tokens(logits, KEYS[:n], torch.arange(n) % 7, **settings)


# counter, key, output: the known-answer vectors published with Random123 (kat_vectors, philox4x32 10).
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter,key,output", VECTORS)
def test_philox_known_answers(counter: str, key: str, output: str) -> None:
    def words(text: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor([int(w, 16)] * 2) for w in text.split())

    for got, expected in zip(philox4x32(words(counter), words(key)), words(output), strict=True):
        assert torch.equal(got, expected)


def test_uniform_uses_all_64_bits_of_key_and_position() -> None:
    # key and counter of the zero vector: words 6627e8d5 e169c58d
    zero = philox_uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert zero.item() == (0x6627E8D5E169C58D >> 11) / 2**53
    u = philox_uniform(torch.tensor([[1], [1 << 40], [3]]), torch.tensor([0, 1, 1 << 33]))
    assert u.shape == (3, 3) and u.unique().numel() == 9 and u.dtype == torch.float64
    assert torch.equal(u[1:2, 1:2], philox_uniform(torch.tensor([1 << 40]), torch.tensor([1]))[None])


def test_uniform_is_uniform() -> None:
    u = philox_uniform(KEYS[:, None], torch.arange(20)).flatten()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    assert (torch.histc(u, 10, 0, 1) / u.numel() - 0.1).abs().max() < 0.005


def test_frequencies_follow_the_probabilities() -> None:
    p = [0.5, 0.0, 0.3, 0.15, 0.05]
    token, logprob = draw(p)
    share = token.bincount(minlength=5) / 5000
    assert share[1] == 0 and (share - torch.tensor(p)).abs().max() < 0.03
    torch.testing.assert_close(logprob, torch.tensor(p).log()[token])
    # Temperature 1/2 squares the probabilities.
    token, logprob = draw(p, temperature=0.5)
    squared = torch.tensor(p).square() / torch.tensor(p).square().sum()
    assert ((token.bincount(minlength=5) / 5000) - squared).abs().max() < 0.03
    torch.testing.assert_close(logprob, squared.log()[token])


def test_a_row_depends_on_its_key_and_position_alone() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40)
    token, logprob = sample_tokens(logits, KEYS[:40], positions)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:11]
    again = sample_tokens(logits[order], KEYS[:40][order], positions[order])
    assert torch.equal(again[0], token[order]) and torch.equal(again[1], logprob[order])
    ahead = sample_tokens(logits, KEYS[:40], positions, uniform=philox_uniform(KEYS[:40], positions))
    assert torch.equal(ahead[0], token)
    assert not torch.equal(sample_tokens(logits, KEYS[:40], positions + 1)[0], token)


def test_logprob_equals_the_trainers() -> None:
    hidden, weight = torch.randn(64, 96), torch.randn(300, 96) * 0.3
    token, logprob = sample_tokens(hidden @ weight.t(), KEYS[:64], torch.zeros(64, dtype=torch.int64), temperature=0.7)
    trainer = linear_logprob(hidden, weight, token, temperature=0.7).logprob
    torch.testing.assert_close(logprob, trainer, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, torch.zeros(1)])
def test_greedy_takes_the_lowest_index_of_a_tie(temperature: float | torch.Tensor) -> None:
    token, logprob = sample_tokens(
        torch.tensor([[1.0, 3.0, 3.0, -1.0]]), KEYS[:1], torch.tensor([0]), temperature=temperature
    )
    assert token.tolist() == [1] and logprob.tolist() == [0.0]


def test_top_k_keeps_k_and_renormalises() -> None:
    token, logprob = draw([0.4, 0.1, 0.3, 0.2], top_k=2)
    assert set(token.tolist()) == {0, 2}
    torch.testing.assert_close(logprob, torch.tensor([4 / 7, 0, 3 / 7]).log()[token])
    tied, _ = draw([0.25, 0.25, 0.25, 0.25], top_k=2)
    assert set(tied.tolist()) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_holds_p() -> None:
    token, logprob = draw([0.1, 0.5, 0.15, 0.25], top_p=0.7)
    assert set(token.tolist()) == {1, 3}
    torch.testing.assert_close(logprob, torch.tensor([0, 2 / 3, 0, 1 / 3]).log()[token])
    assert set(draw([0.1, 0.5, 0.15, 0.25], top_p=1e-6)[0].tolist()) == {1}
    # After top_k = 2 the first token holds 2/3, which is enough.
    assert set(draw([0.1, 0.5, 0.15, 0.25], top_k=2, top_p=0.6)[0].tolist()) == {1}


def test_settings_may_differ_by_row() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(4000, 4)
    row = torch.arange(4000) % 4
    token, logprob = sample_tokens(
        logits,
        KEYS[:4000],
        row,
        temperature=torch.tensor([0.0, 1.0, 1.0, 1.0])[row],
        top_k=torch.tensor([0, 2, 0, 0])[row],
        top_p=torch.tensor([1.0, 1.0, 0.8, 1.0])[row],
    )
    kept = [set(token[row == i].tolist()) for i in range(4)]
    assert kept == [{1}, {1, 3}, {1, 2, 3}, {0, 1, 2, 3}]
    assert not logprob[row == 0].any()
    torch.testing.assert_close(logprob[row == 2], torch.tensor([0, 0.5, 0.15, 0.25]).div(0.9).log()[token[row == 2]])


def test_the_last_uniform_below_one_never_selects_an_impossible_token() -> None:
    logits = torch.tensor([[0.3, 0.7, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]).log()
    ends = torch.tensor([1 - 2**-53, 1 - 2**-53], dtype=torch.float64)
    zeros = torch.zeros(2, dtype=torch.int64)
    assert sample_tokens(logits, zeros, zeros, uniform=ends)[0].tolist() == [1, 1]
    assert sample_tokens(logits, zeros, zeros, uniform=torch.zeros(2).double())[0].tolist() == [0, 1]


def test_bad_settings_and_logits_are_refused() -> None:
    logits, zero = torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    for settings, message in (
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": torch.tensor([1.5])}, "top_p must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_tokens(logits, zero, zero, **settings)
    with pytest.raises(ValueError, match="logits hold NaN"):
        sample_tokens(torch.tensor([[0.0, math.nan]]), zero, zero)
