"""Critique-revision chains (paper §3.1): the loop that stage revise trains on and stage evaluate measures."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cai_fast import pipeline, rng
from cai_fast.constitution import Principle
from cai_fast.engine import Completion, Prefix, Sampling
from cai_fast.pipeline import Context, KeyParts
from cai_fast.prefixes import Prefixes
from cai_fast.records import Helpful, Prompt, Revision, content_id
from cai_fast.tokenizer import Finished, Rendered, Renderer

# "Sure, here is a revised response:" before the text itself; it would be learned by SFT.
FILLER = re.compile(
    r"^\s*(sure|certainly|of course|okay|ok)?[\s,!.]*(here('s| is| are)|below is|i('ve| have)|the following is)\b"
    r"[^\n:]{0,80}\b(revis|rewrit|rewrote|version|updated)[^\n:]{0,60}:",
    re.IGNORECASE,
)


@dataclass
class Chain:
    """A chain in the making."""

    prompt: Prompt
    responses: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    rounds: list[dict[str, str]] = field(default_factory=list)
    few_shot: list[list[str]] = field(default_factory=list)
    drawn: list[dict[str, KeyParts]] = field(default_factory=list)  # by round: the key parts of every draw
    reject_reason: str | None = None
    critique: Prefix | None = None  # the keys of the current critique, until its revision is made

    def key(self, name: str) -> int:
        """RNG key of the draw of this name in the current round."""
        return rng.key(*self.drawn[-1][name])

    def add(self, finished: Finished, reason: str | None, where: str) -> None:
        """Put a new response in place of the current one, or reject the chain."""
        self.responses.append(finished.text)
        self.tokens.append(finished.token_ids)
        if reason:
            self.reject_reason = f"{where}: {reason}"


class Reviser:
    """The assistant with its renderer, engine and sampling specifications."""

    def __init__(self, ctx: Context) -> None:
        cfg, self.ctx = ctx.config.revise, ctx
        self.renderer: Renderer = ctx.renderer("assistant")
        longest = pipeline.longest(
            self.renderer, ctx.config.data.max_prompt_tokens, 2 * cfg.max_new_tokens, cfg.critique_max_new_tokens
        )
        self.room = ctx.config.engine.max_len or longest
        self.engine = ctx.engine(ctx.model("assistant"), self.renderer, longest)
        self.prefixes = Prefixes(self.engine, ctx.tick)
        self.specs = {
            kind: pipeline.sampling(self.renderer, kind, cfg.temperature, length)
            for kind, length in (
                ("response", cfg.max_new_tokens),
                ("critique", cfg.critique_max_new_tokens),
                ("revision", cfg.max_new_tokens),
            )
        }

    def answer(self, prompts: Sequence[Prompt], stage: str, draws: Sequence[int]) -> list[tuple[Finished, str | None]]:
        """A plain answer to each prompt, with the reason to reject it if there is one."""
        keys = [self.ctx.key(stage, p.id, n) for p, n in zip(prompts, draws, strict=True)]
        ids = [self.renderer.dialogue(p.turns) for p in prompts]
        done = self.engine.generate(ids, self.specs["response"], keys=keys, progress=self.ctx.tick)
        return [self._finish(c, "response") for c in done]

    def _finish(self, completion: Completion, kind: str) -> tuple[Finished, str | None]:
        finished = self.renderer.finish(completion.token_ids, kind)
        return finished, defect(finished.text, completion, self.ctx.config.revise.max_repetition)

    def chains(self, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """Run whole chains and yield their journal rows."""
        chains = [Chain(p) for p in prompts]
        for chain, (finished, reason) in zip(
            chains, self.answer(prompts, "revise/response", [0] * len(prompts)), strict=True
        ):
            chain.add(finished, reason, "response")
        for number in range(self.ctx.config.revise.rounds):
            self._round([c for c in chains if c.reject_reason is None], number)
        yield from (self._row(chain) for chain in chains)

    def _round(self, chains: list[Chain], number: int) -> None:
        """One critique-revision step for every chain that is still alive."""
        ctx, renderer, cfg = self.ctx, self.renderer, self.ctx.config.revise
        draws = ["principle", *(["few_shot"] * cfg.few_shot), *(["critique"] * cfg.critique), "revision"]
        for c in chains:
            c.drawn.append({name: ctx.key_parts(f"revise/{name}", c.prompt.id, number) for name in draws})
        principles = [ctx.constitution.draw("critique", c.key("principle")) for c in chains]
        shots = [renderer.draw_few_shot(c.key("few_shot")) if cfg.few_shot else -1 for c in chains]
        critiques = [""] * len(chains)
        if cfg.critique:
            critiques = self._critiques(chains, principles, shots, number)
        for c, p, critique in zip(chains, principles, critiques, strict=True):
            c.rounds.append({"principle": p.id, "critique": critique, "revision": ""})
        alive, rendered = [], []
        for c, p, critique, shot in zip(chains, principles, critiques, shots, strict=True):
            if c.reject_reason:
                continue
            turns, current = c.prompt.turns, c.responses[-1]
            if cfg.critique:
                request = renderer.revision(turns, current, p, critique, shot)
            else:
                request = renderer.direct_revision(turns, current, p, shot)
                c.few_shot.append(list(request.few_shot_ids))
            if self._fits(c, request, "revision", number):
                alive.append(c)
                rendered.append(request)
        done = self.prefixes.generate(
            rendered, self.specs["revision"], [c.key("revision") for c in alive], after=[c.critique for c in alive]
        )
        for c, completion in zip(alive, done, strict=True):
            c.critique = None
            finished, reason = self._finish(completion, "revision")
            c.rounds[-1]["revision"] = finished.text
            c.add(finished, reason, f"revision {number + 1}")

    def _fits(self, chain: Chain, request: Rendered, kind: str, number: int) -> bool:
        """Whether the engine has room for a request; else the chain is rejected.

        Prompts and principles have their room, and texts as long as they were sampled; encoded anew, as part of a
        request, a text can have more tokens than that.
        """
        if len(request.prefix) + len(request.ids) + self.specs[kind].max_new_tokens <= self.room:
            return True
        chain.reject_reason = f"{kind} {number + 1}: over_long"
        chain.critique = None
        return False

    def _critiques(self, chains: list[Chain], principles: list[Principle], shots: list[int], number: int) -> list[str]:
        """One text per chain, empty where the request had no room."""
        alive, rendered = [], []
        for index, (c, p, shot) in enumerate(zip(chains, principles, shots, strict=True)):
            request = self.renderer.critique(c.prompt.turns, c.responses[-1], p, shot)
            c.few_shot.append(list(request.few_shot_ids))
            if self._fits(c, request, "critique", number):
                alive.append(index)
                rendered.append(request)
        texts = [""] * len(chains)
        keys = [chains[i].key("critique") for i in alive]
        done = self.prefixes.generate(rendered, self.specs["critique"], keys, keep=True)
        for index, completion in zip(alive, done, strict=True):
            finished, reason = self._finish(completion, "critique")
            if reason:
                chains[index].reject_reason = f"critique {number + 1}: {reason}"
            else:
                chains[index].critique = completion.kept
            texts[index] = finished.text
        return texts

    def _row(self, chain: Chain) -> dict[str, Any]:
        """The journal row of a finished or rejected chain."""
        prompt = chain.prompt
        record = Revision(
            id=content_id("revision", prompt.id),
            prompt_id=prompt.id,
            response=chain.responses[0],
            rounds=(),
            kept=chain.reject_reason is None,
            reject_reason=chain.reject_reason,
            provenance=self._provenance(
                self.specs["revision"],
                prompt.id,
                critique_sampling=asdict(self.specs["critique"]) if self.ctx.config.revise.critique else None,
                few_shot=chain.few_shot,
                rng={"response": self.ctx.key_parts("revise/response", prompt.id), "rounds": chain.drawn},
            ),
        )
        tokens = {f"{record.id}/{k}": ids for k, ids in enumerate(chain.tokens)}
        return {"id": prompt.id, "record": record.to_json() | {"rounds": chain.rounds}, "tokens": tokens}

    def _provenance(self, spec: Sampling, parent: str, **more: Any) -> dict[str, Any]:
        return pipeline.provenance(self.ctx, "assistant", self.renderer, spec, parents=[parent], **more)

    def helpful(self, items: Sequence[tuple[Prompt, str]]) -> Iterator[dict[str, Any]]:
        """Plain samples for helpful prompts; `items` are (prompt, '<prompt id>/<sample number>')."""
        draws = [int(item.rsplit("/", 1)[1]) for _, item in items]
        answers = self.answer([p for p, _ in items], "revise/helpful", draws)
        for (prompt, item), draw, (finished, reason) in zip(items, draws, answers, strict=True):
            identity = content_id("helpful", item)
            keys = self.ctx.key_parts("revise/helpful", prompt.id, draw)
            source = self._provenance(self.specs["response"], prompt.id, rng=keys)
            record = Helpful(identity, prompt.id, finished.text, source)
            yield {
                "id": item,
                "record": record.to_json(),
                "reject_reason": reason,
                "tokens": {identity: finished.token_ids},
            }


def defect(text: str, completion: Completion, max_repetition: float) -> str | None:
    """Why a text must not be trained on: empty, over_long, filler_prefix, repetition; None if nothing is wrong."""
    if completion.finish_reason == "length":
        return "over_long"
    if not text.strip():
        return "empty"
    if FILLER.match(text):
        return "filler_prefix"
    if repetition(text) > max_repetition:
        return "repetition"
    return None


def repetition(text: str, n: int = 4) -> float:
    """Share of word n-grams that occurred before in the same text, in [0, 1); short texts give 0."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
