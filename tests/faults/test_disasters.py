"""DISASTERS.md, the troubles of other trainers' users: every test that it names exists, and none goes unanswered."""

import ast
import gc
import re
from pathlib import Path

import torch
from tiny import alone, tiny_model

from cai_fast import fit, losses
from cai_fast.batching import Example, pack_targets
from cai_fast.fit import FitSettings, Task
from cai_fast.optim import Optimizer
from cai_fast.runlog import Mean

TESTS = Path(__file__).resolve().parents[1]
CASES = 28


def rows() -> list[tuple[int, str, list[tuple[str, str]]]]:
    """(number, rule, named tests as (file, function)) of every line of the table."""
    found = []
    for line in (TESTS / "DISASTERS.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].isdigit():
            found.append((int(cells[0]), cells[2], re.findall(r"`([\w/]+\.py)::(\w+)`", cells[3])))
    return found


def test_every_case_has_a_rule_and_tests_that_exist() -> None:
    table = rows()
    assert [number for number, _, _ in table] == list(range(1, CASES + 1))
    for number, rule, tests in table:
        assert rule and tests, f"case {number}"
        for file, name in tests:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def live_tensors(kept: list[torch.Tensor] | None) -> list[tuple[int, int]]:
    """(tensors in Python, tensors saved for a backward pass) alive as each of 50 micro-batches begins."""
    model, means = tiny_model(), Mean()
    examples = [Example(str(i), [1, 5, 6 + i % 7], [8, 2]) for i in range(50)]
    alive: list[tuple[int, int]] = []
    saved = 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal saved
            self.tensor, saved = tensor, saved + 1

        def __del__(self) -> None:
            nonlocal saved
            saved -= 1

    def loss(items: list[int], scale: float) -> tuple[torch.Tensor, losses.Stats]:
        gc.collect()
        alive.append((sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()), saved))
        value, stats = losses.sft_loss(model, pack_targets([examples[i] for i in items]), scale)
        if kept is not None:
            kept.append(value + 0)
        return value, stats

    lengths = [example.tokens for example in examples]
    task = Task("sft", lengths, lengths, loss, lengths)
    settings = FitSettings(seed=1, epochs=1, batch_size=1000, micro_tokens=1, lr=1e-3, schedule="constant",
                           warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, save_every=0)  # fmt: skip
    optimizer = Optimizer.adamw(model.named_parameters(), 1e-3)
    gc.freeze()  # what is there already need not be looked at a hundred times
    try:
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda box: box.tensor):
            fit.accumulate(task, range(50), settings, optimizer, means, alone())
    finally:
        gc.unfreeze()
    return alive


def test_nothing_of_a_micro_batch_is_left_in_the_next() -> None:
    alive = live_tensors(None)
    assert len(alive) == 50 and set(alive[2:]) == {alive[2]}
    assert len(set(live_tensors([])[2:])) == 48, "a loss that is kept shows"
