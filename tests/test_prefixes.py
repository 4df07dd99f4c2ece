"""Handles behind handles: what the prompts of a group share is computed once and changes nothing."""

import pytest
import torch
from test_engine import VOCAB, engine, make_model, some_prompts
from test_engine_pages import assert_close

from cai_fast.engine import Prefix, Sampling
from cai_fast.errors import InputError
from cai_fast.model import Model
from cai_fast.prefixes import Prefixes
from cai_fast.tokenizer import Rendered

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = [(5 * i + 1) % VOCAB for i in range(30)]


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def questions() -> tuple[list[Rendered], list[int]]:
    """Of three conversations: four principles, two orders, two samples each; and one question of a group by itself."""
    rendered, groups = [], []
    for group, conversation in enumerate(some_prompts(3, seed=3, longest=30)):
        conversation = conversation + [group] * 20
        for principle in some_prompts(4, seed=group, longest=9):
            for order in ([1] * 17, [2] * 5):
                for _ in range(2):
                    rendered.append(Rendered(BLOCK, [*conversation, *principle, *order], ()))
                    groups.append(group)
    return [*rendered, Rendered([], [7, 8, 9], ())], [*groups, 0]


@pytest.mark.parametrize("page_size", [0, 16])
def test_groups_compute_what_they_share_once(model: Model, page_size: int) -> None:
    rendered, groups = questions()
    sampling, keys = Sampling(max_new_tokens=9), range(len(rendered))
    whole = [[*r.prefix, *r.ids] for r in rendered]
    want = engine(model).generate(whole, sampling)
    counts = []
    for given in (None, groups):
        runner = engine(model, page_size=page_size)
        found = Prefixes(runner).generate(rendered, sampling, keys, groups=given)
        assert_close(model, whole, found, want)
        counts.append(runner.counters["prefill_tokens"])
    apart = {tuple(r.ids) for r in rendered}
    assert counts[0] == len(BLOCK) + sum(map(len, apart))
    saved = sum(
        7 * min(len(r.ids) for r, g in zip(rendered, groups, strict=True) if g == group and r.prefix)
        for group in range(3)
    )
    assert counts[1] < counts[0] - 0.5 * saved
    few = [i for i, group in enumerate(groups) if group == 1]
    runner = engine(model, page_size=page_size)
    alone = Prefixes(runner).generate([rendered[i] for i in few], sampling, few, groups=[1] * len(few))
    assert alone == [found[i] for i in few]  # whatever other groups are asked about


@pytest.mark.parametrize("cut", [1, 16, 29])
def test_a_handle_behind_a_handle_holds_the_keys_of_both(model: Model, cut: int) -> None:
    runner = engine(model)
    whole, first = runner.prefix(BLOCK), runner.prefix(BLOCK[:cut])
    both = runner.prefix(BLOCK[cut:], after=first)
    assert both.token_ids == whole.token_ids and both.stretches[0] is first.stretches[0]
    assert (both.kv - whole.kv).abs().max() <= 1e-5 * whole.kv.abs().max()
    assert (both.last_hidden - whole.last_hidden).abs().max() <= 1e-5 * whole.last_hidden.abs().max()
    options = torch.arange(VOCAB)[:, None]
    scores = [runner.score([[3, 4]], options, prefix=handle) for handle in (both, whole)]
    assert (scores[0] - scores[1]).abs().max() <= 1e-4
    assert runner.prefixes([], []) == []


def test_many_handles_at_once_are_those_made_one_by_one(model: Model) -> None:
    runner, parts = engine(model, prefill_tokens=50), some_prompts(8, longest=40)
    after: list[Prefix | None] = [None, runner.prefix(BLOCK)] * 4
    for made, tokens, begin in zip(runner.prefixes(parts, after), parts, after, strict=True):
        one = runner.prefix(tokens, after=begin)
        assert torch.equal(made.kv, one.kv) and torch.equal(made.last_hidden, one.last_hidden)


def test_handles_that_cannot_be_are_refused(model: Model) -> None:
    runner = engine(model, max_len=40)
    first = runner.prefix(BLOCK)
    with pytest.raises(InputError, match="1 to max_len 40 tokens, found 11 after 30"):
        runner.prefix([1] * 11, after=first)
    with pytest.raises(InputError, match="found 0 after 0"):
        runner.prefix([])
    runner.invalidate()
    with pytest.raises(InputError, match="other weights"):
        runner.prefix([1], after=first)
