"""The one command: read the configuration, check every input, run the stages in order, print the result.

    torchrun [--nproc-per-node N] cai_fast/train.py [--config PRESET|FILE.toml] [--section.key VALUE ...]

Exit codes: 0 all requested stages are done; 1 a failure of the machine, such as a full disk; 2 bad input; 143 stopped
by SIGTERM or Ctrl-C with its state saved (torchrun itself turns all but 0 into 1). Nobody imports this file.
"""

import sys

if __package__ in (None, ""):  # run as a file: Python put cai_fast/ itself on the path, not its parent
    import pathlib

    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    import cai_fast  # noqa: F401 its __path__ is absolute, so the root can go again: `kernels` must stay hidden

    del sys.path[0]

import contextlib
import errno
import importlib
import os
from typing import TYPE_CHECKING, TextIO

from cai_fast import config
from cai_fast.errors import InputError

if TYPE_CHECKING:
    from cai_fast.distributed import Distributed
    from cai_fast.pipeline import Context

FAILED, BAD_INPUT = 1, 2


def main(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code. Every problem of the user's is one message on stderr."""
    try:
        command = config.parse(argv)
        if command.action == "help":
            _say(config.help_text())
        else:
            _work(command)
    except InputError as error:
        _say(f"error: {' '.join(str(error).splitlines())}", sys.stderr)  # libraries' messages may have several lines
        return BAD_INPUT
    except OSError as error:
        fault = _fault(error, command.config.run_dir)
        if not fault:
            raise
        _say(f"error: {fault}, then run the same command again to continue.", sys.stderr)
        return FAILED
    return 0


def _fault(error: OSError, run_dir: str) -> str:
    """What is wrong with the machine, and the remedy; empty for an error that may be the program's."""
    where = f" writing {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left{where}. Free some space"
    if error.errno in (errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES):
        return f"{error.strerror}{where}. Mend that"
    if error.errno == errno.ENOENT and not os.path.exists(run_dir):
        return f"the run folder {run_dir} is gone. Bring it back"
    return ""


def _work(command: config.Command) -> None:
    """Everything that needs PyTorch, which is imported only now so that --help and typing errors answer at once."""
    from cai_fast import distributed, pipeline

    dist = distributed.init(command.config.model.device)
    try:
        if command.action == "plan":
            _say("\n".join(pipeline.plan(command.config)))
            return
        lines = dist.on_main(lambda: pipeline.check(command.config))
        if command.action == "check":
            _say("\n".join([*lines, "All inputs are usable."]))
            return
        distributed.install_signal_handlers()
        _run(command.config, dist)
    except distributed.Stopped:
        _say("Stopped by a signal; the work so far is saved. Run the same command again to continue.", sys.stderr)
        raise
    finally:
        distributed.shutdown()


def _run(cfg: config.Config, dist: "Distributed") -> None:
    """Open the run folder, run every requested stage that is not done, print the table."""
    from cai_fast import pipeline
    from cai_fast.rundir import RunDir
    from cai_fast.runlog import RunLog

    run = RunDir.open(cfg.run_dir, cfg, restart_from=cfg.restart_from or None, dist=dist)
    log = RunLog(run.path("metrics.jsonl"), dist.is_main)
    with contextlib.closing(run):
        ctx = pipeline.open_context(cfg, run, log, dist)
        try:
            ran = [name for name in cfg.stages if _stage(ctx, name)]
        except InputError as error:  # files are missing when all of them are
            if os.path.exists(run.root):
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(run.root)) from error
        _say("\n".join(pipeline.summary_lines(run)))
    unread = _unread_everywhere(cfg, ran, dist)
    if unread:
        raise InputError(f"These settings had no effect: {', '.join(unread)}. All stages are done; leave them out.")


def _unread_everywhere(cfg: config.Config, ran: list[str], dist: "Distributed") -> list[str]:
    """Collective: settings that no rank has read; some are read by rank 0 only, or by whoever got the work."""
    mine = config.unread(cfg, ran, skipped=set(config.STAGES) - set(ran))
    ranks = dist.all_reduce_sum({key: float(key in mine) for key in cfg.explicit})
    return sorted(key for key, count in ranks.items() if count == dist.world)


def _stage(ctx: "Context", name: str) -> bool:
    """Run one stage, or skip it if it is done; True if this process did all of it."""
    stage = importlib.import_module(f"cai_fast.stages.{name}")
    inputs = stage.inputs(ctx)
    if ctx.run.is_done(name, inputs):
        ctx.log.info(f"{name}: done before")
        return False
    ctx.log.info(f"{name}: starting")
    ctx.run.begin(name, inputs)
    stage.run(ctx)
    return ctx.run.record(name)["starts"] == 1  # else an earlier process may have read what this one had no need of


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print on the one process that talks to the user."""
    if os.environ.get("RANK", "0") != "0":
        return
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `--help | head`
        with open(os.devnull, "w") as nowhere:  # else Python complains when it flushes what is left at its end
            os.dup2(nowhere.fileno(), stream.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
