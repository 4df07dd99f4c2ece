"""HHH-style multiple choice (paper §2, files of the paper's release): by the judge's options and by PM score.

The released prompts already end where the option is read. Several questions share a prompt, so intervals are
bootstrapped over prompts, and the majority letter is the baseline to beat.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cai_fast import elo, measure, sharing
from cai_fast.pipeline import Context
from cai_fast.readers import Question
from cai_fast.scorer import Scorer
from cai_fast.tokenizer import Renderer


def _interval(ctx: Context, right: Sequence[float], questions: Sequence[Question]) -> dict[str, Any]:
    cfg = ctx.config
    return measure.interval(right, [_cluster(q) for q in questions], cfg.evaluate.bootstrap, cfg.seed)


def _cluster(question: Question) -> str:
    """Questions about the same conversation belong together."""
    if question.turns is not None:
        return "\n".join(turn.text for turn in question.turns)
    return question.prompt


def multiple_choice(ctx: Context, questions: Sequence[Question]) -> dict[str, Any]:
    """Accuracy of the judge: sum of the answer's token log-probabilities after the prompt; the highest wins.
    Collective."""
    renderer, model = ctx.renderer("judge"), ctx.model("judge")
    tokenizer = renderer.tokenizer
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = [start + tokenizer.encode(q.prompt) for q in questions]
    answers = [[tokenizer.encode(answer) for answer in (q.correct, *q.incorrect)] for q in questions]
    limit = model.config.max_position_embeddings
    longest = [len(prompt) + max(map(len, options)) for prompt, options in zip(prompts, answers, strict=True)]
    kept = [i for i, length in enumerate(longest) if length <= limit]
    engine = ctx.engine(model, renderer, min(max(longest), limit))

    def process(numbers: list[int]) -> list[list[float]]:
        asked = [(prompts[i], answer) for i in numbers for answer in answers[i]]
        totals = map(sum, engine.logprobs([prompt for prompt, _ in asked], [answer for _, answer in asked]))
        return [[next(totals) for _ in answers[i]] for i in numbers]

    # Questions about one prompt share its computation.
    tokens = [sum(len(prompts[i]) + len(answer) for answer in answers[i]) for i in kept]
    parts = sharing.token_chunks(tokens, [questions[i].prompt for i in kept])
    scored = sharing.shared(ctx, "evaluate: multiple choice", kept, parts, process)
    used = [questions[i] for i in kept]
    right = [float(values[0] > max(values[1:])) for values in scored]
    probs = [math.exp(values[0] - _logsumexp(values)) for values in scored]
    letters = Counter(q.correct for q in used)
    return {
        "accuracy": _interval(ctx, right, used),
        "majority_letter": max(letters.values(), default=0) / max(1, len(used)),
        "calibration": elo.calibration(probs + [1 - p for p in probs], [1.0] * len(probs) + [0.0] * len(probs)),
        "too_long": len(questions) - len(used),
    }


def preference(ctx: Context, questions: Sequence[Question], pm: Scorer, renderer: Renderer) -> dict[str, Any]:
    """Accuracy of a preference model where questions carry both responses: score(correct response) > score(incorrect
    response) after the same conversation. Collective."""
    began = time.monotonic()
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
    groups = [_cluster(q) for q in used for _ in range(2)]
    scores = measure.scores(ctx, "evaluate: preferences", pm, sequences, groups)
    ctx.log_work("evaluate", len(used), time.monotonic() - began)
    right = [float(a > b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    return {"accuracy": _interval(ctx, right, used), "too_long": len(questions) - len(used)}


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))
