"""Cards of exported checkpoints: what they say, what they must not say, and whether their code runs."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import byte_tokenizer
from test_chat_templates import FAMILIES, folder_of
from test_tokenizer import pieces
from transformers import AutoTokenizer

from cai_fast import config, model_card, pipeline, roles
from cai_fast.batching import pack
from cai_fast.distributed import Distributed
from cai_fast.model import init_random, load
from cai_fast.pipeline import Context
from cai_fast.records import Prompt, Turn, write_jsonl
from cai_fast.rundir import RunDir
from cai_fast.runlog import RunLog
from cai_fast.tokenizer import Tokenizer
from tests.tiny import CONFIG

NAMES = {"sl_cai": "sft", "pm": "pm", "pm_eval": "pm", "rl_cai": "rl"}
README = """---
language:
- en
license: other
license_name: tiny-community  # ours
license_link: "https://example.org/licence"
base_model: acme/older
---
# Tiny
license: mit
"""
QUESTION = (Turn("human", "How do I bake bread?"),)
ANSWER = "Mix flour, water, salt and yeast, let it rise, then bake it."


def base_folder(folder: Path, tokenizer_folder: Path, **files: str) -> Path:
    """A checkpoint with further files; `__` in a name stands for a dot."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    shape = CONFIG.replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    init_random(shape, 0, std=0.1).save(folder, tokenizer=tokenizer)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def context(folder: Path, base: Path) -> Context:
    """A run in which every stage before has left its summary, and the training stages have begun."""
    given = {"data.red_team": folder.parent / "alice" / "red.jsonl.gz", "data.helpful": "x", "model.base": base}
    given |= {"data.preferences": "y", "data.constitution": "harmlessness", "config": "text", "run-dir": folder}
    cfg = config.load([word for name, value in given.items() for word in (f"--{name}", str(value))])
    alone = Distributed(0, 1, torch.device("cpu"))
    run = RunDir.open(folder, cfg, dist=alone)
    ctx = pipeline.open_context(cfg, run, RunLog(folder / "metrics.jsonl"), alone)
    kinds = ("red_team", "red_team", "helpful")
    prompts = [Prompt(str(i), kind, QUESTION, "s", "train") for i, kind in enumerate(kinds)]  # type: ignore[arg-type]
    write_jsonl(folder / "prompts.jsonl", prompts)
    for stage, summary in (
        ("revise", {"requested": 9, "kept": 7, "rejected": {"critique 1: empty": 2}}),
        ("compare", {"requested": 12, "kept": 11}),
        ("label", {"kept": 5, "entropy": 0.25, "principles": {"a": {"drawn": 1}}}),
    ):
        run.begin(stage, {})
        run.finish(stage, [], summary)
    for stage, metric in (("sft", "sft/loss"), ("pm", "pm/loss"), ("pm", "pm_eval/loss"), ("rl", "rl/reward")):
        run.begin(stage, {"models": {"base": "feedbeef"}, "files": {"prompts.jsonl": "0123abcd"}, "settings": {}})
        ctx.log.metrics(stage, 0, {metric: 9.0, "perf/tokens_per_s": 1.0})
        ctx.log.metrics(stage, 1, {metric: 0.125, "perf/tokens_per_s": 77.5})
        ctx.log.metrics(stage, 2, {metric.split("/")[0] + "/later": 3.0})
    return ctx


def export(ctx: Context, name: str) -> Path:
    """The checkpoint `name`, untrained."""
    if name == "rl_cai" and not ctx.checkpoint("sl_cai").exists():
        export(ctx, "sl_cai")
    model = load(ctx.folder("sl_cai" if name == "rl_cai" else "base"))
    model = model.with_score_head(1) if NAMES[name] == "pm" else model
    tokenizer = Tokenizer.load(ctx.folder("base"))
    extra = {"pad_token_id": tokenizer.pad_id} if NAMES[name] == "pm" else {}
    roles.export(
        ctx, model, name, tokenizer, {"steps": 41, "harmless": {"accuracy": 0.75, "bins": [{"lo": 1}]}}, **extra
    )
    return ctx.checkpoint(name)


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("alice")
    snapshot = folder / "alice" / "hub" / "models--acme--Tiny-1B" / "snapshots" / "0a1b2c"
    files = {"README__md": README, "LICENSE__txt": "Terms.", "NOTICE": "Made by Acme.\n"}
    snapshot.parent.mkdir(parents=True)
    return context(folder / "run", base_folder(snapshot, byte_tokenizer(folder / "tokenizer"), **files))


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_the_checkpoint_is(name: str, ctx: Context) -> None:
    folder = export(ctx, name)
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "base_model": "acme/Tiny-1B", "license": "other", "license_name": "tiny-community",
        "license_link": "https://example.org/licence", "library_name": "transformers",
        "pipeline_tag": "text-classification" if NAMES[name] == "pm" else "text-generation",
        "tags": ["constitutional-ai", "rlaif", "cai_fast", name.replace("_", "-")],
    }  # fmt: skip
    stated = ["arxiv.org/abs/2212.08073", "acme/Tiny-1B, licence: tiny-community", ctx.constitution.hash, "offensive",
              "red_team, train: 2", "critique 1: empty: 2", "label: entropy: 0.25", "steps: 41", "accuracy: 0.75",
              "feedbeef", "0123abcd", f"torch: {torch.__version__}", "model.base: 0a1b2c"]  # fmt: skip
    assert [text for text in stated if text not in card] == []
    for principle in ctx.constitution.principles:
        assert f"- `{principle.id}`: " in card and " ".join(principle.comparison.split()) in card
    metric = {"sl_cai": "sft/loss", "rl_cai": "rl/reward"}.get(name, f"{name}/loss")
    assert f"- {metric}: 0.125\n" in card and "tokens_per_s" not in card and "drawn" not in card
    notice = (folder / "NOTICE").read_text()
    assert notice.startswith("Made by Acme.\n\nThis model is derived from acme/Tiny-1B, licence: tiny-community.")
    assert (folder / "LICENSE.txt").read_text() == "Terms."
    for text in (card, notice):
        assert "alice" not in text and "/tmp" not in text and str(ctx.run.root) not in text
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {file.name: file.read_bytes() for file in export(ctx, name).iterdir()} == before


def test_without_licence_and_notice(tmp_path: Path) -> None:
    ctx = context(tmp_path / "run", base_folder(tmp_path / "mine", byte_tokenizer(tmp_path / "tokenizer")))
    export(ctx, "sl_cai")
    folder = export(ctx, "rl_cai")  # what SL-CAI's folder says is not said twice
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "mine" and "license" not in front
    notice = (folder / "NOTICE").read_text()
    assert notice.startswith("This model is derived from mine, whose folder states no licence")
    assert notice.count("is derived") == 1
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def run_code(folder: Path) -> tuple[dict[str, Any], str]:
    """The names that the card's code leaves behind, and what it prints."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("THIS_FOLDER", str(folder)), names)
    return names, printed.getvalue()


@pytest.mark.parametrize("kind", ["plain", "llama3", "mistral-v1", "sentencepiece"])
def test_the_code_of_the_card_runs(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    made = {"plain": lambda path: byte_tokenizer(path), "sentencepiece": pieces}
    chosen = FAMILIES.get(kind)
    source = folder_of(tmp_path / "tokenizer", chosen.template, chosen.added) if chosen else made[kind](
        tmp_path / "tokenizer")  # fmt: skip
    ctx = context(tmp_path / "run", base_folder(tmp_path / "base", source))
    renderer = ctx.renderer("base")
    names, _ = run_code(export(ctx, "rl_cai"))
    assert names["ids"].tolist() == [renderer.dialogue(QUESTION)] and names["out"].shape[1] > names["ids"].shape[1]
    folder = export(ctx, "pm")
    names, printed = run_code(folder)
    ids = renderer.preference(QUESTION, renderer.response_ids(ANSWER))
    assert names["ids"].tolist() == [ids]
    model = load(folder)
    with torch.no_grad():
        expected = float(model.score(model(pack([ids]))[-1:])[0])
    assert float(printed) == pytest.approx(expected, rel=1e-4) and abs(expected) > 1e-3


def test_generation_stops_where_replies_end(tmp_path: Path) -> None:
    """A base model's configuration knows its own end only; the template closes replies with another token."""
    source = folder_of(tmp_path / "tokenizer", FAMILIES["chatml"].template)
    wrapped = AutoTokenizer.from_pretrained(source)
    wrapped.eos_token = "<eos>"
    wrapped.save_pretrained(source)
    base = base_folder(tmp_path / "base", source, generation_config__json='{"eos_token_id": 7, "top_p": 0.5}')
    ctx = context(tmp_path / "run", base)
    generation = json.loads((export(ctx, "sl_cai") / "generation_config.json").read_text())
    tokenizer = Tokenizer.load(source)
    assert generation == {"eos_token_id": [tokenizer.control["<|end|>"], tokenizer.eos_id, 7], "top_p": 0.5}
    assert set(ctx.renderer("sl_cai").stops("response")[0]) == set(ctx.renderer("base").stops("response")[0])


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (README, {"license": "other", "license_name": "tiny-community", "license_link": "https://example.org/licence"}),
        ("---\r\nlicense: apache-2.0\r\n---\r\n", {"license": "apache-2.0"}),
        ("---\nlicense: [mit, gpl]\n---\n", {}),
        ("# No front matter\nlicense: mit\n", {}),
        (None, {}),
    ],
)
def test_licence_of_a_readme(text: str | None, stated: dict[str, str], tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text, newline="")
    assert model_card.stated_licence(tmp_path) == stated


def test_source_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_card.source_name(tmp_path / "models--acme--Tiny-1B" / "snapshots" / "0a") == "acme/Tiny-1B"
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert model_card.source_name(Path(".")) == "mine"
