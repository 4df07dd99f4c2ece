"""Whatever a user's file holds, its reader takes it or answers with one InputError that names it: see bench.fuzz."""

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from bench import fuzz, fuzz_targets, mutations
from cai_fast import config, preflight
from cai_fast.errors import InputError
from cai_fast.inputs import kind, read_bytes

CASES = 4  # a target and session; the campaign below has thousands


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, fuzz.Target]]:
    """In a folder that other users may enter, so that a file of its own can be one that they may not read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield fuzz_targets.targets(Path(folder))


def test_good_input_is_read(targets: dict[str, fuzz.Target], tmp_path: Path) -> None:
    for name, target in targets.items():
        if target.file:
            data = (target.seed / target.file).read_bytes()
            assert fuzz.judge(target, data, tmp_path / "case") == "read", name


def test_broken_input_is_read_or_refused(targets: dict[str, fuzz.Target]) -> None:
    total = sum((fuzz.run(target, CASES, seed=1) for target in targets.values()), start=fuzz.Counter())
    assert total.total() >= CASES * len(targets) >= 100
    assert min(total["read"], total["refused"]) > 20, "cases of one outcome alone test little"


@pytest.mark.slow
def test_ten_thousand_broken_inputs(tmp_path: Path) -> None:
    result = fuzz.campaign(tmp_path, 10_000, seed=2)
    assert result["problems"] == [] and result["cases"] >= 10_000


def test_what_is_no_file_is_refused_everywhere(targets: dict[str, fuzz.Target], tmp_path: Path) -> None:
    may_be_absent = {"added_tokens.json", "special_tokens_map.json", "generation_config.json", "tokenizer_config.json",
                     "environment.json", "metrics.jsonl", "sft.0.jsonl", "manifest.json"}  # fmt: skip
    for name, target in targets.items():
        for what in mutations.SPECIALS if target.file else ():
            outcome = fuzz.judge(target, mutations.Special(what), tmp_path / "case")
            absent = what in ("absent", "dangling link") and Path(target.file).name in may_be_absent
            assert outcome == "refused" or absent, f"{name}: {what}"


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom the rights of files bind, which are nothing to root."""
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)


def test_a_file_without_permission_is_refused(targets: dict[str, fuzz.Target]) -> None:
    with without_rights():
        if not os.access(Path(__file__), os.R_OK, effective_ids=True):
            pytest.skip("another user cannot read this checkout, let alone a file of the test")
    for name in ("configuration", "constitution", "prompts", "prompts.gz", "labels", "hhh", "Label.jsonl", "weights",
                 "checkpoint/config.json", "chat/tokenizer.json", "chat/generation_config.json"):  # fmt: skip
        target = targets[name]
        case = target.seed.parent / "case"
        fuzz.place(target, (target.seed / target.file).read_bytes(), case)
        (case / target.file).chmod(0)
        with without_rights(), pytest.raises(InputError, match=Path(target.file).name) as caught:
            target.read(case)
        assert "Permission denied" in str(caught.value), name
        shutil.rmtree(case)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "file/below"])
def test_a_name_that_no_file_can_have_is_that_of_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert kind(tmp_path / name) == ""
    with pytest.raises(InputError, match="no such file"):
        read_bytes(tmp_path / name)


def test_what_a_path_leads_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert (kind(tmp_path), kind(tmp_path / "file"), kind("/dev/null")) == ("folder", "file", "special")
    with pytest.raises(InputError, match="loop: cannot be read: Too many levels of symbolic links"):
        kind(tmp_path / "loop")
    with pytest.raises(InputError, match="/dev/zero: no regular file"):
        read_bytes("/dev/zero")


def test_long_names_of_everything_are_one_message() -> None:
    for words in (["--model.base", "x" * 300], ["--data.constitution", "x" * 300], ["--data.red_team", "x" * 300]):
        cfg = config.load([*words, "--run-dir", "x" * 300, "--stages", "revise"])
        with pytest.raises(InputError):
            preflight.check(cfg)


def reader(answer: Any) -> fuzz.Target:
    """A target whose reader raises `answer`, or calls it with a number of seconds."""

    def read(_: Any) -> None:
        if isinstance(answer, BaseException):
            raise answer
        answer(30)

    return fuzz.Target(Path(), "", st.just(30), read, ("rows.jsonl",))


@pytest.mark.parametrize(("answer", "problem"), [
    (KeyError("id"), "KeyError"), (InputError("bad"), "names none of"), (time.sleep, "Hang"),
    (InputError("rows.jsonl" + "x" * 9000), "a message of 9010 characters"),
])  # fmt: skip
def test_bad_answers_are_problems(answer: Any, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "LIMIT", 0.1)
    with pytest.raises(fuzz.Problem, match=problem):
        fuzz.judge(reader(answer), 30, tmp_path)
    assert [problem in text for text in fuzz.run(reader(answer), 5, seed=0, collect=True)] == [True]


def test_special_files_are_what_they_say(tmp_path: Path) -> None:
    for what in mutations.SPECIALS:
        mutations.Special(what).make(tmp_path / what)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and (tmp_path / "folder").is_dir()
    assert (tmp_path / "loop").is_symlink() and not (tmp_path / "dangling link").exists()
