"""The text that teaches the base model: answers, critiques, revisions, judgements, and copying.

Prompts are written with the toy constitution's own templates, so the model meets in every stage exactly what it was
trained on. No held-out prompt occurs. Skills are imperfect on purpose (missed phrases, wrong labels): revisions then
improve an answer step by step, and labels are soft. A sample is a function of (seed, number) alone.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from cai_fast import constitution
from cai_fast.constitution import Principle
from cai_fast.prompts import Mark, Prompts, Segment
from cai_fast.records import Turn
from cai_fast.toy import world
from cai_fast.toy.world import Answer, Request

SPECIAL = ("<pad>", "<bos>", "<eos>", "<eoc>")
UNKNOWN = "<unk>"
# Loss weight of a token: in a prompt, in an answer or revision, in a critique or reasoning, the letter of a judgement.
CONTEXT, ANSWER, CRITIQUE, LETTER = 0.1, 1.0, 2.0, 3.0
FINE, EVASIVE = "the answer looks fine .", "it is evasive ."
MIXTURE = {"benign": 0.12, "red_team": 0.18, "revision": 0.42, "direct": 0.06, "judge": 0.09, "cot": 0.13}
COPY_SHARE, COPY_SHARE_EARLY, EARLY = 0.03, 0.6, 4000  # the first EARLY samples teach copying, on which all else rests
KEPT = 0.99  # chance of each step in the assistant's answers: forgotten steps would be all that RL mends
# A phrase in the scope of a principle is named by a critique, and dropped by a direct revision, with these chances.
NAMED_SPECIFIC, NAMED_GENERAL, DROPPED = 0.9, 0.75, 0.95
FLIPPED = 0.06  # share of wrong judgements


class Sample(NamedTuple):
    """Token ids of one sequence, from <bos> on, and the loss weight of predicting each of them (0 for <bos>)."""

    kind: str
    ids: list[int]
    weights: list[float]


@cache
def toy_prompts() -> Prompts:
    """The toy constitution's templates."""
    loaded = constitution.load("toy")
    return Prompts(loaded, loaded.format)


@cache
def vocabulary() -> dict[str, int]:
    """Every word of the toy language -> token id; the special tokens come last."""
    p = toy_prompts()
    every = frozenset(world.CATEGORIES)
    texts = [FINE, EVASIVE, world.REFUSAL, world.objection(("and",)), "it says", "has none ;", "repeat :", "(A) (B)"]
    texts += [*world.TOPICS, *world.STEPS, *world.CATEGORY_OF, *every, *(r.text for r in world.requests(False))]
    for principle in p.constitution.principles:
        turns = (Turn("human", ""), Turn("assistant", ""))
        for segments in (p.revision(turns, "", principle, ""), p.question("comparison", turns, "", "", principle),
                         p.question("cot", turns, "", "", principle), p.cot_answer()):  # fmt: skip
            texts += [segment for segment in segments if isinstance(segment, str)]
    words = sorted({word for text in texts for word in text.split()})
    return {word: index for index, word in enumerate([UNKNOWN, *words, *SPECIAL])}


def encode(segments: Sequence[Segment]) -> list[int]:
    """Token ids of a prompt without its <bos>."""
    table = vocabulary()
    ids: list[int] = []
    for segment in segments:
        ids += [table["<eos>"]] if isinstance(segment, Mark) else [table[word] for word in segment.split()]
    return ids


def draw(rng: random.Random, table: dict) -> object:
    """A key of `table` with probability proportional to its value."""
    return rng.choices(list(table), list(table.values()))[0]


def draw_request(rng: random.Random, red_team: bool) -> Request:
    """A request that is not held out."""
    while True:
        request = rng.choice(world.requests(red_team))
        if not request.held_out:
            return request


def draw_harms(rng: random.Random, request: Request, count: int, asked: float = 0.9) -> list[str]:
    """Different harmful phrases: the one asked for (with chance `asked`), else half of them from its category."""
    chosen = [request.phrase] if count and request.phrase and rng.random() < asked else []
    while len(chosen) < count:
        category = request.category if request.phrase and rng.random() < 0.5 else rng.choice(world.CATEGORIES)
        phrase = rng.choice(world.HARMS[category])
        if phrase not in chosen:
            chosen.append(phrase)
    return chosen


def draw_steps(rng: random.Random, request: Request, keep: float) -> list[str]:
    """The topic's steps, each kept with chance `keep`; at least one."""
    steps = world.TOPICS[request.topic]
    return [step for step in steps if rng.random() < keep] or [rng.choice(steps)]


def merge(rng: random.Random, steps: Sequence[str], harms: Sequence[str]) -> tuple[str, ...]:
    """Steps in their order with the harmful phrases at random places."""
    clauses = list(steps)
    for phrase in harms:
        clauses.insert(rng.randrange(len(clauses) + 1), phrase)
    return tuple(clauses)


def helpful_answer(rng: random.Random, request: Request) -> Answer:
    """What the helpful-only assistant says: it complies with harmful requests, mostly."""
    if not request.phrase:
        return Answer(tuple(draw_steps(rng, request, KEPT)))
    way = draw(rng, {"comply": 0.84, "refuse": 0.12, "object": 0.04})
    if way == "refuse":
        return Answer()
    steps = draw_steps(rng, request, KEPT)
    if way == "object":
        return Answer(tuple(steps), (request.category,))
    return Answer(merge(rng, steps, draw_harms(rng, request, draw(rng, {1: 0.15, 2: 0.35, 3: 0.30, 4: 0.20}))))


def any_answer(rng: random.Random, request: Request) -> Answer:
    """Answers of all kinds, on which critics and judges must work."""
    if rng.random() < 0.06:
        return Answer()
    count = draw(rng, {0: 0.20, 1: 0.25, 2: 0.25, 3: 0.20, 4: 0.10})
    tail: tuple[str, ...] = ()
    if rng.random() < (0.3 if count else 0.6):
        tail = world.ordered(set(rng.sample(world.CATEGORIES, rng.choice((1, 2)))))
    steps = draw_steps(rng, request, rng.choice((1.0, 0.9, 0.9, 0.5)))
    return Answer(merge(rng, steps, draw_harms(rng, request, count, asked=0.6)), tail)


def in_scope(answer: Answer, principle: Principle) -> list[str]:
    """The answer's harmful phrases that the principle is about, in order."""
    return [phrase for phrase in answer.harms if world.CATEGORY_OF[phrase] in principle.categories]


def named_share(principle: Principle) -> float:
    """Chance that a phrase in scope is named."""
    return NAMED_SPECIFIC if len(principle.categories) == 1 else NAMED_GENERAL


def revise(rng: random.Random, request: Request, answer: Answer, named: Sequence[str]) -> Answer:
    """The answer without (most of) the named phrases, objecting to them; a refusal becomes a real answer."""
    if answer.is_refusal:
        return Answer(world.TOPICS[request.topic], (request.category,) if request.phrase else ())
    dropped = {phrase for phrase in named if rng.random() < DROPPED}
    tail = world.ordered(set(answer.objection) | {world.CATEGORY_OF[phrase] for phrase in dropped})
    return Answer(tuple(clause for clause in answer.clauses if clause not in dropped), tail)


def critique(named: Sequence[str], answer: Answer) -> str:
    """The critique that names these phrases."""
    if answer.is_refusal:
        return EVASIVE
    return f"it says {' , '.join(named)} ." if named else FINE


def demerits(answer: Answer, principle: Principle, harms: Sequence[str]) -> tuple[int, ...]:
    """What a judge goes by, smaller being better: harms in scope; for general principles also evasion, no objection."""
    if len(principle.categories) == 1:
        return (len(harms),)
    return (len(harms), answer.is_refusal, not answer.harms and not answer.objection)


@dataclass
class Writer:
    """Puts one sample together from context and the model's own texts."""

    kind: str

    def __post_init__(self) -> None:
        self.ids, self.weights = [vocabulary()["<bos>"]], [0.0]

    def context(self, segments: Sequence[Segment]) -> None:
        """Words of a prompt. An <eos> at their beginning ends the model's text before it and counts as that."""
        ids = encode(segments)
        ends = ids[0] == vocabulary()["<eos>"]
        self.weights += [self.weights[-1] if ends else CONTEXT] + [CONTEXT] * (len(ids) - 1)
        self.ids += ids

    def says(self, text: str, weight: float) -> None:
        """A text of the model."""
        ids = encode([text])
        self.ids += ids
        self.weights += [weight] * len(ids)

    def done(self) -> Sample:
        """The sample, its last text ended."""
        self.context([Mark.EOS])
        return Sample(self.kind, self.ids, self.weights)


def _answer(rng: random.Random, kind: str) -> Sample:
    request, writer = draw_request(rng, kind == "red_team"), Writer(kind)
    writer.context(toy_prompts().dialogue(_turns(request)))
    writer.says(helpful_answer(rng, request).text, ANSWER)
    return writer.done()


def _turns(request: Request) -> tuple[Turn, ...]:
    return (Turn("human", request.text),)


def _situation(rng: random.Random) -> tuple[Request, Principle]:
    """A prompt, mostly red-team, and a principle; a specific one is about the prompt's category half of the time."""
    request = draw_request(rng, rng.random() < 0.9)
    principles = toy_prompts().constitution.principles
    principle = rng.choice(principles)
    if len(principle.categories) == 1 and request.phrase and rng.random() < 0.5:
        principle = rng.choice([p for p in principles if p.categories == (request.category,)])
    return request, principle


def _revision(rng: random.Random, kind: str) -> Sample:
    request, principle = _situation(rng)
    answer, writer = any_answer(rng, request), Writer(kind)
    named = [phrase for phrase in in_scope(answer, principle) if rng.random() < named_share(principle)]
    writer.context(toy_prompts().critique(_turns(request), answer.text, principle))
    writer.says(critique(named, answer), CRITIQUE)
    writer.context(toy_prompts().revision_suffix(principle))
    writer.says(revise(rng, request, answer, named).text, ANSWER)
    return writer.done()


def _direct(rng: random.Random, kind: str) -> Sample:
    request, principle = _situation(rng)
    answer, writer = any_answer(rng, request), Writer(kind)
    named = [phrase for phrase in in_scope(answer, principle) if rng.random() < named_share(principle)]
    writer.context(toy_prompts().direct_revision(_turns(request), answer.text, principle))
    writer.says(revise(rng, request, answer, named).text, ANSWER)
    return writer.done()


def _pair(rng: random.Random, request: Request, principle: Principle) -> tuple[Answer, Answer]:
    """Two answers; pairs that the principle cannot tell apart are rare, so that few labels are coin flips."""
    while True:
        pair = any_answer(rng, request), any_answer(rng, request)
        scores = [demerits(answer, principle, in_scope(answer, principle)) for answer in pair]
        if scores[0] != scores[1] or rng.random() < 0.3:
            return pair


def letter(rng: random.Random, demerit_a: tuple[int, ...], demerit_b: tuple[int, ...]) -> str:
    """The better answer's letter; of two that are equal, one at random."""
    if demerit_a == demerit_b:
        return rng.choice(("(A)", "(B)"))
    return "(A)" if demerit_a < demerit_b else "(B)"


def _judge(rng: random.Random, kind: str) -> Sample:
    request, principle = _situation(rng)
    a, b = _pair(rng, request, principle)
    writer = Writer(kind)
    writer.context(toy_prompts().question("comparison", _turns(request), a.text, b.text, principle))
    scores = [demerits(answer, principle, in_scope(answer, principle)) for answer in (a, b)]
    writer.says(letter(rng, *(scores if rng.random() >= FLIPPED else reversed(scores))), LETTER)
    return writer.done()


def _cot(rng: random.Random, kind: str) -> Sample:
    """The letter follows from what the reasoning lists, so a judge that reasons is sure of itself."""
    request, principle = _situation(rng)
    a, b = _pair(rng, request, principle)
    writer = Writer(kind)
    writer.context(toy_prompts().question("cot", _turns(request), a.text, b.text, principle))
    listed = [[p for p in in_scope(answer, principle) if rng.random() < NAMED_SPECIFIC] for answer in (a, b)]
    said_a, said_b = (" , ".join(harms) or "none" for harms in listed)
    writer.says(f"(A) has {said_a} ; (B) has {said_b} .", CRITIQUE)
    writer.context(toy_prompts().cot_answer())
    writer.says(letter(rng, demerits(a, principle, listed[0]), demerits(b, principle, listed[1])), LETTER)
    return writer.done()


def _copy(rng: random.Random, kind: str) -> Sample:
    words = sorted({word for step in world.STEPS for word in step.split()})
    items = [rng.choice(words) if rng.random() < 0.5 else rng.choice(list(world.CATEGORY_OF))
             for _ in range(rng.randint(2, 7))]  # fmt: skip
    writer = Writer(kind)
    writer.context(toy_prompts().dialogue((Turn("human", "repeat : " + " ".join(items)),)))
    writer.says(" ".join(items), ANSWER)
    return writer.done()


_MAKERS: dict[str, Callable[[random.Random, str], Sample]] = {
    "benign": _answer, "red_team": _answer, "revision": _revision, "direct": _direct, "judge": _judge, "cot": _cot,
}  # fmt: skip


def sample(seed: int, number: int, direct: float = MIXTURE["direct"]) -> Sample:
    """Sample `number` of the corpus of `seed`; the numbers are the order in which the model reads.

    direct: share of direct revisions, in place of as many critiqued ones.
    """
    rng = random.Random(f"toy/{seed}/{number}")
    if rng.random() < (COPY_SHARE_EARLY if number < EARLY else COPY_SHARE):
        return _copy(rng, "copy")
    revisions = MIXTURE["revision"] + MIXTURE["direct"]
    mixture = MIXTURE if direct == MIXTURE["direct"] else MIXTURE | {"revision": revisions - direct, "direct": direct}
    kind = draw(rng, mixture)
    return _MAKERS[kind](rng, kind)
