"""The run folder: one process, one configuration, and a manifest that is true at every instant."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cai_fast import config, files
from cai_fast.errors import InputError
from cai_fast.hashing import hash_model
from cai_fast.rundir import RunDir, require_free
from cai_fast.runlog import RunLog

ROOT = Path(__file__).resolve().parents[1]
CFG = config.load([])
INPUTS = {"settings": {"a": (1, 2)}, "files": {"prompts.jsonl": "00"}}


def reopen(run: RunDir, cfg: config.Config = CFG, **more) -> RunDir:
    run.close()
    return RunDir.open(run.root, cfg, **more)


def finish(run: RunDir, stage: str, name: str, text: str = "data\n") -> None:
    run.begin(stage, INPUTS)
    run.path(name).parent.mkdir(exist_ok=True, parents=True)
    run.path(name).write_text(text)
    run.finish(stage, [name], {"rows": 1})


@pytest.fixture
def run(tmp_path):
    return RunDir.open(tmp_path / "runs" / "x", CFG)


@pytest.fixture(autouse=True)
def close_all(monkeypatch):
    """A lock lives as long as its process, unless closed."""
    opened, real = [], RunDir._prepare
    monkeypatch.setattr(RunDir, "_prepare", lambda self, *args: (opened.append(self), real(self, *args))[1])
    yield
    for run in opened:
        run.close()


def test_a_new_folder_is_private_and_complete(run):
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
    assert {p.name for p in run.root.iterdir()} == {
        ".lock", "config.toml", "environment.json", "manifest.json", "journal", "checkpoints"
    }  # fmt: skip
    assert config.load(["--config", str(run.path("config.toml"))]).sft == CFG.sft
    (environment,) = json.loads(run.path("environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["ranks"] == 1


def test_a_stage_is_done_once_finished(run):
    assert not run.is_done("revise", INPUTS)
    run.begin("revise", INPUTS)
    assert not run.is_done("revise", INPUTS)
    finish(run, "revise", "revisions.jsonl")
    assert run.is_done("revise", INPUTS)
    again = reopen(run)
    assert again.is_done("revise", INPUTS)
    record = again.record("revise")
    assert record["summary"] == {"rows": 1} and record["starts"] == 2
    assert record["outputs"]["revisions.jsonl"]["bytes"] == 5
    assert again.output_hash("revisions.jsonl") == files.hash_file(run.path("revisions.jsonl"))
    assert len(json.loads(run.path("environment.json").read_text())) == 1


def test_folders_are_outputs_too(run):
    run.begin("sft", INPUTS)
    for name in ("config.json", "sub/model.safetensors"):
        run.path("checkpoints", "sl_cai", name).parent.mkdir(parents=True, exist_ok=True)
        run.path("checkpoints", "sl_cai", name).write_text(name)
    run.finish("sft", ["checkpoints/sl_cai"], {})
    first = run.output_hash("checkpoints/sl_cai")
    assert set(run.record("sft")["outputs"]) == {
        "checkpoints/sl_cai/config.json", "checkpoints/sl_cai/sub/model.safetensors"
    }  # fmt: skip
    run.path("checkpoints/sl_cai/config.json").write_text("changed")
    with pytest.raises(InputError, match=r"config\.json: altered since stage sft"):
        reopen(run).output_hash("checkpoints/sl_cai")
    assert len(first) == 64
    with pytest.raises(InputError, match="no finished stage has written it"):
        run.output_hash("checkpoints/sl")


@pytest.mark.parametrize(("harm", "message"), [
    (lambda p: p.unlink(), "missing, although stage revise has written it"),
    (lambda p: p.write_text("Data\n"), "altered since stage revise"),
    (lambda p: p.write_text("data\ndata\n"), "altered since stage revise"),
])  # fmt: skip
def test_damaged_outputs_are_named_with_the_remedy(run, harm, message):
    finish(run, "revise", "revisions.jsonl")
    harm(run.path("revisions.jsonl"))
    with pytest.raises(InputError, match=rf"revisions\.jsonl: {message}.*--restart-from revise"):
        reopen(run).is_done("revise", INPUTS)


def test_copied_folder_is_as_good(run, tmp_path):
    finish(run, "revise", "revisions.jsonl")
    shutil.copytree(run.root, tmp_path / "copy")
    assert RunDir.open(tmp_path / "copy", CFG).is_done("revise", INPUTS)


def test_other_inputs_are_refused(run):
    finish(run, "revise", "revisions.jsonl")
    changed = {"settings": {"a": [1, 3]}, "files": {"prompts.jsonl": "00"}}
    with pytest.raises(InputError, match=r"stage revise was finished with other inputs: settings\.a: \[1, 2\] -> "):
        run.is_done("revise", changed)
    run.begin("sft", INPUTS)
    with pytest.raises(InputError, match="stage sft was started with other inputs"):
        run.begin("sft", changed)


def test_other_configuration_names_first_stage_keys_and_remedy(run):
    for stage in ("revise", "sft", "pm"):
        finish(run, stage, f"{stage}.txt")
    other = config.load(["--sft.epochs", "7", "--pm.epochs", "9", "--sft.micro_tokens", "4096"])
    with pytest.raises(InputError) as error:
        reopen(run, other)
    text = str(error.value)
    assert "stage sft was finished with other settings" in text and "--restart-from sft" in text
    assert f"sft.epochs: {json.dumps(CFG.sft.epochs)} -> 7" in text
    assert "pm.epochs" not in text and "micro_tokens" not in text
    assert run.path("sft.txt").exists() and 'preset = "toy"' in run.path("config.toml").read_text()
    with pytest.raises(InputError, match="stage sft"):  # an earlier stage differs: nothing may be deleted
        reopen(run, other, restart_from="pm")
    assert run.path("pm.txt").exists() and "pm" in json.loads(run.path("manifest.json").read_text())["stages"]
    again = reopen(run, other, restart_from="sft")
    assert again.record("revise") and not again.record("sft") and not again.record("pm")
    assert not run.path("sft.txt").exists() and run.path("revise.txt").exists()
    assert "epochs = 7" in run.path("config.toml").read_text()


def test_seed_belongs_to_every_stage(run):
    finish(run, "revise", "revisions.jsonl")
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        reopen(run, config.load(["--seed", "1"]))


def test_restart_forgets_progress_and_metrics(run):
    finish(run, "revise", "revisions.jsonl")
    run.begin("sft", INPUTS)
    for name in ("sft", "sft-part"):
        with run.journal(name, 1) as journal:
            journal.append({"id": name})
    for name in ("sft", "sft_eval"):
        run.state_dir(name).mkdir()
    log = RunLog(run.path("metrics.jsonl"))
    for stage in ("revise", "sft"):
        log.metrics(stage, 1, {})
    run.begin("sft", INPUTS)  # resuming keeps them
    names = ["sft-part.1.jsonl", "sft.1.jsonl", "sft.state", "sft_eval.state"]
    assert [p.name for p in run.progress("sft")] == names
    again = reopen(run, restart_from="sft")
    assert again.progress("sft") == []
    assert [json.loads(x)["stage"] for x in log.path.read_text().splitlines()] == ["revise"]
    with pytest.raises(InputError, match="--restart-from nonsense: expected one of base, revise"):
        reopen(again, restart_from="nonsense")


def test_first_start_removes_left_overs(run):
    """A kill between forgetting a stage and deleting its journal must not feed old rows to the new stage."""
    run.journal("revise", 0).close()
    run.begin("revise", INPUTS)
    assert run.progress("revise") == []


def test_finish_drops_progress(run):
    run.begin("revise", INPUTS)
    run.journal("revise", 0).close()
    assert len(run.progress("revise")) == 1
    finish(run, "revise", "revisions.jsonl")
    assert run.progress("revise") == []


def test_progress_that_a_kill_left_behind_a_finished_stage_is_dropped(run, monkeypatch):
    run.begin("revise", INPUTS)
    run.journal("revise", 0).close()
    with monkeypatch.context() as killed:
        killed.setattr(RunDir, "_remove_progress", lambda self, stage: None)
        finish(run, "revise", "revisions.jsonl")
    again = reopen(run)
    assert len(again.progress("revise")) == 1 and again.is_done("revise", INPUTS) and again.progress("revise") == []


HOLDER = """
import sys, time
from cai_fast import config
from cai_fast.rundir import RunDir
run = RunDir.open(sys.argv[1], config.load([]))
print("open", flush=True)
time.sleep(60)
"""


def test_second_process_is_refused_until_the_first_is_killed(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        before, started = (tmp_path / "manifest.json").stat(), time.monotonic()
        with pytest.raises(InputError, match=f"another process is using .*process {holder.pid} on"):
            RunDir.open(tmp_path, CFG, restart_from="base")
        assert time.monotonic() - started < 1
        assert (tmp_path / "manifest.json").stat() == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=30)
    RunDir.open(tmp_path, CFG)


def test_second_open_in_one_process_is_refused(run):
    with pytest.raises(InputError, match="another process is using"):
        RunDir.open(run.root, CFG)
    reopen(run).close()


def test_unusable_folders_are_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: expected a folder .*Not a directory.*--run-dir"):
        RunDir.open(tmp_path / "file" / "run", CFG)
    mine = tmp_path / "home"
    mine.mkdir()
    (mine / "thesis.txt").write_text("")
    with pytest.raises(InputError, match=r"no run folder .*thesis\.txt"):
        RunDir.open(mine, CFG)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    if os.geteuid():  # root may write anywhere
        mine.joinpath("thesis.txt").unlink()
        mine.chmod(0o500)
        with pytest.raises(InputError, match="Permission denied"):
            RunDir.open(mine, CFG)


def test_broken_manifest_is_named(run):
    run.path("manifest.json").write_text('{"version": 1, "sta')
    with pytest.raises(InputError, match=r"manifest\.json: not JSON"):
        reopen(run)


def test_disk_estimate(tmp_path):
    require_free(tmp_path / "not" / "yet", 1)
    with pytest.raises(InputError, match=r"1000000000\.0 GB of disk are needed, \d.* are free"):
        require_free(tmp_path / "not" / "yet", 10**18)


CRASH = """
import os, sys
from cai_fast import config, files
from cai_fast.rundir import RunDir
for limit in range(0, 400, 5):
    pid = os.fork()
    if pid == 0:
        break
    status = os.waitpid(pid, 0)[1]
    print(limit, status, flush=True)
    if not status:
        sys.exit()
calls = 0
def dying(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls > limit:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    return call
for name in ("replace", "fsync", "unlink", "mkdir", "open"):
    setattr(os, name, dying(getattr(os, name)))
run = RunDir.open(f"{sys.argv[1]}/{limit}", config.load([]))
for stage in ("revise", "sft"):
    if not run.is_done(stage, {"n": 1}):
        run.begin(stage, {"n": 1})
        files.write_atomic(run.path(stage + ".jsonl"), stage)
        run.finish(stage, [stage + ".jsonl"], {})
os._exit(0)
"""


def test_kill_at_every_file_operation_leaves_a_true_manifest(tmp_path):
    """Processes die before their k-th file operation; the folder must open and tell the truth every time."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", CRASH, tmp_path], env=env, capture_output=True, text=True, timeout=60)
    statuses = [tuple(map(int, line.split())) for line in out.stdout.splitlines()]
    assert len(statuses) > 10 and statuses[-1][1] == 0, out.stderr
    history = []
    for limit, status in statuses:
        assert status in (0, signal.SIGKILL)
        run = RunDir.open(tmp_path / str(limit), CFG)
        history.append([stage for stage in ("revise", "sft") if run.is_done(stage, {"n": 1})])  # verifies hashes
        run.close()
    assert history == sorted(history) and history[0] == [] and history[-1] == ["revise", "sft"]
    assert ["revise"] in history


def test_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_hash_of_a_model_follows_its_content(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "model.safetensors").write_text("weights")
    (tmp_path / "b" / "README.md").write_text("not part of the model")
    first = hash_model(tmp_path / "a")
    assert hash_model(tmp_path / "b") == first
    (tmp_path / "b" / "model.safetensors").write_text("Weights")
    assert hash_model(tmp_path / "b") != first
    with pytest.raises(InputError, match="found no weights"):
        hash_model(tmp_path / "absent")
