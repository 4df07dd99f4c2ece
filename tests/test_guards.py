"""The guards: numbers against plain references, each against its own fault and no other, what they remember."""

import json
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest

from cai_fast import config, guards
from cai_fast.config_rl import GuardsConfig
from cai_fast.errors import InputError
from cai_fast.guards import GUARDS, RULES, Guards, Moments, Trip

STEPS = 20
PLANTED = 12  # the iteration from which a fault shows


def healthy(step: int) -> dict[str, float]:
    """The means of an iteration of a run that goes well: both preference models gain, KL grows and levels out."""
    noise = random.Random(step)
    gain = 1.0 - math.exp(-step / 4)
    return {
        "rl/reward": gain, "rl/kl_exact": 0.8 * gain + 0.05 * noise.random() * (step > 0), "rl/entropy": 2.0 - gain,
        "rl/refusal_rate_red_team": 0.1 * noise.random(), "rl/refusal_rate_helpful": math.nan,
        "rl/length": 40 + 3 * noise.random(), "rl/boilerplate": 0.3 + 0.04 * noise.random(), "rl/logprob_gap": 1e-6,
        "rl/length_slope": 0.8 * (-1) ** step,
        "rl/score": 5.0 + 2.0 * gain + 0.1 * noise.random(), "rl/score_deviation": 2.0,
        "rl/pm_eval": -3.0 + 0.4 * gain + 0.02 * noise.random(), "rl/pm_eval_deviation": 0.5,
    }  # fmt: skip


def run(watch: Guards, fault: dict[str, float], start: int = 0) -> Iterator[tuple[dict[str, float], list[Trip]]]:
    for step in range(start, STEPS):
        values = healthy(step) | (fault if step >= PLANTED else {})
        values |= watch.derive(step, values)
        yield values, watch.judge(step, values)


@pytest.mark.parametrize(("guard", "fault"), [
    ("kl", {"rl/kl_exact": 2.5}),  # not more than five times what it was
    ("kl_jump", {"rl/kl_exact": 5.0}),
    ("refusals", {"rl/refusal_rate_red_team": 0.95}),
    ("refusals", {"rl/refusal_rate_helpful": 0.95}),
    ("entropy", {"rl/entropy": 0.1}),
    ("entropy", {"rl/entropy": 0.39}),
    ("divergence", {"rl/pm_eval": -3.1}),  # below where it was, while the other has gained a deviation
    ("divergence", {"rl/score": 9.0}),
    ("length", {"rl/length": 90.0}),
    ("length", {"rl/length": 15.0}),
    ("length", {"rl/length_slope": 0.95}),
    ("boilerplate", {"rl/boilerplate": 0.45}),
    ("logprob_gap", {"rl/logprob_gap": 2e-3}),
    ("finite", {"rl/reward": math.nan}),
    ("finite", {"rl/kl_exact": math.inf}),
])  # fmt: skip
def test_a_fault_trips_its_guard_and_no_other(guard: str, fault: dict[str, float]) -> None:
    settings = GuardsConfig(max_kl=2.0 if guard == "kl" else 100.0, min_entropy=0.15)
    watch = Guards(settings, precise=True)
    trips = [(step, trip) for step, (_, found) in enumerate(run(watch, fault)) for trip in found]
    others = {trip.guard for _, trip in trips} - {guard}
    assert not others - ({"kl", "kl_jump"} if fault == {"rl/kl_exact": math.inf} else set())
    steps = [step for step, trip in trips if trip.guard == guard]
    assert steps[0] == PLANTED and watch.report()[guard]["tripped"] == PLANTED
    assert [watch.is_first(trip) for _, trip in trips if trip.guard == guard][0]
    assert sum(watch.is_first(trip) for _, trip in trips if trip.guard == guard) == steps.count(PLANTED)
    if guard == "kl_jump":
        assert len(steps) < STEPS - PLANTED, "a KL that stays where it is jumps no more"


def test_a_healthy_run_trips_nothing_and_guards_that_are_off_neither() -> None:
    watch = Guards(GuardsConfig(max_kl=4.0), precise=True)
    assert not [trip for _, found in run(watch, {}) for trip in found]
    assert watch.report()["kl"] == {"action": "rollback", "limits": {"rl/kl_exact": 4.0}, "tripped": None, "reason": ""}
    assert set(watch.report()) == {*GUARDS, "finite"}
    off = Guards(GuardsConfig(**dict.fromkeys(GUARDS, "off")), precise=True)
    worst = {rule.metric: 1e9 if rule.above else -1.0 for rule in RULES}
    assert off.judge(3, healthy(3) | worst) == []
    assert [trip.guard for trip in off.judge(3, healthy(3) | {"rl/entropy": math.nan})] == ["finite"]


def test_comparisons_with_the_start_by_hand() -> None:
    watch = Guards(GuardsConfig(), precise=True)
    start = healthy(0) | {"rl/score": 1.0, "rl/pm_eval": 2.0, "rl/length": 20.0, "rl/boilerplate": 0.25}
    first = watch.derive(0, start)
    assert first == {
        "rl/kl_jump": 0, "rl/entropy_share": 1, "rl/length_change": 1, "rl/boilerplate_rise": 0, "rl/pm_gain": 0,
        "rl/pm_eval_gain": 0, "rl/pm_divergence": 0,
    }  # fmt: skip
    values = start | {"rl/score": 4.0, "rl/pm_eval": 2.25, "rl/length": 8.0, "rl/boilerplate": 0.5, "rl/entropy": 0.5}
    second = watch.derive(1, values | {"rl/kl_exact": 0.5})
    assert second == {
        "rl/kl_jump": 2.5, "rl/entropy_share": 0.25, "rl/length_change": 2.5, "rl/boilerplate_rise": 0.25,
        "rl/pm_gain": 1.5, "rl/pm_eval_gain": 0.5, "rl/pm_divergence": 1.0,
    }  # fmt: skip
    for step, kl in ((2, 1.0), (3, 9.0)):
        assert watch.derive(step, values | {"rl/kl_exact": kl})["rl/kl_jump"] == pytest.approx(
            kl / {2: 0.25, 3: 0.5}[step]
        )
    unmeasured = {name: value for name, value in values.items() if not name.startswith("rl/pm_eval")}
    later = watch.derive(4, unmeasured)
    assert not {"rl/pm_eval_gain", "rl/pm_divergence"} & set(later) and later["rl/pm_gain"] == 1.5
    constant = Guards(GuardsConfig(), precise=True)
    assert math.isnan(constant.derive(0, start | {"rl/score_deviation": 0.0})["rl/pm_gain"])


def test_a_limit_itself_is_allowed() -> None:
    watch = Guards(GuardsConfig(**dict.fromkeys(GUARDS, "stop"), min_entropy=0.5), precise=False)
    limits = {rule.metric: watch.limit(rule) for rule in RULES}
    assert limits["rl/logprob_gap"] == 0.05
    base = healthy(3) | {"rl/reward": 0.0}
    assert watch.judge(3, base | limits) == []
    for rule in RULES:
        beyond = limits[rule.metric] * (1.001 if rule.above else 0.999)
        (trip,) = watch.judge(3, base | limits | {rule.metric: beyond})
        assert (trip.guard, trip.action, trip.step) == (rule.guard, "stop", 3)
        assert f"{'above' if rule.above else 'below'} guards.{rule.limit} = {limits[rule.metric]}" in trip.reason


def test_the_strongest_action_ends_training() -> None:
    trips = {action: Trip(action, action, 1, "x") for action in ("warn", "stop", "rollback")}
    assert guards.ending([trips["warn"]]) is None and guards.ending([]) is None
    assert guards.ending([trips["warn"], trips["stop"]]) is trips["stop"]
    assert guards.ending([trips["rollback"], trips["stop"], trips["warn"]]) is trips["rollback"]


@pytest.mark.parametrize("broken", [0, 1, 5, PLANTED, PLANTED + 3])
def test_a_resumed_run_decides_as_an_unbroken_one(broken: int) -> None:
    """The state of iteration `broken` is saved after it was judged; the resumed run judges it again."""
    fault = {"rl/kl_exact": 6.0, "rl/length": 100.0}
    whole = Guards(GuardsConfig(max_kl=2.0), precise=True)
    expected = list(run(whole, fault))
    first = Guards(GuardsConfig(max_kl=2.0), precise=True)
    for _ in zip(range(broken + 1), run(first, fault), strict=False):
        pass
    again = Guards(GuardsConfig(max_kl=2.0), True, json.loads(json.dumps(first.memory)))
    found = list(run(again, fault, start=broken))
    assert str(found) == str(expected[broken:])  # nan is nan
    assert again.memory == whole.memory and again.report() == whole.report()


# Length


def test_the_slope_of_score_on_length_by_hand() -> None:
    lengths, scores = [1.0, 2.0, 3.0, 6.0], [0.0, 1.0, 1.0, 4.0]
    alone = guards.length_slope([Moments.of(lengths, scores)])
    assert alone == pytest.approx(np.corrcoef(lengths, scores)[0, 1])
    x, y = np.asarray(lengths), np.asarray(scores)
    other = Moments.of(x * 0.5 + 100, -y + 50)  # a kind of prompt of other lengths and scores
    xx, xy, yy = ((x - x.mean()) ** 2).sum(), ((x - x.mean()) * (y - y.mean())).sum(), ((y - y.mean()) ** 2).sum()
    expected = (xy - 0.5 * xy) / math.sqrt(1.25 * xx * 2 * yy)
    assert guards.length_slope([Moments.of(lengths, scores), other]) == pytest.approx(expected)
    assert math.isnan(guards.length_slope([Moments.of([3.0, 3.0], [1.0, 2.0])]))
    assert math.isnan(guards.length_slope([Moments.of([1.0, 3.0], [2.0, 2.0]), Moments.of([], [])]))


def test_moments_of_ranks_add_up() -> None:
    lengths, scores = [1.0, 2.0, 3.0, 6.0, 4.0], [0.0, 1.0, 1.0, 4.0, -1.0]
    parts = [{"a": Moments.of(lengths[s], scores[s]), "b": Moments.of([], [])} for s in (slice(2), slice(2, None))]
    flat = [guards.sums(part) for part in parts]
    total = {name: flat[0][name] + flat[1][name] for name in flat[0]}
    assert guards.from_sums(total, ("a", "b")) == [Moments.of(lengths, scores), Moments.of([], [])]


# Boilerplate


def share(answers: list[list[int]], prompts: list[int]) -> float:
    """As stage rl computes it."""
    found = [guards.phrases(ids) for ids in answers]
    counts = guards.phrase_counts(found, prompts)
    return guards.covered(found, counts, len(set(prompts))) / max(1, sum(map(len, answers)))


def plain_share(answers: list[list[int]], prompts: list[int]) -> float:
    """With sets of tuples, one token after the other."""
    n = guards.NGRAM
    owners: dict[tuple[int, ...], set[int]] = {}
    for ids, prompt in zip(answers, prompts, strict=True):
        for i in range(len(ids) - n + 1):
            owners.setdefault(tuple(ids[i : i + n]), set()).add(prompt)
    covered = 0
    for ids in answers:
        common = [
            len(owners[tuple(ids[i : i + n])]) > max(1, guards.COMMON * len(set(prompts)))
            for i in range(len(ids) - n + 1)
        ]
        covered += sum(any(common[max(0, t - n + 1) : t + 1]) for t in range(len(ids)))
    return covered / max(1, sum(map(len, answers)))


def test_the_share_of_common_phrases_is_that_of_a_plain_count() -> None:
    draw = random.Random(0)
    for vocabulary in (2, 3, 50, 100000):
        answers = [[draw.randrange(vocabulary) for _ in range(draw.randrange(0, 30))] for _ in range(40)]
        prompts = [i // 2 for i in range(40)]
        assert share(answers, prompts) == pytest.approx(plain_share(answers, prompts))
    assert 0.1 < share([[draw.randrange(2) for _ in range(12)] for _ in range(40)], [*range(40)]) < 1


def test_boilerplate_is_what_answers_to_different_prompts_share() -> None:
    draw = random.Random(1)
    answers = [[draw.randrange(1000) for _ in range(40)] for _ in range(50)]
    tail = [7, 8, 9, 10, 11, 12, 13, 14]
    assert share(answers, [*range(50)]) == 0
    assert share([ids + tail for ids in answers], [*range(50)]) == pytest.approx(8 / 48)
    some = [ids + tail if i % 5 == 0 else ids for i, ids in enumerate(answers)]
    assert share(some, [*range(50)]) == 0, "a fifth of the prompts is not more than a fifth"
    assert share([*some[:-1], some[-1] + tail], [*range(50)]) == pytest.approx(88 / (50 * 40 + 88))
    same = [ids for ids in answers[:10] for _ in range(5)]  # five samples a prompt, all alike
    assert share(same, [i // 5 for i in range(50)]) == 0
    assert share([[1, 2, 3, 4]] * 9, [*range(9)]) == 0, "too short for a phrase"
    assert share(answers[:3], [0, 1, 2]) == 0, "what one prompt has is not shared"


def test_phrases_of_different_order_differ_and_counts_of_ranks_add_up() -> None:
    a, b = guards.phrases([1, 2, 3, 4, 5, 6]), guards.phrases([2, 1, 3, 4, 5, 6])
    assert len(a) == 2 and a[0] != b[0] and a[1] != b[1]
    assert guards.phrases([0, 0, 0, 0, 0])[0] != guards.phrases([0, 0, 0, 0, 1])[0]
    assert guards.phrases([0, 1, 2, 3, 4])[0] == guards.phrases([9, 0, 1, 2, 3, 4])[1]
    answers = [guards.phrases([i, 1, 2, 3, 4, 5]) for i in range(6)]
    apart = guards.phrase_counts(answers[:2], [0, 1]) + guards.phrase_counts(answers[2:], [2, 3, 4, 5])
    assert (apart == guards.phrase_counts(answers, [*range(6)])).all()
    assert apart[guards.phrases([1, 2, 3, 4, 5])[0]] == 6
    draw = random.Random(2)
    many = guards.phrases([draw.randrange(50000) for _ in range(10**5)])
    assert np.bincount(many, minlength=guards.BUCKETS).max() < 10, "hashes are spread"


def test_a_limit_that_nothing_could_keep_is_refused() -> None:
    with pytest.raises(InputError, match="guards.kl = off"):
        GuardsConfig(max_kl=0.0)
    assert GuardsConfig(max_kl=0.0, kl="off").max_kl == 0


def test_a_typed_limit_of_a_guard_that_is_off_is_refused() -> None:
    with pytest.raises(InputError, match="guards.max_kl limits a guard that is off"):
        config.load(["--config", "smoke", "--guards.max_kl", "0.05"])
    assert config.load(["--config", "smoke", "--guards.max_kl", "0.05", "--guards.kl", "stop"]).guards.max_kl == 0.05
    off = GuardsConfig(**dict.fromkeys(GUARDS, "off"))
    limits = {f"guards.{rule.limit}" for rule in RULES}
    assert set(off.unwatched(frozenset(limits))) == limits, "every limit is known"
