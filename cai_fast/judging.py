"""The feedback model as a judge of pairs (paper §4.1): questions, option probabilities, soft labels.

Stage label makes the training labels with it, stage evaluate the win rates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from cai_fast import kernels, pipeline, rng
from cai_fast.constitution import Principle
from cai_fast.errors import InputError
from cai_fast.pipeline import Context, KeyParts
from cai_fast.prefixes import Prefixes
from cai_fast.records import Comparison, Label, Turn, content_id
from cai_fast.tokenizer import Rendered

ORDERS = {"both": (0, 1), "single": (0,)}  # order 1: responses swapped


@dataclass
class Question:
    """One (comparison, principle, order); `logprob` [2] over the letters, `mass` their probability among all tokens."""

    comparison: Comparison
    turns: tuple[Turn, ...]
    principle: Principle
    number: int
    order: int
    few_shot: int
    drawn: dict[str, KeyParts]  # the key parts of principle, few-shot block and order, as far as they are drawn
    few_shot_ids: tuple[str, ...] = ()
    cot: list[str] = field(default_factory=list)
    cot_drawn: list[KeyParts] = field(default_factory=list)  # the key parts of each chain of thought
    probs: list[float] = field(default_factory=list)
    masses: list[float] = field(default_factory=list)

    @property
    def answers(self) -> tuple[str, str]:
        """Text at letters (A) and (B)."""
        pair = (self.comparison.response_a, self.comparison.response_b)
        return pair if self.order == 0 else (pair[1], pair[0])


class Judge:
    """The feedback model with its renderer and engine.

    `measuring`: for win rates, not for training: always both orders, neither clamped nor rounded.
    """

    def __init__(self, ctx: Context, role: str, *, measuring: bool = False) -> None:
        self.ctx, self.role, self.cfg, self.measuring = ctx, role, ctx.config.label, measuring
        self.renderer, self.model = ctx.renderer(role), ctx.model(role)
        self.room = ctx.config.engine.max_len or pipeline.longest(
            self.renderer,
            ctx.config.data.max_prompt_tokens,
            2 * max(ctx.config.compare.max_new_tokens, ctx.config.evaluate.max_new_tokens if measuring else 0),
            self.cfg.cot_max_new_tokens if self.cfg.cot else 0,
        )
        self.engine = ctx.engine(self.model, self.renderer, self.room)
        self.prefixes = Prefixes(self.engine, ctx.tick)
        self.options = self.renderer.options("cot" if self.cfg.cot else "comparison")
        self.spec = pipeline.sampling(self.renderer, "cot", self.cfg.cot_temperature, self.cfg.cot_max_new_tokens)

    def label(self, items: Sequence[tuple[Comparison, tuple[Turn, ...]]]) -> Iterator[dict[str, Any]]:
        """One label row per comparison."""
        questions = [q for comparison, turns in items for q in self._questions(comparison, turns)]
        self.ask(questions)
        yield from self._labels([c for c, _ in items], questions)

    def ask(self, questions: Sequence[Question]) -> None:
        """Add the probability of letter A, and the mass of both letters, to every question."""
        if self.cfg.cot:
            self._answer_with_cot(questions)
        else:
            rendered = [self.renderer.comparison(q.turns, *q.answers, q.principle, q.few_shot) for q in questions]
            self._read_options(questions, rendered)

    def _questions(self, comparison: Comparison, turns: tuple[Turn, ...]) -> list[Question]:
        """The questions of one comparison: `label.principles` draws with replacement, in the configured orders."""
        orders = ORDERS.get("both" if self.measuring else self.cfg.orders, ())
        names = ["principle", *(["few_shot"] * self.cfg.few_shot), *(["order"] * (not orders))]
        questions = []
        for number in range(self.cfg.principles):
            drawn = {name: self.ctx.key_parts(f"label/{name}", comparison.id, number) for name in names}
            keys = {name: rng.key(*parts) for name, parts in drawn.items()}
            principle = self.ctx.constitution.draw("comparison", keys["principle"])
            shot = self.renderer.draw_few_shot(keys["few_shot"]) if self.cfg.few_shot else -1
            for order in orders or (rng.choice(keys["order"], 2),):
                questions.append(Question(comparison, turns, principle, number, order, shot, drawn))
        return questions

    def _make_room(self, rendered: Sequence[Rendered], more: int) -> None:
        """A larger engine if a prompt with `more` tokens after it needs one.

        Prompts and principles have their room from the start. Responses are other models' texts: the judge's tokenizer
        may cut them into more tokens than were sampled, and a label can be neither left out nor made of a part.
        """
        needed = max((len(r.prefix) + len(r.ids) for r in rendered), default=0) + more
        if needed <= self.room:
            return
        if 0 < (limit := self.ctx.config.engine.max_len) < needed:
            raise InputError(f"{self.role}: a question of {needed} tokens; engine.max_len = {limit} must be raised.")
        self.room = pipeline.round_up(needed)
        work = self.engine.counters
        del self.engine, self.prefixes  # frees the old cache before the new one is made
        self.engine = self.ctx.engine(self.model, self.renderer, self.room)
        self.engine.counters.update(work)
        self.prefixes = Prefixes(self.engine, self.ctx.tick)

    def _read_options(self, questions: Sequence[Question], rendered: Sequence[Rendered]) -> None:
        """Score the two options after each prompt and add probability of letter A and option mass."""
        options = self.options.sequences or [self.options.suffix + ids for ids in self.options.option_ids]
        self._make_room(rendered, max(map(len, options)))
        scored = self.prefixes.score(rendered, self.options, [q.comparison.id for q in questions])
        for question, prompt, logprob, mass in zip(questions, rendered, *scored, strict=True):
            question.few_shot_ids = prompt.few_shot_ids
            question.probs.append(math.exp(logprob[0]))
            question.masses.append(mass)

    def _answer_with_cot(self, questions: Sequence[Question]) -> None:
        """Sample chains of thought, read the answer after each; several samples are averaged (paper §2)."""
        rendered = [self.renderer.cot(q.turns, *q.answers, q.principle, q.few_shot) for q in questions]
        self._make_room(rendered, self.spec.max_new_tokens)
        samples = range(self.cfg.cot_samples)
        for q in questions:
            where = f"{q.comparison.id}/{q.number}/{q.order}"
            q.cot_drawn = [self.ctx.key_parts("label/cot", where, sample) for sample in samples]
        # All at once: what a comparison's questions share, and each question's prompt, are prefilled once.
        asked = [(q, prompt) for q, prompt in zip(questions, rendered, strict=True) for _ in samples]
        keys = [rng.key(*parts) for q in questions for parts in q.cot_drawn]
        groups = [q.comparison.id for q, _ in asked]
        completions = self.prefixes.generate([prompt for _, prompt in asked], self.spec, keys, groups=groups)
        answered = []
        for (question, prompt), completion in zip(asked, completions, strict=True):
            thought = self.renderer.finish(completion.token_ids, "cot")
            question.cot.append(thought.text)
            ids = prompt.ids + thought.body_ids + self.renderer.cot_answer_suffix()
            answered.append(Rendered(prompt.prefix, ids, prompt.few_shot_ids))
        self._read_options([question for question, _ in asked], answered)

    def _labels(self, comparisons: Sequence[Comparison], questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Un-swap, average and clamp (kernels.preference_labels), and make the records."""
        row = {c.id: index for index, c in enumerate(comparisons)}
        logprob = torch.full((len(comparisons), self.cfg.principles, 2, 2), math.nan, dtype=torch.float64)
        for q in questions:
            p = min(max(fmean(q.probs), 1e-12), 1 - 1e-12)
            logprob[row[q.comparison.id], q.number, q.order] = torch.tensor([math.log(p), math.log1p(-p)])
        clamp = self._clamp()
        result = kernels.preference_labels(logprob, clamp=clamp)
        rows = []
        views = zip(comparisons, result.prob_a.tolist(), result.per_principle.tolist(), strict=True)
        for c, prob_a, per_order in views:
            asked = [q for q in questions if q.comparison.id == c.id]
            label = self._record(c, self._harden(prob_a), per_order, asked, clamp)
            rows.append({"id": c.id, "record": label.to_json(), "mass": fmean(m for q in asked for m in q.masses)})
        return rows

    def _record(
        self, c: Comparison, prob_a: float, per_order: list[list[float]], asked: list[Question], clamp: Any
    ) -> Label:
        per_principle = []
        for number, (ab, ba) in enumerate(per_order):
            mine = [q for q in asked if q.number == number]
            per_principle.append({
                "principle": mine[0].principle.id,
                "prob_a_ab": None if math.isnan(ab) else ab,
                "prob_a_ba": None if math.isnan(ba) else ba,
                "cot": [text for q in mine for text in q.cot],
            })  # fmt: skip
        source = pipeline.provenance(
            self.ctx, self.role, self.renderer, self.spec if self.cfg.cot else None, parents=[c.id],
            few_shot=[list(q.few_shot_ids) for q in asked], option_mass=fmean(m for q in asked for m in q.masses),
            rng=[self._keys([q for q in asked if q.number == number]) for number in range(self.cfg.principles)],
        )  # fmt: skip
        record = Label(content_id("label", c.id), c.id, prob_a, (), clamp, source).to_json()
        return Label.from_json(record | {"per_principle": per_principle})

    @staticmethod
    def _keys(asked: list[Question]) -> dict[str, Any]:
        """The key parts behind one drawn principle; those of the chains of thought in the order of their texts."""
        thoughts = [parts for q in asked for parts in q.cot_drawn]
        return asked[0].drawn | ({"cot": thoughts} if thoughts else {})

    def _clamp(self) -> tuple[float, float] | None:
        if self.measuring:
            return None
        if self.cfg.clamp == "auto":
            return (0.4, 0.6) if self.cfg.cot else None
        return None if self.cfg.clamp == "none" else tuple(self.cfg.clamp)

    def _harden(self, prob_a: float) -> float:
        """0 or 1 with label.hard; an exact tie stays 0.5 (never resolved by a coin)."""
        if not self.cfg.hard or self.measuring or prob_a == 0.5:
            return prob_a
        return float(prob_a > 0.5)
