"""The supervised training loop: SFT, preference models, and DPO.

Which items a step trains on is a function of (seed, step) alone, so that a resumed run needs no iterator state.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from cai_fast import heartbeat, rng
from cai_fast.batching import bins, split_even
from cai_fast.checkpoint import Checkpoints, TrainState
from cai_fast.config import Config
from cai_fast.config_sections import PmConfig, RlConfig, SftConfig
from cai_fast.distributed import Distributed, Stopped, training_mfu
from cai_fast.losses import Stats
from cai_fast.model import Model
from cai_fast.optim import Optimizer, schedule
from cai_fast.parallel import is_sharded, together
from cai_fast.runlog import Mean, RunLog

Loss = Callable[[list[int], float], tuple[Tensor, Stats]]
"""(items of a micro-batch, scale) -> (loss to differentiate, statistics)."""


@dataclass(frozen=True)
class Task:
    """What to fit: items 0 .. len(lengths)-1, of `lengths` tokens and a normaliser of `weights` each."""

    name: str  # prefix of metrics and progress
    lengths: Sequence[int]
    weights: Sequence[float]
    loss: Loss
    sizes: Sequence[float]  # what `FitSettings.batch_size` counts: tokens, or 1 for each item
    stats: tuple[str, ...] = ("loss",)  # names of the statistics that `loss` returns


@dataclass(frozen=True)
class FitSettings:
    """Hyper-parameters of one fit; `batch_size` counts the task's `sizes` per optimizer step. See also `of`."""

    seed: int
    epochs: int
    batch_size: float
    micro_tokens: int
    lr: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    save_every: int
    moments: str = "float32"  # of weights that are bf16
    keep: int = 1  # states, and
    background: bool = True  # how they are written: see Checkpoints

    @classmethod
    def of(cls, config: Config, section: SftConfig | PmConfig | RlConfig, batch_size: float) -> "FitSettings":
        """Those of stage sft, pm or (for DPO, without weight decay) rl; `section` is the configuration's."""
        shared = {"weight_decay": 0.0} | {
            f.name: getattr(section, f.name) for f in fields(cls) if hasattr(section, f.name)
        }
        states = {"keep": config.checkpoint.keep, "background": config.checkpoint.background}
        return cls(seed=config.seed, batch_size=batch_size, moments=config.model.moments, **shared, **states)


def batches(task: Task, settings: FitSettings) -> list[tuple[int, list[int]]]:
    """(epoch, items) of every optimizer step: each epoch visits every item once, in its own order."""
    plan = []
    for epoch in range(settings.epochs):
        order = rng.permutation(rng.key(settings.seed, f"{task.name}/order", "", epoch), len(task.lengths))
        plan += [(epoch, batch) for batch in split_even(order, task.sizes, settings.batch_size)]
    return plan


def fit(
    model: Model, task: Task, settings: FitSettings, *, stage: str, state_dir: Path, log: RunLog, dist: Distributed,
    first_step: int = 0,
) -> int:  # fmt: skip
    """Train `model` in place, resuming from `state_dir` if it holds a state; returns the number of steps.

    Collective. Metric lines carry `stage` and step `first_step` + s. SIGTERM saves the state and raises Stopped.
    """
    plan = batches(task, settings)
    optimizer = Optimizer.adamw(
        model.named_parameters(), settings.lr, weight_decay=settings.weight_decay, moments=settings.moments,
        head=model.head_weight if model.head == "lm" else None,
    )  # fmt: skip
    states = Checkpoints(state_dir, dist, keep=settings.keep, background=settings.background)
    tensors = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state_dict().items()}
    saved = states.latest()
    if saved is not None:
        states.load(saved, tensors)
    start = saved.step if saved else 0
    if start:
        log.info(f"{task.name}: continues after step {start} of {len(plan)}")
    if start < len(plan):  # else later fits of this stage may have logged already
        log.truncate(stage, first_step + start)
    # Forward and the gradient of the activations take 4 of 6 operations a parameter, that of the parameter itself 2.
    means, parameters = Mean(), sum(p.numel() * (1.0 if p.requires_grad else 4 / 6) for p in model.parameters())
    with states, log.progress(len(plan), task.name, "step", initial=start) as bar:
        for step in range(start, len(plan)):
            epoch, batch = plan[step]
            heartbeat.at(task.name, f"step {step}")
            began = time.monotonic()
            norm = accumulate(task, batch, settings, optimizer, means, dist, even=is_sharded(model))
            values = {f"{task.name}/{name}": value for name, value in means.reduce(dist).items()}
            if not math.isfinite(norm):
                raise FloatingPointError(f"{task.name}: the gradient is {norm} at step {step}; lower {stage}.lr")
            factor = schedule(settings.schedule, step, len(plan), settings.warmup_steps)
            optimizer.step(factor)
            values |= {f"{task.name}/grad_norm": norm, f"{task.name}/lr": settings.lr * factor}
            tokens = sum(task.lengths[i] for i in batch)
            values["perf/tokens_per_s"] = tokens / (time.monotonic() - began)
            values |= training_mfu(parameters, values["perf/tokens_per_s"], dist)
            log.metrics(stage, first_step + step, values)
            bar.update(1, loss=values[f"{task.name}/loss"])
            done, stop = step + 1, dist.stop_agreed()
            if stop or done == len(plan) or (settings.save_every and done % settings.save_every == 0):
                states.save(TrainState(step=done, epoch=epoch, tensors=tensors))
            if stop:
                states.wait()
                raise Stopped()
    optimizer.release()
    return len(plan)


def accumulate(
    task: Task, batch: Sequence[int], settings: FitSettings, optimizer: Optimizer, means: Mean, dist: Distributed,
    even: bool = False,
) -> float:  # fmt: skip
    """Gradient of one step, over all micro-batches and ranks, clipped; returns its norm before clipping. Collective.

    even: every rank must do as many passes as the others, because the model is sharded; one short of a micro-batch
    computes its smallest item once more and counts it for nothing.
    """
    scale = 1.0 / sum(task.weights[i] for i in batch)
    groups = bins([task.lengths[i] for i in batch], settings.micro_tokens)
    for name in task.stats:  # also on a rank that has no micro-batch of this step
        means.add(name, 0.0, 0.0)
    mine = groups[dist.rank :: dist.world]
    for group in mine:
        with together(even):
            loss, stats = task.loss([batch[i] for i in group], scale)
            loss.backward()
        for name, (total, count) in stats.items():
            means.add(name, total, count)
    if even and len(mine) < len(groups[:: dist.world]):
        smallest = min(batch, key=lambda i: task.lengths[i])
        with together(even):
            loss, _ = task.loss([smallest], scale)
            (loss * 0.0).backward()
    optimizer.reduce(dist)
    with together(even):
        return float(optimizer.clip(settings.max_grad_norm))
