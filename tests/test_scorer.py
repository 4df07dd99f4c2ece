"""Preference scores as trees: what a group shares is computed once, and nothing else changes."""

import random

import pytest
import torch
from tiny import CONFIG, alone, tiny_model
from torch import Tensor

from cai_fast import losses
from cai_fast.batching import bins, pack
from cai_fast.engine.trees import MIN_SHARED
from cai_fast.model import Model, init_random
from cai_fast.pipeline import Context
from cai_fast.scorer import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")
DRAW = random.Random(0)


def some(count: int) -> list[int]:
    return [DRAW.randrange(CONFIG.vocab_size) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(head="score")


@torch.no_grad()
def whole(model: Model, sequences: list[list[int]], max_tokens: int = 300) -> Tensor:
    """What separate packed sequences give, in bins as the trainer makes them."""
    found = torch.zeros(len(sequences))
    for group in bins([len(s) for s in sequences], max_tokens):
        found[group] = losses.scores(model, pack([sequences[i] for i in group]))
    return found


def test_what_shares_nothing_has_the_bits_of_packed_sequences(model: Model) -> None:
    sequences = [some(n) for n in (3, 40, 17, 90, 1, 33, 64, 5)]
    start = some(MIN_SHARED - 1)
    alike = [[*start, n, *some(20)] for n in range(4)]  # one token too few to be shared
    scorer = Scorer(model, max_tokens=300)
    assert torch.equal(scorer.scores(sequences, range(8)), whole(model, sequences))
    assert torch.equal(scorer.scores(sequences, [0] * 8), whole(model, sequences))
    assert torch.equal(scorer.scores(alike, [0] * 4), whole(model, alike))
    one_prompt = [[*start, *start, *some(9)] for _ in range(4)]
    assert torch.equal(scorer.scores(one_prompt, "abcd"), whole(model, one_prompt))  # alike, but in no common group
    total = sum(map(len, sequences)) * 2 + sum(map(len, alike)) + sum(map(len, one_prompt))
    assert [scorer.counters[name] for name in ("trunk_tokens", "prefill_tokens", "prompt_tokens")] == [total] * 3
    assert scorer.scores([], []).shape == (0,)


@pytest.mark.parametrize("shape", [{}, {"sliding_window": 24}, {"hidden_size": 48, "tie_word_embeddings": False}])
@pytest.mark.parametrize(("prompt", "exact"), [(MIN_SHARED, True), (50, True), (170, False)])
def test_groups_score_as_separate_sequences(shape: dict, prompt: int, exact: bool) -> None:
    model = init_random(CONFIG.replace(**shape), 1, head="score", std=0.2)
    prompts = [some(prompt + n) for n in range(5)]
    sequences = [[*prompts[n % 5], *some(1 + n)] for n in range(20)]
    sequences += [sequences[3], [*sequences[4], *some(30)], some(40)]  # equal; one that continues another; alone
    groups = [n % 5 for n in range(20)] + [3, 4, 9]
    scorer = Scorer(model, max_tokens=300)
    together, apart = scorer.scores(sequences, groups), whole(model, sequences)
    assert together.dtype == torch.float32
    assert (together - apart).abs().max() <= 1e-5 * apart.abs().max()
    assert torch.equal(together, apart) or not exact or shape
    assert together[20] == together[3]
    assert apart.std() > 1e-3
    computed = sum(map(len, prompts)) + sum(1 + n for n in range(20)) + (5 + 30) + 40
    asked = sum(map(len, sequences))
    assert scorer.counters["trunk_tokens"] == scorer.counters["prefill_tokens"] == computed < 0.7 * asked
    assert scorer.counters["prompt_tokens"] == asked


def test_bits_do_not_depend_on_other_groups(model: Model) -> None:
    prompts = [some(40 + 31 * n) for n in range(6)]
    sequences = [[*prompts[n % 6], *some(1 + n)] for n in range(18)]
    groups = [n % 6 for n in range(18)]
    all_of_them = Scorer(model, max_tokens=300).scores(sequences, groups)
    for group in range(6):
        mine = [n for n in range(18) if groups[n] == group]
        for limit in (60, 8192):
            alone = Scorer(model, max_tokens=limit).scores([sequences[n] for n in mine], [0] * len(mine))
            assert torch.equal(alone, all_of_them[mine])
    order = DRAW.sample(range(18), 18)
    shuffled = Scorer(model).scores([sequences[n] for n in order], [groups[n] for n in order])
    for group in range(6):  # the order inside a group may tell: its tree is built in that order
        mine = [place for place, n in enumerate(order) if groups[n] == group]
        assert (shuffled[mine] - all_of_them[[order[place] for place in mine]]).abs().max() <= 1e-5


def test_a_context_counts_what_its_scorers_save(model: Model) -> None:
    ctx = Context(config=None, run=None, log=None, dist=alone(), constitution=None)
    scorer = Scorer(model)
    ctx.engines.add(scorer)
    prompt = some(60)
    scorer.scores([[*prompt, *some(20)] for _ in range(4)], "aaaa")
    work = ctx.work(2.0)
    assert work["perf/prefill_over_prompts"] == (60 + 80) / 320
    assert work["perf/tokens_per_s"] == 70 and work["perf/trunk_over_minimum"] == 1
    assert ctx.work(1.0) == {}
