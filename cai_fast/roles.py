"""Models by what a stage does with them: trained, frozen beside a trained one, written as a checkpoint.

With `lora.rank` > 0 only adapters and scalar heads are trained. SL-CAI is then the one trunk of every later role: pass
the model that is in memory as `trunk`, and roles share its weights instead of loading their own. A checkpoint holds the
merged model, and in its folder `adapter` what was trained, as peft writes it, with the hash of the trunk below it.

With several ranks and without adapters, what is trained is sharded, see parallel.py.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from cai_fast import heartbeat, model_card, parallel, rng
from cai_fast.errors import InputError
from cai_fast.files import write_atomic
from cai_fast.hashing import hash_model
from cai_fast.model import Model, lora
from cai_fast.model.hf import read_json
from cai_fast.pipeline import Context

ADAPTER, TRUNK = "adapter", "trunk.json"


def trained(ctx: Context, role: str, *, head: str | None = None, name: str = "", trunk: Model | None = None) -> Model:
    """The model in `role`, ready to be trained; `name` seeds what is drawn for it (a score head, adapters).

    head: "lm" or "score"; "score" on a language model is a fresh scalar head.
    """
    rank, seed = ctx.config.lora.rank, rng.key(ctx.config.seed, "pm/head", name)
    if not rank:
        return _recomputing(ctx, ctx.model(role, head, new_head=seed, **_sharding(ctx, torch.float32)))
    if role == "pm":
        return _recomputing(ctx, _logged(ctx, _preference_model(ctx, role, trunk), name))
    model = trunk.shared() if trunk is not None else ctx.model(role, None if head == "score" else head)
    if head == "score" and model.head == "lm":
        model = model.with_score_head(seed, share=True)
    return _adapted(ctx, model, name)


def value_model(ctx: Context, trunk: Model, name: str) -> Model:
    """SL-CAI, which is `trunk`, under a scalar head of zeros, ready to be trained."""
    if ctx.config.lora.rank:
        return _adapted(ctx, trunk.with_score_head(0, zero=True, share=True), name)
    model = trained(ctx, "sl_cai", head="score", name=name)
    with torch.no_grad():
        model.score.weight.zero_()
    return model


def frozen(ctx: Context, role: str, *, head: str | None = None, trunk: Model | None = None) -> Model:
    """The model in `role`, never trained, whole on every rank."""
    adapted = role in ("pm", "pm_eval") and ctx.config.lora.rank > 0
    return (_preference_model(ctx, role, trunk) if adapted else ctx.model(role, head)).requires_grad_(False)


def reference(ctx: Context) -> Model:
    """SL-CAI, never trained, for passes that all ranks do together: sharded as the policy is."""
    return ctx.model("sl_cai", "lm", **_sharding(ctx, ctx.dtype)).requires_grad_(False)


def replica(ctx: Context, model: Model) -> parallel.Replica | None:
    """Collective: a whole copy for an engine or a scorer of a model that is sharded; None for one that is not."""
    return parallel.Replica(model, ctx.dtype) if parallel.is_sharded(model) else None


def _sharding(ctx: Context, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `model.load` that shard a model, kept in `dtype`; none if models are not sharded in this run."""
    if not ctx.config.shards(ctx.dist.world):
        return {}
    return {"dtype": dtype, "prepare": lambda model: parallel.shard(model, ctx.dist, ctx.dtype)}


def _recomputing(ctx: Context, model: Model) -> Model:
    for block in model.model.layers:
        block.recompute = ctx.config.parallel.recompute
    return model


def reset(ctx: Context, model: Model, name: str, before: Model) -> None:
    """Undo the training of a model that was made by `trained` with that name out of `before`."""
    if lora.adapters(model):
        lora.reset(model, _adapter_seed(ctx, name))
    else:
        model.load_state_dict(before.state_dict())


def export(ctx: Context, model: Model, name: str, tokenizer: Any, results: dict[str, Any], **extra_config: Any) -> None:
    """Write a trained model as checkpoint `name` of the run, in Hugging Face's format, with its card. Collective.

    results: the summary of its training, for the card.
    """
    folder, adapted = ctx.checkpoint(name), bool(lora.adapters(model))
    heartbeat.at("saving", name)
    gathered = parallel.gather(model, ctx.dtype) if parallel.is_sharded(model) else model

    def write() -> None:
        whole = lora.merge(model, "cpu") if adapted else gathered
        texts = model_card.files(ctx, name, results)
        whole.save(folder, tokenizer=tokenizer, extra_config=extra_config or None, extra_files=texts)
        if adapted:
            below = model.source
            name_below = f"../../{below.name}" if below.parent == folder.parent else None  # run folders are moved
            lora.save_adapters(model, folder / ADAPTER, name_below)
            write_atomic(folder / ADAPTER / TRUNK, json.dumps({"sha256": hash_model(below)}) + "\n")

    ctx.dist.on_main(write)


def outputs(ctx: Context, *names: str) -> list[str]:
    """What a later stage reads of these checkpoints besides the merged models."""
    return [f"checkpoints/{name}/{ADAPTER}" for name in names if ctx.config.lora.rank]


def sizes(model: Model) -> dict[str, int]:
    """How many parameters a model has, and how many of them are trained."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"parameters": sum(n for n, _ in counts), "trained_parameters": sum(n for n, trained in counts if trained)}


def _adapter_seed(ctx: Context, name: str) -> int:
    return rng.key(ctx.config.seed, "lora", name)


def _adapted(ctx: Context, model: Model, name: str) -> Model:
    """`model` with fresh adapters, if the configuration asks for some."""
    cfg = ctx.config.lora
    if cfg.rank:
        lora.add_adapters(model, cfg.rank, cfg.alpha, cfg.targets, _adapter_seed(ctx, name))
        _logged(ctx, model, name)
    return _recomputing(ctx, model)


def _logged(ctx: Context, model: Model, name: str) -> Model:
    layers, counts = lora.adapters(model), sizes(model)
    ctx.log.info(
        f"{name}: adapters of rank {next(iter(layers.values())).rank} on {len(layers)} layers; "
        f"{counts['trained_parameters']:,} of {counts['parameters']:,} parameters are trained"
    )
    return model


def _preference_model(ctx: Context, role: str, trunk: Model | None) -> Model:
    """SL-CAI with the adapters and the score head that stage pm trained, all of them able to be trained further."""
    folder = ctx.folder(role) / ADAPTER
    expected, found = {"sha256": ctx.model_hash("sl_cai")}, read_json(folder / TRUNK)
    if found != expected:
        raise InputError(
            f"{folder}: expected adapters of {ctx.folder('sl_cai')}, {expected}, found some of another model, {found}; "
            "restore the model they belong to, or redo stage pm with --restart-from pm"
        )
    trunk = ctx.model("sl_cai") if trunk is None else trunk
    model = trunk.with_score_head(0, zero=True, share=True)
    lora.load_adapters(model, folder)
    return model
