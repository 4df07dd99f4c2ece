"""HHH-style multiple choice (paper §2, files of the paper's release): by the judge's options and by PM score.

The released prompts already end where the option is read. Several questions share a prompt, so intervals are
bootstrapped over prompts, and the majority letter is the baseline to beat.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cai_fast import elo, measure
from cai_fast.pipeline import Context
from cai_fast.readers import Question
from cai_fast.scorer import Scorer
from cai_fast.tokenizer import Renderer


def evaluate(ctx: Context, questions: Sequence[Question], pm: Scorer, renderer: Renderer) -> dict[str, Any]:
    """Accuracy of the judge (mc) and of the preference model (pm, where rows carry both responses)."""
    result: dict[str, Any] = {"mc": _multiple_choice(ctx, questions)}
    paired = [q for q in questions if q.turns is not None]
    if paired:
        result["pm"] = _preference(ctx, paired, pm, renderer)
    return result


def _interval(ctx: Context, right: Sequence[float], questions: Sequence[Question]) -> dict[str, Any]:
    cfg = ctx.config
    return measure.interval(right, [_cluster(q) for q in questions], cfg.evaluate.bootstrap, cfg.seed)


def _cluster(question: Question) -> str:
    """Questions about the same conversation belong together."""
    if question.turns is not None:
        return "\n".join(turn.text for turn in question.turns)
    return question.prompt


def _multiple_choice(ctx: Context, questions: Sequence[Question]) -> dict[str, Any]:
    """Sum of the answer's token log-probabilities after the prompt; the highest wins."""
    renderer, model = ctx.renderer("judge"), ctx.model("judge")
    tokenizer = renderer.tokenizer
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts, answers = [], []
    for q in questions:
        for answer in (q.correct, *q.incorrect):
            prompts.append(start + tokenizer.encode(q.prompt))
            answers.append(tokenizer.encode(answer))
    limit = model.config.max_position_embeddings
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    engine = ctx.engine(model, renderer, min(longest, limit))
    fits = [len(p) + len(a) <= limit for p, a in zip(prompts, answers, strict=True)]
    kept = [i for i, fit in enumerate(fits) if fit]
    scored = engine.logprobs([prompts[i] for i in kept], [answers[i] for i in kept])
    totals = dict(zip(kept, map(sum, scored), strict=True))
    right, probs, used, at = [], [], [], 0
    for q in questions:
        rows = range(at, at + 1 + len(q.incorrect))
        at = rows.stop
        if all(i in totals for i in rows):
            values = [totals[i] for i in rows]
            right.append(float(values[0] > max(values[1:])))
            probs.append(math.exp(values[0] - _logsumexp(values)))
            used.append(q)
    letters = Counter(q.correct for q in used)
    return {
        "accuracy": _interval(ctx, right, used),
        "majority_letter": max(letters.values()) / max(1, len(used)),
        "calibration": elo.calibration(probs + [1 - p for p in probs], [1.0] * len(probs) + [0.0] * len(probs)),
        "too_long": len(questions) - len(used),
    }


def _preference(ctx: Context, questions: Sequence[Question], pm: Scorer, renderer: Renderer) -> dict[str, Any]:
    """PM mode: score(correct response) > score(incorrect response) after the same conversation."""
    limit = pm.model.config.max_position_embeddings
    sequences, used = [], []
    for q in questions:
        pair = [
            renderer.preference(q.turns, renderer.response_ids(text))
            for text in (q.response_correct, q.response_incorrect)
        ]
        if max(map(len, pair)) <= limit:
            sequences += pair
            used.append(q)
    scores = pm.scores(sequences, [_cluster(q) for q in used for _ in range(2)]).tolist()
    right = [float(a > b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    return {"accuracy": _interval(ctx, right, used), "too_long": len(questions) - len(used)}


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))
