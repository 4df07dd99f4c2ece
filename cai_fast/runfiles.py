"""A run folder as a reader sees it: manifest, settings, constitutions and rows; nothing is locked or written."""

from fnmatch import fnmatchcase as fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cai_fast import config, constitution, records
from cai_fast.config import Config
from cai_fast.constitution import Constitution
from cai_fast.errors import InputError
from cai_fast.hashing import MODEL_FILES, hash_json
from cai_fast.inputs import kind, parse_toml, read_bytes, read_json
from cai_fast.records import Record
from cai_fast.rundir import CONSTITUTIONS, SNAPSHOT, check_manifest

T = TypeVar("T", bound=Record)
MADE = ("sl_cai", "pm", "pm_eval", "rl_cai")  # roles that are checkpoints of the run itself


class RunFiles:
    """What a run folder holds; InputError where `folder` is none."""

    def __init__(self, folder: str | Path) -> None:
        self.root = Path(folder)
        path = self.root / "manifest.json"
        if not kind(path):
            raise InputError(f"{folder}: no run folder (it has no manifest.json); expected the --run-dir of a run")
        self.stages: dict[str, Any] = check_manifest(path, read_json(path))["stages"]

    @cached_property
    def config(self) -> Config:
        """The settings of the newest start, as far as this version has them."""
        path = self.root / "config.toml"
        tree = parse_toml(read_bytes(path), path)
        known: dict[str, Any] = {name: tree[name] for name in config.TOP_LEVEL if name in tree}
        for name in set(config.SECTIONS) & set(tree):
            keys = config.SECTIONS[name]().values()
            known[name] = {key: value for key, value in dict(tree[name]).items() if key in keys}
        return config.build(known)

    def finished(self, stage: str) -> dict[str, Any]:
        """The manifest's record of a finished stage; InputError for any other."""
        record = self.stages.get(stage, {"status": "not run"})
        if record["status"] != "finished":
            raise InputError(f"{self.root}: stage {stage} is not finished ({record['status']}); finish the run first")
        return record

    def rows(self, name: str, cls: type[T]) -> list[T]:
        """All rows of a file, none where it does not exist."""
        path = self.root / name
        return records.read_jsonl(path, cls) if kind(path) else []

    def json(self, name: str) -> Any:
        """The value of a JSON file."""
        return read_json(self.root / name)

    def tokens(self, name: str) -> dict[str, tuple[list[int], list[float] | None]]:
        """A token side file, empty where it does not exist."""
        path = self.root / "tokens" / f"{name}.safetensors"
        return records.read_tokens(path) if kind(path) else {}

    def constitution(self, digest: str) -> Constitution:
        """The constitution with this hash: as the run keeps it, else from its source if that is still the same."""
        path = self.root / CONSTITUTIONS / f"{digest}.json"
        source = self.config.data.constitution
        found = Constitution.from_json(read_json(path), str(path)) if kind(path) else constitution.load(source)
        if found.hash != digest:
            where = path if kind(path) else f"constitution {source}, which this run did not keep,"
            raise InputError(f"{where}: expected the constitution {digest} of the run, found {found.hash}")
        return found

    def constitution_hash(self) -> str:
        """Hash of the constitution that the run's newest stage used."""
        used = [self.stages[s]["inputs"].get("constitution") for s in config.STAGES if s in self.stages]
        if not used or not isinstance(used[-1], str):
            raise InputError(f"{self.root}: no stage of this run has begun; run it first")
        return used[-1]

    def model_folder(self, role: str) -> Path:
        """Where the model in `role` is or was: a checkpoint of the run, or the folder that its settings name."""
        if role in MADE or role.startswith(SNAPSHOT):
            return self.root / "checkpoints" / role
        name = self.config.role(role)
        return self.root / "checkpoints" / "base" if name == "toy" else Path(name)

    def policy(self, step: int) -> str:
        """The role of the policy after so many iterations of RL, empty where no checkpoint of it was made."""
        if step == 0:
            return "sl_cai"
        if step == self.stages.get("rl", {}).get("summary", {}).get("iterations"):
            return "rl_cai"
        return name if kind(self.model_folder(name := f"{SNAPSHOT}{step:05}")) else ""

    def made_hash(self, role: str) -> str:
        """`hash_model` of a checkpoint of the run when its stage had finished; empty where there was none."""
        files = {Path(n): f for r in self.stages.values() for n, f in r.get("outputs", {}).items()}
        mine = {p.name: f["sha256"] for p, f in files.items() if p.parent == Path("checkpoints", role)}
        found = {name: digest for name, digest in mine.items() if any(fnmatch(name, p) for p in MODEL_FILES)}
        return hash_json(found) if found else ""
