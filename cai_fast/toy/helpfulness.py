"""Helpfulness comparisons of the toy world, in place of the human ones (paper §4.2).

A label depends on steps covered, evasion and malformation, never on harm or objection, and the data carry no trace of
them: harms and objections of drawn answers are independent of their steps; pairs are thinned until better and worse
answers differ in harm and objection equally often either way; what beats a refusal is harmless, as the refusal is; a
corrupted answer is as harmful as the intact one; and answers that differ in nothing but a harm or the objection are
equally good, without which "a clause that does not belong" would come to mean harm. Two exceptions: a broken objection
is malformed, hence worse than an intact one; and half of the answers that beat a refusal to a red-team prompt object.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cai_fast.toy import checker, corpus, world
from cai_fast.toy.world import Answer, Request

Sampler = Callable[[Sequence[str], float], list[str]]
"""(prompts, temperature) -> one answer of the base model to each."""

# Shares of the comparisons by where they come from; the rest are pairs of an answer and a corruption of it.
SAMPLED, DRAWN, REFUSED, TIED = 0.12, 0.18, 0.08, 0.42
TEMPERATURES = (1.5, 1.2)  # of the two samples of a pair: hot, so that something goes wrong in them
SHARPNESS = 2.5  # of the label: one step of three more is preferred with probability 0.70
_DAMAGE = {"foreign": 0.20, "repeat": 0.20, "word": 0.15, "cut": 0.45}


class Pair(NamedTuple):
    """Two answers to a prompt, and where they come from."""

    prompt: str
    better: str
    worse: str
    margin: float  # of their scores, >= 0
    source: str


def score(prompt: str, answer: str) -> float:
    """How helpful an answer is: steps covered, less evasion and malformation."""
    facts = checker.check(prompt, answer)
    return facts["helpful"] - facts["evasive"] - 0.5 * facts["malformed"]


def comparisons(seed: int, count: int, sampler: Sampler) -> list[dict[str, Any]]:
    """`count` rows {turns, response_a, response_b, prob_a, source}, sides and order drawn at random."""
    rng = random.Random(f"toy/helpfulness/{seed}")
    sampled, drawn, refused, tied = (round(share * count) for share in (SAMPLED, DRAWN, REFUSED, TIED))
    pairs = sampled_pairs(rng, sampled, sampler)
    pairs += balanced(_fill(3 * drawn, lambda: drawn_pair(rng)), drawn)
    pairs += _fill(refused, lambda: refusal_pair(rng))
    pairs += _fill(tied, lambda: tied_pair(rng))
    missing = count - len(pairs)
    intact = iter(_intact_samples(rng, missing, sampler))
    pairs += _fill(missing, lambda: corruption_pair(rng, next(intact, None) if rng.random() < 0.3 else None))
    rng.shuffle(pairs)
    return [_row(rng, pair) for pair in pairs]


def _row(rng: random.Random, pair: Pair) -> dict[str, Any]:
    prob = 1.0 / (1.0 + math.exp(-SHARPNESS * pair.margin))
    sides, prob_a = ((pair.better, pair.worse), prob) if rng.random() < 0.5 else ((pair.worse, pair.better), 1 - prob)
    return {"turns": [{"role": "human", "text": pair.prompt}], "response_a": sides[0], "response_b": sides[1],
            "prob_a": round(prob_a, 4), "source": pair.source}  # fmt: skip


def _fill(count: int, draw: Callable[[], Pair | None]) -> list[Pair]:
    pairs: list[Pair] = []
    while len(pairs) < count:
        pair = draw()
        if pair is not None:
            pairs.append(pair)
    return pairs


def _pair(prompt: str, first: str, second: str, source: str) -> Pair | None:
    """The two in order of their scores; None for a tie or an empty answer, which no comparison may hold."""
    margin = score(prompt, first) - score(prompt, second)
    if margin == 0 or not first or not second:
        return None
    return Pair(prompt, first, second, margin, source) if margin > 0 else Pair(prompt, second, first, -margin, source)


def sampled_pairs(rng: random.Random, count: int, sampler: Sampler) -> list[Pair]:
    """Pairs of the base model's answers, half of them to red-team prompts; at most `count`."""
    prompts = [corpus.draw_request(rng, n % 2 == 0).text for n in range(4 * count)]
    answers = zip(*(sampler(prompts, temperature) for temperature in TEMPERATURES), strict=True)
    found = [_pair(p, a, b, "sampled") for p, (a, b) in zip(prompts, answers, strict=True)]
    # A refusal is harmless, so its losing would teach that harm is good; `refusal_pair` treats refusals.
    usable = [pair for pair in found if pair is not None and world.REFUSAL not in pair]
    return balanced(usable, count)


def balanced(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Up to `count` pairs such that (harm, objection) of better minus worse is distributed symmetrically: a pair with a
    difference is kept only together with one of the opposite difference."""
    kept: list[Pair] = []
    waiting: dict[tuple[float, float], list[Pair]] = {}
    for pair in pairs:
        harm, objection = _difference(pair)
        if not harm and not objection and len(kept) < count:
            kept.append(pair)
        elif len(kept) + 2 > count:
            continue
        elif opposite := waiting.get((-harm, -objection)):
            kept += [opposite.pop(), pair]
        else:
            waiting.setdefault((harm, objection), []).append(pair)
    return kept


def _difference(pair: Pair) -> tuple[float, float]:
    better, worse = checker.check(pair.prompt, pair.better), checker.check(pair.prompt, pair.worse)
    return better["harm"] - worse["harm"], better["objection"] - worse["objection"]


def drawn_answer(rng: random.Random, request: Request, keep: float, objects: float = 0.5) -> Answer:
    """An answer of the grammar; harms and objection do not depend on the steps kept."""
    if not request.phrase:
        return Answer(tuple(corpus.draw_steps(rng, request, keep)))
    harms = corpus.draw_harms(rng, request, rng.choice((0, 0, 1, 2, 3)))
    tail = world.ordered({request.category, rng.choice(world.CATEGORIES)}) if rng.random() < objects else ()
    return Answer(corpus.merge(rng, corpus.draw_steps(rng, request, keep), harms), tail)


def drawn_pair(rng: random.Random) -> Pair | None:
    """Two answers of the grammar with different steps."""
    request = corpus.draw_request(rng, rng.random() < 0.6)
    first, second = (drawn_answer(rng, request, rng.choice((0.95, 0.5))).text for _ in range(2))
    return _pair(request.text, first, second, "drawn")


def refusal_pair(rng: random.Random) -> Pair | None:
    """A harmless answer and the refusal."""
    request = corpus.draw_request(rng, rng.random() < 0.5)
    answer = drawn_answer(rng, request, 0.9)
    return None if answer.harms else _pair(request.text, answer.text, world.REFUSAL, "refusal")


def tied_pair(rng: random.Random) -> Pair:
    """Two well-formed answers of the grammar with the same steps, one with more harms or with an objection."""
    request = corpus.draw_request(rng, rng.random() < 0.75)
    steps = tuple(corpus.draw_steps(rng, request, 0.95))
    tail = world.ordered({request.category or rng.choice(world.CATEGORIES)})
    if request.phrase and rng.random() < 0.65:
        harms = corpus.draw_harms(rng, request, rng.choice((1, 1, 2, 3)))
        tail = tail if rng.random() < 0.8 else ()
        first, second = Answer(steps, tail), Answer(corpus.merge(rng, steps, harms), tail)
    else:
        first, second = Answer(steps, tail), Answer(steps)
    return Pair(request.text, first.text, second.text, 0.0, "tied")


def _intact_samples(rng: random.Random, count: int, sampler: Sampler) -> list[tuple[str, str]]:
    """(prompt, answer) of well-formed samples of the base model that do not refuse."""
    prompts = [corpus.draw_request(rng, n % 4 > 0).text for n in range(count // 2)]
    answers = zip(prompts, sampler(prompts, 1.0), strict=True)
    return [(p, a) for p, a in answers if a != world.REFUSAL and not checker.check(p, a)["malformed"]]


def corruption_pair(rng: random.Random, intact: tuple[str, str] | None) -> Pair | None:
    """An answer (`intact`, or a drawn one) and a malformed version of it with equally many harms."""
    if intact is None:
        request = corpus.draw_request(rng, rng.random() < 0.75)
        intact = request.text, drawn_answer(rng, request, 0.95, objects=0.9).text
    prompt, answer = intact
    worse = corrupt(rng, prompt, answer)
    before, after = checker.check(prompt, answer), checker.check(prompt, worse)
    if before["harm"] != after["harm"] or not after["malformed"]:
        return None
    return _pair(prompt, answer, worse, "corrupted")


def corrupt(rng: random.Random, prompt: str, answer: str) -> str:
    """The answer with a fault: a foreign step, a repeated clause, a wrong word, or a clause cut off and babbled on."""
    words = [word for word in corpus.vocabulary() if word not in (*corpus.SPECIAL, corpus.UNKNOWN)]
    clauses = answer.removesuffix(" .").split(" , ")
    kind, at = corpus.draw(rng, _DAMAGE), rng.randrange(len(clauses))
    if kind == "foreign":
        own = world.TOPICS[checker.topic_of(prompt)]
        clauses.insert(rng.randint(0, at), rng.choice(sorted(world.STEPS - set(own))))
    elif kind == "repeat":
        clauses.insert(rng.randint(0, at), rng.choice(clauses))
    elif kind == "word":
        parts = clauses[at].split()
        parts[rng.randrange(len(parts))] = rng.choice(words)
        clauses[at] = " ".join(parts)
    else:
        at = len(clauses) - 1 if rng.random() < 0.8 else at
        parts = clauses[at].split()
        parts = parts[: rng.randrange(1, len(parts) + 1)] + rng.choices(words, k=rng.randint(0, 4))
        clauses[at] = " ".join(parts)
    return " , ".join(clauses) + " ."
