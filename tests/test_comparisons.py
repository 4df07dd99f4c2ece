"""How preference models are measured on held-out comparisons, against numbers by hand."""

import pytest

from cai_fast import comparisons
from cai_fast.records import Turn

SURE = 50.0  # a margin whose probability is 1 in float64


def test_agreement_by_hand() -> None:
    result = comparisons.agreement([2.0, -1.0, 0.0, 3.0], [0.9, 0.8, 0.2, 0.5], list("abcd"))
    assert result["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert (result["sided"], result["count"]) == (3, 4)
    assert comparisons.agreement([1000.0, -1000.0], [1.0, 0.0], ["a", "b"])["ece"] == 0


def test_intervals_are_over_prompts_by_hand() -> None:
    margins, labels = [SURE] * 3 + [-SURE] * 3, [1.0] * 6
    # a quarter of the resamples of two prompts are all right, and a quarter all wrong
    two = comparisons.agreement(margins, labels, list("aaabbb"))
    assert two["accuracy_interval"] == {"lo": 0, "hi": 1} and two["brier"] == pytest.approx(0.5)
    # of those of six prompts 1 / 64 are all wrong and 6 / 64 have one right: the 2.5 % point is one of six
    six = comparisons.agreement(margins, labels, list("abcdef"))
    for name in ("accuracy_interval", "brier_interval"):
        assert six[name] == {"lo": pytest.approx(1 / 6), "hi": pytest.approx(5 / 6)}


def test_a_label_without_a_side_counts_for_the_brier_score_alone() -> None:
    level = comparisons.agreement([0.0, 0.0], [0.5, 0.5], ["a", "b"])
    assert level["accuracy"] is None and level["accuracy_interval"] == {"lo": None, "hi": None}
    assert level["brier_interval"] == {"lo": 0, "hi": 0}
    mixed = comparisons.agreement([SURE, 0.0, -SURE], [1.0, 0.5, 1.0], list("aab"))
    assert mixed["accuracy_interval"] == {"lo": 0, "hi": 1} and mixed["sided"] == 2


def test_conversations_that_begin_alike_are_one_prompt() -> None:
    def pair(kind: str, first: str, last: str, prob_a: float) -> comparisons.Pair:
        turns = Turn("human", first), Turn("assistant", "yes"), Turn("human", last)
        return comparisons.Pair(kind, turns, [], [], prob_a, 1.0, 0)

    pairs = [pair("helpful", "q", f"r{n}", p) for n, p in enumerate((0.9, 0.1))]
    pairs += [pair("harmless", f"q{n}", "r", p) for n, p in enumerate((0.9, 0.1))]
    found = comparisons.agreement_by_kind([1.0] * 4, pairs)
    assert found["helpful"]["accuracy_interval"] == {"lo": None, "hi": None}  # with one there is nothing to resample
    assert found["harmless"]["accuracy_interval"] == {"lo": 0, "hi": 1}
