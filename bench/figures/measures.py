"""What is measured of a run, as columns of one value per prompt or pair: the figures' intervals need them all.

Every function gets the run's folder and returns JSON values. Truth is the toy checker's, None where the prompts are not
the toy world's. Samples are keyed by (seed, prompt), alike for all policies, so that differences between policies are
differences on the same prompts with the same noise.
"""

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from cai_fast import config, constitution, constitutions, judging, measure, pipeline, records
from cai_fast.checkpoint import Checkpoints
from cai_fast.constitution import Principle
from cai_fast.distributed import Distributed
from cai_fast.errors import InputError
from cai_fast.files import write_atomic
from cai_fast.measure import Answer
from cai_fast.model import load as load_model
from cai_fast.pipeline import TOY, Context
from cai_fast.records import Comparison, Prompt, Revision, Turn
from cai_fast.rundir import RunDir
from cai_fast.runlog import RunLog
from cai_fast.tokenizer import Renderer, Tokenizer
from cai_fast.toy import checker, corpus, world
from cai_fast.toy.judge import is_telling
from cai_fast.toy.judge import make_judge as train_judge

Columns = dict[str, list[Any]]
GROUPS = {"red_team": "red_team", "benign": "helpful"}
CHUNK = 40  # comparisons judged at once


def context(run: Path, **changes: dict[str, Any]) -> Context:
    """The context of a finished run, with some settings changed ({section: {key: value}}); nothing is written."""
    cfg = config.load(["--config", str(run / "config.toml"), "--run-dir", str(run)])
    parts = {name: dataclasses.replace(getattr(cfg, name), **values) for name, values in changes.items()}
    cfg = dataclasses.replace(cfg, **parts)
    cuda = cfg.model.device != "cpu" and torch.cuda.is_available()
    dist = Distributed(0, 1, torch.device("cuda" if cuda else "cpu"))
    return Context(cfg, RunDir(run, cfg, dist), RunLog(run / "metrics.jsonl", False), dist,
                   constitution.load(cfg.data.constitution))  # fmt: skip


def renderer(ctx: Context, folder: Path) -> Renderer:
    """The prompt renderer of the model in a folder."""
    return Renderer(
        Tokenizer.load(folder), ctx.constitution, seed=ctx.config.seed, few_shot_pool=ctx.config.data.few_shot_pool
    )


def truths(ctx: Context, prompts: Sequence[Prompt], texts: Sequence[str]) -> Columns:
    """The checker's columns; none outside the toy world."""
    if ctx.config.data.red_team != TOY:
        return {}
    rows = [checker.check(p.turns[-1].text, text) for p, text in zip(prompts, texts, strict=True)]
    return {name: [row[name] for row in rows] for name in checker.METRICS}


def scores(ctx: Context, pm: Path, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """The score of each text by the preference model in a folder."""
    reads = renderer(ctx, pm)
    sequences = [reads.preference(p.turns, reads.response_ids(text)) for p, text in zip(prompts, texts, strict=True)]
    scorer = ctx.scorer(load_model(pm, dtype=ctx.dtype, device=ctx.device))
    return measure.scores(ctx, "scores", scorer, sequences, [p.id for p in prompts])


def policies(run: Path, models: list[str], pm_eval: str, reference: str, counts: dict[str, int]) -> Any:
    """{checkpoint: {group: columns}} of one answer to each held-out prompt: text, truth, scores, exact KL, length."""
    ctx = context(run)
    prompts = {
        group: pipeline.take(
            ctx, pipeline.load_prompts(ctx, kind=kind, split="eval"), f"figures/{group}", counts[group]
        )
        for group, kind in GROUPS.items()
    }
    first = load_model(Path(reference), dtype=ctx.dtype, device=ctx.device)
    result: dict[str, Any] = {}
    for name in models:
        folder = run / "checkpoints" / name
        folder = folder if folder.is_dir() else ctx.folder(name)  # a base model that was brought along
        model = load_model(folder, dtype=ctx.dtype, device=ctx.device)
        answers = sample(ctx, folder, model, [p for group in prompts.values() for p in group])
        kl = measure.exact_kl(ctx, "kl", model, first, renderer(ctx, folder), answers)
        asked, texts = [a.prompt for a in answers], [a.text for a in answers]
        columns: Columns = {"prompt": [p.id for p in asked], "text": texts, "kl": kl}
        columns["length"] = [len(a.token_ids) for a in answers]
        columns |= truths(ctx, asked, texts) | {"pm_eval": scores(ctx, Path(pm_eval), asked, texts)}
        if (run / "checkpoints" / "pm").is_dir():
            columns["pm"] = scores(ctx, run / "checkpoints" / "pm", asked, texts)
        result[name] = {
            group: {key: [v for v, p in zip(values, asked, strict=True) if p.kind == kind]
                    for key, values in columns.items()}
            for group, kind in GROUPS.items()
        }  # fmt: skip
    return result


def sample(ctx: Context, folder: Path, model: Any, prompts: Sequence[Prompt]) -> list[Answer]:
    """An answer of the model to each prompt."""
    reads, cfg = renderer(ctx, folder), ctx.config.evaluate
    room = pipeline.round_up(ctx.config.data.max_prompt_tokens + cfg.max_new_tokens)
    engine = ctx.engine(model, reads, room)
    spec = pipeline.sampling(reads, "response", cfg.temperature, cfg.max_new_tokens)
    keys = [ctx.key("figures/answer", p.id) for p in prompts]
    done = engine.generate([reads.dialogue(p.turns) for p in prompts], spec, keys=keys)
    finished = [reads.finish(c.token_ids, "response") for c in done]
    return [
        Answer(p, f.text, f.token_ids if c.finish_reason == "stop" else f.body_ids, c.finish_reason == "stop")
        for p, f, c in zip(prompts, finished, done, strict=True)
    ]


def snapshots(run: Path, every: int, steps: int, **given: Any) -> Any:
    """`policies` of the snapshots that rl took every so many iterations, by iteration, and of its last policy; without
    those that a guard's stop left out."""
    names = {str(step): f"rl_cai_step_{step:05d}" for step in range(every, steps, every)} | {str(steps): "rl_cai"}
    names = {step: name for step, name in names.items() if (run / "checkpoints" / name).is_dir()}
    measured = policies(run, list(names.values()), **given)
    return {step: measured[name] for step, name in names.items()}


def training(run: Path, names: list[str]) -> Columns:
    """Columns of rl's metrics by iteration."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: [row.get(name) for row in rows if row["stage"] == "rl"] for name in names}


def chains(run: Path, pm_eval: str) -> dict[str, Columns]:
    """{revision: columns} of the chains that stage revise made and kept; 0 is the first response."""
    ctx = context(run)
    prompts = {p.id: p for p in pipeline.load_prompts(ctx)}
    kept = [row for row in records.read_jsonl(run / "revisions.jsonl", Revision) if row.kept]
    asked = [prompts[row.prompt_id] for row in kept]
    steps = [[[row.response, *(r.revision for r in row.rounds)][k] for row in kept]
             for k in range(ctx.config.revise.rounds + 1)]  # fmt: skip
    graded = scores(ctx, Path(pm_eval), asked * len(steps), [text for texts in steps for text in texts])
    return {
        str(k): {"prompt": [p.id for p in asked], "text": texts, "pm_eval": graded[k * len(kept) : (k + 1) * len(kept)]}
        | truths(ctx, asked, texts)
        for k, texts in enumerate(steps)
    }


def judge_columns(run: Path, source: str, judge: str, count: int, principles: int, thoughts: int) -> dict[str, Any]:
    """Toy world only: a feedback model on `count` AI pairs of the run `source` whose harm differs.

    direct, cot1 and cot: by pair, [P(A better) in either order] of each drawn principle: of `principles`, of 4 with one
    chain of thought a question, of one with `thoughts` averaged. harm: of the first answer minus that of the second.
    """
    ctx = context(Path(source), model={"judge": judge})
    prompts = {p.id: p for p in pipeline.load_prompts(ctx)}
    pairs = [c for c in pipeline.load_comparisons(ctx) if c.source == "ai"]
    found = [truths(ctx, [prompts[c.prompt_id]] * 2, (c.response_a, c.response_b))["harm"] for c in pairs]
    chosen = [(c, a - b) for c, (a, b) in zip(pairs, found, strict=True) if a != b]
    random.Random(f"figures/{ctx.config.seed}").shuffle(chosen)
    chosen = chosen[:count]
    items = [(c, prompts[c.prompt_id].turns) for c, _ in chosen]
    result: dict[str, Any] = {"prompt": [c.prompt_id for c, _ in chosen], "harm": [harm for _, harm in chosen]}
    variants: dict[str, dict[str, Any]] = {
        "direct": {"principles": principles}, "cot1": {"cot": True, "principles": 4, "cot_max_new_tokens": 48},
        "cot": {"cot": True, "cot_samples": thoughts, "cot_max_new_tokens": 48},
    }  # fmt: skip
    for name, settings in variants.items():
        asked = context(Path(source), model={"judge": judge}, label={"orders": "both", **settings})
        worker = judging.Judge(asked, "judge", measuring=True)
        rows = [row for at in range(0, len(items), CHUNK) for row in worker.label(items[at : at + CHUNK])]
        result[name] = [[[v["prob_a_ab"], v["prob_a_ba"]] for v in row["record"]["per_principle"]] for row in rows]
    return result


def judge_skill(run: Path, source: str, judge: str, count: int, thoughts: int) -> dict[str, Any]:
    """Toy world only: P(the better of two drawn answers), better by a principle that names a category.

    own: asked by that principle; general: by "harmful", which is what a judge that ignores the principle answers; cot1
    and cot: by the principle with one chain of thought, and with several. kind: aligned if total harm says the same as
    the category, conflict if it says the opposite or nothing.
    """
    ctx = context(Path(source), model={"judge": judge})
    rng = random.Random(f"figures/skill/{ctx.config.seed}")
    principles = [p for p in ctx.constitution.principles if len(p.categories) == 1]
    general = next(p for p in ctx.constitution.principles if p.id == "harmful")
    held_out = [r for r in world.requests(True) if r.held_out]
    jobs: list[tuple[str, Turn, Principle, str, str]] = []
    for kind in ("aligned", "conflict"):
        while sum(job[0] == kind for job in jobs) < count:
            request, principle = rng.choice(held_out), rng.choice(principles)
            pair = corpus.any_answer(rng, request), corpus.any_answer(rng, request)
            scope = [len(corpus.in_scope(answer, principle)) for answer in pair]
            if scope[0] == scope[1] or is_telling(*pair, principle) != (kind == "conflict"):
                continue
            better, worse = pair if scope[0] < scope[1] else pair[::-1]
            jobs.append((kind, Turn("human", request.text), principle, better.text, worse.text))
    variants: dict[str, dict[str, Any]] = {
        "own": {}, "general": {}, "cot1": {"cot": True, "cot_max_new_tokens": 48},
        "cot": {"cot": True, "cot_samples": thoughts, "cot_max_new_tokens": 48},
    }  # fmt: skip
    result: dict[str, Any] = {"kind": [job[0] for job in jobs]}
    for name, settings in variants.items():
        asked = context(Path(source), model={"judge": judge}, label=settings)
        questions = [
            judging.Question(Comparison(str(n), "", "harmless", "ai", a, b, "eval"), (turn,),
                             general if name == "general" else principle, 0, order, -1, {})
            for n, (_, turn, principle, a, b) in enumerate(jobs) for order in (0, 1)
        ]  # fmt: skip
        judging.Judge(asked, "judge", measuring=True).ask(questions)
        means = [fmean(q.probs) for q in questions]
        result[name] = [(a + 1.0 - b) / 2 for a, b in zip(means[::2], means[1::2], strict=True)]
    return result


def subsets(run: Path, source: str, general: list[int], mixed: list[int], alone: int) -> dict[str, list[str]]:
    """Constitutions with so many principles for critiques of the run `source`, nested, in an order that its seed draws:
    general_N.toml (principles of several categories only), mixed_N.toml (of several and of one in turns), and
    alone_K.toml with the K-th of those alone. Returns the principles of each."""
    ctx = context(Path(source))
    name = ctx.config.data.constitution
    path = Path(constitutions.__file__).parent / f"{name}.toml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        raise InputError(f"data.constitution: subsets are drawn of a bundled constitution or a TOML file; got {name!r}")
    parts = re.split(r"(?m)^(?=\[)", path.read_text())
    principles = [part for part in parts if part.startswith("[[principle]]") and "\ncritique_request" in part]
    random.Random(f"figures/principles/{ctx.config.seed}").shuffle(principles)
    several = [part for part in principles if part.count('"', part.find("categories")) > 2]
    turns = itertools.zip_longest(several, [part for part in principles if part not in several])
    both = [part for pair in turns for part in pair if part]
    chosen = {f"general_{n}": several[:n] for n in general} | {f"mixed_{n}": both[:n] for n in mixed}
    chosen |= {f"alone_{k}": [both[k % len(both)]] for k in range(alone)}
    run.mkdir(parents=True, exist_ok=True)
    for file, wanted in chosen.items():
        write_atomic(run / f"{file}.toml", "".join(p for p in parts if p not in principles or p in wanted))
    return {file: [re.search(r'id = "(.*)"', part)[1] for part in wanted] for file, wanted in chosen.items()}


def make_judge(run: Path, base: str, steps: int) -> dict[str, Any]:
    """The toy world's judge, trained from a base model, in the folder `judge` of the run."""
    run.mkdir(parents=True, exist_ok=True)
    seed = json.loads((Path(base).parents[1] / "manifest.json").read_text())["stages"]["base"]["settings"]["seed"]
    states = Checkpoints(run / "state", Distributed(0, 1, torch.device("cpu")))
    train_judge(seed, Path(base), run / "judge", states, RunLog(run / "metrics.jsonl"), steps)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"loss": rows[-1]["judge/loss"]}
