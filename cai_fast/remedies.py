"""What would fit where a configuration does not: settings that are tried on its plan, never guessed."""

from collections.abc import Iterator

from cai_fast.planner import GIB, Changes, Planner

LEAST_TOKENS = 1024  # of a forward pass: below it a GPU idles
LEAST_ROWS = 8
LORA_RANK = 16
GPUS = (2, 4, 8)
PARTS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "cache": "KV cache",
         "activations": "activations"}  # fmt: skip


def refusal(planner: Planner) -> str:
    """Why the configuration does not fit, and what would; nothing if it fits."""
    if planner.fits():
        return ""
    stage, peak = planner.worst()
    sizes = {label: getattr(peak, name) / GIB for name, label in PARTS.items()}
    parts = ", ".join(f"{label} {size:.3g}" for label, size in sizes.items() if size > 0.01 * peak.total / GIB)
    found = f"Stage {stage} needs {peak.total / GIB:.3g} GiB at its peak ({peak.moment}: {parts})"
    if peak.total <= planner.room:
        found = f"No memory is left for the keys and values of one request of stage {planner.starved().name}"
    where = "GPU" if planner.machine.kind == "cuda" else "process"
    return (
        f"{found}; of the {planner.machine.memory / GIB:.3g} GiB of a {where} {planner.room / GIB:.3g} can be used. "
        f"{advice(planner)}"
    )


def advice(planner: Planner) -> str:
    """Settings that fit, each with its peak: alone if there are such, else together; and a number of GPUs."""
    kinds = [choices for choices in map(list, _kinds(planner)) if choices]
    found = [fit for choices in kinds for fit in _first(planner, choices)]
    if not found:
        found = _first(planner, [_together(planner, kinds)])
    found += _more_gpus(planner, {})
    if not found:
        found = _more_gpus(planner, _merged(*(choices[-1] for choices in kinds)))
    if not found:
        return "Nothing that was tried fits: use a smaller model.base or more memory."
    return f"What would fit: {'; or '.join(found)}."


def _together(planner: Planner, kinds: list[list[Changes]]) -> Changes:
    """As few and as mild remedies as fit together, where the strongest of all kinds do; else these."""
    chosen = [choices[-1] for choices in kinds]
    if planner.changed(_merged(*chosen)).fits():
        for place in reversed(range(len(kinds))):  # the last kinds cost most
            choices = kinds[place]
            others = chosen[:place], chosen[place + 1 :]
            options = [{}, *choices]
            chosen[place] = next(o for o in options if planner.changed(_merged(*others[0], o, *others[1])).fits())
    return _merged(*chosen)


def _kinds(planner: Planner) -> Iterator[Iterator[Changes]]:
    """Kinds of remedies, those first that do not change what is computed; of each kind the mildest first."""
    config = planner.config
    tight = [s for s in config.stages if planner.moments.peak(s).total > planner.room]
    trained = [stage for stage in tight if stage in ("sft", "pm", "rl")]
    now = {stage: getattr(config, stage).micro_tokens for stage in trained}
    yield (
        {s: {"micro_tokens": min(now[s], tokens)} for s in trained} for tokens in _halves(max(now.values(), default=0))
    )
    levels = ("none", "full") if config.lora.rank else ("none", "selective", "full")
    yield (
        {"parallel": {"recompute": mode}} for mode in levels[levels.index(config.parallel.recompute) + 1 :] if trained
    )
    rows, chunk = config.engine.max_batch, config.revise.chunk
    held = {"revise", "evaluate"} & set(tight)  # handles of the critiques of a chunk
    yield ({"revise": {"chunk": chunk // n}} for n in (2, 4, 8) if held and chunk // n >= LEAST_ROWS)
    yield ({"engine": {"max_batch": rows // n}} for n in (2, 4, 8) if rows // n >= LEAST_ROWS)
    sampled = "rl" in tight and config.rl.algorithm != "dpo"
    yield ({"guards": {"pm_eval_every": 0}} for _ in range(sampled and config.guards.pm_eval_every > 0))
    yield ({"rl": {"critic": "detached"}} for _ in range(sampled and config.rl.network in ("own", "pm")))
    lora = trained and not config.lora.rank and not config.pm.init and config.parallel.shard is not True
    whole = {"parallel": {"recompute": "none"}} if config.parallel.recompute == "selective" else {}
    yield ({"lora": {"rank": LORA_RANK}} | whole for _ in range(bool(lora)))


def _halves(tokens: int) -> Iterator[int]:
    """Tokens of a pass, halved again and again."""
    while (tokens := tokens // 2) >= LEAST_TOKENS:
        yield tokens


def _first(planner: Planner, choices: list[Changes]) -> list[str]:
    """The first of the choices that fits, as the user would write it, with the peak that it leads to."""
    for changes in filter(None, choices):
        tried = planner.changed(changes)
        if tried.fits():
            words = " ".join(f"--{s}.{key} {value}" for s, new in changes.items() for key, value in new.items())
            return [f"{words} ({tried.worst()[1].total / GIB:.3g} GiB)"]
    return []


def _more_gpus(planner: Planner, changes: Changes) -> list[str]:
    """The first larger number of the same GPUs on which the changed configuration fits."""
    if planner.machine.kind == "cpu":
        return []
    for count in (count for count in GPUS if count > planner.machine.count):
        tried = planner.changed(_merged(changes, {"hardware": {"count": count}}))
        if tried.fits():
            words = "".join(f" --{s}.{key} {value}" for s, new in changes.items() for key, value in new.items())
            return [f"{count} GPUs{words and ' with' + words} ({tried.worst()[1].total / GIB:.3g} GiB each)"]
    return []


def _merged(*parts: Changes) -> Changes:
    merged: Changes = {}
    for part in parts:
        merged |= {name: merged.get(name, {}) | new for name, new in part.items()}
    return merged
