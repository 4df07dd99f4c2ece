"""`--check`, and the first thing every run does: validate every input before any work starts."""

from cai_fast import pipeline, readers
from cai_fast.config import Config
from cai_fast.constitution import load as load_constitution
from cai_fast.errors import InputError
from cai_fast.model import check as check_model
from cai_fast.pipeline import TOY
from cai_fast.rundir import require_free
from cai_fast.tokenizer import Renderer, Tokenizer


def check(config: Config) -> list[str]:
    """Validate everything that can be without work: constitution, prompts, comparisons, checkpoints, disk.

    Returns lines to print; raises InputError on the first thing that cannot be used.
    """
    lines = [_check_constitution(config)]
    if {"revise", "rl"} & set(config.stages):
        lines += [_check_prompts(config, kind) for kind in ("red_team", "helpful")]
    if "pm" in config.stages and config.data.preferences not in ("", TOY):
        rows, rejected = readers.read_comparisons(
            config.data.preferences, max_bad_fraction=config.data.max_bad_fraction
        )
        if not rows:
            raise InputError(f"data.preferences: no usable comparison in {config.data.preferences}.")
        lines.append(f"preferences   {len(rows)} comparisons, {len(rejected)} rejected rows")
    if "label" in config.stages and config.label.from_:
        lines.append(f"labels        {len(readers.read_labels(config.label.from_))} imported")
    if "evaluate" in config.stages and config.evaluate.hhh:
        lines.append(f"hhh           {len(readers.read_hhh(config.evaluate.hhh))} questions")
    lines += check_models(config)
    return lines


def _check_constitution(config: Config) -> str:
    constitution = load_constitution(config.data.constitution)
    for stage, phase in (("revise", "critique"), ("label", "comparison")):
        if stage in config.stages and not constitution.principles_for(phase):
            raise InputError(
                f"Constitution {constitution.name!r} has no principle for phase {phase}, which stage {stage} needs."
            )
    critique, comparison = (len(constitution.principles_for(phase)) for phase in ("critique", "comparison"))
    return f"constitution  {constitution.name}: {critique} critique, {comparison} comparison principles"


def _check_prompts(config: Config, kind: str) -> str:
    prompts, rejected = pipeline.prompt_source(config, kind)
    held_out = sum(p.split == "eval" for p in prompts)
    if held_out == len(prompts):
        raise InputError(f"data.{kind}: no prompt to train on ({len(prompts)} prompts, {held_out} held out).")
    return f"{kind:13} {len(prompts)} prompts, {held_out} held out, {len(rejected)} rejected rows"


def check_models(config: Config) -> list[str]:
    """Check every checkpoint the configuration names: architecture, tensors, tokenizer, options; and the disk."""
    lines, seen, disk = [], set(), 0
    constitution = load_constitution(config.data.constitution)
    for role in ("base", "assistant", "judge"):
        name = config.role(role)
        if name == TOY or name in seen:
            continue
        seen.add(name)
        model = check_model(name)
        renderer = Renderer(
            Tokenizer.load(name), constitution, seed=config.seed, few_shot_pool=config.data.few_shot_pool
        )
        if role == "judge" or config.role("judge") == name:
            renderer.options("cot" if config.label.cot else "comparison")
        if renderer.tokenizer.vocab_size > model.config.vocab_size:
            raise InputError(
                f"{name}: the tokenizer has {renderer.tokenizer.vocab_size} tokens, "
                f"the model's vocabulary {model.config.vocab_size}."
            )
        disk = max(disk, model.num_parameters * 4)
        lines.append(f"{role:13} {name}: {model.config.model_type}, {model.num_parameters:,} parameters")
    # Four exported models and, while training, weights plus two optimizer moments, twice (the old and the new state).
    require_free(config.run_dir, disk * 10)
    return lines
