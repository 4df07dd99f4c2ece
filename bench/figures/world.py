"""The runs of one seed, from which every figure takes what it needs: one upstream run, and forks of it."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures.graph import Job, Suite, closure
from cai_fast import config
from cai_fast.records import content_id

UPSTREAM = "base,revise,sft,compare,label,pm"
SIZES = {"small": (24, 2), "default": (96, 4), "large": (144, 4)}  # hidden size and layers of base models


@dataclass(frozen=True)
class Sizes:
    """How much is done; settings of train.py first."""

    settings: dict[str, Any]
    red_team: int  # held-out prompts per policy
    benign: int
    pairs: int  # that feedback models are measured on
    snapshot_every: int
    rl_steps: int
    long_steps: int  # of training too long
    judge_steps: int
    chain_prompts: int  # whose revisions are compared between principles and sizes
    cost: float = 1.0  # CPU-seconds of everything, relative to --quick


QUICK = Sizes(
    {"revise.num_red_team": 240, "revise.num_helpful": 240, "compare.num_prompts": 1200, "base.comparisons": 1000,
     "pm.epochs": 2, "rl.prompts_per_step": 64},
    red_team=300, benign=120, pairs=240, snapshot_every=8, rl_steps=40, long_steps=80, judge_steps=400,
    chain_prompts=160,
)  # fmt: skip
FULL = Sizes(
    {}, red_team=989, benign=300, pairs=600, snapshot_every=5, rl_steps=40, long_steps=120, judge_steps=400,
    chain_prompts=300, cost=2.2,
)  # fmt: skip
TINY = Sizes(
    {"data.num_red_team": 60, "data.num_helpful": 60, "base.steps": 30, "base.tokens_per_step": 1024,
     "base.comparisons": 80, "revise.num_red_team": 16, "revise.num_helpful": 16, "compare.num_prompts": 24,
     "pm.epochs": 1, "rl.prompts_per_step": 16, "rl.warmup_steps": 1},
    red_team=12, benign=8, pairs=8, snapshot_every=2, rl_steps=4, long_steps=6, judge_steps=10, chain_prompts=8,
    cost=0.03,
)  # fmt: skip


@functools.cache
def configuration(name: str) -> str:
    """Hash of all settings of a preset or file: where one is changed its jobs are done anew."""
    return content_id("configuration", config.load(["--config", name]).to_toml())


@dataclass(frozen=True)
class World:
    """Jobs of one seed. Without the toy world there is neither a base model to make nor a judge to train."""

    seed: int
    sizes: Sizes
    config: str = "toy"
    toy: bool = True

    def job(self, name: str, stages: str, settings: dict[str, Any], *, needs: Sequence[Job] = (), fork: str = "",
            measure: Sequence[tuple[str, dict[str, Any]]] = (), cost: float = 10.0,
            config: str = "") -> Job:  # fmt: skip
        """A run of some stages; a fork needs its parent first. `settings` come on top of those of the sizes."""
        chosen = self.sizes.settings | {"rl.steps": self.sizes.rl_steps} | settings
        if not self.toy:
            chosen.pop("base.comparisons", None)
        words = ["--config", config or self.config, "--seed", self.seed, "--stages", stages]
        words += [word for key, value in chosen.items() if value is not None for word in (f"--{key}", value)]
        return Job(
            self.name(name), tuple(map(str, words)), tuple(needs), fork,
            tuple((function, tuple(given.items())) for function, given in measure), cost * self.sizes.cost,
            configuration(config or self.config),
        )  # fmt: skip

    def name(self, name: str) -> str:
        """The name of a job of this seed."""
        return f"seed_{self.seed}/{name}"

    def path(self, job: str, *parts: str) -> str:
        """A path in the run folder of a job, as settings and measures take it."""
        return "/".join((f"@{self.name(job)}", *parts))

    def answers(self, *models: str) -> dict[str, Any]:
        """Arguments of measures.policies: always the same prompts, preference model and reference."""
        counts = {"red_team": self.sizes.red_team, "benign": self.sizes.benign}
        made = self.path("main", "checkpoints")
        given = {"pm_eval": f"{made}/pm_eval", "reference": f"{made}/sl_cai", "counts": counts}
        return ({"models": list(models)} if models else {}) | given

    def main(self) -> Job:
        """Everything up to the preference models, with the base model as its own judge; the others are forks of it."""
        measure = [("policies", self.answers("base", "sl_cai")), ("chains", {"pm_eval": self.pm_eval})]
        return self.job("main", UPSTREAM if self.toy else UPSTREAM.removeprefix("base,"), {}, measure=measure, cost=220)

    @property
    def pm_eval(self) -> str:
        """The preference model that measures, and that no policy is trained on."""
        return self.path("main", "checkpoints", "pm_eval")

    @property
    def judge(self) -> str:
        """Where the separately trained feedback model is."""
        return self.path("judge", "judge")

    def judge_job(self) -> Job:
        """Training of that model (toy world only)."""
        given = (("base", self.path("main", "checkpoints", "base")), ("steps", self.sizes.judge_steps))
        cost = 65 * self.sizes.judge_steps / 400
        return Job(self.name("judge"), (), (self.main(),), "", (("make_judge", given),), cost)

    def base(self, size: str) -> Job:
        """A base model of some size that has seen as many direct as critiqued revisions; its chains with critiques."""
        hidden, layers = SIZES[size]
        settings = {"base.hidden_size": hidden, "base.layers": layers, "base.direct_revisions": 0.24,
                    "base.comparisons": 20}  # fmt: skip
        return self.job(
            f"base_{size}", "base,revise", settings | self.chain_settings(), needs=[self.main()],
            measure=[("chains", {"pm_eval": self.pm_eval})], cost={"small": 50, "default": 150, "large": 240}[size],
        )  # fmt: skip

    def chain_settings(self) -> dict[str, Any]:
        """Settings of runs that only make chains."""
        return {"revise.num_red_team": self.sizes.chain_prompts, "revise.num_helpful": 1, "revise.helpful_samples": 0}

    def chains(self, name: str, settings: dict[str, Any], base: str = "main", needs: Sequence[Job] = ()) -> Job:
        """Chains made by the base model of another job, with other settings."""
        settings = {"model.base": self.path(base, "checkpoints", "base")} | settings if self.toy else settings
        return self.job(
            name, "revise", self.chain_settings() | settings, needs=[self.main(), *needs],
            measure=[("chains", {"pm_eval": self.pm_eval})], cost=7,
        )  # fmt: skip

    def rl(self, name: str, settings: dict[str, Any], *, fork: str = "rl", steps: int = 0, every: int = 0,
           needs: Sequence[Job] = (), cost: float = 45, config: str = "") -> Job:  # fmt: skip
        """RL (from stage `fork` on) with other settings, measured at its end or, with `every`, along the way."""
        steps = steps or self.sizes.rl_steps
        settings = {"rl.steps": steps} | settings
        measure: list[tuple[str, dict[str, Any]]] = [("policies", self.answers("rl_cai"))]
        if every:
            settings |= {"rl.snapshot_every": every}
            measure = [("snapshots", {"every": every, "steps": steps} | self.answers())]
        measure.append(("training", {"names": ["rl/score", "rl/kl_exact"]}))
        stages = ",".join(UPSTREAM.split(",")[UPSTREAM.split(",").index(fork) :] if fork != "rl" else []) + ",rl"
        return self.job(name, stages.strip(","), settings, needs=[self.main(), *needs], fork=fork, measure=measure,
                        cost=cost, config=config)  # fmt: skip

    def rl_default(self) -> Job:
        """RL with the settings of the configuration and snapshots."""
        return self.rl("rl", {}, every=self.sizes.snapshot_every, cost=60)


class Results:
    """What the jobs of one seed measured."""

    def __init__(self, suite: Suite, world: World) -> None:
        self.suite, self.world = suite, world

    def of(self, job: Job) -> dict[str, Any]:
        """All that was measured of a job."""
        found = self.suite.result(job)
        if found is None:
            raise LookupError(f"{job.name} is not done")
        return found["measured"]

    def commits(self, jobs: Sequence[Job]) -> set[str]:
        """Of the program when it did the jobs and those that they need."""
        return {self.suite.result(job)["commit"] for job in closure(jobs).values()}

    def ended(self, job: Job) -> str:
        """What a guard did to the job's RL, if it ended it: the last policy is then that of an earlier iteration."""
        path = self.suite.path("runs", job.name) / "manifest.json"
        stages = json.loads(path.read_text())["stages"] if path.is_file() else {}
        found = stages.get("rl", {}).get("summary", {})
        if not found.get("guard_name"):
            return ""
        return f"{job.name}: guard {found['guard_name']}, the policy after {found['iterations']} iterations is the last"

    def policy(self, job: Job, name: str = "rl_cai", group: str = "red_team") -> dict[str, list]:
        """Columns of one policy's answers."""
        return self.of(job)["policies"][name][group]

    def last_policy(self, job: Job, group: str) -> dict[str, list]:
        """Columns of the answers of RL's last policy, with or without snapshots."""
        found = self.of(job).get("snapshots")
        return found[str(self.world.sizes.rl_steps)][group] if found else self.policy(job, group=group)

    def chains(self, job: Job) -> dict[str, dict[str, list]]:
        """Columns of chains, by revision."""
        return self.of(job)["chains"]
