"""Stage revise: answers to red-team prompts, critiqued and revised N times, and plain answers to helpful prompts.

Paper §3.1-3.2. The assistant (a helpful-only model) answers; in every round one principle is drawn with replacement,
the model criticises the current response and rewrites it, and the revision takes the response's place. A chain whose
text is empty, over-long, repetitive or starts with filler is rejected with the reason; nothing is dropped silently.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from cai_fast import pipeline, sharing
from cai_fast.chains import Reviser
from cai_fast.constitution import Principle
from cai_fast.errors import InputError
from cai_fast.pipeline import Context
from cai_fast.prompts import fit_turns
from cai_fast.records import Helpful, Prompt, Revision, Turn, write_jsonl, write_tokens
from cai_fast.runlog import in_words

READERS = ("assistant", "base", "judge", "pm_init")  # every model of a run has the tokenizer of one of these
PROMPTS_AT_ONCE = 500
OUTPUTS = ("prompts.jsonl", "revisions.jsonl", "helpful.jsonl", "tokens/revisions.safetensors")


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on."""
    data = ctx.config.data
    # A prompt that is too long for another model's tokenizer is left out.
    others = sorted({ctx.template_hash(role) for role in READERS} - {ctx.template_hash("assistant")})
    found = ctx.inputs("revise", roles=["assistant"])
    found["prompts"] = [pipeline.data_file_hash(data.red_team), pipeline.data_file_hash(data.helpful)]
    return found | ({"other_templates": others} if others else {})


def run(ctx: Context) -> None:
    """Write prompts.jsonl, revisions.jsonl, helpful.jsonl and the token side file."""
    worker = Reviser(ctx)
    cfg = ctx.config.revise
    prompts = prepare_prompts(ctx)
    train = [p for p in prompts if p.split == "train"]
    red_team = pipeline.take(ctx, [p for p in train if p.kind == "red_team"], "revise", cfg.num_red_team)
    helpful = pipeline.take(ctx, [p for p in train if p.kind == "helpful"], "revise/helpful", cfg.num_helpful)
    _warn_refusals(ctx, worker, red_team[:64])
    by_id = {p.id: p for p in train}
    chains = pipeline.journaled(
        ctx, "revise", [p.id for p in red_team], cfg.chunk, lambda ids: worker.chains([by_id[i] for i in ids])
    )
    wanted = [f"{p.id}/{n}" for p in helpful for n in range(cfg.helpful_samples)]
    samples = pipeline.journaled(
        ctx, "revise.helpful", wanted, cfg.chunk, lambda ids: worker.helpful([(by_id[i.split("/")[0]], i) for i in ids])
    )
    summary = _write(ctx, list(chains.values()), list(samples.values())) if ctx.dist.is_main else {}
    ctx.run.finish("revise", list(OUTPUTS), summary)


class Everywhere:
    """Conversations as all models of the run read them; to `fit_turns` a renderer whose text is the longest of all.

    A later stage cannot leave a prompt out any more, so it must fit the tokenizer of every role. The judge reads it
    inside a question, where its turns may be written differently than in a dialogue.
    """

    def __init__(self, ctx: Context) -> None:
        renderers = {role: ctx.renderer(role) for role in READERS}
        distinct = {renderer.hash: renderer for renderer in renderers.values()}
        self.forms: list[Callable[[Sequence[Turn]], list[int]]] = [r.dialogue for r in distinct.values()]
        judge, principle = renderers["judge"], Principle("", comparison="x")
        for question in (judge.comparison, judge.cot):
            frame = len(question((), "x", "x", principle, -1).ids)
            self.forms.append(lambda turns, ask=question, n=frame: ask(turns, "x", "x", principle, -1).ids[n:])

    def dialogue(self, turns: Sequence[Turn]) -> list[int]:
        """The longest form; only its length means anything."""
        return max((form(turns) for form in self.forms), key=len)


def prepare_prompts(ctx: Context) -> list[Prompt]:
    """The run's prompts; from the sources, written to prompts.jsonl."""
    kept: list[Prompt] = []
    data, everywhere = ctx.config.data, Everywhere(ctx)
    for kind, count in (("red_team", data.num_red_team), ("helpful", data.num_helpful)):
        prompts, rejected = pipeline.prompt_source(ctx, kind)
        for bad in rejected[:5]:
            ctx.log.warn(f"{kind} prompts, line {bad.line}: {bad.reason}")
        train = pipeline.take(ctx, [p for p in prompts if p.split == "train"], kind, count)
        chosen = train + [p for p in prompts if p.split == "eval"]
        fitting = _fitting(ctx, kind, chosen, everywhere)
        over_long = len(chosen) - len(fitting)
        total = len(chosen) + len(rejected)
        if over_long + len(rejected) > data.max_bad_fraction * total:
            raise InputError(
                f"{kind} prompts: {over_long} longer than data.max_prompt_tokens = {data.max_prompt_tokens} and "
                f"{len(rejected)} malformed of {total}, more than data.max_bad_fraction = {data.max_bad_fraction}."
            )
        if not any(p.split == "train" for p in fitting):
            raise InputError(f"{kind} prompts: none left to train on (of {total} rows).")
        ctx.log.info(f"{kind} prompts: {len(fitting)} used, {over_long} over-long, {len(rejected)} malformed rows")
        kept += fitting
    if ctx.dist.is_main:
        write_jsonl(ctx.run.path("prompts.jsonl"), kept)
    return kept


def _fitting(ctx: Context, kind: str, prompts: Sequence[Prompt], everywhere: Everywhere) -> list[Prompt]:
    """The prompts within data.max_prompt_tokens, shortened by oldest turns where allowed; without those that cannot
    be. Collective."""
    data = ctx.config.data

    def process(items: list[Prompt]) -> list[int]:
        fitted = (fit_turns(p.turns, everywhere, data.max_prompt_tokens, data.drop_oldest_turns) for p in items)
        return [len(turns or ()) for turns in fitted]

    kept = sharing.shared(ctx, f"{kind} prompts", prompts, sharing.even(len(prompts), PROMPTS_AT_ONCE), process)
    return [dataclasses.replace(p, turns=p.turns[-n:]) for p, n in zip(prompts, kept, strict=True) if n]


def _write(ctx: Context, chains: list[dict[str, Any]], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Journals -> records, with token ids in the side file; counts must add up."""
    write_jsonl(ctx.run.path("revisions.jsonl"), [Revision.from_json(row["record"]) for row in chains])
    kept = [row for row in samples if row["reject_reason"] is None]
    write_jsonl(ctx.run.path("helpful.jsonl"), [Helpful.from_json(row["record"]) for row in kept])
    tokens = {key: (ids, None) for row in chains + kept for key, ids in row["tokens"].items()}
    write_tokens(ctx.run.path("tokens", "revisions.safetensors"), tokens)
    summary = {
        "requested": len(chains),
        "kept": sum(row["record"]["kept"] for row in chains),
        "rejected": dict(Counter(row["record"]["reject_reason"] for row in chains if not row["record"]["kept"])),
        "helpful_requested": len(samples),
        "helpful_kept": len(kept),
        "helpful_rejected": dict(Counter(row["reject_reason"] for row in samples if row["reject_reason"])),
    }
    if summary["requested"] != summary["kept"] + sum(summary["rejected"].values()):
        raise RuntimeError(f"revise: counts do not add up: {summary}")
    ctx.log.info(f"revise: {in_words(summary)}")
    return summary


def _warn_refusals(ctx: Context, worker: Reviser, prompts: Sequence[Prompt]) -> None:
    """An aligned assistant that refuses leaves nothing to revise: say so before the work is done."""

    def process(items: list[Prompt]) -> list[bool]:
        answers = worker.answer(items, "revise/response", [0] * len(items))
        return [worker.renderer.is_refusal(finished.text) for finished, _ in answers]

    parts = sharing.even(len(prompts), -(-len(prompts) // ctx.dist.world))  # a batch for each rank
    refused = sharing.shared(ctx, "revise: first answers", prompts, parts, process)
    rate = sum(refused) / max(1, len(refused))
    ctx.log.truncate("revise", 0)
    ctx.log.metrics("revise", 0, {"revise/refusal_rate": rate})
    if rate > ctx.config.revise.refusal_warn:
        ctx.log.warn(
            f"revise: the assistant refuses {rate:.0%} of {len(refused)} red-team prompts, which leaves nothing to "
            "revise; model.assistant should be a helpful-only model."
        )
