"""Stage compare: every comparison of the run: pairs of answers to judge, and helpfulness comparisons made elsewhere.

Paper §4.1: SL-CAI generates both answers, so that the preference model's data matches the policy that RL starts from.
With `compare.base_fraction` a share of the pairs has one answer of the base model, on a random side. Helpfulness
comparisons (paper §4.2) come from data.preferences and keep their conversation and label in their provenance.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cai_fast import pipeline, readers, rng
from cai_fast.engine import Completion
from cai_fast.pipeline import TOY, Context
from cai_fast.records import Comparison, Prompt, content_id, write_jsonl, write_tokens
from cai_fast.runlog import in_words

OUTPUTS = ("comparisons.jsonl", "tokens/comparisons.safetensors")


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on."""
    roles = ["sl_cai"] + (["base"] if ctx.config.compare.base_fraction else [])
    preferences = ctx.config.data.preferences
    files = ["prompts.jsonl"] + (["preferences.jsonl"] if preferences == TOY else [])
    return ctx.inputs("compare", files=files, roles=roles) | {"preferences": pipeline.data_file_hash(preferences)}


def run(ctx: Context) -> None:
    """Write comparisons.jsonl and its token side file."""
    cfg = ctx.config.compare
    prompts = pipeline.load_prompts(ctx, kind="red_team", split="train")
    chosen = pipeline.take(ctx, prompts, "compare", cfg.num_prompts)
    by_id = {p.id: p for p in chosen}
    helpful, malformed = helpfulness(ctx)  # first: a bad file must not cost the sampling
    worker = Worker(ctx)
    wanted = [f"{p.id}/{n}" for n in range(cfg.pairs_per_prompt) for p in chosen]
    rows = pipeline.journaled(
        ctx, "compare", wanted, cfg.chunk, lambda ids: worker.pairs([(by_id[i.split("/")[0]], i) for i in ids])
    )
    summary: dict[str, Any] = {}
    if ctx.dist.is_main:
        kept = [row for row in rows.values() if row["reject_reason"] is None]
        pairs = [Comparison.from_json(row["record"]) for row in kept]
        write_jsonl(ctx.run.path("comparisons.jsonl"), pairs + helpful)
        tokens = {key: (ids, None) for row in kept for key, ids in row["tokens"].items()}
        write_tokens(ctx.run.path("tokens", "comparisons.safetensors"), tokens)
        rejected = Counter(row["reject_reason"] for row in rows.values() if row["reject_reason"])
        summary = {"requested": len(rows), "kept": len(kept), "rejected": dict(rejected)}
        if len(rows) != len(kept) + sum(rejected.values()):
            raise RuntimeError(f"compare: counts do not add up: {summary}")
        summary["helpfulness"] = {"requested": len(helpful) + malformed, "kept": len(helpful), "malformed": malformed}
        ctx.log.info(f"compare: {in_words(summary)}")
    ctx.run.finish("compare", list(OUTPUTS), summary)


def helpfulness(ctx: Context) -> tuple[list[Comparison], int]:
    """The comparisons of data.preferences, and how many of its rows are malformed.

    `prompt_id` is that of the run's prompt with the same turns, where there is one. Files are split by their first turn
    as prompt files are, so what `evaluate` asks is on split "eval"; the toy world writes none of that.
    """
    data = ctx.config.data
    if not data.preferences:
        return [], 0
    toy = data.preferences == TOY
    path = ctx.run.path("preferences.jsonl") if toy else Path(data.preferences)
    rows, malformed = readers.read_comparisons(path, max_bad_fraction=data.max_bad_fraction)
    known = {p.turns: p.id for p in pipeline.load_prompts(ctx)}
    found: list[Comparison] = []
    for bad in malformed[:5]:
        ctx.log.warn(f"{path}, line {bad.line}: {bad.reason}")
    given, digest = "preferences.jsonl" if toy else data.preferences, pipeline.data_file_hash(str(path))
    for row in rows:
        split = "train" if toy else readers.encode_split(row.turns[0].text, data.eval_fraction)
        origin = {"file": given, "file_hash": digest, "line": row.line, "turns": row.turns, "prob_a": row.prob_a}
        found.append(Comparison(
            content_id("comparison", digest, row.line), known.get(row.turns) or content_id("helpful", row.turns),
            "helpful", "corpus" if toy else "human", row.response_a, row.response_b, split, origin,
        ))  # fmt: skip
    return found, len(malformed)


class Worker:
    """SL-CAI, and the base model where a share of the answers comes from it."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, cfg = ctx, ctx.config.compare
        self.roles = ["sl_cai"] + (["base"] if cfg.base_fraction else [])
        self.renderers = {role: ctx.renderer(role) for role in self.roles}
        room = pipeline.round_up(ctx.config.data.max_prompt_tokens + cfg.max_new_tokens)
        self.engines = {role: ctx.engine(ctx.model(role), self.renderers[role], room) for role in self.roles}
        self.spec = pipeline.sampling(self.renderers["sl_cai"], "response", cfg.temperature, cfg.max_new_tokens)

    def roles_of(self, item: str) -> tuple[str, str]:
        """Which model writes response_a and response_b of a pair."""
        cfg = self.ctx.config.compare
        if rng.uniform(self.ctx.key("compare/mixed", item)) >= cfg.base_fraction:
            return "sl_cai", "sl_cai"
        return ("base", "sl_cai") if rng.choice(self.ctx.key("compare/side", item), 2) else ("sl_cai", "base")

    def pairs(self, items: Sequence[tuple[Prompt, str]]) -> Iterator[dict[str, Any]]:
        """Both answers of each pair; `items` are (prompt, '<prompt id>/<pair number>')."""
        answers: dict[tuple[str, int], Completion] = {}
        for role in self.roles:
            jobs = [(p, item, side) for p, item in items for side in (0, 1) if self.roles_of(item)[side] == role]
            ids = [self.renderers[role].dialogue(p.turns) for p, _, _ in jobs]
            keys = [self.ctx.key("compare/response", item, side) for _, item, side in jobs]
            done = self.engines[role].generate(ids, self.spec, keys=keys, progress=self.ctx.tick)
            answers.update({(item, side): c for (_, item, side), c in zip(jobs, done, strict=True)})
        for prompt, item in items:
            yield self._row(prompt, item, answers[item, 0], answers[item, 1])

    def _row(self, prompt: Prompt, item: str, a: Completion, b: Completion) -> dict[str, Any]:
        renderer = self.renderers["sl_cai"]
        first, second = renderer.finish(a.token_ids, "response"), renderer.finish(b.token_ids, "response")
        identity = content_id("comparison", item)
        source = pipeline.provenance(
            self.ctx, "sl_cai", renderer, self.spec, parents=[prompt.id],
            models={role: self.ctx.model_hash(role) for role in self.roles}, roles=list(self.roles_of(item)),
            rng={side: self.ctx.key_parts("compare/response", item, k) for k, side in enumerate("ab")},
        )  # fmt: skip
        record = Comparison(identity, prompt.id, "harmless", "ai", first.text, second.text, prompt.split, source)
        return {
            "id": item,
            "record": record.to_json(),
            "reject_reason": _defect(first.text, second.text, a, b),
            "tokens": {f"{identity}/a": first.token_ids, f"{identity}/b": second.token_ids},
        }


def _defect(first: str, second: str, a: Completion, b: Completion) -> str | None:
    """Why a pair cannot be compared, or None."""
    if "length" in (a.finish_reason, b.finish_reason):
        return "over_long"
    if not first.strip() or not second.strip():
        return "empty"
    return "identical" if first == second else None
