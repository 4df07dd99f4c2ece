"""Elo ratings by a penalised Bradley-Terry fit, and calibration of probabilities.

P(i beats j) = 1 / (1 + exp(s_j - s_i)); Elo = (400 / ln 10) s, about 173.7 points per nat (arXiv 2204.05862 §2.4).
Every pair that met gets half a pseudo-win each way, so that a clean sweep has a finite rating.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ELO_PER_NAT = 400.0 / math.log(10.0)
PSEUDO_WINS = 0.5
Game = tuple[str, int, int, float]  # cluster (prompt), player i, player j, score of i in [0, 1]


def fit_elo(wins: np.ndarray, anchor: int = 0, *, tolerance: float = 1e-10) -> np.ndarray:
    """Elo of each player; `anchor` is 0.

    wins [K, K]: total score of i against j (fractions allowed). Newton's method in float64 on the penalised
    log-likelihood, which is concave. Players that no chain of games connects to the anchor are NaN.
    """
    games = wins + wins.T
    wins = wins + PSEUDO_WINS * (games > 0)
    games = wins + wins.T
    known = _connected(games > 0, anchor)
    free = [i for i in known if i != anchor]
    strength = np.zeros(len(wins))
    for _ in range(100 if free else 0):
        p = 1.0 / (1.0 + np.exp(strength[None, :] - strength[:, None]))
        gradient = (wins - games * p).sum(1)[free]
        weight = games * p * (1.0 - p)
        hessian = (np.diag(weight.sum(1)) - weight)[np.ix_(free, free)]
        step = np.linalg.solve(hessian, gradient)
        strength[free] += np.clip(step, -2.0, 2.0)  # a bounded step keeps Newton inside its region from far away
        if np.abs(step).max() < tolerance:
            break
    rating = np.full(len(wins), np.nan)
    rating[known] = strength[known] * ELO_PER_NAT
    return rating


def _connected(met: np.ndarray, start: int) -> list[int]:
    seen, queue = {start}, [start]
    while queue:
        i = queue.pop()
        for j in np.flatnonzero(met[i]).tolist():
            if j not in seen:
                seen.add(j)
                queue.append(j)
    return sorted(seen)


def win_matrix(games: Sequence[Game], players: int) -> np.ndarray:
    """wins [K, K] of a list of games."""
    wins = np.zeros((players, players))
    for _, i, j, score in games:
        wins[i, j] += score
        wins[j, i] += 1.0 - score
    return wins


def ratings(games: Sequence[Game], players: int, anchor: int, samples: int, seed: int) -> list[dict[str, Any]]:
    """Rating of each player as {rating, lo, hi, games}, the 95 % interval by bootstrap over clusters (prompts).

    All three are None for a player that no chain of games connects to the anchor.
    """
    names = sorted({game[0] for game in games})
    row = {name: index for index, name in enumerate(names)}
    by_cluster = np.zeros((len(names), players, players))
    for game in games:
        by_cluster[row[game[0]]] += win_matrix([game], players)
    total = by_cluster.sum(0)
    best = fit_elo(total, anchor)
    draws = np.random.default_rng(seed)
    fits = np.asarray([
        fit_elo(np.tensordot(np.bincount(draws.integers(0, len(names), len(names)), minlength=len(names)),
                             by_cluster, axes=1), anchor)
        for _ in range(samples)
    ]) if samples else best[None]  # fmt: skip
    rows = []
    for i in range(players):
        known = fits[~np.isnan(fits[:, i]), i]  # a resample may lack the games that connect a player
        rated = not np.isnan(best[i]) and len(known)
        values = [best[i], *np.quantile(known, [0.025, 0.975])] if rated else [None] * 3
        rows.append(dict(zip(("rating", "lo", "hi"), values, strict=True)))
        rows[-1]["games"] = float(total[i].sum() + total[:, i].sum())
    return rows


def calibration(probs: Sequence[float], outcomes: Sequence[float], bins: int = 10) -> dict[str, Any]:
    """Expected calibration error, Brier score and the reliability table [{lo, hi, mean_prob, frequency, n}]."""
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if len(p) == 0:
        return {"ece": None, "brier": None, "bins": []}
    which = np.minimum((p * bins).astype(int), bins - 1)
    table = []
    for b in range(bins):
        inside = which == b
        if inside.any():
            table.append({
                "lo": b / bins, "hi": (b + 1) / bins, "mean_prob": float(p[inside].mean()),
                "frequency": float(y[inside].mean()), "n": int(inside.sum()),
            })  # fmt: skip
    ece = sum(row["n"] * abs(row["mean_prob"] - row["frequency"]) for row in table) / len(p)
    return {"ece": float(ece), "brier": float(((p - y) ** 2).mean()), "bins": table}
