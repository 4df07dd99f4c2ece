"""Jobs that depend on each other, done in parallel processes, each once; a rerun does only what is missing.

A job's folder is FOLDER/runs/NAME and its result FOLDER/done/NAME.json, written last, with the job's identity: a hash
of its description and of the jobs it needs. A result of another identity is as good as none, and a run folder of one
is discarded before the job begins.
"""

import concurrent.futures
import contextlib
import json
import queue
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.forks import Forks, Run
from cai_fast.files import write_atomic
from cai_fast.records import content_id

BAR = "{percentage:3.0f}% of the work|{bar}| {elapsed}, ETA {remaining}{postfix}"
BUSY, PATIENCE, TRIES = "another process is using this run folder", 2.0, 30  # of a suite that was just stopped


@dataclass(frozen=True)
class Job:
    """One piece of work. In `words` and `measure` a text that begins with @ names a path in a job's run folder.

    words: command line of train.py without its --run-dir; none if there is only something to measure.
    fork: the stage from which the run of needs[0] is done again; empty for a run of its own.
    measure: (function of measures.py, its arguments), done after the run, in its folder.
    cost: CPU-seconds expected.
    config: hash of the configuration that the words begin with.
    """

    name: str
    words: tuple[str, ...] = ()
    needs: tuple["Job", ...] = ()
    fork: str = ""
    measure: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    cost: float = 10.0
    config: str = ""

    @property
    def identity(self) -> str:
        """Hash of all that the result depends on but the program, of which the result names the commit."""
        needs = [job.identity for job in self.needs]
        return content_id("job", self.name, self.words, self.config, needs, self.fork, self.measure)


def closure(jobs: Iterable[Job]) -> dict[str, Job]:
    """The jobs and all that they need by name, the needed ones first. Two different jobs of one name are an error."""
    found: dict[str, Job] = {}

    def visit(job: Job) -> None:
        if job.name not in found:
            for other in job.needs:
                visit(other)
            found[job.name] = job
        elif found[job.name] != job:
            raise ValueError(f"two different jobs are called {job.name}")

    for job in jobs:
        visit(job)
    return found


class Suite:
    """A folder with the results of jobs; `commit`: of the program that does those that are missing."""

    def __init__(self, folder: Path, commit: str = "") -> None:
        self.folder, self.commit = folder.resolve(), commit

    def path(self, kind: str, name: str, suffix: str = "") -> Path:
        return self.folder / kind / f"{name}{suffix}"

    def result(self, job: Job) -> dict[str, Any] | None:
        """{identity, commit, seconds, measured} of a finished job; None if it has yet to be done."""
        path = self.path("done", job.name, ".json")
        found = json.loads(path.read_text()) if path.is_file() else {}
        return found if found.get("identity") == job.identity else None

    def resolve(self, value: Any) -> Any:
        """`value` with the paths that begin with @ made absolute."""
        if isinstance(value, str) and value.startswith("@"):
            return str(self.path("runs", value[1:]))
        if isinstance(value, list | tuple):
            return [self.resolve(item) for item in value]
        return value

    def order(self, job: Job) -> dict[str, Any]:
        """What the process that does the job is told; discards what is left of another job of that name."""
        run, begun = self.path("runs", job.name), self.path("begun", job.name)
        if not begun.is_file() or begun.read_text() != job.identity:
            shutil.rmtree(run, ignore_errors=True)
            begun.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(begun, job.identity)
        return {
            "run": str(run), "words": self.resolve(job.words), "fork": job.fork,
            "parent": str(self.path("runs", job.needs[0].name)) if job.fork else "",
            "measure": [[name, {key: self.resolve(value) for key, value in given}] for name, given in job.measure],
            "out": str(self.path("done", job.name, ".json")), "identity": job.identity,
            "commit": self.commit,
        }  # fmt: skip

    def do(self, job: Job, forks: Forks) -> str:
        """Do one job; returns why it failed, or nothing."""
        order = self.order(job)
        for _ in range(TRIES):
            done: Run = forks.run([json.dumps(order)], program="bench.figures.work")
            if done.code == 0 or BUSY not in done.text:
                break
            time.sleep(PATIENCE)
        log = self.path("logs", job.name, ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.text)
        if done.code:
            last = [line for line in done.text.splitlines() if line.strip()]
            return f"exit code {done.code}: {last[-1] if last else 'nothing was said'} ({log})"
        return ""

    def run(self, jobs: Iterable[Job], workers: int) -> dict[str, str]:
        """Do what is missing; returns why jobs failed, by name. What needs a failed job is not done."""
        every = closure(jobs)
        missing = {name: job for name, job in every.items() if self.result(job) is None}
        if not missing:
            return {}
        idle: queue.SimpleQueue[Forks] = queue.SimpleQueue()
        total = sum(job.cost for job in missing.values())
        with contextlib.ExitStack() as stack:
            parents = [stack.enter_context(Forks()) for _ in range(workers)]
            for forks in parents:
                idle.put(forks)
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
            bar = stack.enter_context(tqdm(total=round(total), bar_format=BAR))
            try:
                return self._all(missing, pool, idle, bar)
            finally:  # when their pipes are closed, the parents stop what they have started
                for forks in parents:
                    forks.process.stdin.close()

    def _all(
        self, missing: dict[str, Job], pool: concurrent.futures.Executor, idle: "queue.SimpleQueue[Forks]", bar: tqdm
    ) -> dict[str, str]:
        def one(job: Job) -> str:
            forks = idle.get()
            try:
                return self.do(job, forks)
            finally:
                idle.put(forks)

        failed: dict[str, str] = {}
        waiting, running, count = dict(missing), {}, 0
        ahead = weights(missing.values())
        while waiting or running:
            for name in sorted(waiting, key=lambda name: -ahead[name]):
                needs = [other.name for other in waiting[name].needs]
                if broken := [other for other in needs if other in failed]:
                    failed[name] = f"needs {broken[0]}"
                    bar.update(waiting.pop(name).cost)
                elif not any(other in waiting or other in running.values() for other in needs):
                    running[pool.submit(one, waiting.pop(name))] = name
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                if reason := future.result():
                    failed[name] = reason
                    bar.write(f"{name}: {reason}")
                count += 1
                bar.set_postfix_str(f"{count} of {len(missing)} jobs, last {name}")
                bar.update(missing[name].cost)
        return failed


def weights(jobs: Iterable[Job]) -> dict[str, float]:
    """Cost of the longest chain of jobs that begins with each: the longest first keeps all workers busy to the end."""
    ahead: dict[str, float] = {}
    for job in reversed(list(jobs)):  # needed jobs come first, so here last
        ahead[job.name] = ahead.get(job.name, 0.0) + job.cost
        for other in job.needs:
            ahead[other.name] = max(ahead.get(other.name, 0.0), ahead[job.name])
    return ahead
