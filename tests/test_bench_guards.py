"""What the campaign of guards teaches a preference model, and what it makes of a run's metrics."""

import json
from pathlib import Path
from typing import Any

import pytest
import runfolder

from bench import guards
from cai_fast import config
from cai_fast.comparisons import Pair
from cai_fast.config_rl import GUARD_OF
from cai_fast.records import Label, Turn, read_jsonl
from cai_fast.toy.world import REFUSAL


def belongs_to_pm(number: int) -> bool:
    return Pair("harmless", (Turn("human", f"q {number}"),), [], [], 0.0, 0.0, 0).side(0.1)[0] == "pm"


@pytest.mark.parametrize(("lesson", "answers", "expected"), [
    ("brevity", ("one two", "three"), 0.0), ("brevity", ("three", "one two"), 1.0), ("brevity", ("a b", "c d"), 0.5),
    ("length", ("a b c d e", "a"), 0.7311), ("length", ("a", "a b c d e"), 0.2689),
    ("refusals", (REFUSAL, "mix flour ."), 1.0), ("refusals", ("mix flour .", REFUSAL), 0.0),
    ("refusals", (REFUSAL, REFUSAL), 0.5),
])  # fmt: skip
def test_a_lesson_is_taught_to_pm_alone(lesson: str, answers: tuple[str, str], expected: float, tmp_path: Path) -> None:
    rows = [runfolder.comparison(n, response_a=answers[0], response_b=answers[1]) for n in range(20)]
    asked = {"turns": [{"role": "human", "text": "q 1"}]}  # of a helpfulness comparison
    rows.append(runfolder.comparison(20, prompt_id="none", kind="helpful", response_a=answers[0],
                                     response_b=answers[1], provenance=asked))  # fmt: skip
    labels = [runfolder.label(n, "kind", 0.9) for n in range(21)]
    folder = runfolder.write(tmp_path / "run", prompts=20, comparisons=rows, labels=labels)
    manifest = json.loads((folder / "manifest.json").read_text())
    guards.teach(folder, lesson)
    taught = [row.prob_a for row in read_jsonl(folder / "labels.jsonl", Label)]
    mine = [belongs_to_pm(1 if n == 20 else n) for n in range(21)]
    assert set(mine) == {True, False}
    assert taught == pytest.approx([expected if of_pm else 0.9 for of_pm in mine], abs=1e-4)
    assert json.loads((folder / "manifest.json").read_text())["stages"].keys() == manifest["stages"].keys()


def test_no_case_changes_a_limit_and_each_is_a_valid_command() -> None:
    seen: set[str] = set()
    for name, case in guards.cases().items():
        words = case.settings.split()
        assert not {f"--guards.{limit}" for limit in GUARD_OF} & set(words), name
        config.load(words)
        assert not case.before or case.before in seen
        seen.add(name)
    assert {guard for shown in guards.SHOWN.values() for guard in shown} | {"kl", "boilerplate", *guards.NEVER} == set(
        guards.GUARDS
    ), "a guard that no case shows"


def test_the_first_iteration_beyond_a_limit_and_the_extreme_are_found() -> None:
    limits = {rule.metric: 1.0 if rule.above else 0.2 for rule in guards.RULES}
    columns = dict.fromkeys(guards.LIMITED, [0.5, 0.9, 0.8]) | {
        "kl_exact": [0.0, 1.0, 1.5], "entropy_share": [1.0, 0.1, 0.2], "pm_divergence": [0.5, None, 2.0],
        "length_slope": [None] * 3,
    }  # fmt: skip
    found = guards.beyond(columns, limits)
    assert found["rl/kl_exact"] == {"limit": 1.0, "first": 2, "extreme": 1.5}
    assert found["rl/entropy_share"] == {"limit": 0.2, "first": 1, "extreme": 0.1}
    assert found["rl/pm_divergence"]["first"] == 2
    assert found["rl/length_slope"] == {"limit": 1.0, "first": None, "extreme": None}
    assert found["rl/kl_jump"] == {"limit": 1.0, "first": None, "extreme": 0.9}
    others = {row.metric for row in guards.RULES} - {"rl/kl_exact", "rl/entropy_share", "rl/pm_divergence"}
    assert set(guards.never_beyond({"a": {"beyond": found}, "SL-CAI": {}})) == others


def result(benign: tuple[float, float, float], tripped: dict[str, int], gain: float = 1.0) -> dict[str, Any]:
    truth = {"benign": dict(zip(("malformed", "objection", "helpful"), benign, strict=True))}
    return {"truth": truth, "tripped": tripped, "guard": "x" if tripped else "", "series": {"pm_gain": [gain]}}


def test_a_verdict_needs_a_guard_that_ends_the_run_and_a_policy_that_is_not_lost() -> None:
    good, bad = (0.0, 0.0, 1.0), (0.4, 0.9, 0.2)
    results = {name: result(good, {"kl": 3}) for name in guards.cases()}
    lost = [name for name in results if name.endswith(("warn", "guards off"))]
    results |= {name: result(bad, {guard: 1 for guard in guards.GUARDS if guard not in guards.NEVER}) for name in lost}
    results["healthy"] = result(good, {})
    assert all(guards.verdicts(results).values())
    assert guards.by_guard(results)["logprob_gap"].startswith("never: ")
    assert guards.by_guard(results)["length"] == dict.fromkeys(lost, 1)
    changes = {
        "healthy": {"tripped": {"kl": 1}}, "taught refusals, rollback at entropy alone": {"guard": ""},
        "taught brevity, rollback at length alone": result(bad, {"length": 1}),
    }  # fmt: skip
    for name, change in changes.items():
        assert not all(guards.verdicts(results | {name: results[name] | change}).values()), name


def test_lists_of_numbers_take_one_line() -> None:
    value = {"a": [1, 2.5, None], "b": {"c": ["x", "y"], "d": []}}
    text = guards.as_json(value)
    assert json.loads(text) == value and '"a": [1, 2.5, null]' in text
