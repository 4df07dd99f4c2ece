"""A feedback model for the toy world: the base model, trained further on questions about pairs of answers alone.

The base model judges by total harm whatever category the question names: among mixed skills, few pairs of answers tell
the two apart. Here most questions do, and labels are true: neither letters nor what a chain of thought lists is
corrupted, so what is wrong with this judge is its own. It no longer criticises well, hence a model beside the base.
"""

import random
from collections import Counter
from pathlib import Path

from cai_fast import model as models
from cai_fast.checkpoint import Checkpoints
from cai_fast.constitution import Principle
from cai_fast.records import Turn
from cai_fast.runlog import RunLog
from cai_fast.toy import corpus, world
from cai_fast.toy.corpus import Sample, Writer
from cai_fast.toy.pretrain import Recipe, ToyTokenizer, train
from cai_fast.toy.world import Answer, Request

MIXTURE = {"judge": 0.5, "cot": 0.4, "other": 0.1}  # other: what the base model learned besides
DISAGREEING = 0.8  # share of the questions about one category whose answers differ in opposite ways in categories
TIED = 0.3  # of the pairs that a question cannot tell apart, so many are asked about all the same
LETTER = 10.0  # loss weight
STEPS, TOKENS_PER_STEP, LR, MUON_LR, WARMUP = 400, 2048, 3e-3, 6e-3, 20


def is_telling(a: Answer, b: Answer, principle: Principle) -> bool:
    """Whether one answer has less harm in the principle's scope, and not less harm in total."""
    scope = len(corpus.in_scope(a, principle)) - len(corpus.in_scope(b, principle))
    total = len(a.harms) - len(b.harms)
    return scope != 0 and scope * total <= 0


def disagree(a: Answer, b: Answer) -> bool:
    """Whether one answer has less harm of one category, and more of another."""
    counts = [Counter(world.CATEGORY_OF[phrase] for phrase in answer.harms) for answer in (a, b)]
    signs = [counts[0][category] - counts[1][category] for category in world.CATEGORIES]
    return min(signs) < 0 < max(signs)


def pair(rng: random.Random, request: Request, principle: Principle) -> tuple[Answer, Answer]:
    """Two answers to judge by the principle.

    Of a principle that names a category, most pairs have categories that disagree, and total harm is right about half
    of them, so that neither it nor its opposite is a rule.
    """
    specific = len(principle.categories) == 1 and rng.random() < DISAGREEING
    against = rng.random() < 0.5
    while True:
        a, b = corpus.any_answer(rng, request), corpus.any_answer(rng, request)
        scores = [corpus.demerits(answer, principle, corpus.in_scope(answer, principle)) for answer in (a, b)]
        if specific:
            if scores[0] != scores[1] and disagree(a, b) and is_telling(a, b, principle) == against:
                return a, b
        elif scores[0] != scores[1] or rng.random() < TIED:
            return a, b


def sample(seed: int, number: int) -> Sample:
    """Sample `number` of the judge's corpus of `seed`."""
    rng = random.Random(f"toy/judge/{seed}/{number}")
    kind = str(corpus.draw(rng, MIXTURE))
    while kind == "other":
        other = corpus.sample(seed, rng.randrange(corpus.EARLY, 10**9))
        if other.kind not in MIXTURE:  # the base model's questions have wrong answers among them
            return other
    request = corpus.draw_request(rng, rng.random() < 0.9)
    principle = rng.choice(corpus.toy_prompts().constitution.principles)
    a, b = pair(rng, request, principle)
    writer, turns = Writer(kind), (Turn("human", request.text),)
    question = {"judge": "comparison", "cot": "cot"}[kind]
    writer.context(corpus.toy_prompts().question(question, turns, a.text, b.text, principle))
    found = [corpus.in_scope(answer, principle) for answer in (a, b)]
    if kind == "cot":
        said_a, said_b = (" , ".join(harms) or "none" for harms in found)
        writer.says(f"(A) has {said_a} ; (B) has {said_b} .", corpus.CRITIQUE)
        writer.context(corpus.toy_prompts().cot_answer())
    scores = [corpus.demerits(answer, principle, harms) for answer, harms in zip((a, b), found, strict=True)]
    writer.says(corpus.letter(rng, *scores), LETTER)
    return writer.done()


def make_judge(seed: int, base: Path, folder: Path, states: Checkpoints, log: RunLog, steps: int = STEPS) -> None:
    """Train the model in `base` further and write the judge to `folder`."""
    recipe = Recipe(seed, steps, TOKENS_PER_STEP, LR, MUON_LR, min(WARMUP, steps))
    model = train(recipe, states, log, start=models.load(base), sample=sample, name="judge")
    model.save(folder, tokenizer=ToyTokenizer())
