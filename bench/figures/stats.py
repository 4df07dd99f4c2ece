"""Estimates over seeds and prompts, and the rules by which a claim counts as reproduced.

A statistic is computed per seed and averaged over seeds. Its 95 % interval is a bootstrap of both levels: seeds are
drawn with replacement and, within each, prompts; so it is wide when seeds differ, and says so with few seeds only
roughly. That is why the rules ask for agreement of all seeds besides. Of findings that are not there 3 % pass with
three seeds where prompts differ most, but 1 in 8 where seeds do: three signs are then alike by chance.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = "reproduced", "not reproduced", "not testable here"
SAMPLES = 500


class Nothing(ValueError):
    """There are no rows to compute with: a run kept none, or the prompts of two do not meet."""


Statistic = Callable[[int, np.ndarray], float]
"""(seed's index, rows drawn of that seed) -> value."""


def pooled(sizes: Sequence[int], statistic: Statistic, samples: int = SAMPLES) -> dict[str, Any]:
    """{mean, lo, hi, seeds: [{mean, lo, hi, n}]} of a statistic of `sizes[s]` rows in seed s."""
    draws = np.random.default_rng(0)
    whole = [statistic(s, np.arange(n)) for s, n in enumerate(sizes) if n]
    within = [[statistic(s, draws.integers(0, n, n)) for _ in range(samples)] for s, n in enumerate(sizes) if n]
    return _combined(sizes, whole, np.array(within), draws)


def means(values: Sequence[Sequence[float]], samples: int = SAMPLES) -> dict[str, Any]:
    """`pooled` mean of each seed's values."""
    draws = np.random.default_rng(0)
    arrays = [np.asarray(row, dtype=np.float64) for row in values if len(row)]
    within = [row[draws.integers(0, len(row), (samples, len(row)))].mean(1) for row in arrays]
    return _combined([len(row) for row in values], [row.mean() for row in arrays], np.array(within), draws)


def _combined(
    sizes: Sequence[int], whole: Sequence[float], within: np.ndarray, draws: np.random.Generator
) -> dict[str, Any]:
    """Values of the seeds [S] and of their resamples [S, samples] -> the estimate."""
    if not all(sizes):
        raise Nothing("no rows on some seed")
    chosen = draws.integers(0, len(sizes), within.shape)  # a seed drawn twice has its prompts drawn twice
    both = within[chosen, draws.integers(0, within.shape[1], within.shape)].mean(0)
    seeds = [
        dict(zip(("mean", "lo", "hi", "n"), (value, *np.quantile(row, [0.025, 0.975]).tolist(), n), strict=True))
        for value, row, n in zip(map(float, whole), within, sizes, strict=True)
    ]
    lo, hi = np.quantile(both, [0.025, 0.975]).tolist()
    return {"mean": float(np.mean(whole)), "lo": lo, "hi": hi, "seeds": seeds}


def differences(first: Sequence[dict[str, list]], second: Sequence[dict[str, list]], column: str) -> dict[str, Any]:
    """`means` of first minus second on the prompts that both have; one pair of tables {prompt, column} per seed."""
    return means([paired(a, b, column) for a, b in zip(first, second, strict=True)])


def paired(first: dict[str, list], second: dict[str, list], column: str) -> list[float]:
    """Differences of one seed's tables, prompt by prompt."""
    other = dict(zip(second["prompt"], second[column], strict=True))
    return [v - other[p] for p, v in zip(first["prompt"], first[column], strict=True) if p in other]


def positive(estimate: dict[str, Any]) -> str:
    """Reproduced if the interval lies above 0 and the value is above 0 on every seed."""
    holds = estimate["lo"] > 0 and all(seed["mean"] > 0 for seed in estimate["seeds"])
    return REPRODUCED if holds else NOT_REPRODUCED


def negligible(estimate: dict[str, Any], margin: float) -> str:
    """Reproduced if the interval lies within +-margin; not reproduced if it lies outside; otherwise not testable."""
    if -margin <= estimate["lo"] and estimate["hi"] <= margin:
        return REPRODUCED
    return NOT_REPRODUCED if estimate["lo"] > margin or estimate["hi"] < -margin else NOT_TESTABLE


def no_worse(estimate: dict[str, Any], margin: float) -> str:
    """Reproduced if the interval lies above -margin; not reproduced if it lies below 0; otherwise not testable."""
    if estimate["hi"] < 0:
        return NOT_REPRODUCED
    return REPRODUCED if estimate["lo"] >= -margin else NOT_TESTABLE


def at_least(estimate: dict[str, Any], bound: float) -> str:
    """Reproduced if the value reaches the bound on every seed."""
    return REPRODUCED if all(seed["mean"] >= bound for seed in estimate["seeds"]) else NOT_REPRODUCED


def claim(text: str, rule: str, verdict: str, estimate: dict[str, Any] | None = None) -> dict[str, Any]:
    """One of the paper's findings with the rule that decides it and what was decided."""
    found = {"claim": text, "rule": rule, "verdict": verdict}
    return found | ({"estimate": rounded(estimate)} if estimate else {})


def above(text: str, what: str, estimate: dict[str, Any]) -> dict[str, Any]:
    """A claim that a number is positive."""
    return claim(text, f"{what}: above 0 on every seed, interval above 0", positive(estimate), estimate)


def rounded(value: Any, digits: int = 4) -> Any:
    """Numbers as they are printed, all through a JSON value."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, list | tuple) else value
