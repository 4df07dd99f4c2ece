"""Measurements that need models: answers of a policy, preference scores, exact KL, the judge's verdicts.

All of it is shared by the ranks. What is generated is keyed and journaled like the other stages' work, so an
interrupted evaluation continues; what is computed in one pass is done again.
"""

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cai_fast import kernels, pipeline, sharing
from cai_fast.batching import Example, pack_targets, segment_sum
from cai_fast.judging import Judge
from cai_fast.model import Model
from cai_fast.pipeline import Context
from cai_fast.records import Comparison, Prompt, content_id
from cai_fast.scorer import Scorer
from cai_fast.tokenizer import Renderer


@dataclass(frozen=True)
class Answer:
    """One answer of a policy to a held-out prompt; `token_ids` end with the stop token only if it was sampled."""

    prompt: Prompt
    text: str
    token_ids: list[int]
    stopped: bool
    provenance: dict[str, Any] = field(default_factory=dict)


def answers(ctx: Context, role: str, prompts: Sequence[Prompt]) -> list[Answer]:
    """One sampled answer of the model in `role` to every prompt."""
    cfg = ctx.config.evaluate
    by_id = {p.id: p for p in prompts}
    worker: list[tuple[Renderer, object]] = []  # made when there is work to do

    def process(ids: list[str]) -> Iterator[dict]:
        if not worker:
            renderer = ctx.renderer(role)
            room = pipeline.round_up(ctx.config.data.max_prompt_tokens + cfg.max_new_tokens)
            worker.append((renderer, ctx.engine(ctx.model(role), renderer, room)))
        renderer, engine = worker[0]
        spec = pipeline.sampling(renderer, "response", cfg.temperature, cfg.max_new_tokens)
        keys = [ctx.key(f"evaluate/{role}", i, cfg.seed_offset) for i in ids]
        asked = [renderer.dialogue(by_id[i].turns) for i in ids]
        done = engine.generate(asked, spec, keys=keys, progress=ctx.tick)
        for i, completion in zip(ids, done, strict=True):
            key = [ctx.config.seed, f"evaluate/{role}", i, cfg.seed_offset]
            finished = renderer.finish(completion.token_ids, "response")
            stopped = completion.finish_reason == "stop"
            yield {
                "id": i,
                "text": finished.text,
                "token_ids": finished.token_ids if stopped else finished.body_ids,
                "stopped": stopped,
                "provenance": pipeline.provenance(ctx, role, renderer, spec, parents=[i], rng=key),
            }

    rows = pipeline.journaled(ctx, f"evaluate.{role}", list(by_id), ctx.config.compare.chunk * 4, process)
    return [
        Answer(by_id[i], row["text"], row["token_ids"], row["stopped"], row["provenance"]) for i, row in rows.items()
    ]


def scores(
    ctx: Context, name: str, scorer: Scorer, sequences: Sequence[list[int]], groups: Sequence[Hashable]
) -> list[float]:
    """Preference scores [B] of token sequences by all ranks; `groups` [B] as in `Scorer.scores`. Collective."""

    def process(items: list[tuple[list[int], Hashable]]) -> list[float]:
        return scorer.scores(*zip(*items, strict=True)).tolist()

    items = list(zip(sequences, groups, strict=True))
    return sharing.shared(ctx, name, items, sharing.token_chunks([*map(len, sequences)], groups), process)


def score_answers(ctx: Context, name: str, scorer: Scorer, role: str, rows: Sequence[Answer]) -> list[float]:
    """Preference scores of answers of the model in `role`; those to one prompt are a group. Collective: logs the work.

    Its tokens as they are where the preference models have its tokenizer, else its texts encoded anew.
    """
    began, renderer = time.monotonic(), ctx.renderer("pm_eval")
    if renderer.tokenizer.hash != ctx.renderer(role).tokenizer.hash:
        encoded = [renderer.response_ids(a.text) for a in rows]  # with the stop token
        rows = [replace(a, token_ids=ids if a.stopped else ids[:-1]) for a, ids in zip(rows, encoded, strict=True)]
    sequences = [renderer.preference(a.prompt.turns, a.token_ids) for a in rows]
    result = scores(ctx, name, scorer, sequences, [a.prompt.id for a in rows])
    ctx.log_work("evaluate", len(rows), time.monotonic() - began)
    return result


def exact_kl(
    ctx: Context, name: str, policy: Model, reference: Model, renderer: Renderer, rows: Sequence[Answer]
) -> list[float]:
    """Sum over the response's tokens of KL(policy || reference) over the whole vocabulary, in nats per answer; by all
    ranks. Collective."""
    examples = [Example(a.prompt.id, renderer.dialogue(a.prompt.turns), a.token_ids) for a in rows]

    @torch.no_grad()
    def process(group: list[Example]) -> list[float]:
        batch = pack_targets(group, policy.device)
        packed = batch.packed
        states = [
            m.hidden(packed.token_ids, packed.positions, packed.cu_seqlens)[batch.rows] for m in (policy, reference)
        ]
        tokens = kernels.linear_kl(states[0], policy.lm_head_weight, states[1], reference.lm_head_weight).kl
        return segment_sum(tokens, batch.cu_targets).tolist()

    return sharing.shared(ctx, name, examples, sharing.token_chunks([e.tokens for e in examples]), process)


@dataclass(frozen=True)
class Verdict:
    """The judge's view of two policies' answers to one prompt: P(first is better), and in either order."""

    first: str
    second: str
    prompt: Prompt
    texts: tuple[str, str]
    prob: float
    prob_ab: float | None
    prob_ba: float | None


def verdicts(
    ctx: Context, by_policy: dict[str, dict[str, Answer]], pairs: Sequence[tuple[str, str]], prompts: Sequence[Prompt]
) -> list[Verdict]:
    """Judge the answers of each pair of policies to each prompt, in both orders, as stage label does."""
    jobs: dict[str, tuple[str, str, Prompt, Comparison]] = {}
    for first, second in pairs:
        for p in prompts:
            a, b = by_policy[first][p.id].text, by_policy[second][p.id].text
            if a.strip() and b.strip() and a != b:
                key = content_id("judge", first, second, p.id)
                jobs[key] = (first, second, p, Comparison(key, p.id, "harmless", "ai", a, b, p.split))
    judge: list[Judge] = []

    def process(ids: list[str]) -> Iterator[dict]:
        if not judge:
            judge.append(Judge(ctx, "judge", measuring=True))
        yield from judge[0].label([(jobs[i][3], jobs[i][2].turns) for i in ids])

    rows = pipeline.journaled(ctx, "evaluate.judge", list(jobs), ctx.config.label.chunk, process)
    result = []
    for key, row in rows.items():
        first, second, prompt, comparison = jobs[key]
        view = row["record"]["per_principle"][0]
        result.append(Verdict(first, second, prompt, (comparison.response_a, comparison.response_b),
                              row["record"]["prob_a"], view["prob_a_ab"], view["prob_a_ba"]))  # fmt: skip
    return result


def interval(values: Sequence[float], clusters: Sequence[str], samples: int, seed: int) -> dict[str, Any]:
    """Mean with a 95 % interval by bootstrap over clusters (prompts), as {mean, lo, hi, n}; without values all None."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        return {"mean": None, "lo": None, "hi": None, "n": 0}
    index = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums, counts = np.bincount(index, weights=x), np.bincount(index)
    draws, means = np.random.default_rng(seed), [x.mean()] if not samples else []
    for _ in range(samples):  # one by one: all at once they would take samples times the memory of the values
        drawn = draws.integers(0, len(counts), size=len(counts))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    lo, hi = np.quantile(means, [0.025, 0.975])
    return {"mean": float(x.mean()), "lo": float(lo), "hi": float(hi), "n": len(x)}
