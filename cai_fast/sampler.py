"""Answers of the policy that is being trained: which prompts, sampled by an engine, scored by the preference model."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cai_fast import heartbeat, losses, pipeline, rng, roles
from cai_fast.batching import Example
from cai_fast.distributed import Stopped
from cai_fast.engine import Completion
from cai_fast.errors import InputError
from cai_fast.model import Model
from cai_fast.pipeline import Context
from cai_fast.records import Prompt
from cai_fast.scorer import Scorer
from cai_fast.tokenizer import Finished, Renderer

STANDARDISE_SAMPLES = 256
KINDS = ("red_team", "helpful")


@dataclass(frozen=True)
class Item:
    """One answer to be sampled; `visit` counts how often this prompt was used before."""

    number: int  # in its iteration, over all ranks
    prompt: Prompt
    visit: int
    sample: int


@dataclass(frozen=True)
class Answers:
    """This rank's answers of one iteration. scores[S]: raw preference scores."""

    items: list[Item]
    total: int  # over all ranks
    completions: list[Completion]
    finished: list[Finished]
    scores: Tensor

    @property
    def groups(self) -> list[int]:
        """Each answer's group, the answers to one prompt, by the number of the first of them."""
        return [item.number - item.sample for item in self.items]

    def examples(self, renderer: Renderer) -> list[Example]:
        """What is trained on: the tokens as sampled."""
        return [
            Example(item.prompt.id, renderer.dialogue(item.prompt.turns), c.token_ids)
            for item, c in zip(self.items, self.completions, strict=True)
        ]


class PromptStream:
    """Prompts of both kinds in their share; each kind in a new order every epoch, a function of seed and position."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.fraction = ctx, ctx.config.rl.red_team_fraction
        self.orders: dict[tuple[str, int], list[int]] = {}  # the current epoch's order of each kind
        self.prompts = {kind: pipeline.load_prompts(ctx, kind=kind, split="train") for kind in KINDS}
        for kind, share in (("red_team", self.fraction), ("helpful", 1 - self.fraction)):
            if share > 0 and not self.prompts[kind]:
                raise InputError(f"rl: no {kind} prompt to train on, but rl.red_team_fraction = {self.fraction}")

    def take(self, start: int, count: int) -> list[tuple[Prompt, int]]:
        """Prompts number `start`... of the whole run, with how often each was used before."""
        chosen = []
        for position in range(start, start + count):
            red_team = [math.floor(p * self.fraction + 0.5) for p in (position, position + 1)]
            kind = "red_team" if red_team[1] > red_team[0] else "helpful"
            chosen.append(self._nth(kind, red_team[0] if kind == "red_team" else position - red_team[0]))
        return chosen

    def _nth(self, kind: str, n: int) -> tuple[Prompt, int]:
        prompts = self.prompts[kind]
        epoch, index = divmod(n, len(prompts))
        return prompts[self._order(kind, epoch)[index]], epoch

    def _order(self, kind: str, epoch: int) -> list[int]:
        if (kind, epoch) not in self.orders:
            order = rng.permutation(self.ctx.key("rl/order", kind, epoch), len(self.prompts[kind]))
            self.orders = {k: v for k, v in self.orders.items() if k[0] != kind} | {(kind, epoch): order}
        return self.orders[kind, epoch]


def pieces(total: int, world: int, batch: int, together: int) -> list[slice]:
    """`total` answers, `together` to a prompt, cut into the pieces that ranks pull."""
    # Where a piece ends, the rows of an engine run empty. So the first pieces are half of a rank's share of what is
    # left; later ones, which even out the ranks, are smaller, but no less than the engine's batch (half a batch takes
    # about as long) nor than an even share, if that is less. A prompt's samples stay together: it is prefilled once.
    smallest = min(batch, -(-total // world))
    together = together if together <= smallest else 1
    bounds = [0]
    while bounds[-1] < total:
        size = max(smallest, -(-(total - bounds[-1]) // (2 * world)))
        bounds.append(min(total, bounds[-1] + -(-size // together) * together))
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


class Sampler:
    """Answers of the current policy, scored by the preference model."""

    def __init__(self, ctx: Context, policy: Model, reference: Model, renderer: Renderer) -> None:
        self.ctx, self.cfg, self.renderer = ctx, ctx.config.rl, renderer
        self.stream = PromptStream(ctx)
        pm = roles.frozen(ctx, "pm", head="score", trunk=reference)
        self.scorer, self.pm_renderer = ctx.scorer(pm, self.cfg.micro_tokens), ctx.renderer("pm")
        self.same_tokens = self.pm_renderer.tokenizer.hash == renderer.tokenizer.hash
        if self.cfg.network == "pm" and not self.same_tokens:
            raise InputError("rl.critic = pm needs a preference model with the policy's tokenizer; use own or detached")
        self.eval_scorer: Scorer | None = None
        if ctx.config.guards.pm_eval_every:
            self.eval_scorer = ctx.scorer(
                roles.frozen(ctx, "pm_eval", head="score", trunk=reference), self.cfg.micro_tokens
            )
        spec = pipeline.sampling(renderer, "response", self.cfg.temperature, self.cfg.max_new_tokens)
        self.spec = dataclasses.replace(spec, top_k=self.cfg.top_k, top_p=self.cfg.top_p)
        room = ctx.config.data.max_prompt_tokens + self.cfg.max_new_tokens
        self.replica = roles.replica(ctx, policy)
        self.engine = ctx.engine(self.replica.model if self.replica else policy, renderer, -(-room // 64) * 64)

    def items(self, step: int) -> list[Item]:
        """The answers of iteration `step`."""
        count = self.cfg.prompts_per_step
        prompts, samples = self.stream.take(step * count, count), range(self.cfg.samples_per_prompt)
        return [Item(n, p, v, s) for n, ((p, v), s) in enumerate(itertools.product(prompts, samples))]

    def answer(self, items: list[Item], stage: str, step: int) -> Answers:
        """This rank's share of the answers, whoever sampled them. Collective."""
        dist, total = self.ctx.dist, len(items)
        if self.replica is not None:
            self.replica.refresh()
        self.engine.invalidate()  # the weights may have changed since the last call
        done = self.generate(items, stage, f"{stage}/{step}")
        share = slice(self._bound(items, dist.rank), self._bound(items, dist.rank + 1))
        mine, done = items[share], done[share]
        finished = [self.renderer.finish(c.token_ids, "response") for c in done]
        # An answer that was cut off must not look finished to the preference model.
        finished = [
            f if c.finish_reason == "stop" else f._replace(token_ids=f.body_ids)
            for f, c in zip(finished, done, strict=True)
        ]
        return Answers(mine, total, done, finished, self.score(self.scorer, mine, finished))

    def held_out(self, answers: Answers) -> Tensor:
        """[S] raw scores of this rank's answers by pm_eval, which no policy is trained against."""
        if self.eval_scorer is None:
            raise ValueError("pm_eval is not loaded: guards.pm_eval_every is 0")
        return self.score(self.eval_scorer, answers.items, answers.finished)

    def _bound(self, items: list[Item], rank: int) -> int:
        """Where the share of a rank begins: never between a prompt's samples, which are scored as one group."""
        prompts = sorted({item.number - item.sample for item in items})
        at = len(prompts) * rank // self.ctx.dist.world
        return prompts[at] - items[0].number if at < len(prompts) else len(items)

    def generate(self, items: list[Item], stage: str, name: str) -> list[Completion]:
        """A completion for every item, in their order, on every rank: ranks pull pieces of the list called `name`, and
        exchange them, so that a rank with short answers samples more and none waits long. After a stop signal to any
        rank Stopped is raised on all, once each has finished the answer in hand. Collective."""
        dist = self.ctx.dist
        if dist.world == 1:
            return self._sample(items, stage)
        parts = pieces(len(items), dist.world, self.ctx.config.engine.max_batch, self.cfg.samples_per_prompt)

        def work() -> list[tuple[int, list[Any]]]:
            mine = []
            try:
                while (number := dist.next_item(name)) < len(parts):
                    made = self._sample(items[parts[number]], stage)
                    mine.append((number, [(c.token_ids, c.logprobs, c.finish_reason) for c in made]))
            except Stopped:
                dist.add(name, len(parts))  # nothing is left for the others to begin
                raise
            return mine

        made = dict(piece for by_rank in dist.gather_objects(work) for piece in by_rank)
        return [Completion(*fields) for number in range(len(parts)) for fields in made[number]]

    def _sample(self, items: list[Item], stage: str) -> list[Completion]:
        heartbeat.at(f"{stage}: sampling", f"{items[0].prompt.id} and {len(items) - 1} more" if items else "")
        prompts = [self.renderer.dialogue(item.prompt.turns) for item in items]
        keys = [self.ctx.key(stage, f"{item.prompt.id}/{item.sample}", item.visit) for item in items]
        return self.engine.generate(prompts, self.spec, keys=keys, progress=self.ctx.tick)

    def score(self, scorer: Scorer, items: list[Item], finished: list[Finished]) -> Tensor:
        """[S] raw scores of a preference model, read at the end-of-context token."""
        sequences = [
            self.pm_renderer.preference(
                item.prompt.turns, f.token_ids if self.same_tokens else self.pm_renderer.response_ids(f.text)
            )
            for item, f in zip(items, finished, strict=True)
        ]
        return scorer.scores(sequences, [(item.prompt.id, item.visit) for item in items])

    def standardisation(self) -> tuple[float, float]:
        """(mean, deviation) of the scores of a first sample of SL-CAI's answers."""
        items = [Item(n, p, v, 0) for n, (p, v) in enumerate(self.stream.take(0, STANDARDISE_SAMPLES))]
        return losses.standardisation(self.answer(items, "rl/standardise", 0).scores, self.ctx.dist)
