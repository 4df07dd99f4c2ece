"""Which state stage rl falls back to where states are damaged: only files and scores, no training."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import alone

from cai_fast import distributed
from cai_fast.checkpoint import Checkpoints, TrainState
from cai_fast.distributed import Stopped
from cai_fast.guards import Trip
from cai_fast.rl_states import RlStates

TRIP = Trip("kl", "rollback", 99, "")


class Trainer:
    """One number to save."""

    def save(self, states: Checkpoints, step: int, extra: dict[str, Any]) -> None:
        states.save(TrainState(step, extra=extra, tensors={"weight": torch.tensor([float(step)])}))


def opened(folder: Path, keep: int = 1) -> RlStates:
    """The states of a run in `folder`, saved at every second of ten iterations."""
    config = SimpleNamespace(
        rl=SimpleNamespace(save_every=2, steps=10), checkpoint=SimpleNamespace(keep=keep, background=False),
        guards=SimpleNamespace(pm_eval_every=1),
    )  # fmt: skip
    run = SimpleNamespace(state_dir=lambda name: folder / name)
    return RlStates(SimpleNamespace(config=config, run=run, dist=alone()))


def judge(states: RlStates, scores: dict[int, float | None]) -> RlStates:
    for step, score in scores.items():
        states.judged(step, Trainer(), {}, score)
    return states


def interrupt(states: RlStates, step: int) -> None:
    """A stop signal at this step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(distributed, "stop_requested", lambda: True)
        judge(states, {step: 1.0})


def damage(folder: Path, step: int) -> None:
    (folder / f"step_{step}" / "state.json").write_text("{")


def chosen(states: RlStates) -> tuple[int, str]:
    state, why = states.choose(TRIP)
    return state.step if state else 0, why


@pytest.mark.parametrize(("scores", "damaged", "step", "why"), [
    ({0: 0.0, 2: 1.0, 4: 3.0}, [], 4, "pm_eval score, 3, of those saved at an iteration at which no guard tripped"),
    ({0: 0.0, 2: 1.0, 4: 3.0}, ["rl/4"], 2, "score, 1, .*the state of iteration 4 is damaged"),
    ({0: 0.0, 2: 3.0, 4: 1.0}, ["rl_best/2"], 4, "score, 1, .*the state of iteration 2 is damaged"),
    ({0: 0.0, 2: None, 4: 3.0}, ["rl/4"], 0, "score, 0, .*the state of iteration 4 is damaged"),
    ({0: 0.0, 2: 1.0, 4: 3.0}, ["rl/4", "rl_best/2"], 0, "SL-CAI, as no intact.* 4 is damaged.* 2 is damaged"),
    ({0: 0.0, 2: 1.0, 4: None}, ["rl_best/2"], 0, "SL-CAI, as no intact state.*the state of iteration 2 is damaged"),
    ({0: None, 2: None, 4: float("nan")}, [], 0, "SL-CAI, as no intact state .* no guard tripped$"),
])  # fmt: skip
def test_where_the_better_state_is_damaged_the_other_one_is_exported(
    scores: dict[int, float | None], damaged: list[str], step: int, why: str, tmp_path: Path
) -> None:
    with judge(opened(tmp_path), scores) as states:
        for place in damaged:
            folder, _, number = place.partition("/")
            damage(tmp_path / folder, int(number))
        found, said = chosen(states)
    assert found == step
    assert re.search(why, said)


def test_a_state_that_was_lost_gives_its_score_to_no_other(tmp_path: Path) -> None:
    """A stop leaves a state of iteration 3; that of 2, which is better than all others, is lost."""
    with judge(opened(tmp_path), {0: 0.0, 2: 9.0}) as states:
        interrupt(states, 3)
    damage(tmp_path / "rl", 2)
    with opened(tmp_path) as states:
        assert states.found.step == 3
        assert chosen(states)[0] == 0 and "score, 0, " in chosen(states)[1]
        assert chosen(judge(states, {4: 3.0}))[0] == 4


def test_a_stop_before_any_state_keeps_the_score_of_the_start(tmp_path: Path) -> None:
    with judge(opened(tmp_path), {0: 5.0}) as states:
        interrupt(states, 1)
    with opened(tmp_path) as states:
        assert "score, 5, " in chosen(states)[1]
        found, said = chosen(judge(states, {2: 3.0, 4: 1.0}))
    assert found == 0 and "score, 5, " in said


def test_what_is_kept_as_the_best_is_not_a_damaged_newer_state(tmp_path: Path) -> None:
    """Two states are kept; the newer one is damaged, so that the stage continues from the other."""
    with judge(opened(tmp_path, keep=2), {0: 0.0, 2: 5.0, 4: 1.0}):
        damage(tmp_path / "rl", 4)
    with opened(tmp_path, keep=2) as states:
        assert states.found.step == 2
        found, said = chosen(judge(states, {4: 1.0, 6: 3.0}))
    assert found == 2 and "score, 5, " in said
