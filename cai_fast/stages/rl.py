"""Stage rl: RL-CAI, SL-CAI trained against the preference model (paper §4.1), or by DPO on its comparisons (dpo.py).

One iteration: answers to red-team and helpful prompts, sampled by an engine that shares the policy's weights; reward =
preference score at the end of the answer, with a KL penalty against SL-CAI at every token; policy-gradient update.
Guards look at the answers before they are trained on. A training state is saved only after they have passed, so the
newest state is always a usable policy, and it is what a guard's stop leaves behind. Only a stop signal while answers
are sampled saves a policy that no guard has judged, in a folder of its own.
"""

import heapq
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cai_fast import chains, dpo, heartbeat, pipeline, records, roles
from cai_fast.checkpoint import Checkpoints
from cai_fast.distributed import Stopped
from cai_fast.model import Model, ScalarHead
from cai_fast.optim import schedule
from cai_fast.pipeline import Context
from cai_fast.policy_gradient import Critic, PolicyGradient, Rollouts
from cai_fast.records import Journal, Rollout, content_id
from cai_fast.runlog import Mean
from cai_fast.sampler import KINDS, Answers, Sampler

OUTPUTS = ("rollouts.jsonl", "tokens/rollouts.safetensors", "checkpoints/rl_cai")
MAX_LOGPROB_GAP = 1e-3  # nats; fp32 engine and trainer agree far better than this


class Loop:
    """The iterations, their records, guards and states."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.cfg, self.renderer = ctx, ctx.config.rl, ctx.renderer("sl_cai")
        self.reference = roles.reference(ctx)
        self.policy = roles.trained(ctx, "sl_cai", head="lm", name="rl", trunk=self.reference)
        self.sampler = Sampler(ctx, self.policy, self.reference, self.renderer)
        settings = ctx.config.checkpoint
        self.states, self.unjudged = (
            Checkpoints(ctx.run.state_dir(name), ctx.dist, keep=settings.keep, background=settings.background)
            for name in ("rl", "rl_unjudged")
        )
        judged, unjudged = self.states.latest(), self.unjudged.latest()
        self.judged = judged.step if judged else 0
        states, state = (self.unjudged, unjudged) if unjudged and unjudged.step > self.judged else (self.states, judged)
        if state is None:
            mean, deviation = 0.0, 1.0
            if self.cfg.reward_transform == "standardise":
                mean, deviation = self.sampler.standardisation()
            self.extra = {"mean": mean, "deviation": deviation, "kl_exact": 0.0, "kl_exact_max": 0.0}
        else:
            self.extra = dict(state.extra)
        self.start = state.step if state else 0
        self.exported_step = 0
        self.ppo = PolicyGradient(
            self.policy, self.reference, self.critic(), self.cfg, seed=ctx.config.seed, dist=ctx.dist,
            moments=ctx.config.model.moments,
        )  # fmt: skip
        if state is not None:
            self.extra = self.ppo.restore(states, state)
            ctx.log.info(f"rl: continues after iteration {self.start} of {self.cfg.steps}")
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

    def run(self) -> str:
        """All iterations; returns why a guard stopped them, or nothing. Collective."""
        cfg, ctx = self.cfg, self.ctx
        ctx.dist.on_main(lambda: drop_rows(ctx, self.start))
        ctx.work(1.0)  # forget the answers for the standardisation: they are no iteration's
        path = ctx.run.path("journal", f"rl.{ctx.dist.rank}.jsonl")
        with Journal(path) as journal, ctx.progress(cfg.steps, "rl", "step", initial=self.start) as bar:
            for step in range(self.start, cfg.steps + 1):
                began = time.monotonic()
                try:
                    answers = self.sampler.answer(self.sampler.items(step), "rl", step)
                except Stopped:
                    if step > self.start:
                        self.keep(step, journal, self.unjudged)
                        self.unjudged.wait()
                    raise
                heartbeat.at("rl: measuring", f"iteration {step}")
                first = answers.items[0].number if answers.items else 0
                rollouts = self.ppo.measure(answers.examples(self.renderer), step, first, answers.total)
                rewards = self.rewards(answers)
                values = self.statistics(answers, rollouts, rewards)
                self.record(journal, step, answers, rollouts, rewards)
                self.extra["kl_exact"] = values["rl/kl_exact"]
                self.extra["kl_exact_max"] = max(self.extra["kl_exact_max"], values["rl/kl_exact"])
                reason = self.guard(values)
                if not reason:
                    self.save(step, journal)
                    if step < cfg.steps:
                        values["perf/rollout_s"] = time.monotonic() - began
                        values |= self.update(step, answers, rollouts, rewards)
                        reason = "" if math.isfinite(values["rl/grad_norm"]) else "the gradient is not finite"
                seconds = time.monotonic() - began
                values |= ctx.work(seconds)
                values |= {"rl/guard": float(bool(reason)), "perf/tokens_per_s": sum(rollouts.tokens) / seconds}
                ctx.log.metrics("rl", step, values)
                if reason:
                    return f"iteration {step}: {reason}"
                if step < cfg.steps:
                    bar.update(1, reward=values["rl/reward"], kl=values["rl/kl_exact"])
        self.exported_step = cfg.steps
        return ""

    def rewards(self, answers: Answers) -> Tensor:
        """[S] transformed scores, with the penalty for answers that never stop."""
        cut_off = torch.tensor([float(c.finish_reason == "length") for c in answers.completions])
        return (answers.scores - self.extra["mean"]) / self.extra["deviation"] - self.cfg.missing_eos_penalty * cut_off

    def statistics(self, answers: Answers, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Global means over answers or tokens, before the update. Collective."""
        means = Mean()
        refused = [float(self.renderer.is_refusal(f.text)) for f in answers.finished]
        per_answer = {
            "reward": rewards, "score": answers.scores, "kl": rollouts.k1, "kl_exact": rollouts.kl,
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
        result = means.reduce(self.ctx.dist)
        if result["rl/logprob_gap"] > MAX_LOGPROB_GAP and self.ctx.dtype == torch.float32:
            self.ctx.log.warn(f"rl: engine and trainer disagree by {result['rl/logprob_gap']:.2g} nats per token")
        return result | {"rl/kl_coef": self.ppo.kl_coef}

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

    def guard(self, values: dict[str, float]) -> str:
        """Why training must stop, judged by the policy's newest answers; nothing if all is well."""
        cfg = self.cfg
        kl, entropy = values["rl/kl_exact"], values["rl/entropy"]
        if not math.isfinite(values["rl/reward"] + kl + entropy):
            return "reward, KL or entropy is not finite"
        if cfg.max_kl > 0 and kl > cfg.max_kl:
            return f"KL to SL-CAI {kl:.3g} nats per answer is above rl.max_kl = {cfg.max_kl}"
        for kind in KINDS:
            rate = values[f"rl/refusal_rate_{kind}"]
            if cfg.max_refusal_rate < 1 and rate > cfg.max_refusal_rate:
                return f"{rate:.0%} of {kind} answers refuse, more than rl.max_refusal_rate = {cfg.max_refusal_rate}"
        if entropy < cfg.min_entropy:
            return f"entropy {entropy:.3g} nats per token is below rl.min_entropy = {cfg.min_entropy}"
        return ""

    def save(self, step: int, journal: Journal) -> None:
        """Save where it is due or a stop was asked for; the policy of `step` has passed the guards. Collective."""
        due = step == self.cfg.steps or (self.cfg.save_every and step % self.cfg.save_every == 0)
        stop = self.ctx.dist.stop_agreed()
        if (due or stop) and step > self.judged:
            self.keep(step, journal, self.states)
            self.drop_unjudged()
        if stop:
            self.states.wait()
            raise Stopped

    def keep(self, step: int, journal: Journal, states: Checkpoints) -> None:
        """Write the state after `step` iterations, and the answers before it. Collective."""
        heartbeat.at("rl: saving", f"iteration {step}")
        journal.sync()
        self.ppo.save(states, step, self.extra)

    def drop_unjudged(self) -> None:
        """Give back the disk of a state that newer ones which have been judged make useless. Collective."""
        folder = self.unjudged.folder
        if self.ctx.dist.on_main(folder.is_dir):
            self.states.wait()  # until the judged one is complete
            self.ctx.dist.on_main(lambda: shutil.rmtree(folder))

    def update(self, step: int, answers: Answers, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Train on the answers of this iteration. Collective."""
        began = time.monotonic()
        heartbeat.at("rl: updating", f"iteration {step}")
        stats = self.ppo.set_advantages(rollouts, rewards, answers.groups)
        factor = schedule(self.cfg.schedule, step, self.cfg.steps, self.cfg.warmup_steps)
        stats |= self.ppo.update(rollouts, factor) | {"lr": self.cfg.lr * factor}
        self.ppo.adapt_kl(float(self.ctx.dist.all_reduce(rollouts.k1.sum())) / answers.total)  # for the next iteration
        stats.pop("entropy", None)  # reported of the policy that sampled
        return {f"rl/{name}": value for name, value in stats.items()} | {"perf/update_s": time.monotonic() - began}

    def fall_back(self) -> None:
        """After a guard's stop: the newest policy that passed the guards and was saved, else SL-CAI."""
        state, worst = self.states.latest(), self.extra["kl_exact_max"]
        if state is None:
            roles.reset(self.ctx, self.policy, "rl", self.reference)
            self.extra["kl_exact"] = 0.0
        else:
            self.extra = self.ppo.restore(self.states, state)
        self.extra["kl_exact_max"] = worst
        self.exported_step = state.step if state else 0


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on."""
    if ctx.config.rl.algorithm == "dpo":
        return dpo.inputs(ctx)
    return ctx.inputs("rl", files=["prompts.jsonl", *roles.outputs(ctx, "pm")], roles=["sl_cai", "pm"])


def run(ctx: Context) -> None:
    """Write rollouts.jsonl and checkpoints/rl_cai."""
    if ctx.config.rl.algorithm == "dpo":
        policy, results = dpo.train(ctx)
        return finish(ctx, policy, results)
    loop = Loop(ctx)
    with loop.states, loop.unjudged:
        reason = loop.run()
        if reason:
            loop.fall_back()
    if reason:
        ctx.log.warn(f"rl: stopped by a guard at {reason}; exporting the policy after {loop.exported_step} iterations")
    return finish(ctx, loop.policy, {
        "guard": reason, "iterations": loop.exported_step, "kl_coef": loop.ppo.kl_coef,
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
    ctx.log.info(f"rl: {summary}")
    ctx.run.finish("rl", list(OUTPUTS), summary)


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
