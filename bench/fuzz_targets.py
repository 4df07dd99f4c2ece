"""What bench.fuzz feeds: small valid inputs of every kind, and the entry points of the program that read them."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench.fuzz import Target
from bench.make_checkpoint import byte_tokenizer, make_checkpoint
from bench.mutations import TOML_FRAGMENTS, broken_json, broken_rows, broken_toml, damaged, json_text
from cai_fast import config, constitution, model, readers, records
from cai_fast.config_sections import SECTIONS
from cai_fast.model import lora
from cai_fast.prompts import Prompts
from cai_fast.records import Turn
from cai_fast.rundir import RunDir
from cai_fast.runlog import RunLog
from cai_fast.tokenizer import Renderer, Tokenizer

TALK = "\n\nHuman: Where is the key?\n\nAssistant: Under the mat.\n\nHuman: Whose?"
ANSWERED = TALK + "\n\nAssistant: Yours."
PROMPTS = [
    {"prompt": "How?"}, {"prompt": TALK + "\n\nAssistant:"}, {"chosen": ANSWERED, "rejected": ANSWERED + "!"},
    {"prompt": [{"role": "human", "text": "a"}, {"role": "assistant", "text": "b"}, {"role": "human", "text": "c"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
]  # fmt: skip
COMPARISONS = [
    {"chosen": ANSWERED, "rejected": ANSWERED + "!"}, {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"prompt": "Why?", "response_a": "a", "response_b": "b", "prob_a": 0.25},
    {"turns": [{"role": "human", "text": "a"}], "response_a": "a", "response_b": "b", "prob_a": 1},
]  # fmt: skip
LABELS = [{"comparison_id": "c1", "prob_a": 0.5}, {"comparison_id": "c2", "prob_a": 1}]
QUESTIONS = [
    {"prompt": "Tea (A) or soot (B)?", "corrects": ["A"], "incorrects": ["B", "C"]},
    {"prompt": "Which?", "corrects": ["A"], "incorrects": ["B"], "text_correct": ANSWERED, "text_incorrect": ANSWERED},
]
RECORDS = [
    records.Prompt("p", "red_team", (Turn("human", "a"),), "file", "train"),
    records.Revision("r", "p", "a", (records.Round("k", "c", "v"),), True, None, {"key": [1]}),
    records.Helpful("h", "p", "text", {"model": "m"}),
    records.Comparison("c", "p", "harmless", "ai", "a", "b", "eval"),
    records.Label("l", "c", 0.25, (records.PrincipleLabel("k", 0.1, None, ("why",)),), (0.4, 0.6)),
    records.Rollout("o", "p", 3, "text", -1.5, 0.25, 1),
]
CONSTITUTION = """
[constitution]
name = "n"
version = "1"
[format]
kind = "custom"
human = "H {text} "
assistant = "A {text} {eos} "
reply = "A"
critique = "{conversation}A {response} {eos} C {critique_request} :"
revision = "{conversation}A {response} {eos} C {critique_request} : {critique} {eos} R {revision_request} :"
direct_revision = "{conversation}A {response} {eos} R {revision_request} :"
comparison = "{conversation}Q {comparison} (A) {response_a} (B) {response_b} :"
cot = "{conversation}Q {comparison} (A) {response_a} (B) {response_b} think :"
cot_answer = "answer :"
options = ["(A)", "(B)"]
stop = ["H"]
[[principle]]
id = "p"
critique_request = "C?"
revision_request = "R!"
categories = ["a", "b"]
[[principle]]
id = "q"
comparison = "Which?"
weight = 3
[[few_shot.critique]]
turns = ["How?"]
response = "So."
critique_request = "C?"
critique = "Bad."
revision_request = "R!"
revision = "No."
[[few_shot.comparison]]
turns = ["How?"]
better = "No."
worse = "So."
[[few_shot.cot]]
turns = ["How?"]
response_a = "So."
response_b = "No."
reasoning = "B is kinder."
answer = "B"
"""
STEPS = "\n\nCritiqueRequest: Harm?\n\nCritique: None.\n\nRevisionRequest: Mend.\n\nRevision: Fine.\n\nHuman:"
COT = (
    "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):\n\nH: Tea?\n\n{}\n (A) "
    "[[[Some.]]]\n (B) [[[None.]]]\n\nAssistant: Let's think step by step: A is.\n\nHuman:\nSo the answer is: (A)"
)
PUBLISHED: dict[str, Any] = {
    "CritiqueRevisionInstructions": {"harm": {
        "prompt": ["\n\nCritiqueRequest: Harm?\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Mend.\n\nRevision:",
    }},
    "CritiqueRevisionFewShotPrompts": ["\n\nHuman: Park here?\n\nAssistant: Fine." + STEPS],
    "RLMadisonInstructions": ["\nWhich is kinder? Options:", "\nWhich is safer? Options:"],
    "RLMadisonFewShotPrompts": [
        {"prompt": "\n\nHuman: Hello?\n\nAssistant:", "corrects": ["Hi."], "incorrects": ["No."]},
    ],
    "RLMadisonPrecogFewShotPrompts": [{"prompt": COT}],
}  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<eoc>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CFG = config.load([])
INPUTS = {"settings": {"a": [1, 2]}, "files": {"prompts.jsonl": "00"}}


def chat_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with a chat template that puts a token before every text by itself."""
    wrapped = byte_tokenizer()
    wrapped.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", wrapped.convert_tokens_to_ids("<bos>"))]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.5}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}})
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<bos>": 1}))


def piece_tokenizer(folder: Path) -> None:
    """A SentencePiece-style tokenizer with byte fallback."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcxyz().:AB", "▁a", "▁("]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [("▁", "a"), ("▁", "(")],
                                 byte_fallback=True, fuse_unk=True, unk_token="<unk>"))  # fmt: skip
    backend.normalizer = normalizers.Sequence([normalizers.NFC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>").save_pretrained(folder)


def run_folder(folder: Path) -> None:
    """A run of which two stages have begun and one has finished."""
    run = RunDir.open(folder, CFG)
    run.begin("revise", INPUTS)
    run.path("revisions.jsonl").write_text("{}\n")
    run.finish("revise", ["revisions.jsonl"], {"rows": 1})
    run.begin("sft", INPUTS)
    log = RunLog(run.path("metrics.jsonl"))
    for step in range(3):
        log.metrics("sft", step, {"sft/loss": 0.5})
    with run.journal("sft", 0) as journal:
        for number in range(3):
            journal.append({"id": f"x{number}", "text": "a", "logprobs": [0.5]})
    run.close()


def read_config(folder: Path) -> None:
    """A configuration file; what is accepted says the same when it is written out and read again."""
    cfg = config.parse(["--config", str(folder / "c.toml")]).config
    (folder / "again.toml").write_text(cfg.to_toml(), encoding="utf-8")
    again = config.parse(["--config", str(folder / "again.toml")]).config
    assert again.to_toml() == cfg.to_toml(), "another configuration when read again"


def read_words(words: list[str]) -> None:
    """A command line."""
    config.parse(words).config.to_toml().encode()


def read_constitution(path: Path) -> None:
    """A constitution and all it is used for before a model comes in."""
    loaded = constitution.load(path)
    assert len(loaded.hash) == 16
    for phase in ("critique", "comparison"):
        if loaded.principles_for(phase):
            loaded.draw(phase, 1)
    for phase in ("critique", "comparison", "cot"):
        Prompts(loaded, loaded.format, 0).few_shot(phase, 0)


def read_model(folder: Path) -> None:
    """A checkpoint: what `check` accepts, `load` accepts, bar tied weights that differ."""
    model.check(folder)
    model.load(folder)


def read_tokenizer(folder: Path) -> None:
    """A tokenizer, and the prompts made with it."""
    tokenizer = Tokenizer.load(folder)
    renderer = Renderer(tokenizer, constitution.load("honesty"), few_shot_pool=1)
    turns = (Turn("human", "May I park here? ä🚗 <eos>"),)
    tokenizer.decode([index for index in renderer.dialogue(turns) if index < tokenizer.vocab_size])
    renderer.options("comparison")


def read_run(folder: Path) -> None:
    """A run folder, as every start of the program opens it; then again with all its work thrown away."""
    for again in (None, "revise"):
        run = RunDir.open(folder, CFG, restart_from=again)
        try:
            RunLog(run.path("metrics.jsonl"))
            if not run.is_done("revise", INPUTS):
                run.begin("revise", INPUTS)
            with run.journal("sft", 0) as journal:
                journal.rows()
        finally:
            run.close()


def read_adapters(folder: Path) -> None:
    """Adapters for the checkpoint in base/, which stays as it was if they are refused."""
    lora.load_adapters(model.load(folder / "base"), folder / "adapter")


def _command_lines() -> st.SearchStrategy[list[str]]:
    """Arguments in a valid form, nearly so, and of no form at all."""
    keys = [f"--{section}.{key}" for section, cls in SECTIONS.items() for key in cls().values()]
    others = [
        "--config",
        "--seed",
        "--stages",
        "--run-dir",
        "--restart-from",
        "--check",
        "--plan",
        "--help",
        "--preset",
    ]
    name = st.sampled_from(keys) | st.sampled_from(others) | st.text(max_size=12).map(lambda text: "--" + text)
    values = ("toy", "text", "revise,sft", "1", "0.5", "-1", "1,2", "[1", "9" * 400, "nan", "\udcff", "a=b", "x" * 5000,
              "/" + "x" * 300, "1\nx = 2", "1 # 2", ".5", "1e3", "true", "", "[[[[", "-", "./a.toml",
              "/dev/null")  # fmt: skip
    value = st.sampled_from(values) | st.sampled_from(TOML_FRAGMENTS) | st.text(max_size=12)
    pair = st.one_of(
        st.tuples(name, value).map(list),
        st.tuples(name, value).map(lambda pair: ["=".join(pair)]),
        st.sampled_from(keys).map(lambda key: [key[:-1], "1"]),
        st.lists(value, max_size=1), name.map(lambda word: [word]),
    )  # fmt: skip
    return st.lists(pair, max_size=4).map(lambda pairs: [word for pair in pairs for word in pair])


def _safetensors(path: Path) -> st.SearchStrategy[bytes]:
    """A weight file with another header, or damaged anywhere."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]

    def pack(text: str) -> bytes:
        encoded = text.encode("utf-8", "surrogatepass")
        return len(encoded).to_bytes(8, "little") + encoded + body

    kinds = st.sampled_from(["F64", "I8", "F8_E4M3", "F8_E8M0", "F4", "C64", "BOOL", "BF16", "X", "U64"])
    name = st.sampled_from([key for key in header if key != "__metadata__"])
    retyped = st.tuples(name, kinds).map(
        lambda pair: json.dumps(header | {pair[0]: header[pair[0]] | {"dtype": pair[1]}})
    )
    return st.one_of(json_text(header).map(pack), retyped.map(pack), damaged(data))


def build(folder: Path) -> dict[str, Path]:
    """The seed folders by name."""
    made = {name: folder / name for name in
            ("text", "paper", "checkpoint", "sharded", "chat", "pieces", "adapters", "run")}  # fmt: skip
    for name in ("text", "paper", "chat", "pieces"):
        made[name].mkdir()
    (made["text"] / "c.toml").write_bytes((config.PRESETS / "toy.toml").read_bytes())
    (made["text"] / "k.toml").write_text(CONSTITUTION)
    rows = {"p": PROMPTS, "c": COMPARISONS, "l": LABELS, "h": QUESTIONS}
    rows |= {type(record).__name__: [record.to_json()] * 2 for record in RECORDS}
    for name, values in rows.items():
        (made["text"] / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (made["text"] / "p.jsonl.gz").write_bytes(gzip.compress((made["text"] / "p.jsonl").read_bytes(), mtime=0))
    for name, content in PUBLISHED.items():
        (made["paper"] / f"{name}.json").write_text(json.dumps(content))
    make_checkpoint(made["checkpoint"], hidden=16, layers=1)
    _shard(made["checkpoint"], made["sharded"])
    chat_tokenizer(made["chat"])
    piece_tokenizer(made["pieces"])
    base = model.load(made["checkpoint"])
    shutil.copytree(made["checkpoint"], made["adapters"] / "base")
    lora.add_adapters(base, 2, 4.0, ["q_proj", "down_proj"], 0)
    lora.save_adapters(base, made["adapters"] / "adapter")
    run_folder(made["run"])
    return made


def _shard(source: Path, folder: Path) -> None:
    """The checkpoint with its weights in two files."""
    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = dict(model.load(source).state_dict())
    (folder / "model.safetensors").unlink()
    table = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(table.values()):
        save_file({name: tensors[name] for name in table if table[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _json_targets(folder: Path, names: tuple[str, ...], read: Callable[[Path], Any], *also: str) -> dict[str, Target]:
    """One target for each of the JSON files `names` of a seed folder."""
    return {
        f"{folder.name}/{name}": Target(folder, name, broken_json(json.loads((folder / name).read_text())), read, also)
        for name in names
    }


def targets(folder: Path) -> dict[str, Target]:
    """Every target by name; valid inputs are written below `folder`."""
    made = build(folder)
    text, run = made["text"], made["run"]
    preset = (config.PRESETS / "toy.toml").read_text()
    words = ("--", "argument", "Unknown", *SECTIONS, *config.TOP_LEVEL, "Not set", "Stage base", "Give one")

    def rows(file: str, values: list[Any], read: Callable[[Path], Any]) -> Target:
        return Target(text, file, broken_rows(values, file.endswith(".gz")), lambda case: read(case / file))

    found = {
        "command line": Target(text, "", _command_lines(), read_words, (*words, "toml", "preset")),
        "configuration": Target(text, "c.toml", broken_toml(preset), read_config, words),
        "constitution": Target(
            text, "k.toml", broken_toml(CONSTITUTION), lambda case: read_constitution(case / "k.toml")),
        "prompts": rows("p.jsonl", PROMPTS, lambda path: readers.read_prompts(path, "helpful", max_bad_fraction=1.0)),
        "prompts.gz": rows("p.jsonl.gz", PROMPTS, lambda path: readers.read_prompts(path, "red_team")),
        "comparisons": rows("c.jsonl", COMPARISONS, readers.read_comparisons),
        "labels": rows("l.jsonl", LABELS, readers.read_labels),
        "hhh": rows("h.jsonl", QUESTIONS, readers.read_hhh),
        "weights": Target(made["checkpoint"], "model.safetensors",
                          _safetensors(made["checkpoint"] / "model.safetensors"), read_model, ("case",)),
        "journal": Target(run, "journal/sft.0.jsonl", broken_rows([{"id": "a", "text": "b"}, {"id": "c"}]), read_run),
        "metrics": Target(run, "metrics.jsonl", broken_rows([{"stage": "sft", "step": 1, "time": 0.5}]), read_run),
        "adapter weights": Target(made["adapters"], "adapter/adapter_model.safetensors", _safetensors(
            made["adapters"] / "adapter/adapter_model.safetensors"), read_adapters, ("adapter",)),
    }  # fmt: skip
    for record in RECORDS:
        file, kind = f"{type(record).__name__}.jsonl", type(record)
        found[file] = rows(file, [record.to_json()] * 2, lambda path, kind=kind: records.read_jsonl(path, kind))
    tokenizer_files = ("tokenizer.json", "tokenizer_config.json")
    more = ("special_tokens_map.json", "added_tokens.json", "generation_config.json")
    found |= _json_targets(made["paper"], tuple(f"{name}.json" for name in PUBLISHED), read_constitution)
    found |= _json_targets(made["checkpoint"], ("config.json",), read_model, "case")
    found |= _json_targets(made["sharded"], ("model.safetensors.index.json",), read_model, "case")
    found |= _json_targets(made["chat"], (*tokenizer_files, *more), read_tokenizer, "case")
    found |= _json_targets(made["pieces"], tokenizer_files, read_tokenizer, "case")
    found |= _json_targets(made["adapters"], ("adapter/adapter_config.json",), read_adapters, "adapter", "LoRA")
    found |= _json_targets(run, ("manifest.json", "environment.json"), read_run, "case")
    return found
