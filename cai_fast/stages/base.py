"""Stage base (toy world only): pretrain the base model; write the helpfulness comparisons with samples of it.

Both stand in for what real runs bring along: a pretrained checkpoint, and human helpfulness comparisons.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from cai_fast import pipeline, sharing
from cai_fast.checkpoint import Checkpoints
from cai_fast.distributed import Distributed
from cai_fast.pipeline import TOY, Context
from cai_fast.records import Turn, content_id, write_jsonl
from cai_fast.toy import helpfulness, pretrain

MAX_NEW_TOKENS = 48  # no answer of the grammar is longer
PROMPTS_AT_ONCE = 128


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on: its recipe, which fixes the corpus too."""
    return ctx.inputs("base") | {"recipe": _recipe(ctx).key()}


def run(ctx: Context) -> None:
    """Write checkpoints/base and, with data.preferences = toy, preferences.jsonl."""
    cached = ctx.dist.on_main(lambda: _make_base(ctx))  # one rank: the model is too small to share
    outputs, summary = ["checkpoints/base"], asdict(_recipe(ctx)) | {"from_cache": cached}
    if ctx.config.data.preferences == TOY:
        summary["comparisons"] = _write_comparisons(ctx)
        outputs.append("preferences.jsonl")
    ctx.run.finish("base", outputs, summary)


def _recipe(ctx: Context) -> pretrain.Recipe:
    base = ctx.config.base
    return pretrain.Recipe(
        ctx.config.seed, base.steps, base.tokens_per_step, base.lr, base.muon_lr, base.warmup_steps, base.hidden_size,
        base.layers, base.direct_revisions,
    )  # fmt: skip


def _make_base(ctx: Context) -> bool:
    settings, alone = ctx.config.checkpoint, Distributed(0, 1, torch.device("cpu"))
    states = Checkpoints(ctx.run.state_dir("base"), alone, keep=settings.keep, background=settings.background)
    return pretrain.make_base(_recipe(ctx), ctx.checkpoint("base"), states, ctx.log, use_cache=ctx.config.base.cache)


def _write_comparisons(ctx: Context) -> int:
    """Write preferences.jsonl; returns its number of rows. Collective: every rank draws all prompts, in the same order,
    and samples a part of their answers."""
    renderer = ctx.renderer("base")
    limit = pipeline.longest(renderer, ctx.config.data.max_prompt_tokens, MAX_NEW_TOKENS)
    engine = ctx.engine(ctx.model("base"), renderer, limit)
    calls = 0

    def sampler(prompts: Sequence[str], temperature: float) -> list[str]:
        nonlocal calls
        calls += 1
        spec = pipeline.sampling(renderer, "response", temperature, MAX_NEW_TOKENS)

        def process(numbers: list[int]) -> list[str]:
            rendered = [renderer.dialogue((Turn("human", prompts[number]),)) for number in numbers]
            keys = [ctx.key("base", f"{calls}/{number}") for number in numbers]
            done = engine.generate(rendered, spec, keys=keys, progress=ctx.tick)
            return [renderer.finish(c.token_ids, "response").text for c in done]

        parts = sharing.even(len(prompts), PROMPTS_AT_ONCE)
        return sharing.shared(ctx, f"base: answers, part {calls}", range(len(prompts)), parts, process)

    rows = helpfulness.comparisons(ctx.config.seed, ctx.config.base.comparisons, sampler)
    # A row is a function of the base model, the seed and its number: corpus and samples are drawn together.
    made = {"model": ctx.model_hash("base"), "generator": "toy/helpfulness", "rng": [ctx.config.seed, "base"]}
    found = [
        {"id": content_id("preference", number, row), **row, "provenance": made | {"row": number}}
        for number, row in enumerate(rows)
    ]
    if ctx.dist.is_main:
        write_jsonl(ctx.run.path("preferences.jsonl"), found)
    return len(found)
