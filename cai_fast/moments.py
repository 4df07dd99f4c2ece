"""What every stage holds on one device, at each of the moments that may be its peak.

A stage's caches stay until it ends. On a GPU the size of one depends on the memory that is free when something is first
generated, which is before the optimizer of stage rl has its moments: the plan counts both.
"""

import dataclasses

from cai_fast import capacity
from cai_fast.capacity import Machine, Pool
from cai_fast.config import Config
from cai_fast.memory import Layout, Memory
from cai_fast.scorer import MICRO_TOKENS
from cai_fast.workload import Work


class Moments:
    """The moments of the stages of one configuration; `works` are those of `workload.works`."""

    def __init__(self, config: Config, machine: Machine, works: dict[str, list[Work]]) -> None:
        self.config, self.machine, self.works = config, machine, works
        self.layout = Layout(config, machine)

    def peak(self, stage: str) -> Memory:
        """The moment at which a stage holds most."""
        return max(self.of(stage), key=lambda memory: memory.total)

    def of(self, stage: str) -> list[Memory]:
        """All moments of a stage."""
        if stage == "rl":
            return self._dpo() if self.config.rl.algorithm == "dpo" else self._rl()
        if stage in ("base", "sft", "pm"):
            return self._fitting(stage) + [self._generating(stage, work) for work in self.works.get(stage, [])]
        if stage == "evaluate":
            return [*(self._generating(stage, work) for work in self.works[stage]), *self._measuring()]
        return [self._generating(stage, work) for work in self.works.get(stage, [])] or [Memory("nothing")]

    def pools(self, stage: str, work: Work) -> list[Pool]:
        """The caches of the engines of one kind of work, each of which finds less memory than the one before."""
        pools: list[Pool] = []
        for _ in range(work.engines):
            pools.append(self._pool(stage, work, sum(pool.nbytes for pool in pools)))
        return pools

    def _pool(self, stage: str, work: Work, taken: int) -> Pool:
        free = None
        if self.layout.cuda:
            free = self.machine.memory - int(self.loaded(stage, work).total) - taken
        model = self.layout.shape(work.role).config
        return capacity.pool(self.config.engine, model, self.layout.width, work, free)

    def loaded(self, stage: str, work: Work) -> Memory:
        """What is there when a cache is made."""
        if stage == "rl":
            # The scores for the standardisation are drawn before there is a critic or an optimizer.
            early = self.config.rl.reward_transform == "standardise"
            networks = self._networks()[: 1 if early else None]
            gradients = 0.0 if early else self.layout.main_grad("rl", self.layout.shape("base"))
            weights = sum(network.weights for network in networks)
            return Memory("loaded", weights, gradients) + self._beside_policy()
        return Memory("loaded", work.engines * self.layout.frozen(work.role))

    def _cached(self, stage: str, work: Work) -> float:
        """Bytes of keys and values in the caches, and in handles outside of them."""
        model = self.layout.shape(work.role).config
        outside = (work.kept + sum(work.blocks)) * capacity.token_bytes(model, self.layout.width)
        return sum(pool.nbytes for pool in self.pools(stage, work)) + outside

    def _generating(self, stage: str, work: Work) -> Memory:
        """An engine at work; one that only scores makes no cache."""
        held = Memory(work.name, cache=self._cached(stage, work), activations=self._engine(work))
        return held + self.loaded(stage, work)

    def _engine(self, work: Work) -> float:
        """Activations of an engine: of prompts that are admitted together, of what it scores, or of a decode step."""
        rows = self.config.engine.max_batch
        admitted = [min(rows, phase.at_once) * phase.context for phase in work.phases]
        return self.layout.generating(self.layout.shape(work.role).config, max(work.room, work.scored, *admitted))

    def _fitting(self, stage: str) -> list[Memory]:
        """Training of one model."""
        layout, head = self.layout, "score" if stage == "pm" else "lm"
        role = "pm_init" if stage == "pm" else "base"
        trunk = Memory("", layout.frozen(role) if layout.rank else 0.0)
        trained = layout.trained(stage, role, head) + trunk
        moments = [Memory("update", activations=layout.training(stage, role, head)) + trained]
        if self.machine.count > 1 and not layout.sharded and stage != "base":
            moments.append(Memory("exchange of gradients", gradients=layout.exchange(stage, role, head)) + trained)
        if layout.rank and not layout.cuda:  # the merged copy is made on the CPU
            moments.append(Memory("merging", 2 * trunk.weights))
        return moments

    def _networks(self) -> list[Memory]:
        """What stage rl trains: the policy, and the critic of an algorithm that has one."""
        layout, critic = self.layout, self.config.rl.network
        policy = layout.trained("rl", "base")
        if not critic:
            return [policy]
        if critic == "detached":
            size = layout.shape("base").config.hidden_size
            gradient, state = layout.per_weight("rl")
            return [policy, Memory("", size * layout.width, size * gradient, size * state)]
        return [policy, layout.trained("rl", "pm_init" if critic == "pm" else "base", "score")]

    def _beside_policy(self) -> Memory:
        """The frozen models of stage rl: reference, preference models, and the engine's copy of a sharded policy."""
        layout, scorers = self.layout, 2 if self.config.guards.pm_eval_every else 1
        if layout.rank:  # one trunk is the reference, and under adapters everything else
            sizes = layout.shape("base")
            scorer = (layout.adapters(sizes) + sizes.config.hidden_size) * layout.width
            return Memory("", layout.frozen("base") + scorers * scorer)
        weights = layout.frozen("base", sharded=layout.sharded) + scorers * layout.frozen("pm_init", "score")
        return Memory("", weights + (layout.frozen("base") if layout.sharded else 0.0))

    def _rl(self) -> list[Memory]:
        layout, config = self.layout, self.config
        (work,) = self.works["rl"]
        model, tokens = layout.shape("base").config, layout.micro("rl")
        held = sum(self._networks(), self._beside_policy()) + Memory(cache=self._cached("rl", work))
        update = layout.training("rl", "base")  # both networks are differentiated together
        if config.rl.network == "detached":
            update += 2 * 4 * tokens * model.hidden_size
        elif config.rl.network:
            update += layout.training("rl", "pm_init" if config.rl.network == "pm" else "base", "score")
        if config.rl.kl_kind == "exact":  # the reference's states, and a second gradient of the head and of its input
            head = 0 if layout.rank else 4 * layout.shape("base").embedding
            update += tokens * model.hidden_size * (layout.width + 4) + head
        idle = dataclasses.replace(held, gradients=layout.main_grad("rl", layout.shape("base")))
        measuring = layout.forward(model, tokens) + layout.logits(model, tokens, 2)
        moments = [
            Memory("update", activations=update) + held,
            Memory("measuring", activations=measuring) + idle,
            Memory("sampling", activations=self._engine(work)) + idle,
        ]
        if self.machine.count > 1 and not layout.sharded:
            moments.append(Memory("exchange of gradients", gradients=layout.exchange("rl", "base")) + held)
        if layout.rank and not layout.cuda:
            moments.append(Memory("merging", layout.frozen("base")) + idle)
        return moments

    def _dpo(self) -> list[Memory]:
        """Log-probabilities of SL-CAI, which is then given back, and training on the comparisons."""
        layout, model = self.layout, self.layout.shape("base").config
        scoring = layout.forward(model, MICRO_TOKENS) + layout.logits(model, MICRO_TOKENS, 1)
        whole = Memory("log-probabilities", layout.frozen("base"), activations=scoring)
        if not layout.sharded:
            return [whole, *self._fitting("rl")]
        trained = layout.trained("rl", "base")
        return [whole, *self._fitting("rl"), dataclasses.replace(trained, gradients=0.0, optimizer=0.0) + whole]

    def _measuring(self) -> list[Memory]:
        """Stage evaluate scores answers with a preference model, then compares the distributions of two policies."""
        layout, model = self.layout, self.layout.shape("base").config
        forward = layout.forward(model, MICRO_TOKENS)
        return [
            Memory("scores", layout.frozen("pm_init", "score"), activations=forward),
            Memory(
                "divergences", 2 * layout.frozen("base"), activations=forward + layout.logits(model, MICRO_TOKENS, 2)
            ),
        ]
