"""All stages on real-schema inputs and a Hugging Face checkpoint: every file of the run folder, and what is in it."""

import dataclasses
import html
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import textworld
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cai_fast import constitution, model, readers, records
from cai_fast.engine import Sampling
from cai_fast.records import Comparison, Helpful, Label, Prompt, Revision, Rollout
from cai_fast.tokenizer import Renderer, Tokenizer

STAGES = ("revise", "sft", "compare", "label", "pm", "rl", "evaluate", "report")
ROWS = {"prompts": Prompt, "revisions": Revision, "helpful": Helpful, "comparisons": Comparison, "labels": Label,
        "rollouts": Rollout}  # fmt: skip
POLICIES = ("sl_cai", "rl_cai")
SHOTS = {"revisions": 2, "labels": 1}  # few-shot examples before each question


@pytest.fixture(scope="module")
def run(build_once: Callable[[str, Callable[[Path], None]], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after every stage."""
    inputs = build_once("text_inputs", textworld.build)
    folder = tmp_path_factory.mktemp("loop") / "run"
    words = textworld.arguments(inputs, folder, evaluate__hhh=inputs / "hhh.jsonl")
    assert textworld.main(words) == 0
    return folder


def rows(run: Path, name: str) -> list[Any]:
    return records.read_jsonl(run / f"{name}.jsonl", ROWS[name])


def summary(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["stages"][stage]["summary"]


def test_every_file_is_there_and_the_folder_is_private(run: Path) -> None:
    files = ["config.toml", "environment.json", "manifest.json", "metrics.jsonl", "evaluation.json", "report.html",
             "tokens/revisions.safetensors", "tokens/comparisons.safetensors"]  # fmt: skip
    files += [f"{name}.jsonl" for name in ROWS]
    files += [f"checkpoints/{name}/{file}" for name in (*POLICIES, "pm", "pm_eval")
              for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")]  # fmt: skip
    assert [name for name in files if not (run / name).is_file()] == []
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert list((run / "journal").iterdir()) == []  # only stages in progress need one
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert list(stages) == list(STAGES) and {s["status"] for s in stages.values()} == {"finished"}


def judged(run: Path) -> list[Comparison]:
    return [row for row in rows(run, "comparisons") if row.source == "ai"]


def test_records_parse_and_refer_to_each_other(run: Path) -> None:
    found = {name: rows(run, name) for name in ROWS}
    for name, parsed in found.items():
        assert parsed and len({row.id for row in parsed}) == len(parsed), name
    prompts = {row.id: row for row in found["prompts"]}
    assert {(p.kind, p.split) for p in prompts.values()} == {
        (kind, split) for kind in ("red_team", "helpful") for split in ("train", "eval")
    }
    assert any(len(p.turns) == 3 for p in prompts.values())
    for used_by, kinds in ((found["revisions"], {"red_team"}), (judged(run), {"red_team"}),
                           (found["helpful"], {"helpful"}), (found["rollouts"], {"red_team", "helpful"})):  # fmt: skip
        used = [prompts[row.prompt_id] for row in used_by]
        assert {p.kind for p in used} == kinds and {p.split for p in used} == {"train"}
    assert {row.comparison_id for row in found["labels"]} == {row.id for row in found["comparisons"]}
    assert {p.id for r in found["revisions"] for p in r.rounds if not p.principle.startswith("harm")} == set()


def test_counts_add_up(run: Path) -> None:
    chains, made = rows(run, "revisions"), summary(run, "revise")
    assert made["requested"] == len(chains) == 20
    assert made["kept"] == sum(c.kept for c in chains) > 0
    reasons = [c.reject_reason for c in chains if not c.kept]
    assert made["rejected"] == {reason: reasons.count(reason) for reason in set(reasons)} and reasons
    assert made["helpful_requested"] == 12 == made["helpful_kept"] + sum(made["helpful_rejected"].values())
    assert made["helpful_kept"] == len(rows(run, "helpful"))
    assert all(len(c.rounds) == 2 for c in chains if c.kept)
    pairs = summary(run, "compare")
    assert pairs["requested"] == 40 == pairs["kept"] + sum(pairs["rejected"].values())
    assert pairs["kept"] == len(judged(run))
    given = [row for row in rows(run, "comparisons") if row.source == "human"]
    assert pairs["helpfulness"]["kept"] == len(given) > 0 and {row.kind for row in given} == {"helpful"}
    assert {row.split for row in given} == {"train", "eval"}
    labels = {row.comparison_id: row for row in rows(run, "labels")}
    assert all(labels[row.id].prob_a == row.provenance["prob_a"] for row in given)
    source = dict(readers.lines(given[0].provenance["file"]))
    for row in given:
        line = source[row.provenance["line"]]
        assert (row.response_a, row.response_b) == tuple(
            line[k].split("Assistant: ")[-1] for k in ("chosen", "rejected")
        )
        assert labels[row.id].provenance["line"] == row.provenance["line"]
    assert summary(run, "label")["requested"] == summary(run, "label")["kept"] == pairs["kept"]
    trained = summary(run, "sft")
    assert trained["examples"] == 2 * made["kept"] + made["helpful_kept"]
    assert summary(run, "rl")["rollouts"] == len(rows(run, "rollouts"))


def test_tokens_belong_to_their_texts(run: Path) -> None:
    tokens = records.read_tokens(run / "tokens" / "revisions.safetensors")
    tokenizer = Tokenizer.load(run / "checkpoints" / "sl_cai")
    for chain in rows(run, "revisions"):
        texts = [chain.response, *(r.revision for r in chain.rounds)] if chain.kept else [chain.response]
        for index, text in enumerate(texts):
            ids = tokens[f"{chain.id}/{index}"][0]
            assert ids[-1] == tokenizer.eos_id and tokenizer.decode(ids[:-1]).strip() == text
    pairs = records.read_tokens(run / "tokens" / "comparisons.safetensors")
    assert set(pairs) == {f"{c.id}/{side}" for c in judged(run) for side in "ab"}


def test_provenance_of_every_generated_row(run: Path) -> None:
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    base, sl_cai = stages["revise"]["inputs"]["models"]["assistant"], stages["compare"]["inputs"]["models"]["sl_cai"]
    writers = {"revisions": base, "helpful": base, "labels": base, "comparisons": sl_cai, "rollouts": sl_cai}
    given = constitution.load(_constitution(run)).hash
    for name, writer in writers.items():
        draws = []
        for row in rows(run, name):
            source = row.provenance
            if "file" in source or "from" in source:
                continue  # made elsewhere
            assert source["model"] == writer and source["constitution"] == given and source["template"]
            assert source["parents"] == [row.comparison_id if name == "labels" else row.prompt_id]
            assert name == "labels" or set(source["sampling"]) == {f.name for f in dataclasses.fields(Sampling)}
            if name in ("revisions", "labels"):
                asked = len(row.rounds) if name == "revisions" else 2  # a label: two orders
                assert [len(ids) for ids in source["few_shot"]] == [SHOTS[name]] * asked
            draws.append(json.dumps(source["rng"]))
        assert name == "rollouts" or len(set(draws)) == len(draws), f"{name}: rows share an RNG key"


def test_provenance_of_measured_answers(run: Path) -> None:
    stage = json.loads((run / "manifest.json").read_text())["stages"]["evaluate"]["inputs"]
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in answers}) == len(answers) == 3 * 7
    for row in answers:
        source = row["provenance"]
        assert source["model"] == stage["models"][row["policy"]]
        assert source["template"] == stage["templates"][row["policy"]]
        assert source["rng"][1:3] == [f"evaluate/{row['policy']}", row["prompt_id"]]


def _constitution(run: Path) -> str:
    """The constitution that config.toml names."""
    return re.search(r'^constitution = "(.*)"$', (run / "config.toml").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("name", POLICIES)
def test_policies_load_in_transformers_with_equal_logits(run: Path, name: str) -> None:
    folder = run / "checkpoints" / name
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = model.load(folder)
    ids = AutoTokenizer.from_pretrained(folder)("\n\nHuman: How do I bake bread?\n\nAssistant:", return_tensors="pt")
    tokens = ids["input_ids"][0]
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        cu = torch.tensor([0, len(tokens)], dtype=torch.int32)
        got = ours.hidden(tokens, torch.arange(len(tokens)), cu) @ ours.lm_head_weight.T
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["pm", "pm_eval"])
def test_preference_models_load_in_transformers_with_equal_scores(run: Path, name: str) -> None:
    folder = run / "checkpoints" / name
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ours, tokenizer = model.load(folder), Tokenizer.load(folder)
    assert theirs.config.num_labels == 1 and theirs.score.bias is None
    assert theirs.config.pad_token_id == tokenizer.pad_id != tokenizer.eoc_id
    renderer = Renderer(tokenizer, constitution.load(_constitution(run)))
    prompts = {p.id: p.turns for p in rows(run, "prompts")}
    sequences = [renderer.preference(prompts[c.prompt_id], renderer.response_ids(c.response_a))
                 for c in judged(run)[:4]]  # fmt: skip
    assert all(ids[-1] == tokenizer.eoc_id for ids in sequences)
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids in sequences], batch_first=True, padding_value=tokenizer.pad_id
    )
    with torch.no_grad():
        expected = theirs(padded, attention_mask=padded != tokenizer.pad_id).logits[:, 0]
        got = []
        for ids in sequences:
            cu = torch.tensor([0, len(ids)], dtype=torch.int32)
            got.append(ours.score(ours.hidden(torch.tensor(ids), torch.arange(len(ids)), cu)[-1:])[0])
    assert torch.allclose(torch.stack(got), expected, rtol=1e-4, atol=1e-6)
    assert expected.std() > 1e-4  # scores of different answers differ


def intervals(tree: Any) -> list[dict[str, float]]:
    """Every {mean, lo, hi, n} below `tree`."""
    if isinstance(tree, dict) and "mean" in tree:
        return [tree]
    return [found for child in tree.values() for found in intervals(child)] if isinstance(tree, dict) else []


def test_evaluation_has_the_contracts_shape(run: Path) -> None:
    result = json.loads((run / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert set(result["policies"]) == {"base", *POLICIES} and set(result["revisions"]) == {"0", "1", "2"}
    for groups in result["policies"].values():
        assert set(groups) == {"red_team", "benign"}
        for group, expected in (("red_team", 4), ("benign", 3)):
            assert {"pm_score", "refusal_rate", "length", "kl"} <= set(groups[group])
            assert {metric["n"] for metric in groups[group].values()} == {expected}
    cells = intervals(result["policies"]) + intervals(result["revisions"]) + intervals(result["judge"])
    assert all(set(cell) == {"mean", "lo", "hi", "n"} and cell["lo"] <= cell["mean"] <= cell["hi"] for cell in cells)
    assert result["policies"]["sl_cai"]["red_team"]["kl"]["mean"] == 0
    assert result["policies"]["base"]["red_team"]["kl"]["mean"] > 0
    assert set(result["judge"]["win_rates"]) == {"sl_cai>base", "rl_cai>base", "rl_cai>sl_cai"}
    assert {"pm", "pm_eval"} <= set(result["pm"])
    assert set(result["elo"]["judge"]) == {"base", *POLICIES} and result["elo"]["judge"]["sl_cai"]["rating"] == 0
    assert result["hhh"]["mc"]["accuracy"]["n"] == 7 and result["hhh"]["pm"]["accuracy"]["n"] == 6


def test_metrics_carry_the_contracts_names(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all({"stage", "step", "time"} <= set(line) for line in lines)
    names = {name for line in lines for name in line}
    rl = ("reward", "kl", "approx_kl", "clipfrac", "explained_variance", "entropy", "logprob_gap", "refusal_rate",
          "length")  # fmt: skip
    assert {"sft/loss", "pm/loss", "pm/accuracy", "perf/tokens_per_s", *(f"rl/{name}" for name in rl)} <= names


def test_report_is_one_file_and_holds_red_team_text_only_as_data(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page, re.IGNORECASE)
    assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", page)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    chain = rows(run, "revisions")[0]
    asked = {p.id: p.turns[-1].text for p in rows(run, "prompts")}[chain.prompt_id]
    assert [asked] == [r["turns"][-1][1] for r in json.loads(data[1])["chains"]["rows"] if r["id"] == chain.id]
    assert html.escape(asked, quote=False) not in html.unescape(page.replace(data[1], ""))


def test_the_same_command_again_does_nothing(run: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*.json*") if p.name != "environment.json"}
    inputs = Path(_constitution(run)).parent
    assert textworld.main(textworld.arguments(inputs, run, evaluate__hhh=inputs / "hhh.jsonl")) == 0
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in before}
    changed = {p.name for p in before if before[p] != after[p]}
    assert changed <= {"manifest.json"}
