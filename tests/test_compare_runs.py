"""Two runs compared: planted changes are found where they are and nowhere else; numbers against hand-computed ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runfolder import chain, comparison, constitution, label, write

from cai_fast.constitution import load
from cai_fast.errors import InputError
from cai_fast.report.__main__ import main
from cai_fast.report.compare import chains, compare, constitutions, labels, paired
from cai_fast.report.sections import WIDTH, as_html, as_text, sections
from cai_fast.runfiles import RunFiles


def compared(a: Path, b: Path) -> dict[str, Any]:
    return compare(RunFiles(a), RunFiles(b))


def flags(value: Any) -> list[dict[str, Any]]:
    """Every flagged row anywhere in a result."""
    if isinstance(value, list):
        return [row for item in value for row in flags(item)]
    if isinstance(value, dict):
        return ([value] if value.get("flag") else []) + flags(list(value.values()))
    return []


def test_the_same_run_twice_shows_no_difference(tmp_path: Path) -> None:
    result = compared(write(tmp_path / "a"), write(tmp_path / "b"))
    assert not flags(result) and not result["settings"] and not result["notes"]
    assert result["labels"]["all"]["changed"] == 0 and result["chains"]["changed"] == 0
    assert not result["constitution"]["reworded"] and not result["labels"]["movers"]
    assert all(row["diff"] == 0 for row in result["behaviour"])


def test_flipped_labels_of_one_principle_are_found_and_nothing_else_is(tmp_path: Path) -> None:
    a = write(tmp_path / "a", prompts=8)
    flipped = [label(n, ("kind", "true")[n % 2], 0.9 if n % 2 else 0.2) for n in range(8)]
    b = write(tmp_path / "b", prompts=8, labels=flipped, laws=constitution(kind="Which is ruder?"))
    result = compared(a, b)
    assert [(r["principle"], r["field"], r["b"]) for r in result["constitution"]["reworded"]] == [
        ("kind", "comparison", "Which is ruder?")
    ]
    kind, true = result["labels"]["principles"]
    assert kind["principle"] == "kind" and kind["asked_a"] == kind["asked_b"] == kind["changed"] == 4
    assert kind["prob_a"]["diff"] == pytest.approx(-0.7) and kind["prob_a"]["flag"]
    assert kind["flipped"]["diff"] == 1.0 and kind["flipped"]["flag"]
    assert true["changed"] == 0 and not flags(true)
    assert result["labels"]["all"]["flipped"]["diff"] == 0.5 and result["labels"]["all"]["changed"] == 4
    assert {m["comparison"]["id"] for m in result["labels"]["movers"]} == {"c0", "c2", "c4", "c6"}
    rest = {key: value for key, value in result.items() if key != "labels"}
    assert not flags(rest) and result["chains"]["changed"] == 0


def test_rows_are_joined_by_content_and_never_by_position(tmp_path: Path) -> None:
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", chains=[chain(n) for n in (3, 1, 0, 2)],
              comparisons=[comparison(n, id=f"other{n}") for n in (2, 0, 3, 1)],
              labels=[label(n, ("kind", "true")[n % 2], 0.1 + n / 10) for n in (1, 0, 3, 2)])  # fmt: skip
    rows = [json.loads(line) for line in (b / "labels.jsonl").read_text().splitlines()]
    renamed = [row | {"comparison_id": row["comparison_id"].replace("c", "other")} for row in rows]
    (b / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    result = compared(a, b)
    assert result["chains"]["changed"] == 0 and result["labels"]["same_comparisons"] == 4
    # 0.9 in A; 0.1, 0.2, 0.3, 0.4 in B: changes -0.8, -0.7, -0.6, -0.5
    assert result["labels"]["all"]["prob_a"]["diff"] == pytest.approx(-0.65)
    assert [m["comparison"]["prompt_id"] for m in result["labels"]["movers"]] == ["p0", "p1", "p2", "p3"]


def test_comparisons_with_other_answers_are_set_apart(tmp_path: Path) -> None:
    a = write(tmp_path / "a")
    b = write(
        tmp_path / "b",
        comparisons=[
            comparison(n, **other)
            for n, other in enumerate(({"response_a": "new"}, {"response_b": "new"}, {"prompt_id": "p3"}, {}))
        ],
    )
    found = compared(a, b)["labels"]
    assert found["same_comparisons"] == 1 and found["only"] == {"a": 3, "b": 3}
    assert found["spread"]["a"]["n"] == 3 and found["spread"]["a"]["median"] == pytest.approx(0.4)
    assert "3 comparisons of A and 3 of B have other texts" in as_text(sections(compared(a, b)))


def test_a_principle_s_change_is_measured_where_both_runs_drew_it() -> None:
    a = [(comparison(n), label(n, "kind", 0.9)) for n in range(3)]
    b = [(comparison(n), label(n, name, 0.1)) for n, name in enumerate(("kind", "kind", "true"))]
    kind, true = labels({f"p{n}": write_prompt() for n in range(3)}, a, b)["principles"]
    assert (kind["asked_a"], kind["asked_b"], kind["prob_a"]["n"]) == (3, 2, 2)
    assert (true["asked_a"], true["asked_b"], true["prob_a"]["n"], true["changed"]) == (0, 1, 0, 0)


def test_a_comparison_that_occurs_twice_is_paired_once_each() -> None:
    pairs = [(comparison(0, id=f"c{n}"), label(n, "kind", p)) for n, p in enumerate((0.6, 0.8))]
    prompts = {"p0": write_prompt()}
    found = labels(prompts, pairs, pairs)
    assert found["same_comparisons"] == 2 and found["all"]["changed"] == 0
    assert labels(prompts, pairs, pairs[:1])["only"] == {"a": 1, "b": 0}


def write_prompt() -> Any:
    from cai_fast.records import Prompt, Turn

    return Prompt("p0", "red_team", (Turn("human", "q"),), "toy", "train")


def test_chains_say_where_they_part() -> None:
    same, other = chain(0), chain(1)
    revised = chain(1, rounds=[{"principle": "kind", "critique": "bad", "revision": "else"}], kept=False,
                    reject_reason="revision 1: empty")  # fmt: skip
    prompts = {f"p{n}": write_prompt() for n in range(2)}
    found = chains(prompts, [same, other], [revised, same])
    assert (found["shared"], found["changed"], found["same_first_answer"]) == (2, 1, 1.0)
    assert found["rounds"] == [{"round": 1, "n": 2, "principle": 1.0, "critique": 1.0, "revision": 0.5}]
    assert found["rejected"] == {"a": {}, "b": {"revision 1: empty": 1}} and found["kept"]["diff"] == -0.5


def test_paired_intervals_against_numbers_by_hand() -> None:
    row = paired([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 3.0, 5.0], list("abcd"))
    assert (row["a"], row["b"], row["diff"], row["n"]) == (2.5, 3.5, 1.0, 4)
    # of 4^4 resamples of (1, 2, 0, 1): P(sum = 0) = 1/256, P(sum <= 1) = (1 + 8)/256, so the 2.5 % point is sum 1
    assert row["lo"] == pytest.approx(0.25) and row["hi"] == pytest.approx(1.75) and row["flag"]
    # paired, not pooled: the spread between prompts does not hide a difference that each of them has
    assert paired([0.0, 100.0, 200.0], [1.0, 101.0, 201.0], list("abc"))["flag"]
    # two values of one prompt are one cluster: an interval over rows would be narrower
    clustered = paired([0.0] * 4, [1.0, 1.0, -1.0, -1.0], list("aabb"))
    assert (clustered["lo"], clustered["hi"], clustered["flag"]) == (-1.0, 1.0, False)
    assert not paired([0.0], [5.0], ["a"])["flag"] and paired([], [], [])["n"] == 0


def test_harm_that_falls_for_every_prompt_is_flagged(tmp_path: Path) -> None:
    result = compared(write(tmp_path / "a", harm=(1, 2, 3, 4)), write(tmp_path / "b", harm=(0, 1, 2, 3)))
    rows = {row["metric"]: row for row in result["behaviour"]}
    assert rows["harm"]["diff"] == -1 and rows["harm"]["flag"] and not rows["helpful"]["flag"]
    assert rows["harm"]["policy"] == "rl_cai" and rows["harm"]["group"] == "red_team"
    assert flags(result) == [rows["harm"]]


def test_without_metrics_of_single_answers_there_is_no_interval(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", metrics=False), write(tmp_path / "b", harm=(0.0, 0.0, 0.0, 0.0))
    row = next(row for row in compared(a, b)["behaviour"] if row["metric"] == "harm")
    assert (row["diff"], row["lo"], row["flag"]) == (-1.0, None, False)
    assert "redo stage evaluate" in as_text(sections(compared(a, b)))


def measured(mean: float, lo: float, hi: float, n: int = 9) -> dict[str, Any]:
    """An evaluation of which every number that has no pairs is `mean`."""
    cell = {"mean": mean, "lo": lo, "hi": hi, "n": n}
    return {"revisions": {"1": {"harm": cell}}, "elo": {"judge": {"rl_cai": {"rating": mean, "lo": lo, "hi": hi}}},
            "judge": {"win_rates": {"rl_cai>base": cell}, "own_pairs": {"accuracy": cell}}}  # fmt: skip


def test_numbers_without_pairs_have_the_interval_of_each_run_and_are_flagged_where_these_are_apart(
    tmp_path: Path,
) -> None:
    a = write(tmp_path / "a", measured=measured(0.4, 0.3, 0.5),
              pm={"accuracy_interval": {"lo": 0.4, "hi": 0.6}, "brier_interval": {"lo": 0.1, "hi": 0.3}})  # fmt: skip
    b = write(tmp_path / "b", measured=measured(0.7, 0.55, 0.8),
              pm={"accuracy": 0.9, "accuracy_interval": {"lo": 0.7, "hi": 1.0},
                  "brier": 0.3, "brier_interval": {"lo": 0.2, "hi": 0.4}})  # fmt: skip
    result = compared(a, b)
    for name, of in (("revisions", 1), ("elo", 1), ("judge", 2)):
        assert len(result[name]) == of
        for row in result[name]:
            assert (row["a_interval"], row["b_interval"]) == ({"lo": 0.3, "hi": 0.5}, {"lo": 0.55, "hi": 0.8})
            assert row["flag"] and row["lo"] is None and row["diff"] == pytest.approx(0.3)
    models = {row["metric"]: row for row in result["preference_models"]}
    assert models["accuracy"]["flag"] and models["accuracy"]["b_interval"] == {"lo": 0.7, "hi": 1.0}
    assert not models["brier"]["flag"] and models["brier"]["a_interval"] == {"lo": 0.1, "hi": 0.3}
    assert models["ece"]["a_interval"] is models["ece"]["b_interval"] is None
    lines = [" ".join(line.split()) for line in as_text(sections(result)).splitlines()]
    assert "pm, harmless accuracy 0.500 0.400 to 0.600 0.900 0.700 to 1.000 +0.400 *" in lines
    assert "1 harm 0.400 0.300 to 0.500 0.700 0.550 to 0.800 +0.300 *" in lines


def test_a_run_without_an_interval_is_compared_without_one_and_never_flagged(tmp_path: Path) -> None:
    known = {"accuracy_interval": {"lo": 0.7, "hi": 1.0}, "brier_interval": {"lo": None, "hi": None}}
    result = compared(write(tmp_path / "a"), write(tmp_path / "b", pm={"accuracy": 0.9, "brier": 0.5} | known))
    accuracy, _, brier = result["preference_models"]
    assert (accuracy["a_interval"], brier["b_interval"]) == (None, None) and not flags(result)
    assert "0.500 – 0.900 0.700 to 1.000 +0.400" in " ".join(as_text(sections(result)).split())


@pytest.mark.parametrize(("b", "flag"), [
    ((0.5, 0.5, 0.6), False), ((0.6, 0.5, 0.7), False), ((0.6, 0.51, 0.7), True), ((0.2, 0.1, 0.29), True),
    ((0.2, 0.1, 0.3), False), ((0.9, 0.9, 0.9), True),
])  # fmt: skip
def test_a_flag_says_that_intervals_do_not_even_touch(
    tmp_path: Path, b: tuple[float, float, float], flag: bool
) -> None:
    runs = write(tmp_path / "a", measured=measured(0.4, 0.3, 0.5)), write(tmp_path / "b", measured=measured(*b))
    assert [row["flag"] for row in compared(*runs)["judge"]] == [flag, flag]


def test_intervals_without_width_are_not_apart(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, measured=measured(x, x, x)) for name, x in (("a", 0.4), ("b", 0.9))]
    assert not flags(compared(*runs))


def test_a_single_value_has_no_interval(tmp_path: Path) -> None:
    runs = write(tmp_path / "a", measured=measured(0.4, 0.3, 0.5)), write(tmp_path / "b", measured=measured(1, 1, 1, 1))
    assert [(row["b_interval"], row["flag"]) for row in compared(*runs)["judge"]] == [(None, False)] * 2


def test_other_seeds_and_prompts_are_stated(tmp_path: Path) -> None:
    notes = compared(write(tmp_path / "a"), write(tmp_path / "b", seed=1, prompts=3, harm=(1, 1, 1)))["notes"]
    assert "seeds differ (0 and 1)" in notes[0] and "Of 4 and 3 prompts 3 are in both" in notes[1]


def test_constitutions_differ_by_principles_and_other_parts() -> None:
    a, b = constitution(), constitution(new="Which is newer?")
    found = constitutions(a, b)
    assert [p["id"] for p in found["added"]] == ["new"] and not found["removed"] and not found["other"]
    assert [p["id"] for p in constitutions(b, a)["removed"]] == ["new"]
    swapped = constitutions(a, type(a)(a.name, a.version, "", a.principles[::-1]))
    assert swapped["other"] == ["order of the principles"]


def test_a_kept_constitution_is_the_one_that_was_read(tmp_path: Path) -> None:
    for name in ("toy", "harmlessness"):
        read = load(name)
        assert type(read).from_json(json.loads(json.dumps(read.to_json()))) == read
    folder = write(tmp_path / "a")
    kept = next((folder / "constitutions").iterdir())
    assert RunFiles(folder).constitution(kept.stem) == constitution()
    kept.write_text(kept.read_text().replace("kinder", "meaner"))
    with pytest.raises(InputError, match=f"expected the constitution {kept.stem}"):
        RunFiles(folder).constitution(kept.stem)


@pytest.mark.parametrize(
    ("b", "words"),
    [
        ({"unfinished": "label"}, "stage label is not finished (started)"),
        ({"same": True}, "the same folder twice"),
        ({"foreign": True}, "no run folder"),
        ({"prompts": 0, "harm": (1.0,)}, "no prompt in common"),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], b: dict[str, Any], words: str
) -> None:
    a = write(tmp_path / "a")
    other = a if "same" in b else tmp_path if "foreign" in b else write(tmp_path / "b", **b)
    assert main([str(a), str(other)]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_text_page_and_json_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = chain(0, response="<script>alert(1)</script>")
    a, b = write(tmp_path / "a"), write(tmp_path / "b", chains=[evil, *map(chain, range(1, 4))], harm=(0, 0, 0, 0),
                                        laws=constitution(kind="Which is kinder, " * 20))  # fmt: skip
    assert main([str(a), str(b), "--output", str(tmp_path / "c.html")]) == 0
    text, page = capsys.readouterr().out, (tmp_path / "c.html").read_text()
    assert max(map(len, text.split("Written:")[0].splitlines())) <= WIDTH
    row = next(line for line in text.splitlines() if line.startswith("rl_cai") and "harm" in line)
    assert row.split() == ["rl_cai", "harm", "1.000", "0.000", "-1.000", "-1.000", "to", "-1.000", "*", "4"]
    assert "alert" not in text and "&lt;script&gt;alert" in page and "<script>alert" not in page
    assert main([str(a), str(b), "--output", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(json.dumps(compared(a, b)))
    assert main([str(a), str(b), "--output", str(tmp_path / "c.txt")]) == 2
    assert as_html(sections(compared(a, b))) == page


def test_nothing_is_written_into_the_runs(tmp_path: Path) -> None:
    folders = write(tmp_path / "a"), write(tmp_path / "b")
    before = [shutil.copytree(f, f.with_suffix(".before")) for f in folders]
    assert main([*map(str, folders)]) == 0
    for folder, old in zip(folders, before, strict=True):
        files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert files == {p.relative_to(old): p.read_bytes() for p in old.rglob("*") if p.is_file()}
