"""Texts sampled again from their recorded keys, to see whether the record tells all that they depend on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from cai_fast import rng
from cai_fast.engine import Engine, Sampling
from cai_fast.errors import InputError
from cai_fast.hashing import hash_model
from cai_fast.model import load as load_model
from cai_fast.pipeline import weight_type
from cai_fast.records import Turn
from cai_fast.runfiles import RunFiles
from cai_fast.tokenizer import Renderer, Tokenizer

RECORDED = ("constitution", "template", "sampling")  # what every text depends on, besides its model and its key
Row = dict[str, Any]


class Draw(NamedTuple):
    """One text that was sampled as the answer to a conversation, as a row records it."""

    text: str  # what it is
    role: str
    model: str  # hash
    key: list[Any]  # parts
    tokens: str  # key in the token side file
    recorded: str  # the text itself
    raw: bool = False  # tokens as they were sampled
    open_end: bool = False  # no stop token where none was sampled


def draws(run: RunFiles, kind: str, row: Row) -> Iterator[Draw]:
    """The texts of a row that were sampled right after its prompt, by weights that may still exist; none of which the
    record lacks what they depend on."""
    origin = row.get("provenance", {})
    role, model, key = origin.get("role", ""), origin.get("model", ""), origin.get("rng")
    if not key or not all(origin.get(name) for name in RECORDED):
        return
    if kind == "helpful":
        yield Draw("response", role or "assistant", model, key, row["id"], row["response"])
    elif kind == "revision" and key.get("response"):
        yield Draw("first answer", role or "assistant", model, key["response"], f"{row['id']}/0", row["response"])
    elif kind == "comparison" and row["source"] == "ai":
        models = origin.get("models", {})
        for side, made_by in zip("ab", origin.get("roles", ()), strict=False):
            if made_by in models and key.get(side):
                text = row[f"response_{side}"]
                yield Draw(f"response_{side}", made_by, models[made_by], key[side], f"{row['id']}/{side}", text)
    elif kind == "answer":
        yield Draw("response", row["policy"], model, key, row["id"], row["response"], open_end=True)
    elif kind == "rollout" and (step := origin.get("policy_step")) is not None and (role := run.policy(step)):
        # The row names the model that training began with.
        yield Draw("response", role, run.made_hash(role), key, row["id"], row["response"], raw=True)


def verify(
    run: RunFiles, kind: str, row: Row, turns: list[Row] | None, tokens: dict[str, Any], device: str
) -> list[Row]:
    """Sample the texts of a row again: {text, same (None: cannot be said), result} of each.

    turns: of its prompt; tokens: the side file of its kind. On a CPU the same bits are expected of a run on this
    machine with these versions and threads; see `Engine`.
    """
    found = list(draws(run, kind, row))
    if not found or turns is None:
        why = (
            "no text of this row can be sampled from its record alone" if not found else "its prompt is not in the run"
        )
        return [{"text": "verify", "same": None, "result": why}]
    said = tuple(Turn(**turn) for turn in turns)
    return [{"text": draw.text} | _verify(run, draw, row["provenance"], said, tokens, device) for draw in found]


def _verify(
    run: RunFiles, draw: Draw, origin: Row, turns: tuple[Turn, ...], tokens: dict[str, Any], device: str
) -> Row:
    if not draw.model:
        return {"same": None, "result": "cannot be sampled again: the hash of its model was not recorded"}
    folder = run.model_folder(draw.role)
    there = any(folder.glob("*.safetensors"))
    if not there or hash_model(folder) != draw.model:
        return {"same": None, "result": f"cannot be sampled again: {folder} does not hold the model {draw.model}"}
    laws, cfg = run.constitution(origin["constitution"]), run.config
    renderer = Renderer(Tokenizer.load(folder), laws, seed=draw.key[0], few_shot_pool=cfg.data.few_shot_pool)
    if renderer.hash != origin["template"] and draw.role == origin.get("role"):
        return {"same": None, "result": f"cannot be sampled again: the template is now {renderer.hash}"}
    spec, prompt = Sampling(**origin["sampling"]), renderer.dialogue(turns)
    model = load_model(folder, dtype=weight_type(cfg, torch.device(device).type), device=device, head="lm")
    settings = cfg.engine
    engine = Engine(model, max_len=len(prompt) + spec.max_new_tokens, max_batch=settings.max_batch,
                    prefill_tokens=settings.prefill_tokens, tokenizer=renderer.tokenizer)  # fmt: skip
    done = engine.generate([prompt], spec, keys=[rng.key(*draw.key)])[0]
    finished = renderer.finish(done.token_ids, "response")
    ids = finished.token_ids
    if draw.raw:
        ids = done.token_ids
    elif draw.open_end and done.finish_reason == "length":
        ids = finished.body_ids
    if draw.tokens not in tokens:
        same = finished.text == draw.recorded
        return {"same": same, "result": f"{'the same' if same else 'another'} text (its tokens were not recorded)"}
    old = tokens[draw.tokens][0]
    if old == ids:
        return {"same": True, "result": f"the same {len(ids)} tokens"}
    at = next((n for n, pair in enumerate(zip(old, ids, strict=False)) if pair[0] != pair[1]), min(len(old), len(ids)))
    return {"same": False, "result": f"differs from token {at} on ({len(old)} recorded, {len(ids)} now); {_where(run)}"}


def _where(run: RunFiles) -> str:
    """What the run was made with, which other bits may be due to."""
    entries = run.json("environment.json")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{run.root / 'environment.json'}: expected a list of objects")
    then = entries[-1]
    return (
        f"the run was made with torch {then['versions'].get('torch')} on {then['device']}, {then['threads']} threads, "
        f"this is torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
