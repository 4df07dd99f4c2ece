"""Bad input: one clear message on stderr, exit code 2, and no work done."""

import gzip
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import textworld
import tokenizers
from safetensors.torch import load_file, save_file
from support import MINIMAL, paper_folder, write_constitution
from tiny import alone
from transformers import PreTrainedTokenizerFast

from cai_fast import config, rundir
from cai_fast.rundir import RunDir

Words = dict[str, Any]
Make = Callable[[Path, Path], Words]  # (inputs, scratch folder) -> settings of the command line


@pytest.fixture(scope="module")
def inputs(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return build_once("text_inputs", textworld.build)


def refused(words: list[str], capfd: Any, *expected: str) -> str:
    """The one message of a command that is refused; it must hold all of `expected`."""
    capfd.readouterr()
    assert textworld.main(words) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: ") and message.endswith("\n") and message.count("\n") == 1, message
    assert all(part in message for part in expected), message
    return message


def prompts(scratch: Path, lines: list[str], name: str = "p.jsonl") -> Words:
    (scratch / name).write_text("".join(lines))
    return {"data.red_team": scratch / name}


GOOD = [json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(20)]


def empty_file(inputs: Path, scratch: Path) -> Words:
    return prompts(scratch, [])


def broken_line(inputs: Path, scratch: Path) -> Words:
    return prompts(scratch, [*GOOD[:2], '{"prompt": "Que\n', *GOOD[2:]])


def cut_off_archive(inputs: Path, scratch: Path) -> Words:
    data = gzip.compress("".join(GOOD).encode() * 50)
    (scratch / "p.jsonl.gz").write_bytes(data[: len(data) // 2])
    return {"data.red_team": scratch / "p.jsonl.gz"}


def bad_rows(inputs: Path, scratch: Path) -> Words:
    return prompts(scratch, [*GOOD, '{"text": "no field of ours"}\n', '{"prompt": ""}\n']) | {
        "data.max_bad_fraction": 0.05
    }


def nothing_to_train_on(inputs: Path, scratch: Path) -> Words:
    return prompts(scratch, GOOD[:1]) | {"data.eval_fraction": 0.9}


def constitution(text: str) -> Make:
    return lambda inputs, scratch: {"data.constitution": write_constitution(scratch, text)}


def unpaired_paper_folder(inputs: Path, scratch: Path) -> Words:
    folder, files = paper_folder(scratch)
    content = files["CritiqueRevisionInstructions"]
    del content["harm1"]["edit_request"]
    (folder / "CritiqueRevisionInstructions.json").write_text(json.dumps(content))
    return {"data.constitution": folder}


def incomplete_paper_folder(inputs: Path, scratch: Path) -> Words:
    folder, _ = paper_folder(scratch)
    (folder / "RLMadisonInstructions.json").unlink()
    return {"data.constitution": folder}


def checkpoint(inputs: Path, scratch: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(inputs / "base", scratch / "base"))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def other_architecture(inputs: Path, scratch: Path) -> Words:
    folder = checkpoint(inputs, scratch)
    change_json(folder / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    return {"model.base": folder}


def weights(change: Callable[[dict[str, Any]], Any], setting: str = "model.base") -> Make:
    def make(inputs: Path, scratch: Path) -> Words:
        folder = checkpoint(inputs, scratch)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return {setting: folder}

    return make


def half_a_file(inputs: Path, scratch: Path) -> Words:
    file = checkpoint(inputs, scratch) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return {"model.assistant": file.parent}


def no_end_token(inputs: Path, scratch: Path) -> Words:
    folder = checkpoint(inputs, scratch)
    change_json(folder / "tokenizer_config.json", eos_token=None)
    return {"model.base": folder}


def scalar_head(inputs: Path, scratch: Path) -> Words:
    from cai_fast import model

    folder = scratch / "score"
    model.load(inputs / "base").with_score_head(0).save(folder)
    for file in (inputs / "base").glob("tokenizer*"):
        shutil.copy(file, folder)
    return {"model.judge": folder}


def word_tokenizer(inputs: Path, scratch: Path) -> Words:
    """Words that it does not know, the letters among them, are all the same token."""
    folder = checkpoint(inputs, scratch)
    words = {word: n for n, word in enumerate(("<unk>", "<eos>", "(", ")", "Human", ":"))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return {"model.judge": folder}


def empty_preferences(inputs: Path, scratch: Path) -> Words:
    return {"data.preferences": textworld.write_rows(scratch / "c.jsonl", [])}


def useless_preferences(inputs: Path, scratch: Path) -> Words:
    rows = [{"chosen": "\n\nHuman: Hi?", "rejected": "\n\nHuman: Hi?"}] * 4
    return {"data.preferences": textworld.write_rows(scratch / "c.jsonl", rows), "data.max_bad_fraction": 1.0}


def below_a_file(inputs: Path, scratch: Path) -> Words:
    (scratch / "file").touch()
    return {"run-dir": scratch / "file" / "run"}


def somebody_elses_folder(inputs: Path, scratch: Path) -> Words:
    (scratch / "photos").mkdir()
    (scratch / "photos" / "holiday.jpg").touch()
    return {"run-dir": scratch / "photos"}


def settings(**values: Any) -> Make:
    return lambda inputs, scratch: {key.replace("__", "."): value for key, value in values.items()}


CASES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "unknown key": (settings(rl__kl_cof=0.1), ("rl.kl_cof", "rl.kl_coef")),
    "unknown section": (settings(rll__kl_coef=0.1), ("rll.kl_coef", "rl.kl_coef")),
    "unknown stage": (settings(stages="revise,sftt"), ("'sftt'", "'sft'")),
    "out of range": (settings(revise__temperature=-1), ("revise.temperature", "-1")),
    "wrong type": (settings(revise__rounds="many"), ("revise.rounds", "many")),
    "missing prompt file": (settings(data__red_team="no/such.jsonl"), ("no/such.jsonl: no such file",)),
    "empty prompt file": (empty_file, ("p.jsonl", "empty")),
    "corrupt prompt file": (broken_line, ("p.jsonl, line 3", "not JSON")),
    "cut-off archive": (cut_off_archive, ("p.jsonl.gz", "damaged gzip file after line")),
    "too many bad rows": (bad_rows, ("2 of 22 rows", "line 21", "line 22", "data.max_bad_fraction")),
    "all prompts held out": (nothing_to_train_on, ("data.red_team", "held out")),
    "unknown constitution": (settings(data__constitution="harmlesness"), ("harmlesness", "harmlessness")),
    "missing field": (constitution(MINIMAL.replace('revision_request = "R!"', "")), ("'p'", "'revision_request'")),
    "missing name": (constitution(MINIMAL.replace('name = "n"', "")), ("[constitution]", "'name'")),
    "broken constitution": (constitution("[constitution"), ("c.toml",)),
    "missing field in the paper's files": (unpaired_paper_folder, ("harm1", "RevisionRequest")),
    "missing file of the paper's": (incomplete_paper_folder, ("RLMadisonInstructions.json: no such file",)),
    "no principle for a stage": (constitution(MINIMAL.replace('critique_request = "C?"\nrevision_request = "R!"',
                                                              'comparison = "Hm?"')), ("phase critique", "revise")),
    "bf16 moments of fp32 weights": (
        settings(model__moments="bfloat16"),
        ("model.moments = bfloat16", "float32 here", "model.dtype = bfloat16"),
    ),
    "missing checkpoint": (settings(model__base="no/model"), ("no/model: no such folder",)),
    "unsupported architecture": (other_architecture, ("gpt2", "llama", "qwen3")),
    "missing tensor": (weights(lambda t: t.pop("model.norm.weight")), ("missing tensors: model.norm.weight",)),
    "extra tensor": (weights(lambda t: t.update(more=t["lm_head.weight"][:2].clone())), ("unexpected tensors: more",)),
    "bad tensor of pm.init": (weights(lambda t: t.pop("lm_head.weight"), "pm.init"), ("lm_head.weight",)),
    "other shape": (weights(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:5].clone()})),
                    ("model.norm.weight", "(5,)", "(32,)")),
    "half a weight file": (half_a_file, ("model.safetensors", "not a readable safetensors file")),
    "no end-of-sequence token": (no_end_token, ("no end-of-sequence token",)),
    "no chat template": (constitution(MINIMAL + '[format]\nkind = "chat"\n'), ("no chat template",)),
    "options alike": (word_tokenizer, ("same tokens", "options")),
    "preference model as judge": (scalar_head, ("model.judge must be a language model",)),
    "no helpfulness comparisons": (settings(data__preferences=""), ("data.preferences", "pm.harmless_only")),
    "only the toy's comparisons": (settings(data__preferences="toy"), ("data.preferences", "toy")),
    "empty comparisons": (empty_preferences, ("c.jsonl", "empty")),
    "no usable comparison": (useless_preferences, ("no usable comparison",)),
    "missing hhh file": (settings(evaluate__hhh="no/hhh.jsonl"), ("no/hhh.jsonl: no such file",)),
    "missing labels": (settings(label__from="no/labels.jsonl"), ("no/labels.jsonl: no such file",)),
    "unwritable run folder": (below_a_file, ("run", "--run-dir")),
    "somebody else's folder": (somebody_elses_folder, ("no run folder", "holiday.jpg")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_message_and_no_work(name: str, inputs: Path, tmp_path: Path, capfd: Any) -> None:
    make, expected = CASES[name]
    chosen = make(inputs, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run = chosen.pop("run-dir", tmp_path / "run")
    refused(textworld.arguments(inputs, run, **chosen), capfd, *expected)
    assert sorted(tmp_path.rglob("*")) == before


def test_check_accepts_good_input_and_refuses_bad(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    words = textworld.arguments(inputs, tmp_path / "run")
    assert textworld.main([*words, "--check"]) == 0
    captured = capfd.readouterr()
    assert "All inputs are usable" in captured.out and captured.err == ""
    bad = textworld.arguments(inputs, tmp_path / "run", **broken_line(inputs, tmp_path))
    refused([*bad, "--check"], capfd, "p.jsonl, line 3")
    assert not (tmp_path / "run").exists()


def test_too_little_disk(inputs: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(rundir.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    refused(textworld.arguments(inputs, tmp_path / "run"), capfd, "GB of disk are needed", "--run-dir")
    assert not (tmp_path / "run").exists()


def test_too_many_over_long_prompts(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    words = textworld.arguments(inputs, tmp_path / "run", data__max_prompt_tokens=16)
    capfd.readouterr()
    assert textworld.main(words) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "data.max_prompt_tokens = 16" in errors[0]
    assert not (tmp_path / "run" / "prompts.jsonl").exists()


def test_a_run_folder_of_another_configuration(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    words = textworld.arguments(inputs, tmp_path / "run", stages="revise")
    assert textworld.main(words) == 0
    before = textworld.contents(tmp_path / "run")
    other = textworld.arguments(inputs, tmp_path / "run", revise__rounds=3)
    refused(other, capfd, "stage revise", "revise.rounds: 2 -> 3", "--restart-from revise")
    assert textworld.contents(tmp_path / "run") == before


def test_a_second_process_on_the_same_run_folder(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    words = textworld.arguments(inputs, tmp_path / "run")
    cfg = config.load(words)
    first = RunDir.open(cfg.run_dir, cfg, dist=alone())
    before = textworld.contents(tmp_path / "run")
    refused(words, capfd, "another process", str(os.getpid()))
    first.close()
    assert textworld.contents(tmp_path / "run") == before


def test_bf16_moments_are_for_stages_that_train(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    words = textworld.arguments(inputs, tmp_path / "run", model__moments="bfloat16")
    assert textworld.main([*words, "--check", "--stages", "revise,compare"]) == 0
    assert textworld.main([*words, "--check", "--model.dtype", "bfloat16"]) == 0
    several = [*words, "--check", "--model.dtype", "bfloat16", "--hardware.count", "2"]
    refused(several, capfd, "model.moments = bfloat16", "sharded ones are float32", "parallel.shard = false")
    assert textworld.main([*several, "--parallel.shard", "false"]) == 0


def test_a_model_that_cannot_fit_is_refused_before_any_work(
    inputs: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_fast import capacity

    words = textworld.arguments(inputs, tmp_path / "run")
    monkeypatch.setattr(capacity.os, "sysconf", lambda name: 1 << 10)  # pages of 1 KiB, a thousand of them
    for action in ([], ["--check"]):
        refused([*words, *action], capfd, "GiB at its peak", "of a process", "smaller model.base or more memory")
    assert not (tmp_path / "run").exists()
    assert textworld.main([*words, "--plan"]) == 0
    assert "Does not fit: Stage" in capfd.readouterr().out
