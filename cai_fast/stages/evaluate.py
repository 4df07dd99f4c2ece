"""Stage evaluate: every policy and every revision on prompts that no stage has seen.

For any model: PM score (by pm_eval, which RL never saw), refusals, length, exact KL to SL-CAI, the judge's win rates in
both orders, Elo, and HHH-style multiple choice. In the toy world also the checker's truth. Intervals are 95 % by
bootstrap over prompts. Harm is never reported without helpfulness, nor a score without the others.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, islice
from statistics import fmean
from typing import Any

import numpy as np

from cai_fast import chains, elo, hhh, measure, pipeline, readers, records
from cai_fast.files import write_atomic
from cai_fast.measure import Answer, Verdict
from cai_fast.pipeline import TOY, Context
from cai_fast.readers import Question
from cai_fast.records import Comparison, Label, PolicyAnswer, Prompt
from cai_fast.scorer import Scorer

OUTPUTS = ("evaluation.json", "answers.jsonl", "tokens/answers.safetensors")
POLICIES = ("base", "sl_cai", "rl_cai")
GROUPS = {"red_team": "red_team", "benign": "helpful"}  # name in evaluation.json -> kind of prompt
Truth = Callable[[Prompt, str], dict[str, float]]


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on."""
    roles = [*POLICIES, "pm", "pm_eval", "assistant", "judge"]
    return ctx.inputs("evaluate", files=["prompts.jsonl", "comparisons.jsonl", "labels.jsonl"], roles=roles) | {
        "hhh": pipeline.data_file_hash(ctx.config.evaluate.hhh)
    }


def run(ctx: Context) -> None:
    """Write evaluation.json, answers.jsonl and its token side file."""
    questions = readers.read_hhh(ctx.config.evaluate.hhh) if ctx.config.evaluate.hhh else []
    evaluation = Evaluation(ctx, questions)
    result = {
        "policies": evaluation.policies(),
        "revisions": evaluation.revisions(),
        "judge": evaluation.judge(),
        "pm": evaluation.preference_models(),
        "elo": evaluation.elo(),
    }
    if questions:
        result["hhh"] = evaluation.hhh
    if ctx.dist.is_main:
        write_atomic(ctx.run.path("evaluation.json"), json.dumps(result, indent=1, allow_nan=False).encode())
        rows, tokens = evaluation.rows()
        records.write_jsonl(ctx.run.path("answers.jsonl"), rows)
        records.write_tokens(ctx.run.path("tokens", "answers.safetensors"), tokens)
    ctx.run.finish("evaluate", list(OUTPUTS), headline(result))


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """Means by policy, prompts and metric, for the manifest and the final table."""
    return {
        policy: {group: {name: v["mean"] for name, v in metrics.items()} for group, metrics in groups.items()}
        for policy, groups in result["policies"].items()
    }


def toy_truth(config: Any) -> Truth | None:
    """The checker's metrics of an answer, where the prompts are the toy world's; else None."""
    if config.data.red_team != TOY or config.data.helpful != TOY:
        return None
    from cai_fast.toy import checker

    return lambda prompt, text: checker.check(prompt.turns[-1].text, text)


class Evaluation:
    """What the models say, gathered with no more of them in memory than one measurement needs, and every table made of
    it. Making one is collective."""

    def __init__(self, ctx: Context, questions: Sequence[Question]) -> None:
        self.ctx, cfg = ctx, ctx.config.evaluate
        self.truth = toy_truth(ctx.config)
        self.renderer = ctx.renderer("pm_eval")
        counts = {"red_team": cfg.num_red_team, "benign": cfg.num_helpful}
        self.prompts = {
            group: pipeline.take(
                ctx, pipeline.load_prompts(ctx, kind=kind, split="eval"), f"evaluate/{group}", counts[group]
            )
            for group, kind in GROUPS.items()
        }
        self.answers: dict[str, dict[str, list[Answer]]] = {}
        for policy in POLICIES:
            both = measure.answers(ctx, policy, [p for group in self.prompts.values() for p in group])
            self.answers[policy] = {group: [a for a in both if a.prompt.kind == kind] for group, kind in GROUPS.items()}
        self.kl = self._divergences()
        self.steps = self._chains()
        self.verdicts = self._judged()
        self.hhh = {"mc": hhh.multiple_choice(ctx, questions)} if questions else {}
        pm_eval = ctx.scorer(ctx.model("pm_eval"))
        self.pm_scores = {"pm_eval": self._scores("pm_eval", pm_eval, tuple(GROUPS))}
        self.step_scores = self._step_scores(pm_eval)
        if paired := [q for q in questions if q.turns is not None]:
            self.hhh["pm"] = hhh.preference(ctx, paired, pm_eval, self.renderer)
        del pm_eval
        if self.truth is not None:
            self.pm_scores["pm"] = self._scores("pm", ctx.scorer(ctx.model("pm")), ["red_team"])

    def _divergences(self) -> dict[str, dict[str, list[float]]]:
        """Exact KL to SL-CAI of every answer, by policy and group of prompts."""
        reference, renderer, result = self.ctx.model("sl_cai"), self.ctx.renderer("sl_cai"), {}
        for policy, by_group in self.answers.items():
            rows = [a for answers in by_group.values() for a in answers]
            model = reference if policy == "sl_cai" else self.ctx.model(policy)
            kl = iter(measure.exact_kl(self.ctx, f"evaluate: KL of {policy}", model, reference, renderer, rows))
            result[policy] = {group: list(islice(kl, len(answers))) for group, answers in by_group.items()}
            del model  # before the next one is loaded
        return result

    def _scores(self, name: str, scorer: Scorer, groups: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """Scores of the preference model `name` by policy and group of prompts, of all policies' answers together."""
        rows = [a for by_group in self.answers.values() for group in groups for a in by_group[group]]
        scores = iter(measure.score_answers(self.ctx, f"evaluate: scores of {name}", scorer, "sl_cai", rows))
        return {
            policy: {group: list(islice(scores, len(by_group[group]))) for group in groups}
            for policy, by_group in self.answers.items()
        }

    def _chains(self) -> list[list[Answer]]:
        """By step, the responses and revisions of the assistant's chains on held-out red-team prompts."""
        prompts = {p.id: p for p in self.prompts["red_team"]}
        made: list[chains.Reviser] = []

        def process(ids: list[str]) -> Iterator[dict[str, Any]]:
            if not made:
                made.append(chains.Reviser(self.ctx))
            return made[0].chains([prompts[i] for i in ids])

        chunk = self.ctx.config.revise.chunk
        rows = pipeline.journaled(self.ctx, "evaluate.revise", list(prompts), chunk, process)
        # A chain that was rejected at a later step still counts up to there.
        return [
            [
                Answer(prompts[i], [row["record"]["response"], *(r["revision"] for r in row["record"]["rounds"])][k],
                       ids, True)
                for i, row in rows.items()
                if (ids := row["tokens"].get(f"{row['record']['id']}/{k}")) is not None
            ]
            for k in range(self.ctx.config.revise.rounds + 1)
        ]  # fmt: skip

    def _step_scores(self, scorer: Scorer) -> list[list[float]]:
        """Preference scores of the chains' texts, by step."""
        everything = [a for answers in self.steps for a in answers]
        name = "evaluate: scores of revisions"
        scores = iter(measure.score_answers(self.ctx, name, scorer, "assistant", everything))
        return [list(islice(scores, len(answers))) for answers in self.steps]

    def _judged(self) -> list[Verdict]:
        """The judge on pairs of policies' answers to the same red-team prompts."""
        by_policy = {policy: {a.prompt.id: a for a in groups["red_team"]} for policy, groups in self.answers.items()}
        prompts = self.prompts["red_team"][: self.ctx.config.evaluate.judge_pairs]
        return measure.verdicts(self.ctx, by_policy, list(combinations(POLICIES, 2)), prompts)

    def table(self, columns: dict[str, Sequence[float]], prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Every column's mean with its interval; a column without values (all chains rejected) is left out."""
        cfg = self.ctx.config
        clusters = [p.id for p in prompts]
        return {
            name: measure.interval(values, clusters, cfg.evaluate.bootstrap, cfg.seed)
            for name, values in columns.items() if values
        }  # fmt: skip

    def text_metrics(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, list[float]]:
        """Refusal, repetition, and in the toy world the truth, of each text."""
        columns: dict[str, list[float]] = {
            "refusal_rate": [float(self.renderer.is_refusal(text)) for text in texts],
            "repetition": [chains.repetition(text) for text in texts],
        }
        if self.truth is not None:
            rows = [self.truth(p, text) for p, text in zip(prompts, texts, strict=True)]
            columns |= {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
        return columns

    def policies(self) -> dict[str, Any]:
        """policies.{policy}.{group}.{metric}; pm_score is relative to the base policy's mean on the same prompts."""
        return {
            policy: {group: self.table(self.columns(policy, group), [a.prompt for a in rows])
                     for group, rows in groups.items()}
            for policy, groups in self.answers.items()
        }  # fmt: skip

    def columns(self, policy: str, group: str) -> dict[str, list[float]]:
        """Every metric of every answer of a policy to a group of prompts."""
        rows, scores = self.answers[policy][group], self.pm_scores["pm_eval"]
        columns = self.text_metrics([a.prompt for a in rows], [a.text for a in rows])
        zero = fmean(scores["base"][group]) if rows else 0.0
        columns["pm_score"] = [score - zero for score in scores[policy][group]]
        columns["length"] = [float(len(a.token_ids)) for a in rows]
        columns["unfinished"] = [float(not a.stopped) for a in rows]
        columns["kl"] = self.kl[policy][group]
        return columns

    def rows(self) -> tuple[list[PolicyAnswer], dict[str, tuple[list[int], None]]]:
        """The rows of answers.jsonl, each with its own metrics, and the answers' tokens."""
        rows, tokens = [], {}
        for policy, groups in self.answers.items():
            for group, answers in groups.items():
                columns = self.columns(policy, group)
                for n, a in enumerate(answers):
                    identity = records.content_id("answer", policy, a.prompt.id)
                    metrics = {name: values[n] for name, values in columns.items()}
                    rows.append(PolicyAnswer(identity, a.prompt.id, policy, a.text, metrics, a.provenance))
                    tokens[identity] = (a.token_ids, None)
        return rows, tokens

    def revisions(self) -> dict[str, Any]:
        """revisions.{k}.{metric} of the assistant's chains on held-out red-team prompts; 0 is the first response."""
        result, zero = {}, 0.0
        for k, (answers, mine) in enumerate(zip(self.steps, self.step_scores, strict=True)):
            columns = self.text_metrics([a.prompt for a in answers], [a.text for a in answers])
            zero = fmean(mine) if k == 0 and mine else zero
            columns["pm_score"] = [score - zero for score in mine]
            result[str(k)] = self.table(columns, [a.prompt for a in answers])
        return result

    def judge(self) -> dict[str, Any]:
        """Win rates (second policy of the pair over the first), position bias, and in the toy world accuracy."""
        cfg = self.ctx.config
        asked = 3 * len(self.prompts["red_team"][: cfg.evaluate.judge_pairs])  # three pairs of policies
        result: dict[str, Any] = {"win_rates": {}, "pairs": asked, "empty_or_identical": asked - len(self.verdicts)}
        for first, second in combinations(POLICIES, 2):
            mine = [v for v in self.verdicts if (v.first, v.second) == (first, second)]
            result["win_rates"][f"{second}>{first}"] = measure.interval(
                [1.0 - v.prob for v in mine], [v.prompt.id for v in mine], cfg.evaluate.bootstrap, cfg.seed
            )
        both = [v for v in self.verdicts if v.prob_ab is not None and v.prob_ba is not None]
        if both:
            result["order_agreement"] = fmean(float((v.prob_ab > 0.5) == (v.prob_ba > 0.5)) for v in both)
            result["position_bias"] = fmean(v.prob_ab - v.prob_ba for v in both)
        if self.truth is not None:
            held_out = [(v.prompt, *v.texts, v.prob) for v in self.verdicts]
            result["held_out_pairs"] = self._harm_accuracy(held_out)
            result["own_pairs"] = self._harm_accuracy(self._labelled_pairs())
        return result

    def _labelled_pairs(self) -> list[tuple[Prompt, str, str, float]]:
        """The pairs that stage label judged, with their labels."""
        ctx = self.ctx
        labels = {row.comparison_id: row.prob_a for row in records.read_jsonl(ctx.run.path("labels.jsonl"), Label)}
        prompts = {p.id: p for p in pipeline.load_prompts(ctx)}
        comparisons: list[Comparison] = pipeline.load_comparisons(ctx)
        judged = [c for c in comparisons if c.source == "ai" and c.id in labels]
        return [(prompts[c.prompt_id], c.response_a, c.response_b, labels[c.id]) for c in judged]

    def _harm_accuracy(self, pairs: Sequence[tuple[Prompt, str, str, float]]) -> dict[str, Any]:
        """How often P(first is better) is on the side of less harm, over pairs whose harm differs; calibration."""
        probs, wins, clusters = [], [], []
        for prompt, a, b, prob in pairs:
            harms = [self.truth(prompt, text)["harm"] for text in (a, b)]
            if harms[0] != harms[1]:
                probs.append(prob)
                wins.append(float(harms[0] < harms[1]))
                clusters.append(prompt.id)
        right = [float((p > 0.5) == (w > 0.5)) for p, w in zip(probs, wins, strict=True)]
        cfg = self.ctx.config
        return {
            "accuracy": measure.interval(right, clusters, cfg.evaluate.bootstrap, cfg.seed),
            "calibration": elo.calibration(probs, wins),
            "pairs": len(pairs),
        }

    def preference_models(self) -> dict[str, Any]:
        """What stage pm measured on its own held-out comparisons and, in the toy world, accuracy on harm."""
        result: dict[str, Any] = dict((self.ctx.run.record("pm") or {}).get("summary", {}))
        if self.truth is None:
            return result
        for name in ("pm", "pm_eval"):
            scores, pairs = self.pm_scores[name], []
            for first, second in combinations(POLICIES, 2):
                rows = zip(
                    self.answers[first]["red_team"], scores[first]["red_team"],
                    self.answers[second]["red_team"], scores[second]["red_team"], strict=True,
                )  # fmt: skip
                pairs += [(a.prompt, a.text, b.text, _sigmoid(s - t)) for a, s, b, t in rows]
            result[f"{name}_harm_pairs"] = self._harm_accuracy(pairs)
        return result

    def elo(self) -> dict[str, Any]:
        """Elo of the policies: harmlessness by the judge, and by pm_eval on both kinds of prompts; sl_cai is 0."""
        index = {policy: i for i, policy in enumerate(POLICIES)}
        scores = self.pm_scores["pm_eval"]
        games = {"judge": [(v.prompt.id, index[v.first], index[v.second], v.prob) for v in self.verdicts]}
        for group in GROUPS:
            games[f"pm_eval_{group}"] = [
                (a.prompt.id, index[first], index[second], _sigmoid(s - t))
                for first, second in combinations(POLICIES, 2)
                for a, s, t in zip(self.answers[first][group], scores[first][group], scores[second][group], strict=True)
            ]
        seed, samples = self.ctx.config.seed, self.ctx.config.evaluate.bootstrap
        zero = index["sl_cai"]
        fits = {name: elo.ratings(rows, len(index), zero, samples, seed) for name, rows in games.items() if rows}
        return {name: dict(zip(POLICIES, fit, strict=True)) for name, fit in fits.items()}


def _sigmoid(x: float) -> float:
    return float(1.0 / (1.0 + np.exp(-x)))
