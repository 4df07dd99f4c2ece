"""Stage report: report.html from the files of the run folder."""

from typing import Any

from cai_fast import report
from cai_fast.files import write_atomic
from cai_fast.pipeline import Context

OUTPUTS = ("report.html",)


def inputs(ctx: Context) -> dict[str, Any]:
    """What this stage depends on: everything that has been written so far."""
    done = (record for record in map(ctx.run.record, ctx.config.stages) if record and record["status"] == "finished")
    return ctx.inputs("report") | {"stages": [record["finished"] for record in done if "report.html" not in
                                              record["outputs"]]}  # fmt: skip


def run(ctx: Context) -> None:
    """Write report.html."""
    if ctx.dist.is_main:
        page = report.build(ctx.run.root, ctx.config.report.samples)
        write_atomic(ctx.run.path("report.html"), page)
    ctx.run.finish("report", list(OUTPUTS), {})
