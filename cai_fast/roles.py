"""Models by what a stage does with them: trained, frozen beside a trained one, written as a checkpoint."""

from __future__ import annotations

from typing import Any

from cai_fast import heartbeat, rng
from cai_fast.model import Model
from cai_fast.pipeline import Context


def trained(ctx: Context, role: str, *, head: str | None = None, name: str = "") -> Model:
    """The model in `role`, ready to be trained; `name` seeds what is drawn for it (a score head, adapters).

    head: "lm" or "score"; "score" on a language model is a fresh scalar head.
    """
    if head != "score":
        return ctx.model(role, head)
    model = ctx.model(role)
    return model if model.head == "score" else model.with_score_head(rng.key(ctx.config.seed, "pm/head", name))


def frozen(ctx: Context, role: str, *, head: str | None = None) -> Model:
    """The model in `role`, never trained."""
    return ctx.model(role, head).requires_grad_(False)


def export(ctx: Context, model: Model, name: str, tokenizer: Any, **extra_config: Any) -> None:
    """Write a trained model as checkpoint `name` of the run, in Hugging Face's format. Collective."""
    folder = ctx.checkpoint(name)
    heartbeat.at("saving", name)
    ctx.dist.on_main(lambda: model.save(folder, tokenizer=tokenizer, extra_config=extra_config or None))
