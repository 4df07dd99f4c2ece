"""Model cards: what an exported checkpoint is, what it was made from, how to load it, and whose licence it is under.

A card is a function of the run folder alone, so a resumed run writes the same bytes; paths are reduced to their last
part. Format: https://huggingface.co/docs/hub/model-cards
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from cai_fast import records
from cai_fast.pipeline import TOY, Context, load_prompts
from cai_fast.records import Prompt, Turn
from cai_fast.rundir import SNAPSHOT
from cai_fast.tokenizer import Renderer

_LICENCE_KEYS = ("license", "license_name", "license_link")
_KINDS = {  # name -> (stage that makes it, model that it starts from, what it is, metric that every training step has)
    "sl_cai": ("sft", "base", "SL-CAI: the base model fine-tuned on AI revisions of its answers", "sft/loss"),
    "pm": ("pm", "pm_init", "The preference model that RL-CAI is trained against", "pm/loss"),
    "pm_eval": ("pm", "pm_init", "A preference model for evaluation, trained on other data", "pm_eval/loss"),
    "rl_cai": ("rl", "sl_cai", "RL-CAI: SL-CAI trained by {} against the preference model", "rl/reward"),
}
_DPO = "RL-CAI: SL-CAI fitted by DPO to AI-labelled and helpfulness comparisons", "rl/loss"
_DATA = """Red-team prompts ask for harmful things and are offensive; first answers to them may comply. Critiques,
revisions, answers and harmlessness labels were written by language models, not by people, under the constitution below.
Helpfulness comparisons are those that the run was given."""
_LIMITS = """When this card was written nothing had been evaluated beyond the numbers above: not bias, not truthfulness,
not robustness to attacks, not languages or lengths other than the training data's. No person has judged the answers. A
constitution is a choice of values; read what the model says before you use it."""
_PM_LIMITS = "\nA score compares answers to the same prompt; it is no measure of safety by itself."
_GENERATE = """from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

folder = "THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
{ids}
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=True)
print(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))"""
_SCORE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer
import torch

folder = "THIS_FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
{ids}
score = model(ids).logits[0, 0].item()  # read at the last token, the end of the context
print(score)"""


def files(ctx: Context, name: str, results: dict[str, Any]) -> dict[str, str]:
    """README.md, NOTICE and, for a policy, generation_config.json of checkpoint `name`: file name -> text.

    results: the summary of its training.
    """
    below = _kind(ctx, name)[1]
    source, renderer = ctx.folder(below), ctx.renderer(below)
    licence = stated_licence(source)
    notice, text = _notice(ctx, name, source, licence)
    made = {"README.md": _card(ctx, name, renderer, results, licence, notice), notice: text}
    if not name.startswith("pm"):
        made["generation_config.json"] = _generation(source, renderer)
    return made


def _kind(ctx: Context, name: str) -> tuple[str, str, str, str]:
    """The entry of `_KINDS` of a checkpoint, of the run's algorithm; a policy along RL is as the last one."""
    if name in _KINDS and name != "rl_cai":
        return _KINDS[name]
    stage, below, title, metric = _KINDS["rl_cai"]
    algorithm = ctx.config.rl.algorithm
    title, metric = _DPO if algorithm == "dpo" else (title.format(algorithm.upper()), metric)
    if name.startswith(SNAPSHOT):
        title = f"A snapshot of {title}, after {int(name.removeprefix(SNAPSHOT))} iterations"
    return stage, below, title, metric


def stated_licence(folder: Path) -> dict[str, str]:
    """license, license_name and license_link of a checkpoint's README.md, those that it states."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    pairs = re.findall(r"^(\w+):[ \t]*([^\s#\[].*?)(?:\s+#.*)?\s*$", front[1] if front else "", re.MULTILINE)
    return {key: value.strip("'\"") for key, value in pairs if key in _LICENCE_KEYS}


def source_name(folder: Path) -> str:
    """The Hub's name of a checkpoint in its cache (models--OWNER--NAME/snapshots/...), else the folder's name."""
    cached = [part for part in folder.absolute().parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else folder.resolve().name


def _source(ctx: Context, name: str) -> str:
    """The folder of the model that the run was given, which may be gone since; or "toy"."""
    return ctx.config.role("pm_init" if name.startswith("pm") else "base")


def _origin(ctx: Context, name: str, licence: dict[str, str]) -> str:
    source = _source(ctx, name)
    if source == TOY:
        return "the base model of cai_fast's toy world, trained from scratch"
    stated = licence.get("license_name") or licence.get("license")
    return f"{source_name(Path(source))}, " + (f"licence: {stated}" if stated else "whose folder states no licence")


def _notice(ctx: Context, name: str, source: Path, licence: dict[str, str]) -> tuple[str, str]:
    """(file name, text): the source's own notice, if it has one, and below it where this model comes from."""
    own = next((file for file in sorted(source.glob("NOTICE*")) if file.is_file()), None)
    text = (
        f"This model is derived from {_origin(ctx, name, licence)}.\nIt was changed by Constitutional AI "
        "training (arXiv 2212.08073) with cai_fast.\n"
    )
    before = own.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if own else ""
    before = before.replace(text + "\n", "")  # that of SL-CAI, which RL-CAI starts from
    return (own.name if own else "NOTICE"), before + text


def _generation(source: Path, renderer: Renderer) -> str:
    """The source's generation_config.json with every token that ends a reply, so that `generate` stops there too."""
    path, tokenizer = source / "generation_config.json", renderer.tokenizer
    values = json.loads(path.read_bytes()) if path.is_file() else {"pad_token_id": tokenizer.pad_id}
    ends = renderer.stops("response")[0]
    return json.dumps(values | {"eos_token_id": list(ends) if len(ends) > 1 else ends[0]}, indent=2) + "\n"


def _card(
    ctx: Context, name: str, renderer: Renderer, results: dict[str, Any], licence: dict[str, str], notice: str
) -> str:
    stage, _, title, metric = _kind(ctx, name)
    record, source = ctx.run.record(stage) or {}, _source(ctx, name)
    origin = _origin(ctx, name, licence)
    base = {} if source == TOY else {"base_model": source_name(Path(source))}
    task = "text-classification" if stage == "pm" else "text-generation"
    front = base | licence | {"library_name": "transformers", "pipeline_tag": task}
    front |= {"tags": ["constitutional-ai", "rlaif", "cai_fast", name.replace("_", "-")]}
    read = {key: value for key, value in record.get("inputs", {}).items() if key in ("models", "templates", "files")}
    versions = json.loads(ctx.run.path("environment.json").read_text())[-1]["versions"]
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items()) + "---",
        f"# {name}\n\n{title} (Constitutional AI, [arXiv 2212.08073](https://arxiv.org/abs/2212.08073)).\nIt starts "
        f"from {origin}.",
        f"## Use\n\n```python\n{_snippet(ctx, stage, renderer)}\n```\n\nThe text around the words is what training put "
        "there (a date, where the chat template has one, is fixed, and thinking is off).",
        f"## Data\n\n{_DATA}\n\n" + "\n".join(_counts(ctx)),
        "## Constitution\n\n" + "\n".join(_constitution(ctx)),
        "## Training\n\nSettings:\n\n" + "\n".join(_lines(record.get("settings", {}))),
        "Results:\n\n" + "\n".join(_lines(results)),
        f"The last step with `{metric}`:\n\n" + "\n".join(_lines(_last_metrics(ctx, metric))),
        "## Provenance\n\nHashes of what the training read, and versions:\n\n" + "\n".join(_lines(read | versions)),
        f"## Limits\n\n{_LIMITS}" + (_PM_LIMITS if stage == "pm" else ""),
        f"## Licence\n\nThe model is derived from {origin}; see `{notice}` and the licence files of this folder. Some "
        "licences set conditions on names, use and redistribution: read them before you publish.",
    ]
    return "\n\n".join(parts) + "\n"


def _snippet(ctx: Context, stage: str, renderer: Renderer) -> str:
    """Code that prints an answer or a score, with a prompt in the token ids that training would have made of it."""
    question, answer = "How do I bake bread?", "Mix flour, water, salt and yeast, let it rise, then bake it."
    if ctx.config.model.base == TOY:  # other words mean nothing to it
        question = answer = load_prompts(ctx, kind="helpful")[0].turns[0].text
    turns = (Turn("human", question),)
    ids = renderer.preference(turns, renderer.response_ids(answer)) if stage == "pm" else renderer.dialogue(turns)
    text, found = renderer.tokenizer.as_text(ids)
    line = f'ids = tokenizer({json.dumps(text, ensure_ascii=False)}, add_special_tokens=False, return_tensors="pt")'
    line = line + '["input_ids"]' if found == ids else f"ids = torch.tensor([{ids}])  # {json.dumps(text)}"
    return (_SCORE if stage == "pm" else _GENERATE).replace("{ids}", line)


def _counts(ctx: Context) -> list[str]:
    """How much of everything there was, as far as the run has come."""
    path = ctx.run.path("prompts.jsonl")
    prompts = records.read_jsonl(path, Prompt) if path.is_file() else []
    counts = Counter((prompt.kind, prompt.split) for prompt in prompts)
    lines = [f"- prompts, {kind}, {split}: {number}" for (kind, split), number in sorted(counts.items())]
    for stage in ("revise", "compare", "label"):
        record = ctx.run.record(stage) or {}
        lines += _lines(record.get("summary", {}), f"{stage}: ")
    return lines


def _constitution(ctx: Context) -> list[str]:
    lines = [f"{ctx.constitution.name}, version {ctx.constitution.version}, hash `{ctx.constitution.hash}`.", ""]
    for principle in ctx.constitution.principles:
        texts = (principle.critique_request, principle.revision_request, principle.comparison)
        lines.append(f"- `{principle.id}`: " + " / ".join(" ".join(text.split()) for text in texts if text))
    return lines


def _last_metrics(ctx: Context, metric: str) -> dict[str, Any]:
    """The metrics of the same part as `metric` ("pm/...") in the last row that has it."""
    path = ctx.run.path("metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    last = next((row for row in reversed(rows) if metric in row), {})
    return {name: value for name, value in last.items() if name.startswith(metric.partition("/")[0] + "/")}


def _lines(values: dict[str, Any], prefix: str = "") -> list[str]:
    """A bullet per number or text, nested names joined; lists of objects and tables (three levels) are left out."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{name}, ") if prefix.count(",") < 1 else []
        elif not isinstance(value, list) or all(isinstance(item, int | float | str) for item in value):
            lines.append(f"- {prefix}{name}: {_shown(value)}")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:.5g}"
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or "none" if isinstance(value, str) else str(value)
