"""Elo: planted ratings are recovered, sweeps stay finite, intervals cover, calibration by hand."""

import math

import numpy as np
import pytest

from cai_fast.elo import ELO_PER_NAT, calibration, fit_elo, ratings, win_matrix


def test_two_players_by_hand():
    """One free strength: the maximum is at p = (wins + 1/2) / (games + 1)."""
    wins = np.array([[0.0, 7.0], [3.0, 0.0]])
    expected = -ELO_PER_NAT * math.log(7.5 / 3.5)
    assert fit_elo(wins) == pytest.approx([0.0, expected], abs=1e-6)
    assert fit_elo(wins, anchor=1) == pytest.approx([-expected, 0.0], abs=1e-6)


def test_a_point_is_the_usual_elo_point():
    rating = fit_elo(np.array([[0.0, 1e9], [1e10, 0.0]]))
    assert rating[1] == pytest.approx(400, abs=1e-4)  # odds of ten to one


def test_planted_ratings_are_recovered():
    planted = np.array([0.0, 120.0, -80.0, 300.0, 40.0])
    chance = 1 / (1 + 10 ** ((planted[None] - planted[:, None]) / 400))
    np.fill_diagonal(chance, 0)
    assert fit_elo(1e8 * chance) == pytest.approx(planted, abs=1e-3)
    played = np.random.default_rng(0).binomial(2000, np.triu(chance, 1))
    wins = played + np.tril(2000 - played.T, -1)
    assert fit_elo(wins.astype(float)) == pytest.approx(planted, abs=25)


def test_sweeps_are_finite_and_ordered():
    rating = fit_elo(np.array([[0.0, 50, 50], [0, 0, 50], [0, 0, 0]]))
    assert np.isfinite(rating).all() and rating[0] > rating[1] > rating[2]
    lone = fit_elo(np.array([[0.0, 10**6], [0, 0]]))
    assert lone[1] == pytest.approx(-ELO_PER_NAT * math.log((10**6 + 0.5) / 0.5), rel=1e-9)


def test_unconnected_players_have_no_rating():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 3
    rating = fit_elo(wins)
    assert np.isfinite(rating[:2]).all() and np.isnan(rating[2:]).all()


def test_ratings_of_unconnected_players_are_none():
    rows = ratings([("p", 0, 1, 1.0), ("q", 0, 1, 0.0)], 3, anchor=0, samples=20, seed=0)
    assert rows[2] == {"rating": None, "lo": None, "hi": None, "games": 0.0}
    assert rows[1]["rating"] == pytest.approx(0) and rows[1]["lo"] <= 0 <= rows[1]["hi"]


def test_games_count_once_each_way():
    games = [("p", 0, 1, 1.0), ("p", 1, 0, 0.25), ("q", 0, 1, 0.5)]
    assert win_matrix(games, 2).tolist() == [[0, 2.25], [0.75, 0]]


def clustered_games(random: np.random.Generator, spread: float) -> list:
    """30 prompts with 6 games each; the better player's chance differs between prompts by `spread` nats."""
    games = []
    for prompt in range(30):
        p = 1 / (1 + math.exp(-(100 / ELO_PER_NAT + spread * random.standard_normal())))
        games += [(str(prompt), 1, 0, float(random.random() < p)) for _ in range(6)]
    return games


def test_intervals_cover_with_clustered_games():
    """Chance of the better player averaged over prompts, as Elo, must lie in about 95 % of intervals."""
    random, spread = np.random.default_rng(1), 1.5
    z = 100 / ELO_PER_NAT + spread * random.standard_normal(200_000)
    p = float((1 / (1 + np.exp(-z))).mean())
    truth = ELO_PER_NAT * math.log(p / (1 - p))
    covered, widths = 0, []
    for seed in range(100):
        row = ratings(clustered_games(random, spread), 2, 0, 60, seed)[1]
        assert row["lo"] <= row["rating"] <= row["hi"] and row["games"] == 180
        covered += row["lo"] <= truth <= row["hi"]
        widths.append(row["hi"] - row["lo"])
    assert covered >= 84  # 60 resamples and the pull of the pseudo-wins cost a little
    unclustered = 2 * 1.96 * ELO_PER_NAT / math.sqrt(180 * p * (1 - p))
    assert np.mean(widths) > 1.15 * unclustered  # games of one prompt are not independent


def test_intervals_are_seeded():
    games = clustered_games(np.random.default_rng(2), 1.0)
    assert ratings(games, 2, 0, 20, 5) == ratings(games, 2, 0, 20, 5) != ratings(games, 2, 0, 20, 6)


def test_calibration_by_hand():
    got = calibration([0.05, 0.05, 0.95, 1.0], [0, 1, 1, 1])
    assert got["ece"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.025)
    assert got["brier"] == pytest.approx((0.05**2 + 0.95**2 + 0.05**2) / 4)
    assert [(row["lo"], row["n"], row["frequency"]) for row in got["bins"]] == [(0.0, 2, 0.5), (0.9, 2, 1.0)]
    assert calibration([], []) == {"ece": None, "brier": None, "bins": []}
