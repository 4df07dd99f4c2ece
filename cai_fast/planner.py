"""The plan of one configuration: each stage's peak memory, disk, tokens and time, from shapes and sources alone.

memory.py and moments.py count bytes, workload.py tokens, capacity.py pages and speed. Training takes 6 floating-point
operations per parameter and token, 4 where the parameter is frozen, 2 more where layers are recomputed.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from cai_fast import capacity, memory, pipeline, workload
from cai_fast.capacity import Machine, Pool
from cai_fast.config import Config
from cai_fast.memory import Memory, Shape
from cai_fast.moments import Moments
from cai_fast.tokenizer import Renderer
from cai_fast.workload import Work

GIB = 2**30
TEXT_BYTES = 3  # on disk, per token computed
USABLE = 0.95  # of a device's memory: the rest is the CUDA context's, the libraries', and lost between blocks
Changes = dict[str, dict[str, Any]]
"""Section -> other settings."""


@dataclass(frozen=True)
class StagePlan:
    """One line of the table: memory of one device at the stage's peak, bytes on disk, tokens of all ranks, seconds."""

    name: str
    memory: Memory
    disk: float
    trained: int
    prefill: int
    decode: int
    seconds: float


class Planner:
    """The engines' work of a configuration, and its stages on the machine that it runs on."""

    def __init__(self, config: Config, inputs: tuple[dict[str, int], Callable[[str], Renderer]] | None = None) -> None:
        """inputs: prompt counts and renderers, of a planner of the same sources and models."""
        self.config, self.machine = config, machine(config)
        self.inputs = inputs or (workload.prompt_counts(config), workload.renderers(config))
        cpu = self.machine.kind == "cpu"
        self.works = workload.works(config, *self.inputs, cpu=cpu, ranks=self.machine.count)
        self.passes = workload.passes(config, self.inputs[0])
        self.moments = Moments(config, self.machine, self.works)

    def shape(self, role: str) -> Shape:
        """Of the model in a role."""
        return memory.role_shape(self.config, role)

    def speeds(self) -> capacity.Rates:
        """Of one device: measured, or those of the GPU that is assumed."""
        if self.machine.name:
            return capacity.sheet(self.machine.name)
        kind = self.machine.kind
        return _measured(kind, pipeline.weight_type(self.config, kind))

    def pool(self, stage: str, work: Work) -> Pool:
        """The cache of the first engine for some work."""
        return self.moments.pools(stage, work)[0]

    def stage(self, stage: str) -> StagePlan:
        """The plan of one stage."""
        works, trained = self.works.get(stage, []), self.passes[stage].trained
        prefill, decode = sum(w.prefill for w in works), sum(w.decode for w in works)
        peak, seconds = self.moments.peak(stage), self._seconds(stage, works)
        return StagePlan(stage, peak, sum(self.disk(stage)), trained, prefill, decode, seconds)

    def _seconds(self, stage: str, works: list[Work]) -> float:
        rates, width, passes = self.speeds(), self.moments.layout.width, self.passes[stage]
        operations = self._operations(stage) * passes.trained + 2 * self.shape("base").params * passes.scored
        spent = rates.packed(operations)
        for work in works:
            spent += capacity.seconds(work, self.pool(stage, work), self.shape(work.role).params, width, rates)
        return spent / (1 if stage == "base" else self.machine.count)  # one rank pretrains the toy model

    def _networks(self, stage: str) -> list[tuple[Shape, str]]:
        """The models that a stage trains at a time, with their heads."""
        base, critic = (self.shape("base"), "lm"), self.config.rl.network
        roles = {"own": ["base"], "pm": ["pm_init"]}.get(critic, [])
        value = [(self.shape(role), "score") for role in roles]
        trained = {"base": [base], "sft": [base], "pm": [(self.shape("pm_init"), "score")], "rl": [base, *value]}
        return trained.get(stage, [])

    def _operations(self, stage: str) -> float:
        """Floating-point operations of training per token."""
        layout, total = self.moments.layout, 0
        for sizes, head in self._networks(stage):
            total += (2 if self.config.parallel.recompute == "full" else 0) * sizes.count(head)
            total += 4 * sizes.count(head) + 6 * layout.adapters(sizes) if layout.rank else 6 * sizes.count(head)
        return total

    def disk(self, stage: str) -> tuple[float, float]:
        """Bytes of all ranks together: of the texts and checkpoints of a stage, and of its training states, which go
        when it ends."""
        texts = TEXT_BYTES * sum(work.prefill + work.decode for work in self.works.get(stage, []))
        layout, kept, states, pair = self.moments.layout, 0.0, 0.0, 2 if stage == "pm" else 1
        guarded = stage == "rl" and bool(self.works.get("rl"))
        more = 2 if guarded else 0  # what a guard may roll back to, and what a stop left until the next state is saved
        for number, (sizes, head) in enumerate(self._networks(stage)):
            adapters = layout.adapters(sizes)
            count = adapters if layout.rank else sizes.count(head)
            weight, state = (4, 8) if layout.sharded else (layout.width, layout.per_weight(stage)[1])
            # Of two models trained one after the other, the first one's stay; one more while it is written.
            states += (pair * self.config.checkpoint.keep + 1 + more) * count * (weight + state)
            kept += (sizes.count(head) + adapters) * layout.width if number == 0 else 0  # the critic is not exported
        if guarded and (every := self.config.rl.snapshot_every):
            kept *= 1 + self.config.rl.steps // every
        return texts + kept * pair, states

    def room_on_disk(self) -> float:
        """Bytes that a run folder may hold at a time: all stages' results, and the states of one."""
        made, most = 0.0, 0.0
        for stage in self.config.stages:
            kept, states = self.disk(stage)
            made += kept
            most = max(most, made + states)
        return most

    @property
    def room(self) -> float:
        """Bytes of one device that a stage may hold."""
        return USABLE * self.machine.memory

    def worst(self) -> tuple[str, Memory]:
        """The stage that holds most, and its peak."""
        peaks = {stage: self.moments.peak(stage) for stage in self.config.stages}
        stage = max(peaks, key=lambda name: peaks[name].total)
        return stage, peaks[stage]

    def starved(self) -> Work | None:
        """Work whose pages, as many as memory allows, do not hold one request."""
        for stage, work in ((s, w) for s, works in self.works.items() for w in works if w.phases):
            for pool in self.moments.pools(stage, work):
                if pool.paged and pool.pages < -(-work.room // pool.size):
                    return work
        return None

    def fits(self) -> bool:
        """Whether every stage finds the memory that it needs."""
        return self.worst()[1].total <= self.room and self.starved() is None

    def changed(self, changes: Changes) -> "Planner":
        """The plan of the same sources and models with other settings."""
        sections = {name: dataclasses.replace(getattr(self.config, name), **new) for name, new in changes.items()}
        return Planner(dataclasses.replace(self.config, **sections), self.inputs)


def machine(config: Config) -> Machine:
    """What a configuration runs on, or is planned for."""
    return capacity.machine(config.hardware, config.model.device)


def weight_width(config: Config) -> int:
    """Bytes per weight of the models on the device that this configuration runs on: 2 or 4."""
    return pipeline.weight_type(config, machine(config).kind).itemsize


@cache
def _measured(kind: str, dtype: torch.dtype) -> capacity.Rates:
    return capacity.rates(torch.device(kind), dtype)
