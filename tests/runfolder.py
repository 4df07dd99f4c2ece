"""A finished run folder written by hand, with the files that `cai_fast.report` compares and nothing else."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_fast.config import load
from cai_fast.constitution import Constitution, Principle
from cai_fast.records import Comparison, Label, PolicyAnswer, PrincipleLabel, Prompt, Revision, Round, Turn, write_jsonl

STAGES = ("revise", "compare", "label", "pm", "evaluate")
METRICS = {"harm": 1.0, "helpful": 0.5}


def constitution(**comparisons: str) -> Constitution:
    """Two principles for both phases; `comparisons` rewords their questions."""
    words = {"kind": "Which is kinder?", "true": "Which is truer?"} | comparisons
    principles = tuple(Principle(name, f"C {name}?", f"R {name}!", text) for name, text in words.items())
    return Constitution("n", "1", "", principles)


def chain(number: int, **changes: Any) -> Revision:
    """The chain of prompt `number`."""
    row = Revision(f"r{number}", f"p{number}", f"first {number}", (Round("kind", "bad", f"better {number}"),), True)
    return Revision.from_json(row.to_json() | changes)


def label(number: int, principle: str, prob_a: float) -> Label:
    """The label of comparison `number`, the same in both orders."""
    return Label(f"l{number}", f"c{number}", prob_a, (PrincipleLabel(principle, prob_a, prob_a),))


def comparison(number: int, **changes: Any) -> Comparison:
    """The comparison about prompt `number`."""
    row = Comparison(f"c{number}", f"p{number}", "harmless", "ai", f"a {number}", f"b {number}", "train")
    return Comparison.from_json(row.to_json() | changes)


def evaluation(harm: float) -> dict[str, Any]:
    """evaluation.json of one policy; `harm` is a mean."""
    cell = {"mean": harm, "lo": harm, "hi": harm, "n": 4}
    return {
        "policies": {"rl_cai": {"red_team": {"harm": cell, "helpful": cell | {"mean": 0.5}}}},
        "revisions": {"0": {"harm": cell}},
        "judge": {"win_rates": {"rl_cai>base": cell | {"mean": 0.75}}},
        "elo": {"judge": {"rl_cai": {"rating": 10.0, "lo": 5.0, "hi": 15.0, "games": 4.0}}},
    }


def write(
    folder: Path,
    *,
    seed: int = 0,
    prompts: int = 4,
    laws: Constitution | None = None,
    chains: Sequence[Revision] | None = None,
    comparisons: Sequence[Comparison] | None = None,
    labels: Sequence[Label] | None = None,
    harm: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    metrics: bool = True,
    unfinished: str = "",
    pm: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Path:
    """A folder of `prompts` prompts, one chain, comparison and label each; `harm` by prompt is rl_cai's; `pm` and
    `measured` are put into the summary of a preference model and into the evaluation."""
    folder.mkdir()
    laws, numbers = laws or constitution(), range(prompts)
    cfg = load(["--config", "toy", "--seed", str(seed), "--run-dir", str(folder)])
    (folder / "config.toml").write_text(cfg.to_toml())
    (folder / "constitutions").mkdir()
    (folder / "constitutions" / f"{laws.hash}.json").write_text(json.dumps(laws.to_json()))
    asked = [Prompt(f"p{n}", "red_team", (Turn("human", f"q {n}"),), "toy", "train") for n in numbers]
    write_jsonl(folder / "prompts.jsonl", asked)
    write_jsonl(folder / "revisions.jsonl", [chain(n) for n in numbers] if chains is None else chains)
    write_jsonl(folder / "comparisons.jsonl", [comparison(n) for n in numbers] if comparisons is None else comparisons)
    given = [label(n, ("kind", "true")[n % 2], 0.9) for n in numbers] if labels is None else labels
    write_jsonl(folder / "labels.jsonl", given)
    own = [PolicyAnswer(f"w{n}", f"p{n}", "rl_cai", "x", {"harm": h, "helpful": 0.5} if metrics else {})
           for n, h in enumerate(harm)]  # fmt: skip
    write_jsonl(folder / "answers.jsonl", own)
    (folder / "evaluation.json").write_text(json.dumps(evaluation(sum(harm) / len(harm)) | dict(measured or {})))
    summary = {"pm": {"harmless": {"accuracy": 0.5, "ece": 0.1, "brier": 0.2} | dict(pm or {})}}
    stages = {
        name: {"status": "finished", "starts": 1, "settings": {}, "inputs": {"constitution": laws.hash}, "outputs": {},
               "summary": summary if name == "pm" else {}}
        for name in STAGES
    }  # fmt: skip
    if unfinished:
        stages[unfinished]["status"] = "started"
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "stages": stages}))
    return folder
