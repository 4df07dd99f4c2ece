"""`--plan`: what each stage will hold in memory, write to disk, and compute, before anything is allocated.

Estimates from shapes and sources alone (planner.py): no weights are needed. A plan that does not fit is still a plan:
it ends by saying so, and what would fit. `--check` refuses it.
"""

from cai_fast.config import Config
from cai_fast.errors import InputError
from cai_fast.planner import GIB, Planner
from cai_fast.remedies import refusal

COLUMNS = {"weights": "weights", "gradients": "grads", "optimizer": "optim.", "cache": "KV", "activations": "activ."}


def plan_lines(config: Config) -> list[str]:
    """The tables of `--plan`."""
    planner = Planner(config)
    base = planner.shape("base")
    plans = [planner.stage(stage) for stage in config.stages]
    columns = COLUMNS | {"total": "peak"}
    lines = [
        f"model.base: {base.params:,} parameters, {base.config.num_layers} layers, hidden {base.config.hidden_size}",
        f"Machine: {planner.machine}; {planner.moments.layout}.",
        f"{'stage':10}" + "".join(f"{head:>9}" for head in columns.values())
        + f"{'disk':>10}{'trained':>9}{'prefill':>9}{'decode':>9}{'time':>10}",
    ]  # fmt: skip
    for plan in plans:
        row = "".join(f"{getattr(plan.memory, name) / GIB:9.3f}" for name in columns) + f"{plan.disk / GIB:10.3f}"
        tokens = "".join(f"{_short(count):>9}" for count in (plan.trained, plan.prefill, plan.decode))
        lines.append(f"{plan.name:10}{row}{tokens}{_time(plan.seconds):>10}")
    disk, spent = sum(p.disk for p in plans) / GIB, sum(p.seconds for p in plans)
    lines += [f"{'total':10}{'':54}{disk:10.3f}{'':27}{_time(spent):>10}", *_cache_lines(planner)]
    each = "" if planner.machine.count == 1 else f" divided by {planner.machine.count} ranks"
    lines += [
        "Sizes in GiB; memory of one device when most is held, disk of all. Tokens at most: every prompt and text as",
        f"long as allowed. Time{each}, of these tokens.",
        *str(planner.speeds()).splitlines(),
    ]
    reason = refusal(planner)
    return [*lines, *([f"Does not fit: {reason}"] if reason else []), "No work was done."]


def _cache_lines(planner: Planner) -> list[str]:
    """The table of the engines' caches."""
    head = f"{'KV cache':20}{'rows':>6}{'longest':>9}  {'pages':24}"
    lines = [head + f"{'MiB each':>9}{'shared':>8}{'in use':>8}{'GiB':>9}"]
    for stage, work in ((s, w) for s, works in planner.works.items() for w in works if w.phases):
        pool = planner.pool(stage, work)
        name = work.name if work.engines == 1 else f"{work.name} (each of {work.engines})"
        pages = f"{pool.pages:,} {'pages' if pool.paged else 'slots'} of {pool.size}"
        lines.append(
            f"{name:20}{pool.rows:6}{work.room:9}  {pages:24}{pool.page_bytes / 2**20:9.2f}{pool.shared:8}"
            f"{pool.used(work):8}{pool.nbytes / GIB:9.3f}"
        )
    return lines if len(lines) > 1 else []


def check_memory(planner: Planner) -> str:
    """A line to print; InputError if the peak of some stage exceeds a device's memory."""
    if reason := refusal(planner):
        raise InputError(reason)
    stage, peak = planner.worst()
    return (
        f"memory        {peak.total / GIB:.2f} GiB at the peak of stage {stage} ({peak.moment}), on {planner.machine}"
    )


def _short(count: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{suffix}"
    return f"{count:.0f}"


def _time(seconds: float) -> str:
    for limit, unit in ((3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.1f} s"
