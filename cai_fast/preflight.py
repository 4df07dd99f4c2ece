"""`--check`, and the first thing every run does: validate every input before any work starts."""

from cai_fast import capacity, pipeline, plan, readers, sinks
from cai_fast.config import Config
from cai_fast.config_sections import HardwareConfig
from cai_fast.constitution import Constitution
from cai_fast.constitution import load as load_constitution
from cai_fast.errors import InputError
from cai_fast.model import check as check_model
from cai_fast.model.verify import Summary, untrained
from cai_fast.pipeline import TOY
from cai_fast.planner import Planner, weight_width
from cai_fast.rundir import folder_bytes, require_free
from cai_fast.tokenizer import Renderer, Tokenizer


def check(config: Config, here: bool = False) -> list[str]:
    """Validate everything that can be without work: constitution, prompts, comparisons, checkpoints, memory, disk.

    Returns lines to print; raises InputError on the first thing that cannot be used. here: a run begins.
    """
    if here and config.hardware != HardwareConfig():
        raise InputError("hardware.gpu and hardware.count are for --check and --plan: leave them out of a run.")
    sinks.check(config)
    lines = [_check_constitution(config)]
    if {"revise", "rl"} & set(config.stages):
        lines += [_check_prompts(config, kind) for kind in ("red_team", "helpful")]
    if "compare" in config.stages and config.data.preferences not in ("", TOY):
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
    planner = Planner(config)
    _check_moments(planner)
    _check_pages(planner)
    if set(config.stages) - {"report"}:
        lines.append(plan.check_memory(planner))
        if not config.hardware.gpu:  # else the disk, too, is not here
            require_free(config.run_dir, max(0, int(planner.room_on_disk()) - folder_bytes(config.run_dir)))
    return lines


def _check_moments(planner: Planner) -> None:
    config = planner.config
    if config.model.moments == "float32" or not {"sft", "pm", "rl"} & set(config.stages):
        return
    if config.shards(planner.machine.count):
        raise InputError(
            f"model.moments = {config.model.moments} is for bfloat16 weights, but sharded ones are float32. Leave it "
            "out, or set parallel.shard = false."
        )
    if weight_width(config) == 4:
        raise InputError(
            f"model.moments = {config.model.moments} is for bfloat16 weights, but they are float32 here (model.dtype = "
            f"{config.model.dtype}; auto is float32 on a CPU). Leave model.moments out, or set model.dtype = bfloat16."
        )


def _check_pages(planner: Planner) -> None:
    """Every stage's longest request against the model's positions and the pages that were asked for: the engine refuses
    only when it is made."""
    config, engine, gpu = planner.config, planner.config.engine, planner.machine.kind == "cuda"
    for work in (work for works_of_stage in planner.works.values() for work in works_of_stage):
        model, where = planner.shape(work.role).config, f"stage {work.name}, {work.room} tokens"
        limit, needed = config.model.max_len or model.max_position_embeddings, engine.max_len or work.room
        if needed > limit:
            raise InputError(
                f"Stage {work.name} needs sequences of up to {needed} tokens (prompt, few-shot examples, answers), and "
                f"model.{work.role} has {limit} positions. Lower data.max_prompt_tokens or the stage's max_new_tokens, "
                "or switch its few_shot off."
            )
        size = capacity.page_size(engine, model, work.room, gpu)
        if engine.num_pages and not size:
            raise InputError(
                f"engine.num_pages = {engine.num_pages} is for pages, but stage {work.name} has slots here. Leave it "
                "out, or set engine.page_size."
            )
        if size and model.max_window is not None and model.max_window < work.room:
            raise InputError(
                f"engine.page_size = {size}: model.{work.role} has a sliding window of {model.max_window} tokens, less "
                f"than the longest sequence ({where}); attention to pages has no window. Set engine.page_size to 0."
            )
        if size and 0 < engine.num_pages < (needed := -(-work.room // size)):
            raise InputError(
                f"engine.num_pages = {engine.num_pages} must be at least {needed}: pages of {size} tokens for the "
                f"longest sequence ({where}). Raise it or lower engine.max_len."
            )


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
    """Check every checkpoint that a stage needs: architecture, tensors, tokenizer, options."""
    lines, working = [], set(config.stages) - {"report"}
    constitution = load_constitution(config.data.constitution)
    roles = {role: config.role(role) for role in ("base", "assistant", "judge") if working}
    if "pm" in working:
        roles["pm_init"] = config.role("pm_init")
    checked: dict[str, tuple[Summary, Renderer]] = {}
    for role, name in roles.items():
        if name == TOY:
            continue
        if name not in checked:
            checked[name] = _check_checkpoint(config, name, constitution)
            model = checked[name][0]
            lines.append(f"{role:13} {name}: {model.config.model_type}, {model.num_parameters:,} parameters")
            lines += _check_chat_tokens(name, checked[name][1])
        model, renderer = checked[name]
        if role != "pm_init" and model.head != "lm":
            raise InputError(f"{name}: model.{role} must be a language model, found a {model.head!r} head.")
        if role == "judge":
            renderer.options("cot" if config.label.cot else "comparison")
    return lines


def _check_checkpoint(config: Config, name: str, constitution: Constitution) -> tuple[Summary, Renderer]:
    model = check_model(name)
    tokenizer = Tokenizer.load(name)
    tokens, rows = tokenizer.vocab_size, model.config.vocab_size
    if tokens > rows:
        raise InputError(f"{name}: the tokenizer has {tokens} tokens, the model's vocabulary {rows}.")
    return model, Renderer(tokenizer, constitution, seed=config.seed, few_shot_pool=config.data.few_shot_pool)


def _check_chat_tokens(name: str, renderer: Renderer) -> list[str]:
    """A base model may carry the chat template of its instruct sibling without ever having seen its tokens."""
    if not renderer.is_chat:
        return []
    tokenizer = renderer.tokenizer
    words = {index: word for word, index in tokenizer.control.items()}
    unseen = untrained(name, renderer.control_ids, tokenizer.encode("Which of these responses is better?"))
    if unseen:
        raise InputError(
            f"{name}: the chat template uses {', '.join(words[i] for i in unseen)}, whose rows of the embedding are "
            "untrained (zero, or equal to one another): a base model with the chat template of its instruct sibling? "
            'Set [format] kind = "paper" in the constitution, or use a chat model.'
        )
    if renderer.stop_id in tokenizer.stop_ids:
        return []
    ends = ", ".join(words.get(i, str(i)) for i in tokenizer.stop_ids)
    return [
        f"warning       {name}: its chat template closes a turn with {words[renderer.stop_id]}, its configuration with "
        f"{ends}, as base models' do; exported models stop at all of them"
    ]
