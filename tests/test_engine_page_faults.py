"""Faults planted in the paged cache are noticed by what tests/test_engine_pages.py asserts."""

from collections.abc import Sequence

import pytest
from test_engine import engine, make_model, some_prompts
from test_engine_pages import SHARED, Cancelled, assert_close, assert_empty, audit

from cai_fast.engine import Completion, Prefix, Sampling
from cai_fast.engine.pages import PagedCache
from cai_fast.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def cancel(model: Model) -> None:
    def progress(index: int, completion: Completion) -> None:
        raise Cancelled

    runner = engine(model, page_size=16)
    with pytest.raises(Cancelled):
        runner.generate(some_prompts(20), [Sampling(max_new_tokens=9 + i) for i in range(20)], progress=progress)
    assert_empty(runner)


def whole_check(model: Model) -> None:
    """A workload that needs every operation of the cache."""
    runner, slots = engine(model, page_size=16, max_batch=6, num_pages=20), engine(model)
    prompts = [p for p in some_prompts(12, longest=40) for _ in range(2)]
    sampling = [Sampling(max_new_tokens=3 + 7 * (i // 2) % 31, stop_token_ids=(3,)) for i in range(24)]
    handles = [(e.prefix(SHARED), e.prefix(SHARED[::-1])) for e in (runner, slots)]
    found, want = (
        e.generate(prompts, sampling, prefix=[(None, *pair)[i // 2 % 3] for i in range(24)])
        for e, pair in zip((runner, slots), handles, strict=True)
    )
    begin = [([], SHARED, SHARED[::-1])[i // 2 % 3] for i in range(24)]
    assert_close(model, [a + b for a, b in zip(begin, prompts, strict=True)], found, want)
    audit(runner)
    runner.invalidate()
    assert_empty(runner)


def keep_pages(self: PagedCache, rows: Sequence[int]) -> None:
    for row in rows:
        self._rows.pop(row)


def drop_first_twice(self: PagedCache, rows: Sequence[int]) -> None:
    for row in rows:
        owned = self._rows.pop(row)
        self._drop([*owned, owned[-1]])


def free_shared(self: PagedCache, owned: list[int]) -> None:
    for page in owned:
        self._refs[page] = max(0, self._refs[page] - 1)
        self._free.append(page)


def share_partial(self: PagedCache, row: int, twin: int, length: int) -> None:
    full, rest = divmod(length, self.page_size)
    if rest:
        self._refs[self._rows[twin][full]] += 1
        self._drop([self._rows[row][full]])
        self._rows[row][full] = self._rows[twin][full]
        self.table[row, full] = self._rows[twin][full]


def move_host_only(self: PagedCache, holes: list[int], tails: list[int], lengths: list[int]) -> None:
    for hole, tail in zip(holes, tails, strict=True):
        self._rows[hole] = self._rows.pop(tail)


def do_nothing(self: PagedCache, *arguments: object) -> None:
    pass


def place_shifted(self: PagedCache, prefix: Prefix) -> list[int]:
    owned = ORIGINAL_PLACE(self, prefix)
    self.kv[:, 0, owned] = self.kv[:, 0, owned].roll(1, dims=3)  # without their values: together would change nothing
    return owned


def evict_any(self: PagedCache, count: int, keep: list[int]) -> bool:
    while len(self._free) < count and self._prefixes:
        for page in self._prefixes.pop(next(iter(self._prefixes)))[2]:
            self._refs[page] = 0
            self._free.append(page)
    return len(self._free) >= count


ORIGINAL_PLACE = PagedCache._place
FAULTS = {
    "counts are not lowered": ("release", keep_pages),
    "a page is freed twice": ("release", drop_first_twice),
    "a shared page is freed with its first holder": ("_drop", free_shared),
    "the partial page is shared": ("share", share_partial),
    "the partial page is left empty": ("share", do_nothing),
    "the prefix's partial page is left empty": ("fill", do_nothing),
    "the table's rows do not move": ("move", move_host_only),
    "the prefix's keys are shifted": ("_place", place_shifted),
    "prefixes outlive their weights": ("forget", do_nothing),
    "pages of a prefix in use are taken": ("_make_room", evict_any),
    "rows are not released after an error": ("clear", do_nothing),
}


def test_the_check_of_planted_faults_passes_without_one(model: Model) -> None:
    whole_check(model)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(model: Model, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    name, replacement = FAULTS[fault]
    monkeypatch.setattr(PagedCache, name, replacement)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        whole_check(model)
        cancel(model)
