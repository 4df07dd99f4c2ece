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
import time
from typing import TYPE_CHECKING, NoReturn, TextIO

from cai_fast import config
from cai_fast.errors import InputError

if TYPE_CHECKING:
    from cai_fast.distributed import Distributed
    from cai_fast.pipeline import Context

FAILED, BAD_INPUT = 1, 2
# How long OpenMP's threads wait awake for each other, on a CPU: by default so long that beside other work
# on the machine a small run took more than five times as long; always asleep, half as long again on an idle one.
WAITING = ("GOMP_SPINCOUNT", "20000")
PATIENCE = 3.0  # seconds


def main(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code. Every problem of the user's is one message on stderr."""
    os.environ.setdefault(*WAITING)  # read when PyTorch is loaded, which is later
    try:
        command = config.parse(argv)
        if command.action != "help":
            return _work(command)
        _say(config.help_text())
    except InputError as error:  # the same on all ranks
        return _bad_input(error)
    return 0


def _bad_input(error: InputError, speak: bool | None = None) -> int:
    text = f"error: {' '.join(str(error).splitlines())}"  # libraries' messages may have several lines
    if not _say(text, sys.stderr, speak):
        time.sleep(PATIENCE)  # torchrun ends all ranks with the first that ends: let the one that speaks be that one
    return BAD_INPUT


def _work(command: config.Command) -> int:
    """Everything that needs PyTorch, which is imported only now so that --help and typing errors answer at once."""
    from cai_fast import distributed

    cfg = command.config
    try:
        dist = distributed.init(cfg.model.device, timeout_s=cfg.parallel.timeout_s, stall_s=cfg.parallel.stall_s)
    except InputError as error:  # perhaps of this rank's GPU alone
        return _bad_input(error, speak=True)
    try:
        _among_ranks(command, dist)
    except InputError as error:  # of one rank or of all
        return _bad_input(error, dist.first(f"error {error}"))
    except distributed.RankLost as error:
        _say(f"error: {error}", sys.stderr, True)
        return FAILED
    except OSError as error:
        fault = _fault(error, command.config.run_dir)
        if not fault:
            raise
        _say(f"error: {fault}, then run the same command again to continue.", sys.stderr, dist.first(fault))
        return FAILED
    except distributed.Stopped:
        but = ", without --restart-from," if command.config.restart_from else ""
        _say(f"Stopped by a signal; the work so far is saved. Run the same command again{but} to continue.", sys.stderr)
        raise
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


def _among_ranks(command: config.Command, dist: "Distributed") -> None:
    """Do the command's action, then leave the other ranks, telling them why if it failed."""
    from cai_fast import distributed

    try:
        _act(command, dist)
        distributed.shutdown()  # here, because a rank may be lost in it too
    except RuntimeError as error:
        if line := dist.lost(error):
            raise distributed.RankLost(line) from error
        raise
    finally:
        distributed.shutdown(sys.exception())


def _act(command: config.Command, dist: "Distributed") -> None:
    from cai_fast import distributed, pipeline

    if command.action == "plan":
        from cai_fast.plan import plan_lines

        _say("\n".join(plan_lines(command.config)))
        return
    lines = dist.on_main(lambda: pipeline.check(command.config, here=command.action == "run"))
    if command.action == "check":
        _say("\n".join([*lines, "All inputs are usable."]))
        return
    distributed.install_signal_handlers()
    _run(command.config, dist)


def _run(cfg: config.Config, dist: "Distributed") -> None:
    """Open the run folder, run every requested stage that is not done, print the table."""
    from cai_fast import pipeline, sinks
    from cai_fast.rundir import RunDir
    from cai_fast.runlog import RunLog

    # A restart by torchrun has the same command line, but must not discard what was done since.
    restart_from = None if dist.done_before("restart-from") else cfg.restart_from or None
    run = RunDir.open(cfg.run_dir, cfg, restart_from=restart_from, dist=dist)
    dist.mark_done("restart-from")
    with contextlib.closing(run):
        copies: list[sinks.Sink] = []
        log = RunLog(run.path("metrics.jsonl"), dist.is_main, copies)  # the file first, which the copies begin with
        with contextlib.closing(log):
            dist.on_main(lambda: copies.extend(sinks.open_all(cfg, run.root, anew=restart_from is not None)))
            _stages(cfg, pipeline.open_context(cfg, run, log, dist))


def _stages(cfg: config.Config, ctx: "Context") -> None:
    """Run what is not done, print the table, and complain about settings without effect."""
    from cai_fast import pipeline

    try:
        ran = [name for name in cfg.stages if _stage(ctx, name)]
    except InputError as error:  # files are missing when all of them are
        if os.path.exists(ctx.run.root):
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(ctx.run.root)) from error
    _say("\n".join(pipeline.summary_lines(ctx.run)))
    unread = _unread_everywhere(cfg, ran, ctx.dist)
    if unread:
        raise InputError(f"These settings had no effect: {', '.join(unread)}. All stages are done; leave them out.")


def _unread_everywhere(cfg: config.Config, ran: list[str], dist: "Distributed") -> list[str]:
    """Collective: settings that no rank has read; some are read by rank 0 only, or by whoever got the work."""
    mine = config.unread(cfg, ran, skipped=set(config.STAGES) - set(ran))
    ranks = dist.all_reduce_sum({key: float(key in mine) for key in cfg.explicit})
    return sorted(key for key, count in ranks.items() if count == dist.world)


def _stage(ctx: "Context", name: str) -> bool:
    """Run one stage, or skip it if it is done; True if this process did all of it."""
    from cai_fast import heartbeat

    stage = importlib.import_module(f"cai_fast.stages.{name}")
    inputs = stage.inputs(ctx)
    if ctx.run.is_done(name, inputs):
        ctx.log.info(f"{name}: done before")
        return False
    ctx.log.info(f"{name}: starting")
    heartbeat.at(name, "start")
    ctx.run.begin(name, inputs)
    stage.run(ctx)
    record = ctx.run.record(name)
    # Else an earlier process may have read what this one had no need of, or a guard may have ended it before an update.
    return record["starts"] == 1 and not record["summary"].get("guard")


def _say(text: str, stream: TextIO | None = None, speak: bool | None = None) -> bool:
    """Print if this process is the one to speak, by default rank 0; returns whether it is."""
    if not (os.environ.get("RANK", "0") == "0" if speak is None else speak):
        return False
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `--help | head`
        with open(os.devnull, "w") as nowhere:  # else Python complains when it flushes what is left at its end
            os.dup2(nowhere.fileno(), stream.fileno())
    return True


def _end(code: int) -> NoReturn:
    """End this process. Among ranks without taking the interpreter down: threads of the communication libraries may
    still run, and one that then needs the interpreter aborts the process, although its work is done."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except SystemExit as stop:
        exit_code = stop.code
    _end(exit_code)
