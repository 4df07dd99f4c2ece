"""Option scoring: prompts, trees and prefixes give what separate full forwards give."""

import random

import pytest
import torch
from planted import leaves
from test_engine import VOCAB, engine, make_model, replay, some_prompts

from cai_fast.engine import Tree, token_tree
from cai_fast.errors import InputError
from cai_fast.model import Model

OPTIONS = [[1, 7], [2, -1], [9, 11]]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def expected(model: Model, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, float]:
    logits = torch.cat([replay(model, prompt, [0]) for prompt in prompts])
    prob = logits.softmax(-1)
    options = torch.stack([sum(prob[:, token] for token in option if token >= 0) for option in OPTIONS], 1)
    mass = options.sum(1)
    return (options / mass[:, None]).log(), mass, 1e-5 * logits.abs().max().item()


def test_prompts_with_mass(model: Model) -> None:
    prompts = [*some_prompts(30), [4]]
    logprob, mass = engine(model, prefill_tokens=200).score(prompts, OPTIONS, return_mass=True)
    want, want_mass, tolerance = expected(model, prompts)
    assert (logprob - want).abs().max() <= tolerance
    assert ((mass - want_mass) / want_mass).abs().max() <= tolerance
    assert torch.equal(engine(model).score(prompts, OPTIONS), logprob)
    assert torch.equal(engine(model).score(prompts[3:4], OPTIONS), logprob[3:4])


def test_masses_do_not_depend_on_other_prompts(model: Model) -> None:
    prompts, letters = some_prompts(40), [[1], [2]]
    mass = engine(model).score(prompts, letters, return_mass=True)[1]
    for count in (1, 5, 12):
        assert torch.equal(engine(model).score(prompts[:count], letters, return_mass=True)[1], mass[:count])


def random_tree(rng: random.Random, depth: int) -> Tree:
    width = rng.randint(1, 3) if depth else 0
    low = 0 if width else 1
    tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(low, 20))]
    return Tree(tokens, [random_tree(rng, depth - rng.randint(1, depth)) for _ in range(width)])


@pytest.mark.parametrize("length", [0, 45])
def test_trees_equal_separate_prompts(model: Model, length: int) -> None:
    rng = random.Random(length)
    shared = [rng.randrange(VOCAB) for _ in range(length)]
    trees = [random_tree(rng, 3) for _ in range(12)]
    prompts = [shared + leaf for tree in trees for leaf in leaves(tree)]
    assert len(prompts) > 24
    runner = engine(model, prefill_tokens=150)
    handle = runner.prefix(shared) if shared else None
    start = runner.counters["trunk_tokens"]
    logprob = runner.score(trees, OPTIONS, prefix=handle)
    assert runner.counters["trunk_tokens"] - start < sum(map(len, prompts))
    want, _, tolerance = expected(model, prompts)
    assert (logprob - want).abs().max() <= tolerance
    first, count = (sum(len(leaves(tree)) for tree in part) for part in (trees[:2], trees[2:4]))
    assert torch.equal(runner.score(trees[2:4], OPTIONS, prefix=handle), logprob[first : first + count])


def test_each_shared_token_is_computed_once(model: Model) -> None:
    tree = Tree([1] * 40, [Tree([2] * 10, [Tree([3, 4]), Tree([5, 6])]), Tree([7])])
    runner = engine(model)
    assert runner.score([tree, [8, 9]], OPTIONS).shape == (4, 3)
    assert runner.counters["trunk_tokens"] == 40 + 10 + 2 + 2 + 1 + 2


def test_a_token_tree_holds_every_prompt_once() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(0, 9))]
        tree, order = token_tree(prompts, rng.randint(1, 5))
        found = leaves(tree) if prompts else []
        assert [found[leaf] for leaf in order] == prompts and len(found) == len(set(map(tuple, prompts)))
    tree, order = token_tree([[1, 2, 3], [1, 2], [1, 2, 4, 5], [1, 2]], min_shared=1)
    assert tree == Tree([1], [Tree([2], [Tree([3]), Tree([4, 5])]), Tree([2])]) and order == [0, 2, 1, 2]
    assert token_tree([[1, 2, 3], [1, 2, 4]], min_shared=3)[0] == Tree([], [Tree([1, 2, 3]), Tree([1, 2, 4])])
    assert token_tree([[7, 8]]) == (Tree([7, 8]), [0])


@pytest.mark.parametrize(("unit", "exact"), [(16, True), (60, False)])
def test_token_trees_score_as_separate_prompts(model: Model, unit: int, exact: bool) -> None:
    rng = random.Random(unit)
    talk, *parts = ([rng.randrange(VOCAB) for _ in range(unit + rng.randrange(unit))] for _ in range(7))
    prompts = [talk + p + q for p in parts[:3] for q in (parts[3] + parts[4], parts[4] + parts[3])]
    prompts += [prompts[0], prompts[1][:-1], prompts[2] + parts[5], talk]
    tree, order = token_tree(prompts)
    runner = engine(model, max_len=600)
    separate = runner.score(prompts, OPTIONS)
    start = runner.counters["trunk_tokens"]
    shared = runner.score([tree], OPTIONS)[order]
    assert runner.counters["trunk_tokens"] - start < 0.7 * sum(map(len, prompts))
    _, _, tolerance = expected(model, prompts)
    assert (shared - separate).abs().max() <= tolerance
    # Up to some 128 keys the CPU adds a row's terms in the same order however long the sequence that it stands in.
    assert torch.equal(shared, separate) or not exact


def test_no_items_empty_leaf_overflow(model: Model) -> None:
    runner = engine(model)
    assert runner.score([], OPTIONS).shape == (0, 3)
    with pytest.raises(InputError, match="no tokens"):
        runner.score([Tree([1], [Tree([])])], OPTIONS)
    with pytest.raises(InputError, match="161 tokens, more than max_len 160"):
        runner.score([[1] * 161], OPTIONS)


def test_logprobs_of_given_responses(model: Model) -> None:
    prompts, responses = some_prompts(9), [*some_prompts(8, seed=3), []]
    found = engine(model, prefill_tokens=100).logprobs(prompts, responses)
    assert found[-1] == []
    assert found[2:5] == engine(model).logprobs(prompts[2:5], responses[2:5])
    for prompt, response, values in zip(prompts, responses, found, strict=True):
        if response:
            logits = replay(model, prompt, response)
            want = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            assert (torch.tensor(values) - want).abs().max() <= 1e-5 * logits.abs().max()
    runner, letters = engine(model), [[5], [6], [7, 8], [5]]
    scored = runner.logprobs([prompts[0]] * 4, letters)
    assert runner.counters["trunk_tokens"] == 2 * len(prompts[0]) + 1
    assert scored == [engine(model).logprobs([prompts[0]], [letter])[0] for letter in letters]
    with pytest.raises(InputError, match="prompt 1 is empty"):
        engine(model).logprobs([[1], []], [[2], [3]])
