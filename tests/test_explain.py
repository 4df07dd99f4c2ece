"""Rows walked back to their prompts: what is shown is what was recorded, and a lost link is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import runfolder

from cai_fast import rng
from cai_fast.constitution import ComparisonExample, Constitution
from cai_fast.errors import InputError
from cai_fast.explain import ROWS, Explainer, as_text, main
from cai_fast.hashing import facts_of, hash_model
from cai_fast.records import Helpful, Label, PolicyAnswer, PrincipleLabel, Rollout, Turn, write_jsonl
from cai_fast.replay import draws
from cai_fast.runfiles import RunFiles

EXAMPLES = tuple(ComparisonExample((Turn("human", f"ask {n}"),), f"good {n}", f"bad {n}") for n in range(2))


def laws() -> Constitution:
    base = runfolder.constitution()
    return Constitution(base.name, base.version, "", base.principles, (), EXAMPLES)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose label l0 was made by two principles, the second asked in one order alone."""
    folder, digest = runfolder.write(tmp_path / "run", laws=laws()), laws().hash
    views = PrincipleLabel("kind", 0.8, 0.6), PrincipleLabel("true", None, 0.3)
    origin = {
        "role": "judge", "model": "m", "constitution": digest, "template": "t", "parents": ["c0"], "option_mass": 0.5,
        "few_shot": [["0:kind:AB"], ["1:true:BA"], ["1:kind:AB", "0:true:BA"]],
        "rng": [{"principle": [0, "label/principle", "c0", k]} for k in range(2)],
    }  # fmt: skip
    labels = [Label("l0", "c0", 0.55, views, None, origin), Label("l9", "c9", 0.5, (), None, {})]
    write_jsonl(folder / "labels.jsonl", labels)
    return folder


def explained(folder: Path, identity: str) -> dict[str, Any]:
    found = Explainer(RunFiles(folder))
    return found.explain(*found.find(identity))


def test_a_label_shows_principles_orders_examples_keys_and_its_ancestors(run: Path) -> None:
    node = explained(run, "l0")
    first, second = node["per_principle"]
    assert first["principle"] == {"id": "kind", "comparison": "Which is kinder?"}
    assert (first["prob_a_ab"], first["prob_a_ba"], second["prob_a_ab"]) == (0.8, 0.6, None)
    # one list of examples a question: two questions of the first principle, then one of the second
    assert [e["better"] for e in first["few_shot"]] == ["good 0"]
    assert [e["id"] for e in second["few_shot"]] == ["1:kind:AB", "0:true:BA"]
    key = node["rng"][1]["principle"]
    assert key == {"seed": 0, "stage": "label/principle", "sample": "c0", "draw": 1,
                   "key": rng.key(0, "label/principle", "c0", 1)}  # fmt: skip
    comparison = node["parents"][0]
    assert (comparison["kind"], comparison["response_a"]["text"]) == ("comparison", "a 0")
    assert comparison["parents"][0]["turns"] == [{"role": "human", "text": "q 0"}]
    text = as_text(node)
    depth = [len(line) - len(line.lstrip()) for line in text if line.split()[0] in ("label", "comparison", "prompt")]
    assert depth[0] == 0 and depth == sorted(depth) and depth[-1] == 8


def test_what_was_not_recorded_or_is_gone_is_named(run: Path) -> None:
    node = explained(run, "l0")
    assert node["model"]["state"] == "no model there" and node["model"]["role"] == "judge"
    old = explained(run, "r0")
    assert old["model"]["hash"] == old["sampling"] == old["template"] == "not recorded"
    assert old["first_answer"]["tokens"] == old["rounds"][0]["rng"] == "not recorded"
    orphan = explained(run, "l9")["parents"][0]
    assert orphan["missing"] == "no such row in comparisons.jsonl" and "missing" in " ".join(as_text(orphan))
    next((run / "constitutions").iterdir()).unlink()
    lost = explained(run, "l0")
    assert "did not keep" in lost["constitution"]["missing"] and "missing" in lost["per_principle"][0]["principle"]


def test_an_id_may_be_shortened_but_must_be_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Explainer(RunFiles(run))
    assert found.find("l0")[1]["id"] == "l0"
    with pytest.raises(InputError, match=r"4 .*p0 \(prompt\), p1 \(prompt\)"):
        found.find("p")
    for wrong, words in (("c77", "the nearest: c3 (comparison)"), ("", "no row"), ("l", "l0 (label), l9 (label)")):
        assert main([str(run), wrong]) == 2
        shown = capsys.readouterr()
        assert words in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert main([str(run.parent), "l0"]) == 2


def test_a_run_of_another_version_can_be_read(run: Path) -> None:
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text("later = 1\n" + text.replace("[rl]", "[rl]\nnot_yet_known = 3"))
    assert RunFiles(run).config.seed == 0 and explained(run, "l0")["id"] == "l0"


def test_json_is_the_whole_tree(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "l0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(explained(run, "l0")))
    assert main([str(run), "l0", "--verify"]) == 0 and "from its record alone" in capsys.readouterr().out


def recorded(**parts: Any) -> dict[str, Any]:
    """All that a text depends on."""
    return {"role": "sl_cai", "model": "m", "constitution": laws().hash, "template": "t",
            "sampling": {"max_new_tokens": 4}, "rng": [0, "stage", "p0", 0]} | parts  # fmt: skip


SIDES = {side: [0, "compare/response", "p0/0", k] for k, side in enumerate("ab")}
ORIGINS = {
    "comparison": recorded(roles=["sl_cai", "base"], models={"sl_cai": "m", "base": "n"}, rng=SIDES),
    "rollout": recorded(policy_step=0),
    "helpful": recorded(),
    "revision": recorded(rng={"response": [0, "revise", "p0", 0]}),
    "answer": recorded(),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_a_text_is_sampled_again_only_where_all_that_it_depends_on_was_recorded(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for lost in ("", *(ORIGINS[name].keys() - {"role", "model"})):
        origin = {part: value for part, value in ORIGINS[name].items() if part != lost}
        rows = {
            "comparison": runfolder.comparison(0, provenance=origin), "helpful": Helpful("h0", "p0", "x", origin),
            "revision": runfolder.chain(0, provenance=origin),
            "rollout": Rollout("o0", "p0", 0, "x", 0.5, 0.1, 0, origin),
            "answer": PolicyAnswer("w0", "p0", "rl_cai", "x", {}, origin),
        }  # fmt: skip
        write_jsonl(run / ROWS[name][0], [rows[name]])
        assert main([str(run), rows[name].id, "--verify"]) == 0
        shown = capsys.readouterr().out
        assert ("from its record alone" in shown) == bool(lost), lost
        assert ("cannot be sampled again" in shown) != bool(lost), lost


@pytest.mark.parametrize(("part", "value"), [
    ("roles", ["sl_cai"]), ("models", {"sl_cai": "m"}), ("rng", {"a": SIDES["a"]}), ("rng", SIDES | {"b": None})
])  # fmt: skip
def test_the_side_of_a_comparison_that_was_recorded_is_sampled_again(run: Path, part: str, value: Any) -> None:
    row = runfolder.comparison(0, provenance=ORIGINS["comparison"] | {part: value}).to_json()
    assert [draw.text for draw in draws(RunFiles(run), "comparison", row)] == ["response_a"]


def test_the_policy_of_a_rollout_is_the_checkpoint_of_its_iteration(run: Path) -> None:
    folder, last = (run / "checkpoints" / name for name in ("rl_cai_step_00002", "rl_cai"))
    files = [place / name for place in (folder, last) for name in ("config.json", "model.safetensors", "README.md")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path))
    manifest = json.loads((run / "manifest.json").read_text())
    outputs = {path.relative_to(run).as_posix(): facts_of(path) for path in files}
    manifest["stages"]["rl"] = {"status": "finished", "starts": 1, "settings": {}, "inputs": {}, "outputs": outputs,
                                "summary": {"iterations": 4}}  # fmt: skip
    whole = json.loads(json.dumps(manifest))
    (run / "manifest.json").write_text(json.dumps(manifest))
    rows = [Rollout(f"o{n}", "p0", n, "x", 0.5, 0.1, 0, {"policy_step": n, "pm": "m"}) for n in range(5)]
    write_jsonl(run / "rollouts.jsonl", rows)
    policies = [explained(run, f"o{n}")["policy"] for n in range(5)]
    assert [p.get("role", p.get("missing")) for p in policies] == [
        "sl_cai", "its weights were not exported", folder.name, "its weights were not exported", "rl_cai"
    ]  # fmt: skip
    assert [policies[n]["hash"] for n in (2, 4)] == [hash_model(folder), hash_model(last)]
    assert policies[2]["state"] == policies[4]["state"] == "holds this model"
    del manifest["stages"]["rl"]["summary"], manifest["stages"]["rl"]["outputs"]
    unfinished = manifest | {"stages": manifest["stages"] | {"rl": manifest["stages"]["rl"] | {"status": "started"}}}
    (run / "manifest.json").write_text(json.dumps(unfinished))
    assert explained(run, "o2")["policy"]["state"].endswith("not recorded")
    assert explained(run, "o4")["policy"]["missing"] == "its weights were not exported"
    (run / "manifest.json").write_text(json.dumps(whole))
    (folder / "model.safetensors").write_text("other")
    assert explained(run, "o2")["policy"]["state"].startswith("holds another model")
    assert explained(run, "o4")["preference_model"]["state"] == "no model there"
