"""One job in a process of its own: make or continue its run, measure, write the result (see graph.py)."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from bench.figures import measures
from cai_fast import config, train
from cai_fast.errors import InputError
from cai_fast.files import write_atomic
from cai_fast.rundir import RunDir


def fork(parent: Path, run: Path, words: list[str], stage: str) -> None:
    """A copy of the run without what `stage` and later stages made; complete or not there at all."""
    partial = run.with_name(run.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(parent, partial, ignore=shutil.ignore_patterns("*.state", ".lock"))
    RunDir.open(partial, config.load(words), restart_from=stage).close()
    os.replace(partial, run)


def main(words: list[str]) -> int:
    """Do the job that the one argument describes in JSON; returns the exit code of train.py if that is not 0."""
    order: dict[str, Any] = json.loads(words[0])
    run, began = Path(order["run"]), time.process_time()
    run.parent.mkdir(parents=True, exist_ok=True)
    if order["fork"] and not run.exists():
        try:
            fork(Path(order["parent"]), run, order["words"], order["fork"])
        except InputError as error:
            print(f"error: {error}")
            return train.BAD_INPUT
    if order["words"] and (code := train.main([*order["words"], "--run-dir", str(run)])):
        return code
    measured = {name: getattr(measures, name)(run, **given) for name, given in order["measure"]}
    out = Path(order["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    seconds = round(time.process_time() - began, 1)
    about = {"identity": order["identity"], "commit": order["commit"], "seconds": seconds}
    write_atomic(out, json.dumps(about | {"measured": measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
