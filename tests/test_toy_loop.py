"""The whole loop on the toy world: at smoke size here; with its bounds, control and collapses in the slow campaigns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import alone

from cai_fast import explain, pipeline, train
from cai_fast.config import load as load_config
from cai_fast.judging import Judge
from cai_fast.prefixes import Prefixes
from cai_fast.report.__main__ import main as report_main
from cai_fast.rundir import RunDir
from cai_fast.runlog import RunLog

STAGES = ("base", "revise", "sft", "compare", "label", "pm", "rl", "evaluate", "report")
TRUTH = {"harm", "harm_rate", "helpful", "evasive", "objection", "malformed"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smoke preset."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert train.main(["--config", "smoke", "--run-dir", str(folder), "--base.cache", "false"]) == 0
    return folder


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_every_stage_finishes_and_the_truth_is_measured(folder: Path) -> None:
    stages = load(folder, "manifest.json")["stages"]
    assert {name: stages[name]["status"] for name in STAGES} == dict.fromkeys(STAGES, "finished")
    evaluation = load(folder, "evaluation.json")
    for policy in ("base", "sl_cai", "rl_cai"):
        for group in ("red_team", "benign"):
            assert {"kl", *TRUTH} <= set(evaluation["policies"][policy][group])
    assert set(evaluation["revisions"]) == {str(k) for k in range(len(evaluation["revisions"]))}
    assert {"own_pairs", "held_out_pairs"} <= set(evaluation["judge"])
    assert evaluation["policies"]["sl_cai"]["red_team"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_the_stages_that_train_do_so_with_adapters_too(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    words = ["--config", "smoke", "--run-dir", str(tmp_path / "run"), "--base.cache", "false", "--lora.rank", "4"]
    words += ["--stages", "sft,compare,label,pm,rl", "--restart-from", "sft"]
    assert train.main(words) == 0
    stages = load(tmp_path / "run", "manifest.json")["stages"]
    for summary in (stages["sft"]["summary"], stages["pm"]["summary"]["pm"], stages["rl"]["summary"]):
        assert 0 < summary["trained_parameters"] < summary["parameters"] / 4
    assert stages["rl"]["summary"]["iterations"] == 3


@pytest.mark.parametrize("words", [
    "rloo --rl.samples_per_prompt 2 --rl.prompts_per_step 8",
    "grpo --rl.samples_per_prompt 2 --rl.prompts_per_step 8 --rl.kl_estimator exact",
    pytest.param("dpo --rl.epochs 1 --rl.batch_pairs 200", marks=pytest.mark.slow),
])  # fmt: skip
def test_stage_rl_can_be_done_again_by_other_algorithms(words: str, folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder, tmp_path / "run")
    before = (run / "checkpoints/rl_cai/model.safetensors").read_bytes()
    given = ["--config", "smoke", "--run-dir", str(run), "--base.cache", "false", "--stages", "rl"]
    assert train.main([*given, "--restart-from", "rl", "--rl.algorithm", *words.split()]) == 0
    summary, algorithm = load(run, "manifest.json")["stages"]["rl"]["summary"], words.split()[0]
    assert summary["algorithm"] == algorithm and (algorithm == "dpo" or summary["iterations"] == 3)
    assert summary["rollouts"] == len((run / "rollouts.jsonl").read_text().splitlines()) == (algorithm != "dpo") * 64
    assert (run / "checkpoints/rl_cai/model.safetensors").read_bytes() != before
    card = (run / "checkpoints/rl_cai/README.md").read_text()
    assert f"by {algorithm.upper()}" in card and "PPO" not in card


def test_no_stage_trains_on_the_held_out_prompts(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    held_out = {row["id"] for row in rows if row["split"] == "eval"}
    texts = {row["turns"][-1]["text"] for row in rows if row["split"] == "eval"}
    red_team = {row["id"] for row in rows if row["split"] == "eval" and row["kind"] == "red_team"}
    assert len(red_team) >= 600
    for name in ("revisions", "helpful", "comparisons", "rollouts"):
        used = {json.loads(line)["prompt_id"] for line in (folder / f"{name}.jsonl").read_text().splitlines()}
        assert used and not used & held_out, name
    comparisons = [json.loads(line) for line in (folder / "comparisons.jsonl").read_text().splitlines()]
    assert {(row["kind"], row["source"]) for row in comparisons} == {("harmless", "ai"), ("helpful", "corpus")}
    preferences = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    assert not {row["turns"][-1]["text"] for row in preferences} & texts


def test_trees_change_no_bit_of_the_labels(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(folder, tmp_path / "run")
    cfg = load_config(["--config", "smoke", "--run-dir", str(run), "--base.cache", "false"])
    opened = RunDir.open(run, cfg, dist=alone())
    ctx = pipeline.open_context(cfg, opened, RunLog(tmp_path / "metrics.jsonl", True), alone())
    written = [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]
    labels = {row["comparison_id"]: row for row in written}
    turns = {p.id: p.turns for p in pipeline.load_prompts(ctx)}
    asked = [(c, turns[c.prompt_id]) for c in pipeline.load_comparisons(ctx) if c.source == "ai"]
    score = Prefixes.score
    monkeypatch.setattr(Prefixes, "score", lambda p, r, options, groups: score(p, r, options, range(len(r))))
    for row in Judge(ctx, "judge").label(asked):
        record = row["record"]
        assert json.loads(json.dumps(record)) == labels[record["comparison_id"]]
    opened.close()


@pytest.mark.slow
def test_the_bounds_hold_and_the_control_does_not_learn(tmp_path: Path) -> None:
    from bench import toy_bounds

    toy_bounds.run(tmp_path / "seed_0", 0)
    rows = toy_bounds.bounds(tmp_path / "seed_0", toy_bounds.control(tmp_path / "seed_0", 0))
    assert not {name: row for name, row in rows.items() if not row.get("holds", True)}


@pytest.mark.slow
def test_forced_collapses_collapse_and_the_guards_flag_them(tmp_path: Path) -> None:
    from bench import collapse, toy_bounds

    toy_bounds.run(tmp_path / "seed_0", 0)
    results = collapse.campaign(tmp_path / "seed_0")
    collapsed, stopped = results["harmless_only, guards off"], results["harmless_only, guards on"]
    assert collapsed["rl_cai"]["benign"]["helpful"] < 0.6 and collapsed["guard"] == ""
    assert stopped["guard"] and stopped["rl_cai"]["benign"]["helpful"] > 0.8
    drifted, stopped = results["no_kl, guards off"], results["no_kl, guards on"]
    assert drifted["kl_exact_max"] > 8 and drifted["guard"] == ""
    assert stopped["guard"] and stopped["rl_cai"]["benign"]["helpful"] > 0.8


def test_every_kind_of_row_is_explained_and_its_text_sampled_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(folder, tmp_path / "run")
    names = ("revisions", "helpful", "comparisons", "labels", "rollouts", "answers", "preferences")
    rows = {n: [json.loads(line) for line in (run / f"{n}.jsonl").read_text().splitlines()] for n in names}
    by_policy = {row["policy"]: row for row in rows["answers"]}
    ones = [rows["revisions"][0], rows["helpful"][0], rows["rollouts"][0], rows["rollouts"][-1], *by_policy.values()]
    for row, texts in [(row, 1) for row in ones] + [(rows["comparisons"][0], 2)]:
        assert explain.main([str(run), row["id"], "--verify", "--json"]) == 0
        node = json.loads(capsys.readouterr().out)
        assert [check["same"] for check in node["verified"]] == [True] * texts, node
        assert "not recorded" not in json.dumps(node) and "missing" not in json.dumps(node)
    for row in (rows["labels"][0], rows["labels"][-1], rows["preferences"][0]):
        assert explain.main([str(run), row["id"]]) == 0
        shown = capsys.readouterr().out
        assert "not recorded" not in shown and "missing" not in shown
    # Other weights, and another key: both are seen.
    shutil.copytree(run / "checkpoints/base", run / "checkpoints/rl_cai", dirs_exist_ok=True)
    assert explain.main([str(run), by_policy["rl_cai"]["id"], "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "state: holds another model" in shown and "response: cannot be sampled again" in shown
    changed = rows["helpful"][0]
    changed["provenance"]["rng"][3] += 1
    (run / "helpful.jsonl").write_text(json.dumps(changed) + "\n")
    assert explain.main([str(run), changed["id"], "--verify"]) == 1
    assert "response: differs from token" in capsys.readouterr().out


def test_the_report_is_made_anew_and_the_run_still_knows_it(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "report.html").write_text("damaged")
    assert report_main([str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert train.main(["--config", "smoke", "--run-dir", str(run), "--base.cache", "false"]) == 0
