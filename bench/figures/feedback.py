"""Figures 4 and 9 of the paper and its section 2.5: how good feedback labels are, by how the judge is asked."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.figures import stats
from bench.figures.figure import Figure, panel
from bench.figures.graph import Job
from bench.figures.stats import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, above, claim
from bench.figures.world import Results, World
from cai_fast import elo

PRINCIPLES, THOUGHTS = 16, 5
CALIBRATED = 0.1  # expected calibration error, at most
SAMPLES = 200
# Name -> P(A better) of a pair from what it was asked: [principle][order] direct, with one and with several thoughts.
Views = list[list[float]]
VARIANTS: dict[str, Callable[[Views, Views, Views], float]] = {
    "one order": lambda direct, one, several: direct[0][0],
    "both orders": lambda direct, one, several: np.mean(direct[0]),
    "hard": lambda direct, one, several: np.sign(np.mean(direct[0]) - 0.5) / 2 + 0.5,
    "4 principles": lambda direct, one, several: np.mean(direct[:4]),
    "16 principles": lambda direct, one, several: np.mean(direct),
    "CoT": lambda direct, one, several: np.mean(one[0]),
    "CoT, 4 principles": lambda direct, one, several: np.mean(one),
    "CoT, 5 samples": lambda direct, one, several: np.mean(several),
    "CoT in 20-80 %": lambda direct, one, several: np.clip(np.mean(one[0]), 0.2, 0.8),
    "CoT in 40-60 %": lambda direct, one, several: np.clip(np.mean(one[0]), 0.4, 0.6),
}


def asked(world: World, judge: str) -> Job:
    """A feedback model on AI pairs, and on pairs whose categories disagree."""
    folder = world.judge if judge == "separate" else world.path("main", "checkpoints", "base")
    given = {"judge": folder, "count": world.sizes.pairs, "principles": PRINCIPLES, "thoughts": THOUGHTS}
    source = world.main()
    measure = [("judge_columns", {"source": world.path("main"), **given})]
    skill = {"source": world.path("main"), "judge": folder, "count": world.sizes.pairs // 2,
             "thoughts": THOUGHTS}  # fmt: skip
    measure.append(("judge_skill", skill))
    needs = (source, world.judge_job()) if judge == "separate" else (source,)
    return Job(world.name(f"asked_{judge}"), (), needs, "",
               tuple((name, tuple(values.items())) for name, values in measure), 60 * world.sizes.cost)  # fmt: skip


def judges() -> tuple[str, ...]:
    """The base model, which is its own judge by default, and the one that was trained to judge."""
    return "base", "separate"


def jobs(world: World) -> list[Job]:
    if not world.toy:
        return [world.main()]
    return [asked(world, judge) for judge in judges()]


def table(columns: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """P(A better) of every variant, and whether A is better."""
    views = list(zip(columns["direct"], columns["cot1"], columns["cot"], strict=True))
    probs = {name: np.array([float(ask(*view)) for view in views]) for name, ask in VARIANTS.items()}
    return probs, (np.array(columns["harm"]) < 0).astype(float)


def accuracy(p: np.ndarray, truth: np.ndarray) -> float:
    """Share of labels on the right side; a tie is half right."""
    return float(np.mean(np.where(p == 0.5, 0.5, (p > 0.5) == (truth > 0.5))))


def brier(p: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean((p - truth) ** 2))


def confidence(p: np.ndarray, truth: np.ndarray) -> float:
    """Mean probability of the answer that a label prefers."""
    return float(np.mean(np.maximum(p, 1 - p)))


def ece(p: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error, every pair counted from both sides."""
    return elo.calibration([*p, *(1 - p)], [*truth, *(1 - truth)])["ece"]


MEASURES = {"accuracy": accuracy, "Brier score": brier, "confidence": confidence, "calibration error": ece}
Tables = Sequence[tuple[dict[str, np.ndarray], np.ndarray]]


def estimate(tables: Tables, measure: Callable, first: str, second: str = "") -> dict[str, Any]:
    """A measure of one variant, or of it minus that of another."""

    def value(s: int, rows: np.ndarray) -> float:
        probs, truth = tables[s]
        other = measure(probs[second][rows], truth[rows]) if second else 0.0
        return measure(probs[first][rows], truth[rows]) - other

    return stats.pooled([len(truth) for _, truth in tables], value, SAMPLES)


def reliability(tables: Tables, variant: str) -> list[tuple[float, dict[str, Any]]]:
    """(mean label, how often it was right) by tenths of the labels' range, all seeds together."""
    p = np.concatenate([probs[variant] for probs, _ in tables])
    truth = np.concatenate([truth for _, truth in tables])
    p, truth = np.concatenate([p, 1 - p]), np.concatenate([truth, 1 - truth])
    points = []
    for number in range(10):
        inside = np.minimum((p * 10).astype(int), 9) == number
        if inside.sum() >= 5:
            points.append((float(p[inside].mean()), stats.means([truth[inside]])))
    return points


def evaluate(results: Sequence[Results]) -> dict[str, Any]:
    """Every variant and judge on the same pairs."""
    world = results[0].world
    if not world.toy:  # nothing to draw
        return {"panels": {}, "claims": [claim("labels against the truth", "needs the truth", NOT_TESTABLE)]}
    tables = {judge: [table(r.of(asked(r.world, judge))["judge_columns"]) for r in results] for judge in judges()}
    panels = {
        name: panel("", name, {f"{judge} judge": [(v, estimate(found, measure, v)) for v in VARIANTS]
                               for judge, found in tables.items()})
        for name, measure in MEASURES.items()
    }  # fmt: skip
    for judge, found in tables.items():
        panels[f"reliability, {judge} judge"] = panel(
            "label", "share of pairs whose first answer has less harm",
            {v: reliability(found, v) for v in ("both orders", "16 principles", "CoT", "CoT, 5 samples")},
            diagonal=True,
        )  # fmt: skip
    skills = {judge: [r.of(asked(r.world, judge))["judge_skill"] for r in results] for judge in judges()}
    panels["category named by the principle"] = panel(
        "", "accuracy", {f"{judge} judge": skill_points(found) for judge, found in skills.items()}
    )
    return {"panels": panels, "claims": claims(tables["separate"], skills["separate"])}


KEYS = {"own": "by its principle", "general": 'by "harmful"', "cot1": "CoT", "cot": "CoT, 5 samples"}
Skills = Sequence[dict[str, Any]]


def skill_points(found: Skills) -> list[tuple[str, dict[str, Any]]]:
    """Accuracy on aligned and conflicting pairs by how they were asked about."""
    return [(f"{kind}, {words}", stats.means([right(skill, kind, key) for skill in found]))
            for kind in ("aligned", "conflict") for key, words in KEYS.items()]  # fmt: skip


def right(skill: dict[str, Any], kind: str, key: str) -> list[float]:
    """Whether each pair of a kind was judged rightly."""
    return [float(p > 0.5) for p, k in zip(skill[key], skill["kind"], strict=True) if k == kind]


def gain(found: Skills, more: str, less: str, kinds: Sequence[str] = ("aligned", "conflict")) -> dict[str, Any]:
    """Accuracy asked in one way minus another, on the same pairs."""
    return stats.means([
        np.concatenate([np.array(right(s, kind, more)) - np.array(right(s, kind, less)) for kind in kinds])
        for s in found
    ])  # fmt: skip


def claims(tables: Tables, skills: Skills) -> list[dict[str, Any]]:
    """The paper's statements about labels, on the judge that was trained to judge."""
    direct = estimate(tables, ece, "both orders")
    extreme = estimate(tables, confidence, "CoT", "both orders")
    over = [confidence(p["CoT"], t) - accuracy(p["CoT"], t) for p, t in tables]
    calibrated = max(seed["mean"] for seed in direct["seeds"]) <= CALIBRATED
    ways = {"without chain of thought": "own", "with it": "cot1"}
    aware = [
        above(f"The judge goes by the principle, {how}", "accuracy where total harm does not give the answer: by the "
              "principle minus by a general one", gain(skills, key, "general", ("conflict",)))
        for how, key in ways.items()
    ]  # fmt: skip
    squares = [(np.array([skill["cot1"], skill["cot"]]) - 1) ** 2 for skill in skills]
    fewer = stats.means([one - several for one, several in squares])
    sure = stats.positive(extreme) == REPRODUCED and min(over) > 0
    return [
        *aware,
        above("Chain of thought makes the judge more accurate (Fig. 4)", "accuracy on the question that is asked, with "
              "one chain of thought minus without", gain(skills, "cot1", "own")),
        above("Chain of thought makes labels more accurate by total harm, which they are used for", "accuracy of CoT "
              "minus direct", estimate(tables, accuracy, "CoT", "both orders")),
        above("Averaging 5 chains of thought helps a little more (Fig. 4)", "Brier score there, of 1 minus 5", fewer),
        claim("Labels without CoT are well calibrated (Fig. 9)", "calibration error by total harm at most "
              f"{CALIBRATED} on every seed", REPRODUCED if calibrated else NOT_REPRODUCED, direct),
        claim("CoT labels are near 0 or 1 and over-confident, hence the clamp (section 4.1)",
              "confidence of CoT minus direct: above 0 on every seed, interval above 0; confidence of CoT above its "
              "accuracy by total harm on every seed", REPRODUCED if sure else NOT_REPRODUCED, extreme),
        ensemble("with chains of thought", aware[1], estimate(tables, accuracy, "CoT, 4 principles", "CoT")),
        ensemble("without", aware[0], estimate(tables, accuracy, "16 principles", "both orders")),
        above("Asking in both orders helps (Lee et al. 2023)", "accuracy of both orders minus one",
              estimate(tables, accuracy, "both orders", "one order")),
    ]  # fmt: skip


def ensemble(how: str, aware: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Whether several principles are better than one; no test where the judge ignores which one it is."""
    tested = above(f"Ensembles over principles make labels more robust (section 4.3), {how}", "accuracy of several "
                   "minus one principle; not testable where the judge does not go by the principle", found)  # fmt: skip
    return tested if aware["verdict"] == REPRODUCED else tested | {"verdict": NOT_TESTABLE}


FIGURES = (Figure("labels", jobs, evaluate),)
