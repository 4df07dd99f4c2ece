"""The supervised loop: order, micro-batches, resume, a planted preference recovered."""

import json
import random
from pathlib import Path

import pytest
import torch
from tiny import alone, gradients, relative_difference, tiny_model

from cai_fast import distributed, fit, losses
from cai_fast.batching import Example, pack, pack_targets
from cai_fast.distributed import Stopped
from cai_fast.fit import FitSettings, Task
from cai_fast.model import Model
from cai_fast.optim import Optimizer
from cai_fast.runlog import Mean, RunLog

SETTINGS = FitSettings(
    seed=1, epochs=2, batch_size=40, micro_tokens=64, lr=3e-3, schedule="linear", warmup_steps=2, weight_decay=0.01,
    max_grad_norm=1.0, save_every=3,
)  # fmt: skip
random.seed(0)
EXAMPLES = [
    Example(str(i), [1, *random.choices(range(4, 60), k=random.randint(1, 9))],
            [*random.choices(range(4, 60), k=random.randint(1, 5)), 2])
    for i in range(24)
]  # fmt: skip


def sft_task(model: Model) -> Task:
    def loss(items: list[int], scale: float) -> tuple[torch.Tensor, losses.Stats]:
        return losses.sft_loss(model, pack_targets([EXAMPLES[i] for i in items]), scale)

    lengths = [e.tokens for e in EXAMPLES]
    return Task("sft", lengths, [len(e.target_ids) for e in EXAMPLES], loss, lengths)


def changed(**values: float) -> FitSettings:
    return FitSettings(**(vars(SETTINGS) | values))


def train(folder: Path, settings: FitSettings = SETTINGS) -> Model:
    folder.mkdir(exist_ok=True)
    model, log = tiny_model(), RunLog(folder / "metrics.jsonl")
    fit.fit(model, sft_task(model), settings, stage="sft", state_dir=folder / "state", log=log, dist=alone())
    return model


def test_every_item_once_an_epoch_in_a_new_order() -> None:
    plan = fit.batches(sft_task(tiny_model()), SETTINGS)
    orders = [[i for e, batch in plan if e == epoch for i in batch] for epoch in (0, 1)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("micro_tokens", [1, 16, 50, 10_000])
def test_gradient_does_not_depend_on_micro_batches(micro_tokens: int) -> None:
    results = []
    for tokens in (micro_tokens, 10_000):
        model = tiny_model()
        optimizer, means = Optimizer.adamw(model.named_parameters(), 0.1), Mean()
        settings = changed(micro_tokens=tokens, max_grad_norm=0)
        fit.accumulate(sft_task(model), range(24), settings, optimizer, means, alone())
        results.append((gradients(model), means.reduce(alone())["loss"]))
    assert relative_difference(results[0][0], results[1][0]) <= 1e-6
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)


def test_loss_falls_and_metrics_are_complete(tmp_path: Path) -> None:
    train(tmp_path, changed(epochs=12))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["sft/loss"] < 0.5 * rows[0]["sft/loss"]
    assert {"sft/grad_norm", "sft/lr", "perf/tokens_per_s"} <= rows[0].keys()


@pytest.mark.parametrize("stop_at", [1, 4, 5])
def test_stop_and_resume_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    whole = train(tmp_path / "whole")
    calls = iter(range(1000))
    monkeypatch.setattr(distributed, "stop_requested", lambda: next(calls) == stop_at)
    with pytest.raises(Stopped):
        train(tmp_path / "parts")
    monkeypatch.undo()
    resumed = train(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    losses_of = [
        [json.loads(line)["sft/loss"] for line in (tmp_path / part / "metrics.jsonl").read_text().splitlines()]
        for part in ("whole", "parts")
    ]
    assert losses_of[0] == losses_of[1]


def test_kill_without_warning_resumes_from_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole")
    steps = iter(range(1000))

    def crash(*args: object) -> float:
        if next(steps) == 5:
            raise KeyboardInterrupt
        return real(*args)

    real = Optimizer.clip
    monkeypatch.setattr(Optimizer, "clip", crash)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "parts" / "state").iterdir()] == ["step_3"]
    resumed = train(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_finished_fit_is_not_repeated(tmp_path: Path) -> None:
    first = train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    second = train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_nan_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="lower sft.lr"):
        train(tmp_path, changed(lr=float("inf")))


def test_planted_preference_is_recovered(tmp_path: Path) -> None:
    """Token 40 makes an answer bad, whatever else it holds: at least 99 % of unseen pairs come out right."""
    random.seed(3)

    def answer(bad: bool) -> list[int]:
        words = random.choices(range(4, 40), k=random.randint(2, 7))
        return words[:1] + [40] * bad + words[1:] + [2, 3]

    def pair() -> tuple[list[list[int]], float]:
        prob_a = float(random.random() < 0.5)
        return [[1, 7, *answer(prob_a == 0)], [1, 7, *answer(prob_a == 1)]], prob_a

    pairs = [pair() for _ in range(1000)]
    train_pairs, test_pairs = pairs[:600], pairs[600:]
    model = tiny_model(head="score", std=0.05)

    def loss(items: list[int], scale: float) -> tuple[torch.Tensor, losses.Stats]:
        packed = pack([sequence for i in items for sequence in train_pairs[i][0]])
        prob_a = torch.tensor([train_pairs[i][1] for i in items])
        return losses.preference_loss(model, packed, prob_a, torch.ones(len(items)), scale)

    ones = [1.0] * len(train_pairs)
    lengths = [sum(map(len, p)) for p, _ in train_pairs]
    task = Task("pm", lengths, ones, loss, ones, ("loss", "accuracy", "margin"))
    log = RunLog(tmp_path / "metrics.jsonl")
    settings = changed(epochs=3, batch_size=32, micro_tokens=2048, lr=3e-3, save_every=0)
    fit.fit(model, task, settings, stage="pm", state_dir=tmp_path / "state", log=log, dist=alone())
    with torch.no_grad():
        a, b = losses.scores(model, pack([s for p, _ in test_pairs for s in p])).unflatten(0, (-1, 2)).unbind(1)
    right = (a > b) == torch.tensor([prob_a > 0.5 for _, prob_a in test_pairs])
    assert right.float().mean() >= 0.99
