"""Kill a stage in its middle, run the same command again: every file has the bits of an undisturbed run.

The stages before are done once and copied. Faults are built into the killed process: see bench.forks.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench import kill_campaign
from bench.forks import Fault, Forks, Run

STAGES = ("revise", "sft", "compare", "label", "pm", "rl")
APPEND, STEP = "cai_fast.records:Journal.append", "cai_fast.optim:Optimizer.step"
WRITE, FINISH = "cai_fast.checkpoint:_write", "cai_fast.rundir:RunDir.finish"  # _write: three files a checkpoint
RENAMED = "cai_fast.checkpoint:fsync_dir"  # twice a checkpoint: before it gets its name, before old ones are removed
EXPORT = "cai_fast.model.hf:_write_shards"
TICK = "cai_fast.pipeline:Context.tick"  # an answer is finished while others of its chunk or iteration are not
TERM = "term"


class Undisturbed(NamedTuple):
    """Run folders: `before[stage]`, where all earlier stages are done, and `after[stage]`."""

    forks: Forks
    inputs: Path
    before: dict[str, Path]
    after: dict[str, Path]

    def run(self, folder: Path, stage: str, fault: Fault | None = None, **settings: Any) -> Run:
        words = kill_campaign.command(self.inputs, folder, stages=stage, **settings)
        return self.forks.run(words, fault=fault)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    inputs, root = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("runs")
    kill_campaign.write_inputs(inputs)
    with Forks() as forks:
        whole = Undisturbed(forks, inputs, {}, {})
        for stage in STAGES:
            whole.before[stage] = whole.after[STAGES[STAGES.index(stage) - 1]] if whole.after else root / "nothing"
            whole.after[stage] = root / stage
            copy(whole.before[stage], whole.after[stage])
            done = whole.run(whole.after[stage], stage)
            assert done.code == 0, done.text
        yield whole


def copy(source: Path, target: Path) -> None:
    """A run folder as it is, with the times of its files; nothing where there is none yet."""
    if source.exists():
        shutil.copytree(source, target)


@pytest.mark.parametrize(("stage", "faults"), [
    ("revise", [Fault(APPEND, 6), Fault(APPEND, 3, "torn"), Fault(APPEND, 12), Fault(FINISH)]),
    ("label", [Fault(APPEND, 3), Fault(APPEND, 2, "torn"), Fault(FINISH)]),
    ("sft", [Fault(WRITE, 3), Fault(RENAMED, 2), Fault(EXPORT)]),
    # Every second step is saved. pm takes three and pm_eval four steps, one after the other.
    ("pm", [Fault(STEP, 4), Fault(WRITE, 2), Fault(RENAMED, 2), Fault(EXPORT, 2), Fault(FINISH)]),
    # Two minibatches an iteration, one step each of policy and critic: the fourteenth is the critic's in iteration 3.
    ("rl", [Fault(STEP, 14), Fault(WRITE, 2), Fault(APPEND, 6, "torn"), Fault(RENAMED, 1), Fault(EXPORT)]),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_killed_stages_resume_to_the_same_bits(
    undisturbed: Undisturbed, tmp_path: Path, stage: str, faults: list[Fault]
) -> None:
    folder = tmp_path / "run"
    copy(undisturbed.before[stage], folder)
    for fault in faults:
        killed = undisturbed.run(folder, stage, fault)
        assert killed.code == kill_campaign.KILLED, f"{fault}: {killed.text}"
        assert kill_campaign.stage_of(folder) == stage
        assert list((folder / "journal").iterdir()), "nothing was kept"
    last = undisturbed.run(folder, stage)
    assert last.code == 0, last.text
    assert kill_campaign.differences(folder, undisturbed.after[stage]) == []


@pytest.mark.parametrize(("stage", "fault", "kept"), [
    ("revise", Fault(APPEND, 6, TERM), "revise.0.jsonl"), ("pm", Fault(STEP, 1, TERM), "pm.state/step_1"),
    ("rl", Fault(STEP, 10, TERM), "rl_stopped.state/step_3"),
    # Four answers an iteration: what iteration 2 has trained is kept, the answers of the next one are not.
    ("revise", Fault(TICK, 50, TERM), "revise.0.jsonl"), ("rl", Fault(TICK, 14, TERM), "rl_stopped.state/step_3"),
])  # fmt: skip
def test_sigterm_saves_the_state_and_ends(
    undisturbed: Undisturbed, tmp_path: Path, stage: str, fault: Fault, kept: str
) -> None:
    folder = tmp_path / "run"
    copy(undisturbed.before[stage], folder)
    stopped = undisturbed.run(folder, stage, fault)
    assert stopped.code == 143, stopped.text
    assert stopped.text.count("Stopped by a signal") == 1
    assert "Traceback" not in stopped.text and "error" not in stopped.text
    assert (folder / "journal" / kept).exists()
    last = undisturbed.run(folder, stage)
    assert last.code == 0, last.text
    assert kill_campaign.differences(folder, undisturbed.after[stage]) == []


def test_a_guard_never_falls_back_to_a_policy_that_a_stop_saved_unjudged(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    settings = {"guards__max_kl": 1e-9}  # so that the guard stops at the first policy that was trained
    for name, fault in (("whole", None), ("stopped", Fault(TICK, 6, TERM))):
        copy(undisturbed.before["rl"], tmp_path / name)
        code = undisturbed.run(tmp_path / name, "rl", fault, **settings).code
        assert code == (143 if fault else 0)
    assert (tmp_path / "stopped" / "journal" / "rl_stopped.state" / "step_1").is_dir()
    assert undisturbed.run(tmp_path / "stopped", "rl", **settings).code == 0
    assert kill_campaign.differences(tmp_path / "stopped", tmp_path / "whole") == []
    summary = json.loads((tmp_path / "whole" / "manifest.json").read_text())["stages"]["rl"]["summary"]
    assert "max_kl" in summary["guard"] and summary["iterations"] == 0


def test_differences_are_seen(undisturbed: Undisturbed, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.after["rl"], tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "pm" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (tmp_path / "run" / "left.tmp").touch()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(lines + lines.splitlines()[0] + "\n")
    found = kill_campaign.differences(tmp_path / "run", undisturbed.after["rl"])
    assert [line.split(":")[0] for line in found] == ["left.tmp", "checkpoints/pm/model.safetensors", "metrics.jsonl"]
