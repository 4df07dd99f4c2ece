"""Files of users that are broken in ways that once ended in a traceback, a hang, or a silent wrong reading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import CUSTOM, MINIMAL, byte_tokenizer, paper_folder, write_constitution

from bench.make_checkpoint import make_checkpoint
from cai_fast import config, constitution, model, readers, records
from cai_fast.errors import InputError
from cai_fast.inputs import parse_json, parse_toml, read_json
from cai_fast.rundir import RunDir
from cai_fast.runlog import RunLog
from cai_fast.tokenizer import Tokenizer

DIGITS, DEEP = "9" * 5000, "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(("text", "message"), [
    (DEEP, "nested too deeply"), (f"{{\n\n{DIGITS}", "line 3: a number of 5000 digits|Expecting"),
    (f"[1,\n{DIGITS}]", "line 2: a number of 5000 digits"), ("[NaN]", "NaN is no number"),
    ("[-Infinity]", "-Infinity is no number"), ("", "Expecting value"),
    ('"\xff', "byte 1 is not UTF-8"), ("[1] 2", "Extra data"),
])  # fmt: skip
def test_json(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"some file: not JSON.*({message})"):
        parse_json(text.encode("latin-1"), "some file")


@pytest.mark.parametrize(("text", "message"), [
    (f"a = {DEEP}", "nested too deeply"), (f"b = 1\na = {DIGITS}", "line 2: a number of 5000 digits"),
    ("a = 1\na = 2\n", "Cannot overwrite"),
    ("\xff", "byte 0 is not UTF-8"), ('a = "\\ud800"', "not valid TOML"), ("\0", "not valid"),
])  # fmt: skip
def test_toml(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"some file: not .*TOML.*{message}|some file: .*{message}"):
        parse_toml(text.encode("latin-1"), "some file")


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    assert parse_json(b'\xef\xbb\xbf{"a":\r\n1}', "x") == {"a": 1}
    assert parse_toml(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n", "x") == {"a": 1, "b": 2}
    (tmp_path / "x.json").write_text('"\\ud83d\\ude97"')
    assert read_json(tmp_path / "x.json") == "🚗"
    (tmp_path / "x.json").write_text('["\\ud83d"]')
    with pytest.raises(InputError, match="x.json: half a surrogate pair"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(("words", "message"), [
    (["--rl.kl_coef", "9" * 400], "rl.kl_coef must be"), (["--rl.steps", "9" * 30], "rl.steps must be"),
    (["--rl.kl_coef", "1\nseed = 2"], "rl.kl_coef must be"), (["--rl.kl_coef", "1 # or 2"], "rl.kl_coef must be"),
    (["--data.red_team", "\udcff"], "data.red_team must be text"), (["--run-dir", "\udcff"], "run_dir must be text"),
    (["--config", "x" * 300 + ".toml"], "no such file"), (["--seed", DEEP], "seed must be"),
])  # fmt: skip
def test_command_lines(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config.parse(words)


def test_configuration_files(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    with pytest.raises(InputError, match=r"loop\.toml: cannot be read"):
        config.read_file(str(tmp_path / "loop.toml"))
    (tmp_path / "c.toml").write_text('extends = "a\\u0000b.toml"')
    with pytest.raises(InputError, match="no such file"):
        config.read_file(str(tmp_path / "c.toml"))


def test_every_setting_survives_being_written_out(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('run_dir = "a\\u007f\\u0001\\\\\\"é"\n')
    cfg = config.load(["--config", str(path)])
    path.write_text(cfg.to_toml(), encoding="utf-8")
    assert config.load(["--config", str(path)]).run_dir == cfg.run_dir == 'a\x7f\x01\\"é'


@pytest.mark.parametrize(("text", "message"), [
    (MINIMAL + "weight = 1" + "0" * 400, "weight"), (MINIMAL + "few_shot = 3", "few_shot"),
    (MINIMAL + "[few_shot]\ncritique = 3", r"\[\[few_shot.critique\]\]"),
    (MINIMAL + CUSTOM.replace("{text}", "{what}", 1), "unknown placeholder|must hold"),
])  # fmt: skip
def test_constitutions(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"c\.toml.*({message})"):
        constitution.load(write_constitution(tmp_path, text.replace("weight = 3\nweight", "weight")))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("CritiqueRevisionFewShotPrompts", ["\n\nAssistant:" + "".join(
        f"\n\n{step}: x" for step in ("CritiqueRequest", "Critique", "RevisionRequest", "Revision"))], "item 0"),
    ("RLMadisonFewShotPrompts", [{"prompt": "\n\nHuman: a", "corrects": [5], "incorrects": ["b"]}],
     "item 0: .*strings"),
    ("RLMadisonInstructions", ["\n\ud800 Options:"], "half a surrogate pair"),
])  # fmt: skip
def test_published_files(name: str, content: Any, message: str, tmp_path: Path) -> None:
    folder, _ = paper_folder(tmp_path)
    (folder / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"{name}\.json.*{message}"):
        constitution.load(folder)


TEXT = "\n\nHuman: a\n\nAssistant: b"
GOOD = {"prompt": "a"}
HHH = {"prompt": "a", "corrects": ["A"], "incorrects": ["B"]}


@pytest.mark.parametrize(("read", "row", "reason"), [
    (readers.read_prompts, {"messages": [{"role": [], "content": "a"}]}, "message with role"),
    (readers.read_prompts, {"prompt": "\ud83d"}, "half a surrogate pair"),
    (readers.read_comparisons, {"prompt": "a", "chosen": "\ud83d", "rejected": "b"}, "half a surrogate pair"),
    (readers.read_hhh, HHH | {"corrects": [5]}, "no string"),
    (readers.read_hhh, HHH | {"incorrects": [None]}, "no string"),
    (readers.read_hhh, HHH | {"text_correct": TEXT}, "missing"),
    (readers.read_hhh, HHH | {"text_correct": 1, "text_incorrect": 2}, "no string"),
    (readers.read_labels, {"comparison_id": "c", "prob_a": 10**400}, "prob_a must be"),
])  # fmt: skip
def test_rows(read: Callable[..., Any], row: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    more = ("helpful",) if read is readers.read_prompts else ()
    with pytest.raises(InputError, match=rf"x\.jsonl: 1 of 1 rows are unusable .line 1: .*{reason}"):
        read(tmp_path / "x.jsonl", *more)


def test_a_second_label_for_a_comparison_is_refused(tmp_path: Path) -> None:
    rows = [{"comparison_id": "c", "prob_a": prob} for prob in (0.25, 0.75)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="line 2: a second label for comparison 'c'"):
        readers.read_labels(tmp_path / "x.jsonl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_checkpoint(folder, hidden=16, layers=1)
    return folder


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": []}, "model_type"), ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"hidden_size": 2**62}, "hidden_size"), ({"vocab_size": True}, "vocab_size"), ({"head_dim": "4"}, "head_dim"),
    ({"num_key_value_heads": 2.0}, "num_key_value_heads"), ({"rope_parameters": [1]}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": [1]}}, "rope type"), ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor"), ({"rms_norm_eps": -1}, "rms_norm_eps"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                          "original_max_position_embeddings": 512}}, "low_freq_factor"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"), ({"layer_types": 3}, "layer_types"),
    ({"layer_types": [[]]}, "layer_types"), ({"num_attention_heads": 32, "head_dim": None}, "head_dim"),
    ({"architectures": ["LlamaForSequenceClassification"], "id2label": 3}, "2 labels"),
])  # fmt: skip
def test_model_configurations_name_folder_and_field(
    change: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    for read in (model.check, model.load):
        with pytest.raises(InputError, match=rf"{folder}/config\.json.*{message}"):
            read(folder)


def test_what_transformers_and_tokenizers_let_through(tmp_path: Path) -> None:
    """A bare Exception, a TypeError, a panic that no `except` may name, and more memory than there is."""
    good = byte_tokenizer(tmp_path / "good")
    whole = json.loads((good / "tokenizer.json").read_text())
    loose = json.loads(json.dumps(whole))
    loose["post_processor"]["special_tokens"] = {}
    bpe, charsmap = whole["model"], {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    charsmap = {"type": "Sequence", "normalizers": [{"type": "NFC"}, charsmap]}
    cases: list[tuple[str, Any, str]] = [
        ("tokenizer.json", whole | {"model": {"type": "BPE"}}, r"tokenizer\.json: not a tokenizer"),
        ("tokenizer.json", loose, r"tokenizer\.json: post_processor adds '<bos>'"),
        ("tokenizer.json", whole | {"model": bpe | {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
        ("tokenizer.json", whole | {"normalizer": charsmap}, "precompiled_charsmap of the normalizer is damaged"),
        ("tokenizer.json", whole | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "u"}}, "WordLevel"),
        ("tokenizer.json", whole | {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}}, "Unigram"),
        ("tokenizer_config.json", [], r"tokenizer_config\.json: expected a JSON object"),
        ("tokenizer_config.json", {"bos_token": 3}, "cannot load the tokenizer"),
        ("added_tokens.json", {"a": None, "b": 3}, "cannot load the tokenizer"),
        ("generation_config.json", {"eos_token_id": ["x"]}, r"generation_config\.json: eos_token_id 'x'"),
        ("generation_config.json", {"eos_token_id": -1}, r"generation_config\.json: eos_token_id -1"),
    ]
    for number, (name, content, message) in enumerate(cases):
        folder = Path(shutil.copytree(good, tmp_path / str(number)))
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            Tokenizer.load(folder)


def test_the_vocabulary_reaches_to_the_highest_id(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "t", bos=False)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["wideapart"] = 100_000
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.load(folder).vocab_size == 100_001
    raw["model"]["vocab"]["wideapart"] = 4_000_000_000  # a walk of minutes and of many gigabytes for the library
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"tokenizer\.json: a token with the id 4000000000"):
        Tokenizer.load(folder)


def finished(folder: Path) -> RunDir:
    """A run folder with one finished stage."""
    run = RunDir.open(folder, config.load([]))
    run.begin("revise", {})
    run.path("x.jsonl").write_text("{}\n")
    run.finish("revise", ["x.jsonl"], {})
    run.close()
    return run


@pytest.mark.parametrize("name", ["../mine.txt", "/etc/hosts", "a/../../mine.txt", "manifest.json", "a\0b"])
def test_a_manifest_cannot_delete_what_is_not_the_runs(name: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    (tmp_path / "mine.txt").touch()
    manifest = json.loads(run.path("manifest.json").read_text())
    outputs = manifest["stages"]["revise"]["outputs"]
    outputs[name] = outputs.pop("x.jsonl")
    run.path("manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: revise\.outputs\..*the name of a file in the run folder"):
        RunDir.open(run.root, run.cfg, restart_from="revise")
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize(("file", "text", "message"), [
    ("manifest.json", "[]", "version"), ("manifest.json", '{"version": 1}', "stages"),
    ("manifest.json", '{"version": 1, "stages": {"sft": 3}}', "sft: expected an object"),
    ("manifest.json", '{"version": 1, "stages": {"sft": {"status": "started", "starts": 1}}}', "sft.settings"),
    ("environment.json", "{", "not JSON"), ("environment.json", "3", "a list of objects"),
])  # fmt: skip
def test_files_of_a_run(file: str, text: str, message: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    run.path(file).write_text(text)
    with pytest.raises(InputError, match=rf"{file}.*{message}"):
        RunDir.open(run.root, run.cfg)


def test_metrics_and_journal_rows_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 0}\n{"step": 1}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        RunLog(tmp_path / "metrics.jsonl")
    (tmp_path / "j").write_text('{"id": "a"}\n3\n')
    with records.Journal(tmp_path / "j") as journal, pytest.raises(InputError, match="j, line 2: expected an object"):
        journal.rows()
    with pytest.raises(InputError, match="no regular file"):
        records.Journal(tmp_path)
    with pytest.raises(InputError, match="reward: expected float"):
        records.Rollout.from_json({"id": "o", "prompt_id": "p", "iteration": 3, "response": "", "reward": 10**400,
                                   "kl": 0})  # fmt: skip
