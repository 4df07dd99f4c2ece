"""torchrun: killed ranks come back, the run goes on by itself, and ends with the bits of an unbroken one."""

import json
import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import ranks

from bench import kill_campaign
from bench.two_ranks import SPLIT, _begun

pytestmark = pytest.mark.distributed


def command(inputs: Path, run: Path) -> list[str]:
    return kill_campaign.command(inputs, run, **SPLIT, stages="revise,sft,compare,label,pm,rl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    kill_campaign.write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(inputs: Path) -> Path:
    """The run folder of two ranks that nothing has happened to."""
    with ExitStack() as stack:
        words = ["cai_fast/train.py", *command(inputs, inputs / "unbroken")]
        for process in [stack.enter_context(p) for p in ranks.start(words)]:
            code, text = process.wait()
            assert code == 0, text
    return inputs / "unbroken"


def starts(run: Path) -> dict[str, int]:
    """How often each stage was started."""
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    return {name: record["starts"] for name, record in stages.items()}


def test_killed_ranks_come_back_and_the_run_goes_on(inputs: Path, unbroken: Path, tmp_path: Path) -> None:
    """Rank 1 dies in stage revise, rank 0, which holds the folder's lock, in stage rl."""
    run = tmp_path / "run"
    # An attempt that obeyed this again would throw away what the attempt before it had done.
    words = [*command(inputs, run), "--restart-from", "revise"]
    with ranks.torchrun(["--master-port", ranks.free_port(), "--max-restarts=2", "--nproc-per-node=2"], words) as runs:
        for rank, name in ((1, "revise.[0-9]*.jsonl"), (0, "rl.state")):
            runs.until(lambda name=name: _begun(run, name))
            os.kill(runs.workers()[rank], signal.SIGKILL)
        code, text = runs.wait()
    assert code == 0, text
    assert kill_campaign.differences(run, unbroken) == []
    assert starts(run) == dict.fromkeys(starts(run), 1) | {"revise": 2, "rl": 2}


def test_bad_input_ends_each_attempt_at_once(tmp_path: Path) -> None:
    flags = ["--standalone", "--max-restarts=1", "--nproc-per-node=2"]
    with ranks.torchrun(flags, ["--run-dir", tmp_path / "run", "--sede", "1"]) as runs:
        code, text = runs.wait()
    assert code == 1 and text.count("error: ") == 2, text  # torchrun has no way to be told not to try again
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_many_kills_at_random_instants(inputs: Path, unbroken: Path, tmp_path: Path) -> None:
    run, draw, kills = tmp_path / "run", random.Random(0), 10
    flags = ["--standalone", f"--max-restarts={kills}", "--nproc-per-node=2"]
    with ranks.torchrun(flags, command(inputs, run)) as runs:
        old: set[int] = set()
        for _ in range(kills):
            workers = fresh_workers(runs, old)
            old |= set(workers.values())
            time.sleep(draw.uniform(0, 20))
            os.kill(workers[draw.randrange(2)], signal.SIGKILL)
        code, text = runs.wait()
    assert code == 0, text
    assert kill_campaign.differences(run, unbroken) == []


def fresh_workers(runs: ranks.Process, old: set[int]) -> dict[int, int]:
    """The workers of the next attempt, once both have started."""
    return runs.until(lambda: len(found := runs.workers()) == 2 and old.isdisjoint(found.values()) and found)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [[], ["--rdzv-backend=c10d", "--rdzv-id=several-nodes"]], ids=["static", "c10d"])
def test_two_nodes_and_a_kill_on_the_second(inputs: Path, unbroken: Path, tmp_path: Path, backend: list[str]) -> None:
    """With c10d only the agent of the killed rank counts a restart, so the two counts differ."""
    run, endpoint = tmp_path / "run", f"127.0.0.1:{ranks.free_port()}"
    words = [*command(inputs, run), "--restart-from", "revise"]
    flags = ["--nnodes=2", f"--rdzv-endpoint={endpoint}", *backend, "--max-restarts=2", "--nproc-per-node=1"]
    with ExitStack() as stack:
        nodes = [stack.enter_context(ranks.torchrun([*flags, f"--node-rank={n}"], words)) for n in range(2)]
        nodes[0].until(lambda: _begun(run, "label.[0-9]*.jsonl"))
        victim = next(node for node in nodes if 1 in node.workers())
        os.kill(victim.workers()[1], signal.SIGKILL)
        for node in nodes:
            code, text = node.wait()
            assert code == 0, text
    assert kill_campaign.differences(run, unbroken) == []
    assert starts(run) == dict.fromkeys(starts(run), 1) | {"label": 2}


@pytest.mark.parametrize("whom", ["torchrun", "rank 1"])
@pytest.mark.parametrize("part", ["revise.[0-9]*.jsonl", "label.[0-9]*.jsonl", "pm.state", "rl.state"])
@pytest.mark.slow
def test_a_stop_signal_is_agreed_on(inputs: Path, unbroken: Path, tmp_path: Path, whom: str, part: str) -> None:
    run = tmp_path / "run"
    with ranks.torchrun(["--standalone", "--nproc-per-node=2"], command(inputs, run)) as runs:
        runs.until(lambda: _begun(run, part))
        os.kill(runs.process.pid if whom == "torchrun" else runs.workers()[1], signal.SIGTERM)
        code, text = runs.wait()
    assert code == 1 and text.count("Stopped by a signal") == 1, text  # torchrun makes 1 of 143
    assert "error: " not in text and "exitcode: -" not in text, text
    with ranks.torchrun(["--standalone", "--nproc-per-node=2"], command(inputs, run)) as runs:
        code, text = runs.wait()
    assert code == 0, text
    assert kill_campaign.differences(run, unbroken) == []
