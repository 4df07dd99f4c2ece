"""The training states of stage rl on disk: the newest, the best before it, and one that a stop signal left behind.

Saved as often as `rl.save_every` says, once the guards have judged the policy's answers: so the newest state is always
a usable policy. Before it is replaced it is kept beside it, if it is the best so far of those saved at an iteration at
which no guard tripped; a guard that warned earlier does not count.
A stop signal saves a state of its own, from which the stage continues but to which no guard falls back: so a run that
was interrupted exports what an unbroken one does.
"""

import math
import shutil
from typing import Any

from cai_fast import heartbeat
from cai_fast.checkpoint import Checkpoints, Saved
from cai_fast.distributed import Stopped
from cai_fast.guards import Trip
from cai_fast.pipeline import Context
from cai_fast.policy_gradient import PolicyGradient

Scored = tuple[int, float | None]
NONE: Scored = (0, None)


class RlStates:
    """Where stage rl continues, what it saves, and what it falls back to. A context manager."""

    def __init__(self, ctx: Context) -> None:
        """Collective: looks for the state to continue from, `found`, or None."""
        self.ctx, self.cfg, settings = ctx, ctx.config.rl, ctx.config.checkpoint
        self.every = self.cfg.save_every
        self.newest, self.stopped = (
            Checkpoints(ctx.run.state_dir(name), ctx.dist, keep=settings.keep, background=settings.background)
            for name in ("rl", "rl_stopped")
        )
        self.best_folder = ctx.run.state_dir("rl_best")
        newest, stopped = self.newest.latest(), self.stopped.latest()
        self.saved = newest.step if newest else 0  # step of the newest state; 0 is SL-CAI, which needs none
        self.found: Saved | None = stopped if stopped and stopped.step > self.saved else newest
        # (step, score) of the newest state, and of the best before it; a score of None is that of no candidate.
        step, score = (newest or stopped).extra["newest"] if newest or stopped else (0, None)
        self.newest_score: Scored = (self.saved, score if step == self.saved else None)  # not that of a damaged state
        self.best: Scored = tuple(self.found.extra["best"]) if self.found else NONE

    def due(self, step: int) -> bool:
        """Whether a state is to be saved at this step."""
        return step == self.cfg.steps or bool(step and self.every and step % self.every == 0)

    def judged(self, step: int, trainer: PolicyGradient, extra: dict[str, Any], score: float | None) -> None:
        """Save where it is due or a stop was asked for; no guard has ended training at `step`. Collective.

        score: how good the policy is; None if a guard tripped at this step. Raises Stopped after a signal.
        """
        stop = self.ctx.dist.stop_agreed()
        if step == 0:
            self.newest_score = (0, score)
        elif self.due(step) and step > self.saved:
            self._promote()
            self.saved, self.newest_score = step, (step, score)
            self._save(self.newest, step, trainer, extra)
            self._drop_stopped()
        elif stop:
            self.interrupted(step, trainer, extra)
        if stop:
            self.newest.wait()
            raise Stopped

    def interrupted(self, step: int, trainer: PolicyGradient, extra: dict[str, Any]) -> None:
        """Save the state in which a stop signal finds the stage, unless it began with it. Collective."""
        if step > (self.found.step if self.found else 0):
            self._save(self.stopped, step, trainer, extra)
            self.stopped.wait()

    def _save(self, states: Checkpoints, step: int, trainer: PolicyGradient, extra: dict[str, Any]) -> None:
        heartbeat.at("rl: saving", f"iteration {step}")
        trainer.save(states, step, extra | {"newest": list(self.newest_score), "best": list(self.best)})

    def _promote(self) -> None:
        """Keep the newest state, which is about to be replaced, if it is the best so far. Collective."""
        if _better(self.newest_score, self.best):
            self.best = self.newest_score
            if self.best[0]:
                self.newest.copy(self.best[0], self.best_folder)

    def _drop_stopped(self) -> None:
        """Give back the disk of a state that a newer one makes useless. Collective."""
        folder = self.stopped.folder
        if self.ctx.dist.on_main(folder.is_dir):
            self.newest.wait()  # until that one is complete
            self.ctx.dist.on_main(lambda: shutil.rmtree(folder))

    def choose(self, trip: Trip) -> tuple[Saved | None, str]:
        """What to export after a trip, None being SL-CAI, and why: the other candidate if the better one is damaged.
        Collective."""
        if trip.action == "stop":
            newest = self.newest.latest()
            return newest, "the newest state that was saved" if newest else "SL-CAI, as no state was saved"
        candidates = [(self.newest_score, self.newest.folder), (self.best, self.best_folder)]
        if not _better(self.newest_score, self.best):
            candidates.reverse()
        name = "pm_eval score" if self.ctx.config.guards.pm_eval_every else "reward"
        damaged = ""
        for (step, score), folder in candidates:
            if not _better((step, score), NONE):
                continue
            state = self.newest.latest(folder) if step else None
            if step == (state.step if state else 0):
                of = "of those saved at an iteration at which no guard tripped"
                return state, f"the best by mean {name}, {score:.4g}, {of}{damaged}"
            damaged += f"; the state of iteration {step} is damaged"
        return None, f"SL-CAI, as no intact state was saved at an iteration at which no guard tripped{damaged}"

    def __enter__(self) -> "RlStates":
        self.newest.__enter__()
        self.stopped.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stopped.__exit__(*error)
        self.newest.__exit__(*error)


def _better(new: Scored, old: Scored) -> bool:
    if new[1] is None or math.isnan(new[1]):
        return False
    return old[1] is None or new[1] > old[1]
