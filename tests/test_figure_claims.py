"""The figures' statistics: intervals, and verdicts on planted trends."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.figures import feedback, measures, ratings, reinforcement, stats, supervised
from bench.figures.graph import Job
from bench.figures.stats import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED
from bench.figures.world import QUICK, Results, World
from cai_fast import config, constitution

PROMPTS = [f"p{n}" for n in range(120)]


def planted(levels: Sequence[float], noise: float, seed: int, rows: int = 120) -> dict[str, dict[str, list]]:
    """Chains whose score and helpfulness at revision k have mean levels[k], and whose harm falls by as much."""
    draw = np.random.default_rng(seed)
    result = {}
    for k, level in enumerate(levels):
        score = level + noise * draw.standard_normal(rows)
        result[str(k)] = {"prompt": PROMPTS[:rows], "pm_eval": score.tolist(), "harm": (5 - score).tolist(),
                          "helpful": (0.5 + 0 * score).tolist(), "text": [f"a b c {seed}"] * rows}  # fmt: skip
    return result


class Planted(Results):
    """Results that are made up: the tables of chains of every job, by its name."""

    def __init__(self, seed: int, tables: dict[str, dict[str, dict[str, list]]]) -> None:
        self.world, self.tables = World(seed, QUICK), tables

    def chains(self, job: Job) -> dict[str, dict[str, list]]:
        return self.tables.get(job.name.split("/")[1], self.tables[""])

    def ended(self, job: Job) -> str:
        return ""

    def commits(self, jobs: Sequence[Job]) -> set[str]:
        return {"a commit"}


def verdicts(found: dict[str, Any]) -> list[str]:
    return [claim["verdict"] for claim in found["claims"]]


def test_revisions_that_help_are_found_and_those_that_do_not_are_not() -> None:
    rising = [Planted(s, {"": planted([0, 1, 1.4, 1.6, 1.7], 0.5, s)}) for s in range(3)]
    assert verdicts(supervised.revisions(rising)) == [REPRODUCED, REPRODUCED, REPRODUCED, NOT_REPRODUCED]
    noise = [Planted(s, {"": planted([0, 0, 0, 0, 0], 1.0, s)}) for s in range(3)]
    assert verdicts(supervised.revisions(noise)) == [NOT_REPRODUCED] * 4
    falling = [Planted(s, {"": planted([0, -1, -2, -3, -4], 0.5, s)}) for s in range(3)]
    assert set(verdicts(supervised.revisions(falling))) == {NOT_REPRODUCED}


def test_one_seed_that_disagrees_spoils_a_trend() -> None:
    results = [Planted(s, {"": planted([0, 1, 2, 3, 4] if s else [0, -0.1, -0.2, -0.3, -0.4], 0.1, s)})
               for s in range(3)]  # fmt: skip
    assert verdicts(supervised.revisions(results))[:2] == [NOT_REPRODUCED] * 2


def test_a_positive_number_needs_every_seed() -> None:
    def verdict(*means: float) -> str:
        return stats.positive({"lo": 0.1, "seeds": [{"mean": mean} for mean in means]})

    assert verdict(1, 2, 3) == REPRODUCED and verdict(1, 2, 3, 4, -0.1) == NOT_REPRODUCED


def test_no_difference_is_told_from_a_difference_and_from_too_few_prompts() -> None:
    def result(one: float, noise: float) -> str:
        tables = {"": planted([0, 1, 2, 3, 4], noise, 0), "principles_general_1": planted([0, 1, 2, 3, one], noise, 1)}
        return verdicts(supervised.principles([Planted(s, tables) for s in range(3)]))[0]

    assert result(4, 0.1) == REPRODUCED and result(2, 0.1) == NOT_REPRODUCED and result(4, 5.0) == NOT_TESTABLE
    idle = [Planted(s, {"": planted([1, 1, 1, 1, 1], 0.0, 0)}) for s in range(3)]
    assert verdicts(supervised.principles(idle)) == [NOT_TESTABLE] * 2  # revisions that change nothing


def test_critiques_that_help_small_models_only_are_found() -> None:
    def results(small: float, large: float) -> list[Planted]:
        return [Planted(s, {
            "": planted([0, 1, 2, 3, 4], 0.3, s), "base_small": planted([0, 1, 2, 3, 4 + small], 0.3, s + 9),
            "base_large": planted([0, 1, 2, 3, 4 + large], 0.3, s + 19),
        }) for s in range(3)]  # fmt: skip

    assert verdicts(supervised.critique(results(1, 0.1))) == [REPRODUCED, REPRODUCED, REPRODUCED]
    assert verdicts(supervised.critique(results(1, 1)))[:2] == [REPRODUCED, NOT_REPRODUCED]
    assert verdicts(supervised.critique(results(0, -1))) == [NOT_REPRODUCED, NOT_REPRODUCED, NOT_REPRODUCED]


def test_too_few_prompts_do_not_show_that_critiques_are_harmless() -> None:
    results = [Planted(s, {"": planted([0, 1, 2, 3, 4], 0.3, s), "base_large": planted([0, 1, 2, 3, 4], 9.0, s + 19)})
               for s in range(3)]  # fmt: skip
    assert verdicts(supervised.critique(results))[2] == NOT_TESTABLE


def test_both_models_prompts_count_where_two_gains_are_compared() -> None:
    """The smallest model's gain is certain, the largest one's is not: so is their difference not."""
    wide = planted([0, 1, 2, 3, 4], 9.0, 19)
    results = [Planted(s, {"": planted([0, 1, 2, 3, 4], 0.0, 0), "base_small": planted([0, 1, 2, 3, 5], 0.0, 0),
                           "base_large": wide}) for s in range(3)]  # fmt: skip
    claim = supervised.critique(results)["claims"][1]
    standard_error = np.std(wide["4"]["pm_eval"]) / 120**0.5
    assert claim["estimate"]["seeds"][0]["hi"] - claim["estimate"]["seeds"][0]["lo"] > 3 * standard_error


def test_diversity_is_counted_on_as_many_answers_and_lies_in_its_interval() -> None:
    few, more = (
        {"prompt": prompts, "text": [f"{p} is new" for p in prompts]} for prompts in (["a", "b"], list("abcd"))
    )
    shared = [{"a", "b"}]
    assert supervised.diversity([few], shared) == supervised.diversity([more], shared)
    found = supervised.diversity([few], shared)
    assert found["mean"] == 1.5 and found["lo"] <= found["mean"] <= found["hi"]  # {a is, b is, is new} of 2 answers


def test_the_mean_of_seeds_and_its_interval() -> None:
    found = stats.means([[1.0, 1.0], [3.0, 3.0]])
    assert found["mean"] == 2.0 and (found["lo"], found["hi"]) == (1.0, 3.0)  # all its width is that between seeds
    assert [seed["mean"] for seed in found["seeds"]] == [1.0, 3.0] and found["seeds"][0]["n"] == 2
    within = stats.means([np.random.default_rng(0).standard_normal(400)])
    assert 0.16 < within["hi"] - within["lo"] < 0.24  # 2 x 1.96 / 20
    with pytest.raises(stats.Nothing):
        stats.means([[1.0], []])


def test_a_seed_that_is_drawn_twice_has_its_prompts_drawn_twice() -> None:
    """Three seeds of equal values: what is left is the spread of a mean of three times as many prompts."""
    values = np.random.default_rng(0).standard_normal(100)
    found = stats.means([values] * 3, samples=4000)
    expected = 2 * 1.96 * values.std() / 300**0.5
    assert (found["hi"] - found["lo"]) == pytest.approx(expected, rel=0.06)


def test_noise_is_taken_for_a_trend_as_often_as_the_page_says() -> None:
    draw = np.random.default_rng(5)

    def share(between: float, within: float) -> float:
        seeds = between * draw.standard_normal((300, 3, 1)) + within * draw.standard_normal((300, 3, 50))
        return sum(stats.positive(stats.means(values, 200)) == REPRODUCED for values in seeds) / 300

    assert share(0.0, 1.0) <= 0.04 and share(1.0, 7.0) <= 0.06  # 7 / sqrt(50): prompts as much as seeds
    assert 0.08 <= share(1.0, 0.01) <= 0.17  # three signs alike


def test_differences_are_taken_on_the_prompts_that_both_have() -> None:
    first, second = {"prompt": ["a", "b", "c"], "x": [1, 2, 3]}, {"prompt": ["c", "b"], "x": [1, 5]}
    assert stats.paired(first, second, "x") == [-3, 2]


def test_labels_are_measured_by_hand() -> None:
    # Pairs by [principle][order]: the first is better in both; the judge is right, and once only in one order.
    columns = {"harm": [-1, -2], "direct": [[[0.9, 0.7]], [[0.6, 0.2]]],
               "cot1": [[[1.0, 1.0], [0.4, 0.2]], [[0.9, 0.9], [0.9, 0.9]]],
               "cot": [[[1.0, 0.9]], [[0.6, 0.6]]]}  # fmt: skip
    probs, truth = feedback.table(columns)
    assert truth.tolist() == [1, 1] and np.allclose(probs["both orders"], [0.8, 0.4])
    assert probs["hard"].tolist() == [1, 0] and probs["CoT in 40-60 %"].tolist() == [0.6, 0.6]
    assert np.allclose(probs["CoT, 4 principles"], [0.65, 0.9])
    assert feedback.accuracy(probs["one order"], truth) == 1 and feedback.accuracy(probs["both orders"], truth) == 0.5
    assert feedback.brier(probs["both orders"], truth) == pytest.approx((0.04 + 0.36) / 2)
    assert feedback.confidence(probs["both orders"], truth) == pytest.approx((0.8 + 0.6) / 2)


def test_a_calibrated_label_has_no_calibration_error_and_a_sure_one_has() -> None:
    draw = np.random.default_rng(0)
    p = draw.uniform(0, 1, 4000)
    truth = (draw.uniform(0, 1, 4000) < p).astype(float)
    assert feedback.ece(p, truth) < 0.03 and feedback.ece((p > 0.5).astype(float), truth) > 0.2


def policy(harm: float, helpful: float, seed: int) -> dict[str, list]:
    draw = np.random.default_rng(seed)
    return {"prompt": PROMPTS, "harm": draw.poisson(harm, 120).tolist(), "evasive": [0.0] * 120,
            "helpful": np.clip(helpful + 0.05 * draw.standard_normal(120), 0, 1).tolist(),
            "pm_eval": (-draw.poisson(harm, 120)).tolist()}  # fmt: skip


def test_elo_orders_policies_by_what_they_did() -> None:
    players = [{"base": policy(2.0, 0.9, s), "SL-CAI": policy(0.8, 0.9, s + 5), "40": policy(0.05, 0.9, s + 9)}
               for s in range(3)]  # fmt: skip
    every = [ratings.games(p, "less harm") for p in players]
    elo = ratings.ratings(every, ["base", "SL-CAI", "40"])
    assert stats.positive(elo("SL-CAI", "base")) == stats.positive(elo("40")) == REPRODUCED
    assert stats.positive(elo("base")) == NOT_REPRODUCED and elo("SL-CAI")["mean"] == 0
    assert np.allclose(every[0] + every[0].transpose(0, 2, 1), 1 - np.eye(3))


def test_an_algorithm_must_lower_harm_and_keep_helpfulness() -> None:
    start, base = ([policy(1.0, 0.9, s + shift) for s in range(3)] for shift in (0, 50))
    good, idle = ([policy(harm, 0.9, s + 20) for s in range(3)] for harm in (0.2, 1.0))
    dull = [policy(0.2, 0.5, s + 30) for s in range(3)]
    found = [reinforcement.works("x", harm, start, helps, base)["verdict"]
             for harm, helps in ((good, good), (idle, good), (good, dull))]  # fmt: skip
    assert found == [REPRODUCED, NOT_REPRODUCED, NOT_REPRODUCED]


def test_reward_in_the_square_root_of_kl() -> None:
    x, y = reinforcement.curve({"rl/kl_exact": [0.0, 1.0, 4.0, None], "rl/score": [1.0, 2.0, 3.0, 4.0]})
    assert x == [0, 1, 2] and reinforcement.explained(x, y) == pytest.approx(1.0)
    assert reinforcement.explained(x, y[::-1]) == pytest.approx(-1.0) and reinforcement.explained(x, [2.0] * 3) == 0


def answered(seed: int, *, harm: float = 0.5, helpful: float = 0.8, objects: float = 0.0, kl: float = 0.5,
             score: float = 0.0, held_out: float = 0.0) -> dict[str, list]:  # fmt: skip
    """A policy's answers to a group of prompts, by their means."""
    draw = np.random.default_rng(seed)
    noise = 0.1 * draw.standard_normal((5, 120))
    return {
        "prompt": PROMPTS, "harm": (harm + noise[0]).tolist(), "helpful": (helpful + noise[1]).tolist(),
        "evasive": [0.0] * 120, "malformed": [0.0] * 120, "kl": (kl + noise[2]).tolist(),
        "objection": (draw.uniform(size=120) < objects).astype(float).tolist(),
        "pm": (score + 10 * noise[3]).tolist(), "pm_eval": (held_out + 10 * noise[4]).tolist(),
    }  # fmt: skip


class PlantedPolicies(Planted):
    """Results that are made up: what `facts(job, step)` says of each policy's answers; SL-CAI has the defaults."""

    def __init__(self, seed: int, facts: Callable[[str, int], dict[str, float]], curve: Sequence[float] = ()) -> None:
        self.world, self.facts, self.curve = World(seed, QUICK), facts, list(curve)

    def of(self, job: Job) -> dict[str, Any]:
        name, last = job.name.split("/")[1], 80 if "labels" in job.name else 40

        def groups(step: int) -> dict[str, dict[str, list]]:
            facts = {} if name == "main" else self.facts(name, step)
            return {g: answered(100 * self.world.seed + step, **facts) for g in ("red_team", "benign")}

        policies = {policy: groups(last) for policy in ("base", "sl_cai", "rl_cai")}
        training = {"rl/kl_exact": [k**2 for k in range(len(self.curve))], "rl/score": self.curve}
        steps = range(20 if last == 80 else 8, last + 1, 20 if last == 80 else 8)
        return {"policies": policies, "snapshots": {str(s): groups(s) for s in steps}, "training": training}


def policy_verdicts(evaluate: Callable, facts: Callable[[str, int], dict[str, float]], *curve: float) -> list[str]:
    return verdicts(evaluate([PlantedPolicies(s, facts, curve) for s in range(3)]))


def test_labels_that_matter_to_policies_are_told_from_those_that_do_not() -> None:
    hard, sure = {"harm": 0.9, "helpful": 0.5}, {"kl": 2.0}

    def planted_labels(name: str, step: int) -> dict[str, float]:
        kind = {"labels_hard": hard, "labels_cot": sure}.get(name, {})
        return kind | {"objects": 0.6 if step > 40 else 0.1}

    assert policy_verdicts(reinforcement.soft_hard, planted_labels) == [REPRODUCED] * 5 + [NOT_REPRODUCED]
    assert policy_verdicts(reinforcement.soft_hard, lambda name, step: {}) == [NOT_REPRODUCED] * 6
    swapped = policy_verdicts(reinforcement.soft_hard, lambda name, step: hard if name == "labels_soft" else {})
    assert swapped == [NOT_REPRODUCED] * 6
    unclamped = policy_verdicts(
        reinforcement.soft_hard, lambda name, step: {"objects": 0.0 if name == "labels_cot_in_40-60" else 0.9}
    )
    assert unclamped[3:] == [NOT_REPRODUCED, REPRODUCED, REPRODUCED]  # early, and kept
    # boilerplate of one kind of label out of four, and less of it with the others, is none
    one = policy_verdicts(
        reinforcement.soft_hard, lambda name, step: {"objects": 0.4 if (name == "labels_hard") == (step > 40) else 0.1}
    )
    assert one[3] == NOT_REPRODUCED


class Ended(PlantedPolicies):
    """On seed 1 a guard ended RL early: the last policy is that of an earlier iteration, snapshots are missing."""

    kept = 0

    def of(self, job: Job) -> dict[str, Any]:
        found = super().of(job)
        last = max(map(int, found["snapshots"]))
        if self.world.seed == 1:
            found["snapshots"] = {s: t for s, t in found["snapshots"].items() if int(s) <= self.kept or int(s) == last}
        return found


def test_runs_that_a_guard_ended_are_compared_at_the_iterations_that_all_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def facts(name: str, step: int) -> dict[str, float]:
        return {"harm": 0.5 - step / 200, "held_out": 0.1 * step}

    monkeypatch.setattr(Ended, "kept", 16)
    found = ratings.evaluate([Ended(s, facts) for s in range(3)])
    drawn = [x for x, _ in found["panels"]["harmlessness, truth"]["lines"]["RL-CAI"]]
    assert drawn == [0, 8, 16, 40]
    whole = ratings.evaluate([PlantedPolicies(s, facts) for s in range(3)])
    assert [c["verdict"] for c in found["claims"]] == [c["verdict"] for c in whole["claims"]]
    monkeypatch.setattr(Ended, "kept", 40)
    found = reinforcement.soft_hard([Ended(s, facts) for s in range(3)])
    assert [x for x, _ in found["panels"]["KL to SL-CAI (nats), red-team prompts"]["lines"]["hard"]] == [0, 20, 40, 80]
    monkeypatch.setattr(Ended, "kept", 20)
    with pytest.raises(stats.Nothing, match="before iteration 40"):
        reinforcement.soft_hard([Ended(s, facts) for s in range(3)])


def test_a_weight_that_makes_policies_annoying_is_found() -> None:
    heavy = {"harm": 0.1, "helpful": 0.4, "objects": 0.8}
    bound = policy_verdicts(reinforcement.weight, lambda name, _: heavy if name == "weight_8" else {})
    loose = policy_verdicts(reinforcement.weight, lambda name, _: heavy if name == "weight_8_loose" else {})
    assert bound == loose[::-1] == [REPRODUCED] * 3 + [NOT_REPRODUCED] * 3
    light = policy_verdicts(reinforcement.weight, lambda name, _: heavy if "weight_0.25" in name else {})
    assert light == policy_verdicts(reinforcement.weight, lambda name, _: {}) == [NOT_REPRODUCED] * 6


def test_reward_that_is_bought_with_kl_is_found() -> None:
    bought = {"kl": 3.0, "score": 4.0, "held_out": 2.0}

    def low(name: str, _: int) -> dict[str, float]:
        return bought if name == "kl_coef_0.001" else {}

    assert policy_verdicts(reinforcement.frontier, low, 0.0, 1.1, 1.9, 3.0) == [REPRODUCED] * 3 + [NOT_REPRODUCED]
    falling = policy_verdicts(reinforcement.frontier, low, 3.0, 2.0, 1.0, 0.0)
    assert falling == [REPRODUCED, NOT_REPRODUCED, REPRODUCED, NOT_REPRODUCED]
    assert policy_verdicts(reinforcement.frontier, lambda name, _: {}, 1.0, 1.0, 1.0) == [NOT_REPRODUCED] * 4
    later = policy_verdicts(reinforcement.frontier, lambda name, step: bought if step > 8 else {}, 1.0)
    assert later[3] == REPRODUCED
    always = policy_verdicts(reinforcement.frontier, lambda name, step: bought, 1.0)
    assert always[2:] == [REPRODUCED, NOT_REPRODUCED]


def test_all_algorithms_are_judged_alike() -> None:
    def good(name: str, _: int) -> dict[str, float]:
        return {"harm": 0.2} if name != "grpo" else {"harm": 0.2, "helpful": 0.7}

    expected = [REPRODUCED, REPRODUCED, NOT_REPRODUCED, REPRODUCED]
    assert policy_verdicts(reinforcement.algorithms, good) == expected


def test_chains_of_several_principles_count_as_their_mean() -> None:
    runs = [{"0": {"prompt": ["b", "a"], "harm": [2.0, 1.0], "text": ["x", "y"]}},
            {"0": {"prompt": ["c", "a"], "harm": [7.0, 4.0], "text": ["x", "y"]}}]  # fmt: skip
    assert supervised.averaged(runs) == {"0": {"prompt": ["a"], "harm": [2.5]}}
    assert supervised.averaged(runs[:1]) is runs[0]


def test_subsets_hold_principles_of_both_kinds_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config.load(["--config", "toy", "--run-dir", str(tmp_path)])
    monkeypatch.setattr(measures, "context", lambda run: SimpleNamespace(config=made))
    found = measures.subsets(tmp_path / "out", "", [1, 8], [2, 4], 4)
    categories = {p.id: p.categories for p in constitution.load("toy").principles}
    assert [len(categories[name]) > 1 for name in found["mixed_4"]] == [True, False, True, False]
    assert [found[f"alone_{k}"][0] for k in range(4)] == found["mixed_4"] and found["mixed_2"] == found["mixed_4"][:2]
    for name, ids in found.items():
        written = constitution.load(str(tmp_path / "out" / f"{name}.toml"))
        asked = {p.id for p in written.principles if p.critique_request}
        assert asked == set(ids)
        assert "general" not in name or all(len(categories[p]) > 1 for p in ids)
