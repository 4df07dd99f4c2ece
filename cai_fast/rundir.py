"""The run folder: lock, configuration check, and a manifest of what each stage read and wrote.

manifest.json holds, per stage: status ("started" or "finished"), settings, inputs (settings and hashes of what it
read), outputs (bytes and sha256 per file), summary, times. It is replaced atomically, only after the outputs it lists
are on disk, so it is true at every instant. With several ranks, rank 0 alone writes.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import cai_fast
from cai_fast import config
from cai_fast.distributed import Distributed
from cai_fast.errors import InputError
from cai_fast.files import fsync_dir, hash_file, write_atomic
from cai_fast.hashing import REHASH_BELOW, facts_of, files_of, hash_json
from cai_fast.inputs import kind, read_json
from cai_fast.records import Journal
from cai_fast.runlog import truncate_metrics

CONSTITUTIONS = "constitutions"  # the text of every constitution that rows refer to, by its hash
OWN_FILES = {".lock", "config.toml", "environment.json", "manifest.json", "metrics.jsonl", "journal", CONSTITUTIONS}
SNAPSHOT = "rl_cai_step_"  # checkpoints of policies along RL: iterations follow, in five digits
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def folder_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    total = 0
    for file in Path(path).rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # gone since
            total += file.stat().st_size if file.is_file() else 0
    return total


def require_free(path: str | os.PathLike[str], size: int) -> None:
    """InputError unless `path` (or its nearest existing parent) can be written to and has `size` bytes free."""
    place = Path(path).absolute()
    while not kind(place) and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {place} is not a folder that can be written to; choose another --run-dir")
    free = shutil.disk_usage(place).free
    if free < size:
        raise InputError(
            f"{path}: about {size / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free; "
            "free some space or choose another --run-dir"
        )


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Leaves in which two JSON values differ, as "key: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(old) + [k for k in new if k not in old]
        found = (_differences(old.get(k, "(absent)"), new.get(k, "(absent)"), f"{name}.{k}".lstrip(".")) for k in keys)
        return [line for lines in found for line in lines]
    return [] if old == new else [f"{name[:80]}: {json.dumps(old):.200} -> {json.dumps(new):.200}"]


def _environment(dist: Distributed) -> dict[str, Any]:
    """What a result may depend on besides the configuration."""
    versions = {"python": platform.python_version(), "cai_fast": cai_fast.__version__}
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    cuda = dist.device.type == "cuda"
    device = torch.cuda.get_device_name(dist.device) if cuda else platform.processor() or platform.machine()
    return {"versions": versions, "cuda": torch.version.cuda, "device": device, "ranks": dist.world,
            "threads": torch.get_num_threads(), "platform": platform.platform()}  # fmt: skip


def check_manifest(path: Path, manifest: Any) -> dict[str, Any]:
    """`manifest`, if every part is as this module writes it: files are deleted by the names that it holds."""

    def need(holds: bool, place: str, expected: str) -> None:
        if not holds:
            raise InputError(f"{path}: {place}: expected {expected}; restore it or choose another --run-dir")

    need(isinstance(manifest, dict) and manifest.get("version") == 1, "version", "1")
    stages = manifest.get("stages")
    need(isinstance(stages, dict) and set(stages) <= set(config.STAGES), "stages", "a record for some of the stages")
    for stage, record in stages.items():
        need(isinstance(record, dict), stage, "an object")
        finished = record.get("status") == "finished"
        need(finished or record.get("status") == "started", f"{stage}.status", "started or finished")
        need(type(record.get("starts")) is int, f"{stage}.starts", "a whole number")
        for part in ("settings", "inputs", *(("outputs", "summary") if finished else ())):
            need(isinstance(record.get(part), dict), f"{stage}.{part}", "an object")
        for name, facts in record.get("outputs", {}).items():
            place = f"{stage}.outputs.{name[:80]}"
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
            need(inside and name not in OWN_FILES, place, "the name of a file in the run folder")
            types = {"bytes": int, "mtime_ns": int, "sha256": str}
            exact = isinstance(facts, dict) and {key: type(value) for key, value in facts.items()} == types
            need(exact, place, ", ".join(types))
    return manifest


class RunDir:
    """An open run folder. `open`, `is_done`, `begin`, `finish` are collective: call them on every rank."""

    def __init__(self, path: Path, cfg: config.Config, dist: Distributed):
        self.root, self.cfg, self.dist = path, cfg, dist
        self.lock: int | None = None  # a descriptor, not a file object: it lives until `close` or the process ends
        self.ready = False  # whether there is a manifest
        self.verified: set[str] = set()
        self.began: dict[str, float] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], cfg: config.Config, *, restart_from: str | None = None,
             dist: Distributed | None = None) -> "RunDir":  # fmt: skip
        """Create or reopen the folder; `restart_from` first forgets that stage and all later ones."""
        run = cls(Path(path), cfg, dist or Distributed(0, 1, torch.device("cpu")))
        run.dist.on_main(lambda: run._open(restart_from))
        return run

    def close(self) -> None:
        """Let another process have the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _open(self, restart_from: str | None) -> None:
        try:
            self._prepare(restart_from)
        except OSError as error:
            self.close()
            raise InputError(
                f"{self.root}: expected a folder that can be created and written to, got: {error.strerror}; "
                "choose another --run-dir"
            ) from error
        except InputError:
            self.close()
            raise

    def _prepare(self, restart_from: str | None) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        foreign = sorted(p.name for p in self.root.iterdir() if p.name not in OWN_FILES and p.suffix != ".tmp")
        if foreign and not self.path("manifest.json").exists():
            raise InputError(
                f"{self.root}: this folder is no run folder (no manifest.json) and not empty "
                f"({', '.join(foreign[:3])}); choose an empty or new --run-dir"
            )
        self._take_lock()
        self._check_settings(restart_from)  # before anything is deleted
        write_atomic(self.path("manifest.json"), json.dumps(self._manifest(), indent=1))
        self.ready = True
        self.path("journal").mkdir(exist_ok=True)
        if restart_from:
            self.clear_from(restart_from)
        write_atomic(self.path("config.toml"), self.cfg.to_toml())
        self._record_environment()
        self.path("checkpoints").mkdir(exist_ok=True)

    def _take_lock(self) -> None:
        self.lock = os.open(self.path(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            owner = os.read(self.lock, 200).decode(errors="replace").strip()
            raise InputError(
                f"{self.root}: another process is using this run folder ({owner or 'unknown'}); "
                "wait for it, stop it, or choose another --run-dir"
            ) from error
        os.ftruncate(self.lock, 0)
        os.write(self.lock, f"process {os.getpid()} on {platform.node()}\n".encode())

    def _check_settings(self, restart_from: str | None) -> None:
        stages = self._manifest()["stages"]
        for stage in config.STAGES:
            if stage == restart_from:
                return
            if stage in stages:
                self._check_same(stage, stages[stage], "settings", self._settings(stage))

    def _check_same(self, stage: str, record: dict[str, Any], part: str, new: Any) -> None:
        changed = _differences(record[part], new)
        if changed:
            more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
            raise InputError(
                f"{self.root}: stage {stage} was {record['status']} with other {part}: "
                f"{'; '.join(changed[:8])}{more} (recorded -> now). Undo the change, choose another --run-dir, or "
                f"redo this stage and all later ones with --restart-from {stage}"
            )

    def _settings(self, stage: str) -> Any:
        return json.loads(json.dumps(config.stage_settings(self.cfg, stage)))  # tuples become lists, as recorded

    def _record_environment(self) -> None:
        """A list, because a run may be continued on another machine: one entry per change."""
        path = self.path("environment.json")
        entries = read_json(path) if kind(path) else []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{path}: expected a list of objects; restore it or delete it")
        now = _environment(self.dist)
        if not entries or {k: v for k, v in entries[-1].items() if k != "since"} != now:
            write_atomic(path, json.dumps([*entries, {"since": round(time.time(), 3)} | now], indent=1))

    def _manifest(self) -> dict[str, Any]:
        path = self.path("manifest.json")
        if kind(path):
            return check_manifest(path, read_json(path))
        if self.ready:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return {"version": 1, "stages": {}}

    def _update(self, stage: str, record: dict[str, Any]) -> None:
        manifest = self._manifest()
        manifest["stages"][stage] = record
        write_atomic(self.path("manifest.json"), json.dumps(manifest, indent=1))

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(*parts)

    def keep(self, name: str, value: Any) -> None:
        """Write a JSON file that no stage makes, if it is not there: its name tells its content. Rank 0 only."""
        path = self.path(name)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")

    def rewrite(self, name: str, text: str) -> None:
        """Replace a file that a finished stage wrote, and what the manifest knows of it, while nobody else has the
        folder; a file of no stage is just written. Rank 0 only."""
        self._take_lock()
        try:
            write_atomic(self.path(name), text)
            for stage, record in self._manifest()["stages"].items():
                if name in record.get("outputs", {}):
                    self._update(stage, record | {"outputs": record["outputs"] | {name: facts_of(self.path(name))}})
        finally:
            self.close()

    def journal(self, name: str, rank: int) -> Journal:
        """Opens this rank's journal of finished rows. `name`: the stage, or stage-part ("revise-helpful")."""
        return Journal(self.path("journal", f"{name}.{rank}.jsonl"))

    def state_dir(self, name: str) -> Path:
        """Where a stage in progress (or a part of it, "pm_eval") keeps its TrainStates."""
        return self.path("journal", f"{name}.state")

    def progress(self, stage: str) -> list[Path]:
        """The journals and state folders of a stage and its parts."""
        return sorted(p for p in self.path("journal").iterdir() if re.split("[-_.]", p.name)[0] == stage)

    def record(self, stage: str) -> dict[str, Any] | None:
        """The manifest's entry of a stage, or None if it has not begun."""
        return self._manifest()["stages"].get(stage)

    def is_done(self, stage: str, inputs: dict[str, Any]) -> bool:
        """Has the stage finished with these inputs, outputs intact? Other inputs or damaged outputs: InputError."""
        return self.dist.on_main(lambda: self._is_done(stage, json.loads(json.dumps(inputs))))

    def _is_done(self, stage: str, inputs: dict[str, Any]) -> bool:
        record = self.record(stage)
        if record is None:
            return False
        self._check_same(stage, record, "inputs", inputs)
        if record["status"] != "finished":
            return False
        for name, facts in record["outputs"].items():
            self._verify(stage, name, facts)
        self._remove_progress(stage)  # of a process that was killed after it had recorded the stage
        return True

    def _verify(self, stage: str, name: str, facts: dict[str, Any]) -> None:
        if name in self.verified:
            return
        remedy = f"restore the file or redo the stage with --restart-from {stage}"
        path = self.path(name)
        if not path.is_file():
            raise InputError(f"{path}: missing, although stage {stage} has written it; {remedy}")
        stat = path.stat()
        same = stat.st_size == facts["bytes"]
        if same and (stat.st_size < REHASH_BELOW or stat.st_mtime_ns != facts["mtime_ns"]):
            same = hash_file(path) == facts["sha256"]
        if not same:
            raise InputError(f"{path}: altered since stage {stage} wrote it (size or sha256 differs); {remedy}")
        self.verified.add(name)

    def output_hash(self, name: str) -> str:
        """sha256 of a file, or over a folder, that a finished stage wrote; verified first. Not collective."""
        for stage, record in self._manifest()["stages"].items():
            facts = {n: f for n, f in record.get("outputs", {}).items() if n == name or n.startswith(name + "/")}
            for file, fact in facts.items():
                self._verify(stage, file, fact)
            if facts:
                whole = facts.get(name)
                return whole["sha256"] if whole else hash_json({n: f["sha256"] for n, f in facts.items()})
        raise InputError(f"{self.path(name)}: no finished stage has written it; run the stage that makes it first")

    def begin(self, stage: str, inputs: dict[str, Any]) -> None:
        """Record that the stage has started, or resume it; a first start removes left-overs of an older one."""
        self.dist.on_main(lambda: self._begin(stage, json.loads(json.dumps(inputs))))
        self.began[stage] = time.monotonic()

    def _begin(self, stage: str, inputs: dict[str, Any]) -> None:
        record = self.record(stage)
        if record is None:
            self._remove_progress(stage)
            truncate_metrics(self.path("metrics.jsonl"), (stage,))
            record = {"status": "started", "starts": 0, "started": round(time.time(), 3)}
            record |= {"settings": self._settings(stage), "inputs": inputs}
        self._check_same(stage, record, "inputs", inputs)
        self._update(stage, record | {"starts": record["starts"] + 1})

    def finish(self, stage: str, outputs: list[str], summary: dict[str, Any]) -> None:
        """Record the stage's outputs (files or folders, relative to the run folder), then drop its progress files."""
        self.dist.barrier()  # every rank has written its part
        self.dist.on_main(lambda: self._finish(stage, outputs, summary))

    def _finish(self, stage: str, outputs: list[str], summary: dict[str, Any]) -> None:
        facts: dict[str, Any] = {}
        for path in (file for name in outputs for file in files_of(self.path(name))):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # whoever wrote it may not have
            facts[path.relative_to(self.root).as_posix()] = facts_of(path)
        for folder in {self.path(name).parent for name in facts}:
            fsync_dir(folder)
        now = {"status": "finished", "finished": round(time.time(), 3)}
        now["seconds"] = round(time.monotonic() - self.began[stage], 3)  # since the last start
        self._update(stage, (self.record(stage) or {}) | now | {"outputs": facts, "summary": summary})
        self.verified |= set(facts)
        self._remove_progress(stage)

    def _remove_progress(self, stage: str) -> None:
        for path in self.progress(stage):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def clear_from(self, stage: str) -> None:
        """Forget `stage` and all later stages and delete what they wrote. Rank 0 only."""
        if stage not in config.STAGES:
            raise InputError(f"--restart-from {stage}: expected one of {', '.join(config.STAGES)}")
        later = config.STAGES[config.STAGES.index(stage) :]
        manifest = self._manifest()
        removed = {s: manifest["stages"].pop(s) for s in later if s in manifest["stages"]}
        write_atomic(self.path("manifest.json"), json.dumps(manifest, indent=1))  # first: it must not name lost files
        for name in (n for record in removed.values() for n in record.get("outputs", {})):
            self.verified.discard(name)
            self.path(name).unlink(missing_ok=True)
        for name in later:
            self._remove_progress(name)
        if "rl" in later:
            self.drop_snapshots()
        truncate_metrics(self.path("metrics.jsonl"), later)

    def snapshots(self, start: int = 0) -> list[Path]:
        """Checkpoints of the policies after `start` iterations of RL and later, those half written among them."""
        found = self.path("checkpoints").glob(SNAPSHOT + "[0-9]*")
        return sorted(p for p in found if int(re.split("[_.]", p.name)[3]) >= start)

    def drop_snapshots(self, start: int = 0) -> None:
        """Delete them. Rank 0 only."""
        for folder in self.snapshots(start):
            shutil.rmtree(folder)
