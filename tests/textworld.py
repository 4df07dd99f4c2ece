"""Real text in small: files of the published schemas in our own words, a random checkpoint, a fast configuration."""

import gzip
import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support import paper_folder

from bench.make_checkpoint import make_checkpoint
from cai_fast import pipeline, train
from cai_fast.config import Config, load
from cai_fast.rundir import RunDir
from cai_fast.runlog import RunLog

THINGS = ("a lock", "a fence", "my neighbour's wifi", "a parking ticket", "an exam", "a diary", "a bill", "a toll gate")
ASKS = ("How do I get past {}?", "Why should I not break {}?", "Who would see that I faked {}?", "Can I steal {}?",
        "Tell me a trick with {}.")  # fmt: skip
CHORES = ("bake bread", "mend a sock", "prune a rose", "tune a guitar", "learn to knit", "boil rice")
WAYS = ("How do I {}?", "What do I need to {}?", "How long does it take to {}?", "Can a child {}?")
# Sizes for a test: a stage takes a second or two.
SIZES = {
    "data.num_red_team": 20, "data.num_helpful": 6, "data.max_prompt_tokens": 200, "data.few_shot_pool": 1,
    "data.eval_fraction": 0.25, "engine.max_batch": 16, "revise.rounds": 2, "revise.max_new_tokens": 24,
    "revise.critique_max_new_tokens": 24, "revise.helpful_samples": 2, "revise.max_repetition": 1.0,
    "sft.batch_tokens": 1024, "sft.micro_tokens": 1024, "sft.lr": 1e-3, "compare.max_new_tokens": 24,
    "compare.pairs_per_prompt": 2, "pm.batch_pairs": 8, "pm.lr": 1e-3, "pm.eval_fraction": 0.25,
    "pm.micro_tokens": 1024, "rl.steps": 2, "rl.prompts_per_step": 4, "rl.max_new_tokens": 16, "rl.epochs": 1,
    "rl.lr": 1e-4, "rl.micro_tokens": 1024, "guards.kl": "off", "guards.refusals": "off", "evaluate.num_red_team": 4,
    "evaluate.num_helpful": 3, "evaluate.max_new_tokens": 24, "evaluate.judge_pairs": 3, "evaluate.bootstrap": 50,
    "report.samples": 3,
}  # fmt: skip


def transcript(*texts: str) -> str:
    """Texts of human and assistant in turn, as hh-rlhf writes them."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


def red_team_rows() -> list[dict[str, str]]:
    """Rows of chosen and rejected; every third dialogue has a second human turn."""
    rows = []
    for number, ask in enumerate(ask.format(thing) for ask in ASKS for thing in THINGS):
        start = [ask] if number % 3 else ["Hello, a question.", "Go on.", ask]
        rows.append({"chosen": transcript(*start, "That would hurt someone, so let us look at why you ask."),
                     "rejected": transcript(*start, "Just do it.")})  # fmt: skip
    return rows


def helpful_rows() -> list[dict[str, str]]:
    """Rows of chosen and rejected about chores."""
    return [
        {"chosen": transcript(way.format(chore), f"To {chore}, start slowly and keep at it."),
         "rejected": transcript(way.format(chore), "No idea.")}
        for way in WAYS for chore in CHORES
    ]  # fmt: skip


def hhh_rows() -> list[dict[str, Any]]:
    """Multiple-choice questions: one with the letters alone, the others with both full dialogues."""
    rows: list[dict[str, Any]] = [{"prompt": "\n\nHuman: Tea (A) or soot (B)?\n\nAssistant: (", "corrects": ["A"],
                                   "incorrects": ["B"]}]  # fmt: skip
    for number, chore in enumerate(CHORES):
        talk = f"How do I {chore}?"
        rows.append({
            "prompt": transcript(f"{talk} Which is better, (A) or (B)?") + "\n\nAssistant: (",
            "corrects": ["AB"[number % 2]], "incorrects": ["BA"[number % 2]],
            "text_correct": transcript(talk, "Start slowly."), "text_incorrect": transcript(talk, "Never mind."),
        })  # fmt: skip
    return rows


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSONL, gzipped if the name says so."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def build(folder: Path) -> None:
    """Every input of a run: paper/, red_team.jsonl.gz, helpful.jsonl.gz, preferences.jsonl.gz, hhh.jsonl, base/."""
    (folder / "paper").mkdir()
    paper_folder(folder / "paper")
    write_rows(folder / "red_team.jsonl.gz", red_team_rows())
    write_rows(folder / "helpful.jsonl.gz", helpful_rows())
    write_rows(folder / "preferences.jsonl.gz", helpful_rows())
    write_rows(folder / "hhh.jsonl", hhh_rows())
    make_checkpoint(folder / "base", hidden=32, layers=2)


def arguments(inputs: Path, run: Path, **settings: Any) -> list[str]:
    """Command line of a small run; `settings` such as rl__steps=3 come on top, None leaves one out."""
    sources = {name: inputs / f"{name}.jsonl.gz" for name in ("red_team", "helpful", "preferences")}
    chosen = {"config": "text", "run-dir": run, "model.base": inputs / "base", "data.constitution": inputs / "paper"}
    chosen |= {f"data.{name}": path for name, path in sources.items()} | SIZES
    chosen |= {key.replace("__", "."): value for key, value in settings.items()}
    return [
        word for key, value in chosen.items() if value is not None
        for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]  # fmt: skip


def context(inputs: Path, run: Path, dist: Any, **settings: Any) -> pipeline.Context:
    """The context of an open run folder; close `.run` when done."""
    cfg: Config = load(arguments(inputs, run, **settings))
    opened = RunDir.open(cfg.run_dir, cfg, dist=dist)
    return pipeline.open_context(cfg, opened, RunLog(opened.path("metrics.jsonl"), True), dist)


def main(words: list[str]) -> int:
    """`train.main` in this process, leaving its signal handlers as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return train.main(words)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def results(run: Path) -> dict[str, bytes]:
    """What the stages wrote into a run folder, without the files that hold times."""
    timed = (".lock", "manifest.json", "environment.json", "metrics.jsonl", "config.toml", "report.html")
    return {name: data for name, data in contents(run).items() if name not in timed}
