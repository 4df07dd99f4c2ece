"""What the report says: every number from the files of the run, no text that could become markup, no request."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import reportworld

from cai_fast import report
from cai_fast.report import curves, facts, rows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reportworld.write(tmp_path_factory.mktemp("report") / "made")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return report.build(folder, 20)


class Elements(HTMLParser):
    """(tag, attributes) of every element and the text inside <script> and <style>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style") and data.strip():
            self.inside.append((*self.found[-1], data))


def data_of(page: str) -> dict[str, Any]:
    return next(json.loads(t) for _, a, t in Elements(page).inside if a.get("type") == "application/json")


def test_the_same_run_gives_the_same_bytes(folder: Path, page: str) -> None:
    assert report.build(folder, 20) == page and page.startswith("<!doctype html>")
    code = (
        f"from cai_fast import report; from pathlib import Path; print(report.build(Path({str(folder)!r}), 20), end='')"
    )
    other = [sys.executable, "-X", "utf8", "-c", code]
    done = subprocess.run(other, capture_output=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True)
    assert done.stdout.decode() == page  # sets have another order there


def test_the_policy_allows_its_own_style_and_script_and_nothing_else(page: str) -> None:
    elements = Elements(page)
    (policy,) = (a["content"] for t, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashed = {
        tag: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, attributes, text in elements.inside if not attributes.get("type")
    }  # fmt: skip
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'",
                     "style-src": hashed["style"], "script-src": hashed["script"]}  # fmt: skip
    assert sum(tag == "script" for tag, _ in elements.found) == 2  # the data, which does not run, and the script
    for _, attributes in elements.found:
        assert not any(name.startswith("on") or name in ("style", "src") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"@import|url\(", page)


def test_hostile_text_stays_text(page: str) -> None:
    assert "<img" not in page and "\u2028" not in page and page.count("</script>") == 2
    first = next(row for row in data_of(page)["chains"]["rows"] if row["id"] == "r0")
    assert reportworld.HOSTILE in first["turns"][-1][1]
    assert "<b>made up</b>" not in page and "&lt;b&gt;made up&lt;/b&gt;" in page  # environment.json


def test_embedded_json_is_the_same_json() -> None:
    value = {"text": f"{reportworld.HOSTILE}\u2029\x00\ud800 ☕", "number": [1.5, None, True]}
    text = report.embedded(value)
    assert json.loads(text) == value and not set("<>&\u2028\u2029") & set(text)
    assert "\ud800" not in report.shell("half a pair", "", data=value)


@pytest.mark.parametrize("sizes, count, taken", [
    ({"a": 10}, 4, [4]), ({"a": 10, "b": 10}, 4, [2, 2]), ({"a": 10, "b": 1}, 4, [3, 1]), ({"a": 2, "b": 1}, 9, [2, 1]),
    ({"a": 5, "b": 5, "c": 5}, 2, [0, 1, 1]), ({"a": 5}, 0, [0]), ({}, 5, []),
])  # fmt: skip
def test_rows_are_spread_over_their_groups(sizes: dict[str, int], count: int, taken: list[int]) -> None:
    groups, start = {}, 0
    for name, size in sizes.items():
        groups[name] = list(range(start, start + size))
        start += size
    chosen = rows.spread(groups, count)
    assert chosen == sorted(set(chosen)) and [len(set(g) & set(chosen)) for g in groups.values()] == taken
    assert rows.spread({"a": list(range(10))}, 5) == [0, 2, 4, 6, 8]


def test_chains_show_the_rejected_ones_too(folder: Path) -> None:
    found = rows.chains(folder, 9)
    shown = [row for row in found["rows"] if row["rounds"]]
    reasons = [row["reason"] for row in shown]
    assert len(shown) == 9 and {r: reasons.count(r) for r in set(reasons)} == {None: 4, "empty": 2, "repetition": 3}
    assert all(row["kept"] == (row["reason"] is None) for row in shown)
    assert [row["id"] for row in found["rows"] if row["kind"] == "helpful"] == ["h30"]
    assert found["total"] == 35 and rows.chains(folder, 0) == {"rows": [], "total": 35}
    assert shown[0]["turns"][0] == ["human", "hello"] and shown[0]["rounds"][1] == ["calm", "", reportworld.GENTLE]


def test_comparisons_carry_both_orders(folder: Path) -> None:
    found = {row["id"]: row for row in rows.comparisons(folder, 12)["rows"]}
    assert len(found) == 12 and found["c9"]["views"] == [] and found["c9"]["source"] == "human"
    assert found["c4"]["views"] == [["kind", round(0.1 + 4 / 12, 4), 0.2, ["step by step"]]]
    assert found["c0"]["views"][0][2] is None and found["c4"]["prob"] == round((0.1 + 4 / 12 + 0.2) / 2, 4)
    few = rows.comparisons(folder, 3)["rows"]  # ab > 0.5 >= ba from c5 on
    assert {(row["source"], row["views"][0][1] > 0.5 if row["views"] else None) for row in few} == {
        ("ai", False), ("ai", True), ("human", None)
    }  # fmt: skip


def test_answers_stand_side_by_side(folder: Path) -> None:
    found = rows.answers(folder, 4)
    assert found["total"] == 35 and [row["kind"] for row in found["rows"]] == ["red_team"] * 2 + ["helpful"] * 2
    assert [policy for policy, _ in found["rows"][0]["answers"]] == ["base", "sl_cai", "rl_cai"]


def test_curves_are_read_with_their_gaps_and_without_a_torn_line(folder: Path) -> None:
    points = curves.read_points(folder / "metrics.jsonl")
    assert points["rl/reward"][2:5] == [(2, 2), (3, None), (4, 4)]
    assert points["evaluate: perf/tokens_per_s"] == [(5, 7.0)] and len(points["rl: perf/tokens_per_s"]) == 8
    panels = curves.panels(points, {"max_kl": 2.0, "min_entropy": 0.0})
    titles = {section: [chart["title"] for chart in charts] for section, charts in panels.items()}
    assert titles["Guards"] == ["rl/guard"] and "rl/unheard_of" in titles["Everything else"]
    kl = next(chart for chart in panels["Reinforcement learning"] if "KL" in chart["title"])
    assert kl["limits"] == [{"name": "max_kl", "y": 2.0}] and kl["series"][0]["points"][7] == [7, 3.5]
    assert curves.single(points) == {"evaluate: perf/tokens_per_s": 7.0}


def test_thinning_keeps_ends_and_spikes() -> None:
    line = [(x, 0.0) for x in range(10_000)]
    line[4321], line[7654], line[5000] = (4321, 9.0), (7654, -9.0), (5000, None)
    thin = curves.thinned(line)
    assert (
        len(thin) <= curves.POINTS and thin == sorted(thin) and {line[0], line[-1], line[4321], line[7654]} <= set(thin)
    )
    assert curves.thinned(line[:400]) == line[:400]


@pytest.mark.parametrize("value, text", [
    (0.0, "0"), (-1e-17, "0"), (3, "3"), (12345, "12,345"), (0.3421, "0.34"), (12.345, "12.3"), (1234.5, "1,234"),
    (-149.2, "−149"), (0.00412, "0.0041"), (True, "True"), ("auto", "auto"), (-0.5, "−0.50"),
])  # fmt: skip
def test_numbers_are_short(value: Any, text: str) -> None:
    assert facts.number(value) == text


def test_counts_add_up_and_name_their_reasons() -> None:
    stages = {s["name"]: s for phase in facts.loop(reportworld.manifest()) for s in phase["stages"]}
    chains, helpful = stages["revise"]["counts"]
    assert (chains["requested"], chains["kept"], chains["rejected"]) == (30, 24, 6) and helpful["rejected"] == 0
    assert chains["reasons"] == [("repetition", 4), ("empty", 2)] and chains["part"] == 80
    assert (
        "base" not in stages
        and stages["report"]["status"] == "this page"
        and stages["rl"]["time"] == "20.0 s"
        and stages["rl"]["part"] == 100
    )
    assert stages["pm"]["more"]["pm harmless accuracy"] == "0.75" and "pm harmless bins" not in stages["pm"]["more"]


def test_the_headline_of_a_toy_run_is_the_truth() -> None:
    tiles = facts.headline(
        reportworld.manifest(), reportworld.evaluation(), {"diff": 0.15, "lo": -0.05, "hi": 0.3, "n": 40}
    )
    assert [tile["title"] for tile in tiles] == ["Harm per red-team answer", "Helpfulness on benign prompts",
                                                 "Evasive red-team answers"]  # fmt: skip
    assert [(c["name"], c["mean"], c["interval"]) for c in tiles[0]["cells"]] == [
        ("base", "2.00", "1.95 to 2.05"), ("SL-CAI", "1.50", "1.45 to 1.55"), ("RL-CAI", "0.50", "0.45 to 0.55")
    ]  # fmt: skip
    assert tiles[1]["note"] == "RL-CAI minus base: +15.0 points (−5.0 to +30.0; 40 prompts)"
    assert tiles[0]["note"] == "lower is better"


def test_the_change_of_helpfulness_is_paired_by_prompt(folder: Path) -> None:
    found = rows.change(folder, "helpful", "helpful", "base", "rl_cai")
    assert (found["diff"], found["n"]) == (pytest.approx(0.1), 5)
    # two of five changes are 1/4, the others 0: 8 % of the resamples have none of the two and 9 % have four or five,
    # so these are the ends; a normal approximation would end below 0
    assert (found["lo"], found["hi"]) == (0, pytest.approx(0.2))
    assert rows.change(folder, "unknown", "helpful", "base", "rl_cai")["n"] == 0
    same = rows.change(folder, "helpful", "red_team", "base", "sl_cai")
    assert (same["diff"], same["lo"], same["hi"]) == (-0.5, -0.5, -0.5)


def test_the_headline_of_any_other_run_is_judge_refusals_and_kl() -> None:
    tiles = facts.headline(reportworld.manifest(), reportworld.evaluation(toy=False), {})
    assert tiles[0]["cells"] == [
        {"name": "RL-CAI over SL-CAI", "mean": "80.0\u00a0%", "interval": "75.0 to 85.0\u00a0%"}
    ]
    assert [tile["title"] for tile in tiles[1:]] == ["Refusals on benign prompts", "KL to SL-CAI on red-team prompts"]
    before = facts.headline(reportworld.manifest(), {}, {})
    assert [tile["cells"][0]["mean"] for tile in before] == ["24", "12", "75.0\u00a0%"]


def test_plots_share_one_scale() -> None:
    drawn = facts.plot("x", "", [("", "a", reportworld.value(1.0)), ("", "b", reportworld.value(-1.0))])
    a, b = drawn["rows"]
    assert (b["lo"], a["hi"]) == (3, 97) and drawn["zero"] == 50 and a["at"] - 50 == pytest.approx(50 - b["at"])
    elo, wins = facts.preference_plots(reportworld.evaluation())
    assert [row["name"] for row in elo["rows"]] == ["base", "RL-CAI"]  # SL-CAI met nobody
    assert [row["name"] for row in wins["rows"]] == ["RL-CAI over SL-CAI"] and wins["zero"] == 3


def test_a_tripped_guard_and_its_thresholds_are_told(page: str) -> None:
    told = " ".join(re.sub(r"<[^>]*>", " ", page[page.index('<section id="guards">') :]).split())
    assert "Stopped by a guard. iteration 7: KL too high. The policy after 5 iterations was exported (the best" in told
    assert "kl rollback rl/kl exact 2.00 iteration 7 KL too high length warn rl/length change 2.00 no" in told
    warned = reportworld.manifest()
    warned["stages"]["rl"]["summary"] |= {"guard": ""}
    assert facts.guards(warned)["warned"] == ["kl"]
    warned["stages"]["rl"]["summary"].pop("guards")
    assert facts.guards(warned)["warned"] == [] == facts.guards(warned)["table"]
    assert not facts.guards({"stages": {"rl": {"summary": {"steps": 9}}}})["watched"]  # DPO
    settings = {"rl": {"lr": 1.0}, "guards": {"kl": "stop", "max_kl": 2.0}}
    assert facts.thresholds(settings) == {"guards.kl": "stop", "guards.max_kl": "2.00"}
    assert facts.limits(settings) == {"max_kl": 2.0}


def test_every_chart_has_its_place(page: str) -> None:
    places = [int(a["data-chart"]) for _, a in Elements(page).found if "data-chart" in a]
    assert sorted(places) == list(range(len(data_of(page)["charts"]))) and len(places) > 8


@pytest.mark.parametrize("missing", [
    "evaluation", "metrics", "revisions", "helpful", "prompts", "comparisons", "labels", "answers", "environment",
    "config", "manifest",
])  # fmt: skip
def test_a_missing_file_leaves_the_rest(folder: Path, tmp_path: Path, missing: str) -> None:
    for path in folder.glob("*.*"):
        if path.stem != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    page = report.build(tmp_path, 20)
    rows_left = {name: len(data_of(page)[name]["rows"]) for name in ("chains", "comparisons", "answers")}
    lost = {"revisions": "chains", "comparisons": "comparisons", "answers": "answers"}.get(missing, "")
    assert all((count > 4) == (name != lost) for name, count in rows_left.items())
    assert page.count('class="browser"') == 3 and data_of(page)["chains"].keys() == {"rows", "total"}
    assert (missing == "evaluation") == ("No evaluation yet" in page) and (missing == "metrics") == (
        "No metrics" in page
    )


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    started = {"status": "started", "starts": 2, "started": 1.0, "settings": {}, "inputs": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "stages": {"revise": started}}))
    page = report.build(tmp_path, 5)
    assert "started, 2 starts" in page and "Stage rl has not finished." in page


def test_principles_are_quoted_from_the_run_folder(folder: Path, tmp_path: Path, page: str) -> None:
    assert data_of(page)["principles"] == {"kind": ["Is it kind?", "Make it kind.", "Which is kinder?"]}
    assert "Which is kinder?" in page.partition("Principles (1)")[2]
    assert report._wording(tmp_path, reportworld.manifest()) == {}


def test_any_body_can_have_the_shell() -> None:
    page = report.shell("A & B", "<h1>Two runs</h1>", links={"top": "Top <1>"})
    assert "<title>A &amp; B</title>" in page and "<h1>Two runs</h1>" in page and "Top &lt;1&gt;" in page
    assert [a for t, a in Elements(page).found if t == "a"][1] == {"href": "#top"}
