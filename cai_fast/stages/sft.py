"""Stage sft: SL-CAI, the base model fine-tuned on revisions and helpful samples.

Paper §3.1-3.2: training starts from the pretrained base (not from the assistant that wrote the revisions), on the
revisions of every round and plain helpful samples; the loss covers the response and its stop token.
"""

from typing import Any

from torch import Tensor

from cai_fast import losses, records, roles
from cai_fast.batching import Example, pack_targets
from cai_fast.errors import InputError
from cai_fast.fit import FitSettings, Task, fit
from cai_fast.pipeline import Context, load_prompts
from cai_fast.records import Helpful, Revision
from cai_fast.runlog import in_words
from cai_fast.tokenizer import Renderer, Tokenizer

OUTPUTS = ("checkpoints/sl_cai",)


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on."""
    files = ["prompts.jsonl", "revisions.jsonl", "helpful.jsonl", "tokens/revisions.safetensors"]
    return ctx.inputs("sft", files=files, roles=["base"])


def run(ctx: Context) -> None:
    """Write checkpoints/sl_cai."""
    cfg, renderer, model = ctx.config.sft, ctx.renderer("base"), roles.trained(ctx, "base", head="lm", name="sft")
    examples, counts = examples_of(ctx, renderer)
    limit = ctx.config.model.max_len or model.config.max_position_embeddings
    fitting = [e for e in examples if e.tokens <= limit]
    counts["over_long"] = len(examples) - len(fitting)
    if not fitting:
        raise InputError(f"sft: nothing to train on: {in_words(counts)}")
    ctx.log.info(f"sft: {len(fitting)} examples: {in_words(counts)}")

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        return losses.sft_loss(model, pack_targets([fitting[i] for i in items], ctx.device), scale)

    lengths = [e.tokens for e in fitting]
    task = Task("sft", lengths, [e.weight * len(e.target_ids) for e in fitting], loss, lengths)
    settings = FitSettings.of(ctx.config, cfg, cfg.batch_tokens)
    steps = fit(model, task, settings, stage="sft", state_dir=ctx.run.state_dir("sft"), log=ctx.log, dist=ctx.dist)
    summary = counts | {"examples": len(fitting), "tokens": sum(lengths), "steps": steps} | roles.sizes(model)
    roles.export(ctx, model, "sl_cai", renderer.tokenizer, summary)
    ctx.run.finish("sft", list(OUTPUTS), summary)


def examples_of(ctx: Context, renderer: Renderer) -> tuple[list[Example], dict[str, int]]:
    """Training examples (revisions chosen by `sft.revisions`, then helpful samples) and how many there are of each."""
    tokens = records.read_tokens(ctx.run.path("tokens", "revisions.safetensors"))
    if Tokenizer.load(ctx.folder("assistant")).hash != renderer.tokenizer.hash:
        tokens = {}  # the assistant's ids mean nothing to the base model: encode the texts anew
    dialogues = {p.id: renderer.dialogue(p.turns) for p in load_prompts(ctx, split="train")}

    def example(identity: str, prompt_id: str, text: str) -> Example:
        target = tokens[identity][0] if tokens else renderer.response_ids(text)
        return Example(identity, dialogues[prompt_id], target)

    chosen = revision_indices(ctx.config.sft.revisions, ctx.config.revise.rounds)
    revisions = [
        example(f"{row.id}/{k}", row.prompt_id, [row.response, *(r.revision for r in row.rounds)][k])
        for row in records.read_jsonl(ctx.run.path("revisions.jsonl"), Revision) if row.kept for k in chosen
    ]  # fmt: skip
    helpful = [
        example(row.id, row.prompt_id, row.response)
        for row in records.read_jsonl(ctx.run.path("helpful.jsonl"), Helpful)
    ]
    return revisions + helpful, {"revisions": len(revisions), "helpful": len(helpful)}


def revision_indices(chosen: str | tuple[int, ...], rounds: int) -> list[int]:
    """Which responses of a chain to train on; 0 is the initial response, which "all" leaves out (paper §3.2)."""
    if chosen == "all":
        return list(range(1, rounds + 1))
    return [rounds] if chosen == "last" else sorted(set(chosen))
