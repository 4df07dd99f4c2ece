"""Readers of prompts, comparisons, labels and questions: shapes accepted, rows rejected, files refused."""

import gzip
import json

import pytest

from cai_fast.errors import InputError
from cai_fast.readers import encode_split, parse_dialogue, read_comparisons, read_hhh, read_labels, read_prompts
from cai_fast.records import Turn

TALK = "\n\nHuman: Where is the key?\n\nAssistant:  Under  the mat.\n\nHuman: Whose?\nReally?\n\nAssistant: Yours."


def write(path, *rows):
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_dialogue_keeps_every_byte():
    turns = parse_dialogue(TALK)
    assert turns == (
        Turn("human", "Where is the key?"),
        Turn("assistant", " Under  the mat."),
        Turn("human", "Whose?\nReally?"),
        Turn("assistant", "Yours."),
    )
    names = {"human": "Human", "assistant": "Assistant"}
    assert "".join(f"\n\n{names[turn.role]}: {turn.text}" for turn in turns) == TALK
    assert parse_dialogue("Human: a\n\nAssistant:") == (Turn("human", "a"),)


@pytest.mark.parametrize(
    "row, texts",
    [
        ({"prompt": "How?"}, [["How?"]]),
        ({"prompt": "\n\nHuman: How?\n\nAssistant:"}, [["How?"]]),
        (
            {
                "prompt": [
                    {"role": "human", "text": "a"},
                    {"role": "assistant", "text": "b"},
                    {"role": "human", "text": "c"},
                ]
            },
            [["a", "b", "c"]],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            [["a"]],
        ),
        (
            {"chosen": TALK, "rejected": TALK + "?"},
            [["Where is the key?"], ["Where is the key?", " Under  the mat.", "Whose?\nReally?"]],
        ),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_prompt_shapes(row, texts, name, tmp_path):
    prompts, rejected = read_prompts(write(tmp_path / name, row, "", row), "red_team")
    assert not rejected and [[turn.text for turn in prompt.turns] for prompt in prompts] == texts
    assert {(prompt.kind, prompt.source, prompt.split) for prompt in prompts} == {("red_team", name, "train")}


@pytest.mark.parametrize(
    "row, reason",
    [
        ([1], "expected an object"),
        ({"text": "a"}, "no field prompt"),
        ({"prompt": "  "}, "empty turn"),
        ({"prompt": 3}, "list of messages"),
        ({"messages": []}, "does not end with a human turn"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "alternate"),
        ({"chosen": "no roles", "rejected": 1}, None),
        ({"chosen": "\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: c"}, "empty turn"),
    ],
)
def test_bad_rows_are_counted_with_line_and_reason(row, reason, tmp_path):
    good = {"prompt": "fine"}
    prompts, rejected = read_prompts(write(tmp_path / "x", good, row), "helpful", max_bad_fraction=0.5)
    if reason is None:  # a bare text is a legitimate one-turn prompt
        assert not rejected and len(prompts) == 2
        return
    assert len(prompts) == 1 and rejected[0].line == 2 and reason in rejected[0].reason
    with pytest.raises(InputError, match="1 of 2 rows are unusable .line 2: .*max_bad_fraction"):
        read_prompts(tmp_path / "x", "helpful", max_bad_fraction=0.49)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "none", "helpful")
    with pytest.raises(InputError, match="the file is empty"):
        read_prompts(write(tmp_path / "x"), "helpful")
    with pytest.raises(InputError, match="line 2: not JSON"):
        read_prompts(write(tmp_path / "x", {"prompt": "a"}, "{oops"), "helpful")
    (tmp_path / "x").write_bytes(b'{"prompt": "a"}\n"\xff"\n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        read_prompts(tmp_path / "x", "helpful")
    whole = write(tmp_path / "x.jsonl.gz", *[{"prompt": f"{i} {hash(str(i))}"} for i in range(5000)]).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"damaged gzip file after line [1-9]\d+"):
        read_prompts(tmp_path / "x.jsonl.gz", "helpful")
    (tmp_path / "x.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(InputError, match="damaged gzip file after line 0"):
        read_prompts(tmp_path / "x.jsonl.gz", "helpful")


def test_split_is_by_first_turn_and_stable(tmp_path):
    rows = [{"chosen": TALK.replace("Where", f"{i}: where")} for i in range(400)]
    prompts, _ = read_prompts(write(tmp_path / "x", *rows), "red_team", eval_fraction=0.25)
    held = {prompt.turns[0].text for prompt in prompts if prompt.split == "eval"}
    kept = {prompt.turns[0].text for prompt in prompts if prompt.split == "train"}
    assert len(prompts) == 800 and not held & kept and 70 <= len(held) <= 130
    assert encode_split("any", 0.0) == "train" and encode_split("any", 1.0) == "eval"


def test_comparisons(tmp_path):
    other = TALK.replace("Yours.", "Nobody's.")
    rows = [
        {"chosen": TALK, "rejected": other},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
        {"turns": [{"role": "human", "text": "q"}], "response_a": "a", "response_b": "b", "prob_a": 0.25},
        {"chosen": TALK, "rejected": other.replace("mat", "rug")},
        {"chosen": TALK + "\n\nHuman: and?", "rejected": other},
        {"prompt": "q", "response_a": "a", "response_b": "b", "prob_a": 1.5},
        {"prompt": "q", "response_a": "a", "response_b": " ", "prob_a": 0.5},
    ]
    found, rejected = read_comparisons(write(tmp_path / "x", *rows), max_bad_fraction=0.5)
    assert [(len(p.turns), p.response_a, p.response_b, p.prob_a) for p in found] == [
        (3, "Yours.", "Nobody's.", 1.0),
        (1, "good", "bad", 1.0),
        (1, "a", "b", 1.0),
        (1, "a", "b", 0.25),
    ]
    assert [(r.line, r.reason.split()[0]) for r in rejected] == [(5, "chosen"), (6, "a"), (7, "prob_a"), (8, "a")]


def test_labels(tmp_path):
    assert read_labels(write(tmp_path / "x", {"comparison_id": "c", "prob_a": 1})) == {"c": 1.0}
    with pytest.raises(InputError, match="line 1: prob_a must be in"):
        read_labels(write(tmp_path / "x", {"comparison_id": "c", "prob_a": None}))


def test_questions(tmp_path):
    full = {
        "prompt": "q",
        "corrects": [" (B)"],
        "incorrects": [" (A)"],
        "text_correct": TALK,
        "text_incorrect": TALK + "!",
    }
    bare = {"prompt": "q", "corrects": ["x"], "incorrects": ["y", "z"]}
    first, second = read_hhh(write(tmp_path / "x", full, bare))
    assert (first.correct, first.response_correct, first.response_incorrect) == (" (B)", "Yours.", "Yours.!")
    assert first.turns == parse_dialogue(TALK)[:-1] and second.turns is None and second.incorrect == ("y", "z")
    with pytest.raises(InputError, match="line 1: expected one string in corrects"):
        read_hhh(write(tmp_path / "x", {"prompt": "q", "corrects": [], "incorrects": ["y"]}))
