"""Configuration of a run: preset or TOML file, then the command line, checked before anything else happens.

`load(argv)` returns a frozen `Config`; its sections and their fields are in config_sections.py. Unknown keys and values
out of range are InputErrors that name the nearest key or the range.
"""

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_fast import config_schema as schema
from cai_fast import config_sections as sections
from cai_fast.config_schema import nearest
from cai_fast.config_sections import SECTIONS, GuardsConfig, ModelConfig
from cai_fast.errors import InputError
from cai_fast.inputs import is_text, parse_toml, read_bytes, require_file

STAGES = ("base", "revise", "sft", "compare", "label", "pm", "rl", "evaluate", "report")
PRESETS = Path(__file__).resolve().parent / "presets"
TOP_LEVEL = ("seed", "run_dir", "stages", "preset", "restart_from")
ACTIONS = ("check", "plan", "help")

# What the result of a stage depends on besides its own section and the seed; "section.*" is the whole section.
_PROMPTS = (
    "data.red_team", "data.helpful", "data.num_red_team", "data.num_helpful", "data.eval_fraction",
    "data.max_prompt_tokens", "data.drop_oldest_turns", "data.max_bad_fraction",
)  # fmt: skip
_TEXT = ("data.constitution", "data.few_shot_pool")
_MODEL = ("model.base", "model.dtype", "model.max_len")
_TRAINED = (*_MODEL, "model.moments", "lora.rank", "lora.alpha", "lora.targets")
_GUARDS = tuple(f"guards.{key}" for key in GuardsConfig().values())
_USES: dict[str, tuple[str, ...]] = {
    "base": ("data.constitution", "data.preferences"),
    "revise": (*_MODEL, "model.assistant", *_TEXT, *_PROMPTS),
    "sft": _TRAINED,
    "compare": (*_MODEL, *_TEXT, *_PROMPTS, "data.preferences"),
    "label": (*_MODEL, "model.judge", *_TEXT),
    "pm": (*_TRAINED, "data.max_bad_fraction", "data.max_prompt_tokens", "data.drop_oldest_turns"),
    "rl": (*_TRAINED, *_TEXT, *_PROMPTS, *_GUARDS),
    "evaluate": (*_MODEL, "model.judge", *_TEXT, *_PROMPTS),
    "report": (),
}


@dataclass(frozen=True)
class Config:
    """One run. Sections are frozen dataclasses; `explicit` holds the keys given on the command line."""

    seed: int = 0
    run_dir: str = "runs/toy"
    stages: tuple[str, ...] = STAGES
    preset: str = "toy"
    restart_from: str = ""
    model: sections.ModelConfig = dataclasses.field(default_factory=sections.ModelConfig)
    data: sections.DataConfig = dataclasses.field(default_factory=sections.DataConfig)
    engine: sections.EngineConfig = dataclasses.field(default_factory=sections.EngineConfig)
    lora: sections.LoraConfig = dataclasses.field(default_factory=sections.LoraConfig)
    parallel: sections.ParallelConfig = dataclasses.field(default_factory=sections.ParallelConfig)
    checkpoint: sections.CheckpointConfig = dataclasses.field(default_factory=sections.CheckpointConfig)
    log: sections.LogConfig = dataclasses.field(default_factory=sections.LogConfig)
    hardware: sections.HardwareConfig = dataclasses.field(default_factory=sections.HardwareConfig)
    base: sections.BaseConfig = dataclasses.field(default_factory=sections.BaseConfig)
    revise: sections.ReviseConfig = dataclasses.field(default_factory=sections.ReviseConfig)
    sft: sections.SftConfig = dataclasses.field(default_factory=sections.SftConfig)
    compare: sections.CompareConfig = dataclasses.field(default_factory=sections.CompareConfig)
    label: sections.LabelConfig = dataclasses.field(default_factory=sections.LabelConfig)
    pm: sections.PmConfig = dataclasses.field(default_factory=sections.PmConfig)
    rl: sections.RlConfig = dataclasses.field(default_factory=sections.RlConfig)
    guards: sections.GuardsConfig = dataclasses.field(default_factory=sections.GuardsConfig)
    evaluate: sections.EvaluateConfig = dataclasses.field(default_factory=sections.EvaluateConfig)
    report: sections.ReportConfig = dataclasses.field(default_factory=sections.ReportConfig)
    explicit: frozenset[str] = frozenset()

    def role(self, name: str) -> str:
        """Checkpoint folder (or "toy") of a role: base, assistant, judge or pm_init; an empty one is model.base."""
        path = self.pm.init if name == "pm_init" else getattr(self.model, name)
        return path or self.model.base

    def shards(self, ranks: int) -> bool:
        """Whether what is trained is sharded over so many ranks; adapters are replicated."""
        return ranks > 1 and not self.lora.rank and bool(self.parallel.shard)

    def to_toml(self) -> str:
        """The whole configuration as a file that --config accepts; `restart_from` is a request, not a setting."""
        lines = [f"{key} = {_toml(getattr(self, key))}" for key in ("seed", "run_dir", "stages", "preset")]
        for name in SECTIONS:
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in getattr(self, name).values().items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Command:
    """A parsed command line: what to do ("run", "check", "plan" or "help") with which configuration."""

    action: str
    config: Config


def load(argv: Sequence[str]) -> Config:
    """Configuration from command-line arguments (without the program's name)."""
    return parse(argv).config


def parse(argv: Sequence[str]) -> Command:
    """Read the command line; the preset or file named by --config first, then every other argument on top of it."""
    actions, options = _split(argv)
    if len(actions) > 1:
        raise InputError(f"Give one of {' and '.join('--' + a for a in actions)}, not both.")
    if actions == ["help"]:
        return Command("help", Config())
    name = options.pop("config", "toy")
    tree = read_file(name)
    tree.setdefault("preset", Path(name).stem)
    for key, text in options.items():
        _set(tree, key, text)
    return Command(actions[0] if actions else "run", build(tree, frozenset(options)))


def read_file(name: str, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Settings of a preset (by name) or a TOML file (by path), on top of what it `extends`."""
    path = _find(name, _chain[-1].parent if _chain else Path())
    if path in _chain:
        raise InputError(f"{path} extends itself: {' -> '.join(p.name for p in (*_chain, path))}.")
    tree = parse_toml(read_bytes(path), path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise InputError(f"extends in {path} must be the name of a preset or a TOML file. Got {parent!r:.80}.")
    merged = read_file(parent, (*_chain, path))
    for key, value in tree.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if both_tables else value
    return merged


def build(tree: dict[str, Any], explicit: frozenset[str] = frozenset()) -> Config:
    """A checked Config from nested settings, as TOML gives them; `explicit` names those the user typed."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise InputError(f"{key} is a section: write [{key}] and its keys below, or {key}.<key> = value.")
            values[key] = _section(key, value)
        elif key in TOP_LEVEL:
            values[key] = value
        else:
            raise InputError(f"Unknown key {key!r:.80}.{nearest(key, (*TOP_LEVEL, *SECTIONS))}")
    cfg = Config(**_top_level(values), explicit=explicit)
    _check_together(cfg)
    return cfg


def stage_settings(cfg: Config, stage: str) -> dict[str, Any]:
    """All settings that the result of a stage depends on, as JSON values: no batch or chunk sizes."""
    names = [f"{stage}.{key}" for key in getattr(cfg, stage).values()]
    settings: dict[str, Any] = {"seed": cfg.seed}
    for name in (*names, *_USES[stage]):
        section, key = name.split(".")
        last_alone = name == "rl.save_every" and cfg.rl.algorithm == "dpo"  # of DPO's states none but the last is kept
        if not _field(section, key).metadata["work"] and not last_alone:
            value = getattr(cfg, section).values()[key]
            settings[name] = list(value) if isinstance(value, tuple) else value
    return settings


def unread(cfg: Config, stages: Iterable[str], skipped: Iterable[str] = ()) -> list[str]:
    """Keys given on the command line that the stages that ran (`stages`) should have read, and did not.

    Keys that a stage in `skipped` uses are left out: it reads them when it runs, in an earlier or a later process.
    """
    ran = set(stages)
    shared = {name for stage in ran for name in _USES[stage]} - {name for stage in skipped for name in _USES[stage]}
    missed = []
    for key in sorted(cfg.explicit):
        section, dot, name = key.partition(".")
        if dot and (section in ran or key in shared):
            attribute = _field(section, name).name
            missed += [key] if attribute not in vars(getattr(cfg, section))["_reads"] else []
    return missed


def help_text() -> str:
    """Usage and every setting with its default, range, meaning and source."""
    lines = [
        "usage: torchrun [--nproc-per-node N] cai_fast/train.py [--config PRESET|FILE.toml] [--run-dir DIR]",
        "           [--stages a,b,...] [--seed N] [--restart-from STAGE] [--section.key VALUE ...]",
        "           [--check | --plan | --help]",
        "",
        "  --config        preset (" + ", ".join(preset_names()) + ") or TOML file; default toy",
        "  --run-dir       folder of the run; default runs/<preset>. The same command again continues the run.",
        "  --stages        stages to run, of " + ",".join(STAGES),
        "  --seed          seed of every random draw; default 0",
        "  --restart-from  discard this stage's results and all later ones",
        "  --check         check configuration, constitution, prompts, checkpoints, disk and memory; do no work",
        "  --plan          sizes, memory, disk, tokens and time per stage; do no work",
        "",
        "Settings, with their defaults. P: arXiv 2212.08073 (Constitutional AI); B: arXiv 2204.05862 (HH-RLHF).",
    ]
    for name, cls in SECTIONS.items():
        lines += ["", f"[{name}] {(cls.__doc__ or '').strip()}"]
        for field in dataclasses.fields(cls):
            source = f" [{field.metadata['source']}]" if field.metadata["source"] else ""
            lines.append(f"  --{name}.{schema.key_of(field.name)} = {_toml(field.default)}")
            text = f"{field.metadata['doc']}; {schema.describe_type(field)}.{source}"
            lines += textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def preset_names() -> list[str]:
    """Names of the bundled presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """`--name value` and `--name=value` arguments as {name: value}, and the actions among them."""
    actions, options = [], {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", *(f"--{action}" for action in ACTIONS)):
            actions.append("help" if word == "-h" else word[2:])
            continue
        if not word.startswith("--"):
            raise InputError(f"Unexpected argument {word!r:.80}. Settings look like --rl.kl_coef 0.1; see --help.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(_unknown(name) or f"--{name} needs a value, as in --{name} VALUE.")
            value = rest.pop(0)
        name = {"run-dir": "run_dir", "restart-from": "restart_from"}.get(name, name)
        if name in options:
            raise InputError(f"--{name} is given twice.")
        options[name] = value
    return actions, options


def _unknown(name: str) -> str:
    """The message for an unknown command-line name; empty if it is known."""
    flags = ("config", "run-dir", "stages", "seed", "restart-from", *ACTIONS)
    keys = [f"{section}.{key}" for section, cls in SECTIONS.items() for key in cls().values()]
    if name in (*flags, *keys):
        return ""
    section, dot, key = name.partition(".")
    if dot and section in SECTIONS:
        return f"Unknown key {name[:80]}.{_nearest_key(section, key)}"
    return f"Unknown argument --{name[:80]}.{nearest(name, keys if dot else [*flags, *keys])}"


def _nearest_key(section: str, key: str) -> str:
    elsewhere = [name for name, cls in SECTIONS.items() if key in cls().values()]
    if len(elsewhere) == 1:  # such as rl.max_kl, which is a guard's
        return f" Did you mean '{elsewhere[0]}.{key}'?"
    return nearest(key, SECTIONS[section]().values()).replace("mean '", f"mean '{section}.")


def _set(tree: dict[str, Any], name: str, text: str) -> None:
    """Put one command-line setting into the settings tree, read in the type its field has."""
    if name == "stages":
        tree["stages"] = [stage.strip() for stage in text.split(",")]
    elif name in ("run_dir", "restart_from"):
        tree[name] = text
    elif name == "seed":
        tree["seed"] = _value(text)
    else:
        message = _unknown(name)
        if message or name == "preset":
            raise InputError(message or "preset is not an argument: use --config.")
        section, key = name.split(".")
        kind = _field(section, key).type
        table = tree.setdefault(section, {})
        if isinstance(table, dict):
            value = text if kind is str else _value(text)
            words = kind == tuple[str, ...] and isinstance(value, str)
            table[key] = [word.strip() for word in value.split(",")] if words else value


def _value(text: str) -> Any:
    """The TOML value `text` spells (1e-4, true, [1, 3]); a bare list 1,3; otherwise the text itself."""
    for spelled in (text, f"[{text}]" if "," in text else text, f"0{text}" if text.startswith(".") else text):
        try:
            table = parse_toml(f"value = {spelled}".encode(), text)
        except (InputError, UnicodeEncodeError):
            continue
        if "#" not in text and table.keys() == {"value"}:  # neither a comment nor a second line is dropped
            return table["value"]
    return text


def _find(name: str, folder: Path) -> Path:
    if not name.endswith(".toml") and "/" not in name:
        if name not in preset_names():
            raise InputError(
                f"Unknown preset {name!r:.80}.{nearest(name, preset_names())} A file's name ends in .toml."
            )
        return PRESETS / f"{name}.toml"
    return require_file(folder / name, f"a TOML file, or one of the presets {', '.join(preset_names())}").resolve()


def _field(section: str, key: str) -> dataclasses.Field:
    fields = {schema.key_of(f.name): f for f in dataclasses.fields(SECTIONS[section])}
    return fields[key]


def _section(name: str, table: dict[str, Any]) -> schema.Section:
    keys = {schema.key_of(f.name): f.name for f in dataclasses.fields(SECTIONS[name])}
    for key in table:
        if key not in keys:
            raise InputError(f"Unknown key {name}.{key[:80]}.{_nearest_key(name, key)}")
    return SECTIONS[name](**{keys[key]: value for key, value in table.items()})


def _top_level(values: dict[str, Any]) -> dict[str, Any]:
    """Check the keys outside sections and fill in the defaults that depend on others."""
    values = dict(values)
    seed = values.setdefault("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise InputError(f"seed must be a whole number in [0, 2^63). Got {seed!r:.80}.")
    for key in ("preset", "run_dir", "restart_from"):
        if not is_text(values.get(key, "")):
            raise InputError(f"{key} must be text. Got {values[key]!r:.80}.")
    values.setdefault("preset", "toy")
    values["run_dir"] = values.get("run_dir") or f"runs/{values['preset']}"
    toy = values.get("model", ModelConfig()).values()["base"] == "toy"
    stages = values.get("stages") or [stage for stage in STAGES if stage != "base" or toy]
    restart = [values["restart_from"]] if values.get("restart_from") else []
    if not isinstance(stages, list | tuple):
        raise InputError(f"stages must be a list of names. Got {stages!r:.80}.")
    for stage in (*stages, *restart):
        if stage not in STAGES:
            raise InputError(f"Unknown stage {stage!r:.80}.{nearest(str(stage), STAGES)} Stages: {', '.join(STAGES)}.")
    values["stages"] = tuple(stage for stage in STAGES if stage in stages)  # always in the pipeline's order
    return values


def _check_together(cfg: Config) -> None:
    """Rules between settings of several sections."""
    settings = {name: getattr(cfg, name).values() for name in SECTIONS}
    model, data = settings["model"], settings["data"]
    working = set(cfg.stages) - {"report"}
    needed = {"model.base": model["base"]} if working else {}
    if working & {"revise", "rl"}:
        needed |= {"data.red_team": data["red_team"], "data.helpful": data["helpful"]}
    empty = [name for name, value in needed.items() if not value]
    if empty:
        raise InputError(f"Not set: {', '.join(empty)}. Give " + " ".join(f"--{name} PATH" for name in empty) + ".")
    if "base" in cfg.stages and model["base"] != "toy":
        raise InputError(f"Stage base makes the toy model, but model.base is {model['base']!r}: leave base out.")
    if "pm" in cfg.stages and not data["preferences"] and not settings["pm"]["harmless_only"]:
        raise InputError(
            "data.preferences is empty: a preference model without helpfulness comparisons teaches refusals. "
            "Give --data.preferences FILE, or --pm.harmless_only true to do it all the same."
        )
    if "pm" in cfg.stages and data["preferences"] == "toy" != model["base"]:
        raise InputError(
            f"data.preferences is the toy world's, but model.base is {model['base']!r}: give --data.preferences FILE "
            "(a preference model without helpfulness comparisons teaches refusals)."
        )
    algorithm, idle = settings["rl"]["algorithm"], {f"rl.{key}" for key in cfg.rl.idle()}
    idle |= {key for key in cfg.explicit if key.startswith("guards.") and algorithm == "dpo"}
    if "rl" in cfg.stages and (typed := sorted(cfg.explicit & idle)):
        raise InputError(f"rl.algorithm = {algorithm} does not read {', '.join(typed)}: leave it out.")
    if blind := cfg.guards.unwatched(cfg.explicit):
        raise InputError(f"{blind[0]} limits a guard that is off: also give it an action, warn, stop or rollback.")
    if settings["lora"]["rank"] and settings["pm"]["init"]:
        raise InputError(
            f"pm.init = {settings['pm']['init']!r}: with lora.rank > 0 the preference models are adapters on SL-CAI. "
            "Leave pm.init out, or set lora.rank = 0."
        )
    if settings["lora"]["rank"] and settings["parallel"]["shard"] is True:
        raise InputError(
            "parallel.shard = true: adapters and their trunk are replicated. Leave it out or set lora.rank = 0."
        )
    if settings["lora"]["rank"] and settings["parallel"]["recompute"] == "selective":
        raise InputError("parallel.recompute = selective keeps more than none does with adapters: use full or none.")
    revisions, rounds = settings["sft"]["revisions"], settings["revise"]["rounds"]
    if isinstance(revisions, tuple) and (not revisions or max(revisions) > rounds):
        raise InputError(f"sft.revisions must name revisions 0 to revise.rounds = {rounds}. Got {list(revisions)}.")


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON's text, whole numbers and truth values are TOML's, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
