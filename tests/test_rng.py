"""Keyed randomness: fixed values, independence of neighbouring keys, and uniformity."""

import numpy as np
import pytest
import torch

from cai_fast import rng


def test_values_are_fixed_for_ever():
    k = rng.key(0, "revise", "0123456789abcdef", 2)
    assert k == 1772538552959806085
    assert rng.permutation(k, 8) == [5, 0, 7, 3, 6, 2, 4, 1]
    assert (rng.uniform(k), rng.choice(k, 1000)) == (0.9271002403911942, 913)


def test_every_part_of_the_key_counts():
    base = (1, "revise", "ab", 0)
    others = [(2, "revise", "ab", 0), (1, "label", "ab", 0), (1, "revise", "abc", 0), (1, "revise", "ab", 1)]
    glued = [(1, "revisea", "b", 0), (11, "revise", "ab", 0)]
    keys = {rng.key(*parts) for parts in [base, *others, *glued]}
    assert len(keys) == 7
    assert all(0 <= k < 2**63 for k in keys)


def test_draws_are_uniform():
    keys = [rng.key(3, "t", str(i)) for i in range(4000)]
    u = np.array([rng.uniform(k) for k in keys])
    assert abs(u.mean() - 0.5) < 4 * 12**-0.5 / 4000**0.5
    assert (u >= 0).all() and (u < 1).all()
    counts = np.bincount([rng.choice(k, 5) for k in keys], minlength=5)
    assert ((counts - 800) ** 2 / 800).sum() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


def test_permutation_is_one_and_mixes():
    for n in (0, 1, 2, 7):
        assert sorted(rng.permutation(5, n)) == list(range(n))
    firsts = np.bincount([rng.permutation(rng.key(0, "p", "", e), 6)[0] for e in range(3000)], minlength=6)
    assert ((firsts - 500) ** 2 / 500).sum() < 20.5  # 5 degrees of freedom, p = 0.001


def test_choice_of_nothing_is_refused():
    with pytest.raises(ValueError, match="n >= 1"):
        rng.choice(1, 0)


def test_generator_depends_on_the_key_only():
    a, b, c = (torch.randn(4, generator=rng.generator(k)) for k in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)
