"""Stage rl: RL-CAI, SL-CAI trained against the preference model (paper §4.1), or by DPO on its comparisons (dpo.py).

One iteration: answers to red-team and helpful prompts, sampled by an engine that shares the policy's weights; reward =
preference score at the end of the answer, with a KL penalty against SL-CAI at every token; policy-gradient update.
Guards look at the answers before they are trained on, see guards.py; what is saved, and exported after a guard's stop,
is in rl_states.py.
"""

import heapq
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cai_fast import chains, comparisons, dpo, guards, heartbeat, pipeline, records, roles
from cai_fast.distributed import Stopped, global_moments
from cai_fast.guards import Guards, Trip
from cai_fast.model import Model, ScalarHead
from cai_fast.optim import schedule
from cai_fast.pipeline import Context
from cai_fast.policy_gradient import Critic, PolicyGradient, Rollouts
from cai_fast.records import Journal, Rollout, content_id
from cai_fast.rl_states import RlStates
from cai_fast.rundir import SNAPSHOT
from cai_fast.runlog import Mean, in_words
from cai_fast.sampler import KINDS, Answers, Sampler

OUTPUTS = ("rollouts.jsonl", "tokens/rollouts.safetensors", "checkpoints/rl_cai")


class Loop:
    """The iterations, their records, guards and states."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.cfg, self.renderer = ctx, ctx.config.rl, ctx.renderer("sl_cai")
        self.reference = roles.reference(ctx)
        self.policy = roles.trained(ctx, "sl_cai", head="lm", name="rl", trunk=self.reference)
        self.sampler = Sampler(ctx, self.policy, self.reference, self.renderer)
        self.snapshot_every = self.cfg.snapshot_every
        self.states = RlStates(ctx)
        state = self.states.found
        if state is None:
            mean, deviation = 0.0, 1.0
            if self.cfg.reward_transform == "standardise":
                mean, deviation = self.sampler.standardisation()
            self.extra: dict[str, Any] = {"mean": mean, "deviation": deviation, "kl_exact": 0.0, "kl_exact_max": 0.0}
        else:
            self.extra = dict(state.extra)
        self.guards = Guards(ctx.config.guards, ctx.dtype == torch.float32, self.extra.get("guards"))
        self.start = state.step if state else 0
        self.trainer = PolicyGradient(
            self.policy, self.reference, self.critic(), self.cfg, seed=ctx.config.seed, dist=ctx.dist,
            moments=ctx.config.model.moments,
        )  # fmt: skip
        if state is not None:
            self.extra = self.trainer.restore(self.states.newest, state)
            ctx.log.info(f"rl: continues after iteration {self.start} of {self.cfg.steps}")
        self.extra["guards"] = self.guards.memory  # saved with every state
        ctx.log.truncate("rl", self.start)
        self.provenance = pipeline.provenance(
            ctx, "sl_cai", self.renderer, self.sampler.spec, pm=ctx.model_hash("pm"), algorithm=self.cfg.algorithm
        )

    def critic(self) -> Critic | None:
        """The value function that `rl.critic` names, of an algorithm that has one."""
        kind = self.cfg.network
        if not kind:
            return None
        if kind == "detached":
            return Critic(ScalarHead(self.policy.config.hidden_size).to(self.policy.device))
        if kind == "own":
            return Critic(roles.value_model(self.ctx, self.reference, "critic"))
        critic = roles.trained(self.ctx, "pm", head="score", name="critic", trunk=self.reference)
        return Critic(critic, self.extra["mean"], self.extra["deviation"])

    def run(self) -> Trip | None:
        """All iterations; returns the trip of a guard that ended them, if one did. Collective."""
        cfg, ctx = self.cfg, self.ctx
        ctx.dist.on_main(lambda: (drop_rows(ctx, self.start), ctx.run.drop_snapshots(self.start)))
        ctx.work(1.0)  # forget the answers for the standardisation: they are no iteration's
        path = ctx.run.path("journal", f"rl.{ctx.dist.rank}.jsonl")
        with Journal(path) as journal, ctx.progress(cfg.steps, "rl", "step", initial=self.start) as bar:
            for step in range(self.start, cfg.steps + 1):
                began = time.monotonic()
                try:
                    answers = self.sampler.answer(self.sampler.items(step), "rl", step)
                except Stopped:
                    journal.sync()
                    self.states.interrupted(step, self.trainer, self.extra)
                    raise
                heartbeat.at("rl: measuring", f"iteration {step}")
                first = answers.items[0].number if answers.items else 0
                rollouts = self.trainer.measure(answers.examples(self.renderer), step, first, answers.total)
                rewards = self.rewards(answers)
                values = self.statistics(answers, rollouts, rewards)
                values |= self.signs(answers, step)
                values |= self.guards.derive(step, values)
                self.record(journal, step, answers, rollouts, rewards)
                self.extra["kl_exact"] = values["rl/kl_exact"]
                self.extra["kl_exact_max"] = max(self.extra["kl_exact_max"], values["rl/kl_exact"])
                trips = self.guards.judge(step, values)
                end = guards.ending(trips)
                if end is None:
                    self.save(step, journal, values, trips)
                    if step < cfg.steps:
                        values["perf/rollout_s"] = time.monotonic() - began
                        values |= self.update(step, answers, rollouts, rewards)
                        if not math.isfinite(values["rl/grad_norm"]):
                            end = self.guards.broken(step, "the gradient is not finite")
                            trips.append(end)
                seconds = time.monotonic() - began
                values |= ctx.work(seconds)
                values |= {"rl/guard": float(end is not None), "rl/guards_tripped": float(len(trips))}
                values["perf/tokens_per_s"] = sum(rollouts.tokens) / seconds
                ctx.log.metrics("rl", step, values)
                for trip in trips:
                    if trip.action == "warn" and self.guards.is_first(trip):
                        ctx.log.warn(f"rl: guard {trip.guard} at {trip}")
                if end:
                    return end
                if step < cfg.steps:
                    bar.update(1, reward=values["rl/reward"], kl=values["rl/kl_exact"])
        return None

    def rewards(self, answers: Answers) -> Tensor:
        """[S] transformed scores, with the penalty for answers that never stop."""
        cut_off = torch.tensor([float(c.finish_reason == "length") for c in answers.completions])
        return (answers.scores - self.extra["mean"]) / self.extra["deviation"] - self.cfg.missing_eos_penalty * cut_off

    def statistics(self, answers: Answers, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Global means over answers or tokens, before the update. Collective."""
        means = Mean()
        refused = [float(self.renderer.is_refusal(f.text)) for f in answers.finished]
        per_answer = {
            "reward": rewards, "kl": rollouts.k1, "kl_exact": rollouts.kl,
            "refusal_rate": torch.tensor(refused),
            "repetition": torch.tensor([chains.repetition(f.text) for f in answers.finished]),
            "length": torch.tensor([float(len(c.token_ids)) for c in answers.completions]),
            "finished": torch.tensor([float(c.finish_reason == "stop") for c in answers.completions]),
        }  # fmt: skip
        for name, values in per_answer.items():
            means.add(f"rl/{name}", values.sum(), len(values))
        for kind in KINDS:
            chosen = [r for r, item in zip(refused, answers.items, strict=True) if item.prompt.kind == kind]
            means.add(f"rl/refusal_rate_{kind}", sum(chosen), len(chosen))
        entropy, trained = rollouts.flat("entropy"), rollouts.flat("logprob").cpu()
        sampled = [x for b in rollouts.bins for i in b.samples for x in answers.completions[i].logprobs]
        gap = (trained - torch.tensor(sampled)).abs()
        means.add("rl/entropy", entropy.sum(), entropy.numel())
        means.add("rl/logprob_gap", gap.sum(), gap.numel())
        return means.reduce(self.ctx.dist) | {"rl/kl_coef": self.trainer.kl_coef}

    def signs(self, answers: Answers, step: int) -> dict[str, float]:
        """What the guards watch besides: global numbers about answers and their scores. Collective."""
        dist, measured = self.ctx.dist, {"score": answers.scores}
        every = self.ctx.config.guards.pm_eval_every
        if every and (step % every == 0 or self.states.due(step)):
            measured["pm_eval"] = self.sampler.held_out(answers)
        signs: dict[str, float] = {}
        for name, scores in measured.items():
            mean, variance = global_moments(scores, None, dist)
            signs |= {f"rl/{name}": float(mean), f"rl/{name}_deviation": math.sqrt(float(variance))}
        lengths = [len(c.token_ids) for c in answers.completions]
        moments = {}
        for kind in KINDS:
            own = [i for i, item in enumerate(answers.items) if item.prompt.kind == kind]
            moments[kind] = guards.Moments.of([lengths[i] for i in own], [float(answers.scores[i]) for i in own])
        signs["rl/length_slope"] = guards.length_slope(
            guards.from_sums(dist.all_reduce_sum(guards.sums(moments)), KINDS)
        )
        bodies = [
            f.body_ids if c.finish_reason == "stop" else f.token_ids  # which has no stop token then
            for f, c in zip(answers.finished, answers.completions, strict=True)
        ]
        found, prompts = [guards.phrases(ids) for ids in bodies], [item.number - item.sample for item in answers.items]
        counts = dist.all_reduce(torch.from_numpy(guards.phrase_counts(found, prompts))).numpy()
        shared = guards.covered(found, counts, answers.total // self.cfg.samples_per_prompt)
        total = dist.all_reduce_sum([shared, sum(map(len, bodies))])
        return signs | {"rl/boilerplate": total[0] / max(1.0, total[1])}

    def record(self, journal: Journal, step: int, answers: Answers, rollouts: Rollouts, rewards: Tensor) -> None:
        """One journal row per answer."""
        for i, (item, f) in enumerate(zip(answers.items, answers.finished, strict=True)):
            seed = [self.ctx.config.seed, "rl", f"{item.prompt.id}/{item.sample}", item.visit]
            row = Rollout(
                content_id("rollout", item.prompt.id, step, item.number, item.sample), item.prompt.id, step, f.text,
                float(rewards[i]), float(rollouts.k1[i]), item.sample,
                self.provenance | {"parents": [item.prompt.id], "rng": seed, "policy_step": step},
            )  # fmt: skip
            sampled = answers.completions[i]
            tokens = {"token_ids": sampled.token_ids, "logprobs": sampled.logprobs}
            journal.append({"number": item.number, "record": row.to_json()} | tokens)

    def save(self, step: int, journal: Journal, values: dict[str, float], trips: list[Trip]) -> None:
        """Keep the policy of `step`, which no guard has stopped, where that is due or a stop was asked for. Collective.

        The state has the answers before it.
        """
        journal.sync()
        score = values.get("rl/pm_eval", values["rl/reward"])
        self.states.judged(step, self.trainer, self.extra, None if trips else score)
        self.snapshot(step, values)

    def snapshot(self, step: int, values: dict[str, float]) -> None:
        """Export the policy where that is due; one that no guard has stopped. Collective.

        Those after the newest state are written again when the stage continues, like its answers.
        """
        every = self.snapshot_every
        if every and step and step % every == 0:
            about = {"iterations": step} | {name.partition("/")[2]: value for name, value in values.items()}
            roles.export(self.ctx, self.policy, f"{SNAPSHOT}{step:05}", self.renderer.tokenizer, about)

    def update(self, step: int, answers: Answers, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Train on the answers of this iteration. Collective."""
        began = time.monotonic()
        heartbeat.at("rl: updating", f"iteration {step}")
        stats = self.trainer.set_advantages(rollouts, rewards, answers.groups)
        factor = schedule(self.cfg.schedule, step, self.cfg.steps, self.cfg.warmup_steps)
        stats |= self.trainer.update(rollouts, factor) | {"lr": self.cfg.lr * factor}
        self.trainer.adapt_kl(
            float(self.ctx.dist.all_reduce(rollouts.k1.sum())) / answers.total
        )  # for the next iteration
        stats.pop("entropy", None)  # reported of the policy that sampled
        return {f"rl/{name}": value for name, value in stats.items()} | {"perf/update_s": time.monotonic() - began}

    def fall_back(self, trip: Trip) -> tuple[int, str]:
        """After a guard's stop: make the policy the one to export; returns its iteration, and why it is that one."""
        state, why = self.states.choose(trip)
        worst = self.extra["kl_exact_max"]
        if state is None:
            roles.reset(self.ctx, self.policy, "rl", self.reference)
            self.extra["kl_exact"] = 0.0
        else:
            self.extra = self.trainer.restore(self.states.newest, state)
        self.extra["kl_exact_max"] = worst
        return state.step if state else 0, why


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on."""
    if ctx.config.rl.algorithm == "dpo":
        return dpo.inputs(ctx)
    pms = ["pm", "pm_eval"] if ctx.config.guards.pm_eval_every else ["pm"]
    return ctx.inputs("rl", files=["prompts.jsonl", *roles.outputs(ctx, *pms)], roles=["sl_cai", *pms])


def run(ctx: Context) -> None:
    """Write rollouts.jsonl, checkpoints/rl_cai and the snapshots that were asked for."""
    if ctx.config.rl.algorithm == "dpo":
        policy, results = dpo.train(ctx)
        return finish(ctx, policy, results)
    loop = Loop(ctx)
    with loop.states:
        trip = loop.run()
        step, why = loop.fall_back(trip) if trip else (ctx.config.rl.steps, "the last")
    if trip:
        said = f"rl: stopped by guard {trip.guard} at {trip}; exporting the policy after {step} iterations: {why}"
        ctx.log.warn(said)
    return finish(ctx, loop.policy, {
        "guard": str(trip or ""), "guard_name": trip.guard if trip else "", "guard_step": trip.step if trip else None,
        "guard_action": trip.action if trip else "", "iterations": step, "exported": why,
        "guards": loop.guards.report(), "kl_coef": loop.trainer.kl_coef,
        "reward_mean": loop.extra["mean"], "reward_deviation": loop.extra["deviation"],
        "kl_exact_final": loop.extra["kl_exact"], "kl_exact_max": loop.extra["kl_exact_max"],
    } | roles.sizes(loop.policy))  # fmt: skip


def finish(ctx: Context, policy: Model, results: dict[str, Any]) -> None:
    """Write the sampled answers, of which DPO has none, and the trained policy. Collective."""
    ctx.dist.barrier()
    summary = {
        "algorithm": ctx.config.rl.algorithm,
        "rollouts": ctx.dist.on_main(lambda: write_rollouts(ctx)),
    } | results
    roles.export(ctx, policy, "rl_cai", ctx.renderer("sl_cai").tokenizer, summary)
    shown = {name: value for name, value in summary.items() if name not in ("guards", *comparisons.KINDS)}  # tables
    ctx.log.info(f"rl: {in_words(shown)}")
    ctx.run.finish("rl", [*OUTPUTS, *(f"checkpoints/{path.name}" for path in ctx.run.snapshots())], summary)


def journals(ctx: Context) -> list[Path]:
    """Every rank's journal, also those of an earlier start with more ranks."""
    return sorted(ctx.run.path("journal").glob("rl.[0-9]*.jsonl"))


def drop_rows(ctx: Context, start: int) -> None:
    """Forget the answers of iterations that will be done again."""
    for path in journals(ctx):
        with Journal(path) as journal:  # opening it mends a torn line
            kept = [row for row in journal.rows() if row["record"]["iteration"] < start]
        records.write_jsonl(path, kept)


def write_rollouts(ctx: Context) -> int:
    """All ranks' journals in the order of iterations -> rollouts.jsonl and the sampled tokens with their log-probs;
    returns the number of rows."""
    tokens: dict[str, tuple[Any, Any]] = {}  # all that is held in memory, hence as arrays
    rows = heapq.merge(*map(_rows, journals(ctx)), key=lambda row: (row["record"]["iteration"], row["number"]))

    def taken() -> Iterator[dict[str, Any]]:
        for row in rows:
            pair = np.asarray(row["token_ids"], np.int32), np.asarray(row["logprobs"], np.float32)
            tokens[row["record"]["id"]] = pair
            yield row["record"]

    records.write_jsonl(ctx.run.path("rollouts.jsonl"), taken())
    records.write_tokens(ctx.run.path("tokens", "rollouts.safetensors"), tokens)
    return len(tokens)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one journal, one at a time; each journal is in the order of iterations, as it was written."""
    with path.open("rb") as lines:
        for line in lines:
            yield json.loads(line.decode("utf-8", "surrogatepass"))
