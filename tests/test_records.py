"""Records round-trip exactly, refuse what is not theirs, and files survive torn writes."""

import json
import os

import pytest

from cai_fast.errors import InputError
from cai_fast.records import (
    Comparison,
    Helpful,
    Journal,
    Label,
    PrincipleLabel,
    Prompt,
    Revision,
    Rollout,
    Round,
    Turn,
    content_id,
    read_jsonl,
    read_tokens,
    write_jsonl,
    write_tokens,
)

PROMPT = Prompt("p1", "red_team", (Turn("human", 'Grüße \u2028 "x"\n'),), "file", "train")
RECORDS = [
    PROMPT,
    Revision("r", "p1", " a ", (Round("k", "c", "v"), Round("k", "", "w")), False, "empty", {"key": 2**62}),
    Helpful("h", "p1", "text", {"model": "m"}),
    Comparison("c", "p1", "harmless", "ai", "a", "b", "eval"),
    Label("l", "c", 0.25, (PrincipleLabel("k", 0.1, None, ("why",)),), (0.4, 0.6)),
    Rollout("o", "p1", 3, "text", -1.5, 0.25, 1),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_record_round_trips_through_a_file(record, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [record, record])
    assert read_jsonl(tmp_path / "x.jsonl", type(record)) == [record, record]
    assert len((tmp_path / "x.jsonl").read_bytes().split(b"\n")) == 3, "one line a record, whatever the text holds"
    assert os.listdir(tmp_path) == ["x.jsonl"], "no temporary file stays behind"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": 1}, "unknown field 'extra'"),
        ({"split": None}, "expected one of train, eval"),
        ({"id": 7}, "expected str"),
        ({"turns": "x"}, "expected a list"),
        ({"turns": [{"role": "system", "text": "x"}]}, r"turns\[0\].role: expected one of human, assistant"),
    ],
)
def test_reading_is_strict(change, message):
    with pytest.raises(InputError, match=message):
        Prompt.from_json(PROMPT.to_json() | change)


def test_missing_field_and_bad_line_name_the_place(tmp_path):
    row = PROMPT.to_json()
    del row["kind"]
    (tmp_path / "x.jsonl").write_text(json.dumps(PROMPT.to_json()) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match="line 2: Prompt lacks the field 'kind'"):
        read_jsonl(tmp_path / "x.jsonl", Prompt)
    (tmp_path / "x.jsonl").write_text("{")
    with pytest.raises(InputError, match="line 1: not JSON"):
        read_jsonl(tmp_path / "x.jsonl", Prompt)


def test_bool_is_no_number_and_nan_is_not_written(tmp_path):
    with pytest.raises(InputError, match="reward: expected float"):
        Rollout.from_json(RECORDS[-1].to_json() | {"reward": True})
    assert Rollout.from_json(RECORDS[-1].to_json() | {"reward": 2}).reward == 2.0
    write_jsonl(tmp_path / "x", [{"a": 1}])
    with pytest.raises(ValueError):
        write_jsonl(tmp_path / "x", [{"a": float("nan")}])
    assert (tmp_path / "x").read_text() == '{"a": 1}\n', "a failed write leaves the old file"
    assert os.listdir(tmp_path) == ["x"]


def test_content_id_depends_on_content_only():
    assert content_id("a", (Turn("human", "x"),)) == content_id("a", [{"text": "x", "role": "human"}])
    assert content_id("a", "b") != content_id("ab") and len(content_id()) == 16


def test_journal_survives_a_cut_at_every_byte(tmp_path):
    path = tmp_path / "journal" / "revise.jsonl"
    rows = [{"id": "é", "n": 1}, {"id": "b"}, {"id": "c", "text": "x" * 50}]
    with Journal(path) as journal:
        for row in rows:
            journal.append(row)
        assert journal.rows() == rows
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with Journal(path) as journal:
            kept = sum(end <= size for end in ends)
            assert journal.rows() == rows[:kept], f"cut at byte {size}"
            journal.append({"id": "next"})
            assert journal.rows() == [*rows[:kept], {"id": "next"}]


def test_journal_finds_a_newline_far_back(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 200_000)
    with Journal(path) as journal:
        assert journal.rows() == [{"a": 1}]


def test_journal_syncs_in_groups(tmp_path, monkeypatch):
    count = []
    monkeypatch.setattr("cai_fast.records.os.fsync", count.append)
    with Journal(tmp_path / "j", interval=1e9) as journal:
        for _ in range(10):
            journal.append({})
        assert not count
    assert len(count) == 1
    with Journal(tmp_path / "j", interval=0) as journal:
        journal.append({})
        assert len(count) == 2


def test_corrupt_journal_names_the_line(tmp_path):
    (tmp_path / "j").write_bytes(b'{}\n{"a\n')
    with Journal(tmp_path / "j") as journal, pytest.raises(InputError, match="line 2"):
        journal.rows()


def test_tokens_round_trip(tmp_path):
    rows = {"a": ([1, 2, 128_255], [-0.5, -1.0, 0.0]), "b": ([], None), "c": ([7], None), "d": ([], [])}
    write_tokens(tmp_path / "t.safetensors", rows)
    assert read_tokens(tmp_path / "t.safetensors") == rows
    assert list(read_tokens(tmp_path / "t.safetensors")) == list(rows)
    write_tokens(tmp_path / "t.safetensors", {})
    assert read_tokens(tmp_path / "t.safetensors") == {}
    (tmp_path / "t.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="t.safetensors"):
        read_tokens(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="3 tokens but 1"):
        write_tokens(tmp_path / "t", {"a": ([1, 2, 3], [0.0])})


def test_what_a_killed_write_left_is_gone_after_the_next(tmp_path):
    (tmp_path / "rows.jsonl.tmp").write_text("half a r")
    write_jsonl(tmp_path / "rows.jsonl", [{"id": "a"}, {"id": "b"}])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert (tmp_path / "rows.jsonl").read_text() == '{"id": "a"}\n{"id": "b"}\n'
