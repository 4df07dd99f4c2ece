"""Configuration: what is accepted, what is refused and how, and the entry point's exit codes."""

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cai_fast import config
from cai_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FILES = "--model.base a --data.red_team b --data.helpful c --data.preferences d".split()


def train(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "cai_fast" / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_defaults_are_the_toy_preset() -> None:
    cfg = config.load([])
    assert (cfg.preset, cfg.run_dir, cfg.seed, cfg.stages) == ("toy", "runs/toy", 0, config.STAGES)
    assert (cfg.data.constitution, cfg.rl.steps, cfg.rl.critic, cfg.sft.revisions) == ("toy", 40, "pm", (2, 3, 4))


def test_defaults_of_the_sections_are_the_papers() -> None:
    cfg = config.Config()
    assert (cfg.revise.rounds, cfg.revise.temperature, cfg.revise.helpful_samples) == (4, 1.0, 2)
    assert (cfg.sft.revisions, cfg.sft.epochs, cfg.sft.schedule) == ("all", 1, "constant")
    assert (cfg.label.principles, cfg.label.clamp, cfg.label.hard, cfg.compare.base_fraction) == (1, "auto", False, 0.0)
    assert (cfg.rl.kl_coef, cfg.rl.clip_coef, cfg.rl.gamma, cfg.rl.max_new_tokens) == (0.001, 0.2, 1.0, 128)
    assert cfg.rl.reward_transform == "none"


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_loads_and_survives_its_own_toml(name: str, tmp_path: Path) -> None:
    cfg = config.load(["--config", name] + ([] if name in ("toy", "smoke") else FILES))
    assert cfg.preset == name and cfg.run_dir == f"runs/{name}"
    (tmp_path / "config.toml").write_text(cfg.to_toml())
    again = config.load(["--config", str(tmp_path / "config.toml")])
    assert dataclasses.replace(again, explicit=cfg.explicit) == cfg


def test_paper_preset_keeps_the_papers_ratios() -> None:
    cfg = config.load(["--config", "paper", *FILES])
    assert cfg.pm.lr == cfg.rl.lr == pytest.approx(cfg.sft.lr / 50)  # 0.01 and 0.5 of the pretraining rate
    assert cfg.rl.warmup_steps * cfg.rl.prompts_per_step == pytest.approx(25_000, rel=0.05)
    assert cfg.rl.steps * cfg.rl.prompts_per_step == pytest.approx(1_283_569, rel=0.05)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.02", 0.02), ("1", 1.0), ("1e-4", 1e-4), (".5", 0.5), ("0", 0.0)],
)
def test_numbers_on_the_command_line(text: str, expected: float) -> None:
    for arguments in (["--rl.kl_coef", text], [f"--rl.kl_coef={text}"]):
        value = config.load(arguments).rl.kl_coef
        assert value == expected and type(value) is float


def test_union_values_on_the_command_line() -> None:
    assert config.load(["--sft.revisions", "1,3"]).sft.revisions == (1, 3)
    assert config.load(["--sft.revisions", "[2]"]).sft.revisions == (2,)
    assert config.load(["--sft.revisions", "last"]).sft.revisions == "last"
    assert config.load(["--label.clamp", "0.2,0.8"]).label.clamp == (0.2, 0.8)
    assert config.load(["--engine.deterministic", "true"]).engine.deterministic is True
    assert config.load(["--label.from", "12"]).label.from_ == "12"  # text stays text


def test_stages_run_in_the_pipelines_order() -> None:
    assert config.load(["--stages", "pm,revise"]).stages == ("revise", "pm")


def test_base_is_left_out_for_a_checkpoint() -> None:
    assert config.load(["--model.base", "folder", "--data.preferences", "file"]).stages[0] == "revise"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--rl.kl_coeff 1", "rl.kl_coeff.*'rl.kl_coef'"),
        ("--rl2.kl_coef 1", "--rl2.kl_coef.*'rl.kl_coef'"),
        ("--sede 1", "--sede.*'seed'"),
        ("--chek", "--chek.*'check'"),
        ("--config toi", "'toi'.*'toy'"),
        ("--config missing.toml", "missing.toml: no such file.*presets"),
        ("--rl.kl_coef -1", "rl.kl_coef must be a number >= 0. Got -1"),
        ("--rl.kl_coef nan", "rl.kl_coef must be .* Got nan"),
        ("--rl.kl_coef inf", "rl.kl_coef must be .* Got inf"),
        ("--rl.kl_coef much", "rl.kl_coef must be .* Got 'much'"),
        ("--rl.kl_coef", "--rl.kl_coef needs a value"),
        ("--rl.kl_coef 1 --rl.kl_coef 2", "given twice"),
        ("--data.eval_fraction 1.5", r"data.eval_fraction must be a number in \[0, 0.9\]. Got 1.5"),
        ("--sft.epochs 1.5", "sft.epochs must be a whole number >= 1. Got 1.5"),
        ("--sft.epochs true", "sft.epochs must be a whole number >= 1. Got true"),
        ("--label.cot yes", "label.cot must be true or false. Got 'yes'"),
        ("--rl.critic detatched", "rl.critic must be one of .*'detatched'.*'detached'"),
        ("--engine.page_size -2", "engine.page_size must be a whole number >= -1. Got -2"),
        ("--engine.num_pages -1", "engine.num_pages must be a whole number >= 0. Got -1"),
        ("--engine.page_size 0 --engine.num_pages 9", "engine.num_pages = 9 is for pages.*engine.page_size = 0"),
        ("--rl.top_k 5", "rl.top_k"),
        ("--rl.top_p 0.9", "rl.top_p"),
        ("--sft.revisions 9", "sft.revisions"),
        ("--sft.revisions [9]", "revise.rounds"),
        ("--label.clamp 0.6,0.4", "label.clamp"),
        ("--label.clamp 0.1,0.2,0.3", "label.clamp"),
        ("--seed -1", "seed"),
        ("--stages sft,labl", "'labl'.*'label'"),
        ("--restart-from labl", "'labl'.*'label'"),
        ("--model.base x --stages base", "leave base out"),
        ("--config paper", "Not set: model.base, data.red_team, data.helpful"),
        ("--data.preferences=", "data.preferences is empty.*harmless_only"),
        ("--check --plan", "not both"),
        ("check", "Unexpected argument 'check'"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(arguments: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        config.load(arguments.split())
    assert re.search(words, str(caught.value)), caught.value


def test_harmless_only_allows_no_preferences() -> None:
    assert config.load(["--data.preferences=", "--pm.harmless_only", "true"]).data.preferences == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[rl]\nkl_koef = 1", "rl.kl_koef.*'rl.kl_coef'"),
        ("[rll]\nkl_coef = 1", "'rll'.*'rl'"),
        ("rl = 1", "rl is a section"),
        ("[rl]\nkl_coef = '1'", "rl.kl_coef must be a number >= 0. Got '1'"),
        ("stages = 'sft'", "stages must be a list"),
        ("extends = 3", "extends"),
        ("extends = 'toi'", "'toi'.*'toy'"),
        ("extends = 'self.toml'", "extends itself"),
        ("[rl\n", "not valid TOML.*line 1"),
    ],
)
def test_bad_files_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "self.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        config.load(["--config", str(tmp_path / "self.toml")])
    assert re.search(words, str(caught.value)), caught.value


def test_layers_file_over_what_it_extends_and_command_line_over_both(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("extends = 'toy'\n[rl]\nsteps = 5\nlr = 1e-3\n")
    (tmp_path / "b.toml").write_text("extends = 'a.toml'\nseed = 7\n[rl]\nlr = 2e-3\n")
    cfg = config.load(["--config", str(tmp_path / "b.toml"), "--rl.clip_coef", "0.3"])
    assert (cfg.rl.steps, cfg.rl.lr, cfg.rl.clip_coef, cfg.rl.vf_coef, cfg.seed) == (5, 2e-3, 0.3, 0.25, 7)
    assert cfg.run_dir == "runs/b"


def test_stage_settings_hold_what_matters_and_no_more() -> None:
    def settings(stage: str, *arguments: str) -> dict:
        return config.stage_settings(config.load(list(arguments)), stage)

    for stage, change in itertools.product(
        config.STAGES,
        (
            ["--engine.max_batch", "8"],
            ["--engine.page_size", "16", "--engine.num_pages", "99"],
            ["--run-dir", "x"],
            ["--revise.chunk", "3"],
            ["--sft.save_every", "3"],
        ),
    ):
        assert settings(stage, *change) == settings(stage)
    assert settings("label", "--label.cot", "true") != settings("label")
    assert settings("label", "--data.few_shot_pool", "9") != settings("label")
    assert settings("sft", "--seed", "1") != settings("sft")
    assert settings("sft", "--rl.lr", "1") == settings("sft")
    assert settings("rl", "--rl.save_every", "3") != settings("rl")  # a rollback exports one of the states
    dpo = ("--rl.algorithm", "dpo")  # which has none
    assert settings("rl", *dpo, "--rl.save_every", "3") == settings("rl", *dpo)
    assert settings("sft", "--model.assistant", "x") == settings("sft")
    assert settings("revise", "--model.assistant", "x") != settings("revise")
    for stage in config.STAGES:
        trains = stage in ("sft", "pm", "rl")
        assert (settings(stage, "--model.moments", "bfloat16") != settings(stage)) is trains


def test_typed_keys_that_nothing_reads_are_found() -> None:
    cfg = config.load(["--rl.lr", "1e-3", "--rl.steps=3", "--pm.lr", "1e-3", "--data.num_helpful", "9", "--seed", "3"])
    assert cfg.rl.lr and cfg.seed
    cfg.to_toml()
    config.stage_settings(cfg, "rl")
    assert cfg == cfg  # none of these four count as reading rl.steps
    assert config.unread(cfg, ["rl"]) == ["data.num_helpful", "rl.steps"]  # pm did not run
    assert config.unread(cfg, ["rl"], skipped=["revise"]) == ["rl.steps"]  # revise may have read the other
    assert config.unread(cfg, ["pm"]) == ["pm.lr"]
    assert cfg.rl.steps and cfg.data.num_helpful
    assert config.unread(cfg, ["rl"]) == []


def test_reads_of_one_configuration_do_not_count_for_another() -> None:
    assert config.load(["--rl.lr", "1"]).rl.lr
    assert config.unread(config.load(["--rl.lr", "1"]), ["rl"]) == ["rl.lr"]


def test_help_explains_every_setting() -> None:
    text = config.help_text()
    for section, cls in config.SECTIONS.items():
        for field in dataclasses.fields(cls):
            assert f"--{section}.{field.name.rstrip('_')} = " in text
            assert field.metadata["doc"], field.name
    assert text.count("[P ") > 20


def test_config_needs_no_torch() -> None:
    code = "import sys; from cai_fast import config; config.load([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_entry_point_answers_help_and_bad_input(tmp_path: Path) -> None:
    shown = train("--help")
    assert shown.returncode == 0 and "--rl.kl_coef" in shown.stdout and not shown.stderr
    refused = train("--rl.kl_coeff", "1", "--run-dir", str(tmp_path / "run"))
    assert refused.returncode == 2 and not refused.stdout
    assert refused.stderr == "error: Unknown key rl.kl_coeff. Did you mean 'rl.kl_coef'?\n"
    assert not (tmp_path / "run").exists()
