"""Talking with checkpoints: the prompts and draws of training, kept keys, commands, and what cannot be done."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CHAT_TEMPLATE, byte_tokenizer
from tiny import CONFIG

from cai_fast import chat, rng
from cai_fast.chat import Chat, Printer, Speaker, main, side_by_side, visible
from cai_fast.engine import Engine, Sampling
from cai_fast.model import init_random, load
from cai_fast.records import Turn
from cai_fast.tokenizer import Renderer, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def checkpoint(folder: Path, *, head: str = "lm", seed: int = 0, template: str | None = CHAT_TEMPLATE) -> Path:
    """Random weights with a byte-level tokenizer, and a chat template if there is one."""
    tokenizer = Tokenizer.load(byte_tokenizer(folder / "tokenizer", chat_template=template))
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size)
    init_random(config, seed, head=head, std=0.2).save(folder / head, tokenizer=tokenizer)
    return folder / head


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("chat"))


def opened(*words: Any) -> Chat:
    return chat.open_chat(chat.parser().parse_args([*map(str, words), "--max-new-tokens", "12"]))


def talk(monkeypatch: pytest.MonkeyPatch, lines: Sequence[str], *words: Any) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main([*map(str, words), "--max-new-tokens", "12"])


def alone(folder: Path, turns: Sequence[Turn], number: int, **sampling: Any) -> Any:
    """What a fresh engine answers to a conversation, with the key of the answer's number."""
    renderer = Renderer(Tokenizer.load(folder), chat.constitution_of(folder))
    stop_ids, stop_strings = renderer.stops("response")
    spec = Sampling(max_new_tokens=12, stop_token_ids=stop_ids, stop_strings=stop_strings, **sampling)
    engine = Engine(load(folder), max_len=256, max_batch=4, tokenizer=renderer.tokenizer)
    done = engine.generate([renderer.dialogue(turns)], spec, keys=[rng.key(0, "chat", str(number))])[0]
    return renderer.finish(done.token_ids, "response"), done


def test_every_answer_is_that_of_a_fresh_engine_and_what_was_read_is_not_read_again(model: Path) -> None:
    session, turns = opened(model), []
    speaker, read = session.speakers[0], []
    for number, text in enumerate(("How do I bake bread?", "And then?", "Why <|end|> so?")):
        before = speaker.engine.counters["prefill_tokens"]
        session.say(text)
        read.append(speaker.engine.counters["prefill_tokens"] - before)
        turns.append(Turn("human", text))
        finished, done = alone(model, turns, number)
        assert speaker.turns[-1].text == finished.text
        assert speaker.replies[-1].finish_reason == done.finish_reason
        turns.append(Turn("assistant", finished.text))
    prompts = [len(Renderer(Tokenizer.load(model), speaker.laws).dialogue(turns[: 2 * n + 1])) for n in range(3)]
    assert read == [prompts[0], *(b - a for a, b in zip(prompts, prompts[1:], strict=False))]


def test_lines_from_a_pipe_are_answered_on_stdout(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.jsonl"
    lines = [
        "/temperature 0",
        "Hello",
        "",
        f"/save {path}",
        "/undo",
        "Hello",
        "/reset",
        "/seed 7",
        "//x",
        "/quit",
        "no",
    ]
    assert talk(monkeypatch, lines, model) == 0
    finished, done = alone(model, [Turn("human", "Hello")], 0, temperature=0.0)
    other, _ = alone(model, [Turn("human", "/x")], 0, temperature=0.0)
    shown = capsys.readouterr()
    assert shown.out == f"{visible(finished.text)}\n" * 2 + f"{visible(other.text)}\n"
    assert "error" not in shown.err and ">" not in shown.out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["role"] for row in rows] == ["human", "assistant"] and rows[0]["text"] == "Hello"
    ids = finished.token_ids if done.finish_reason == "stop" else finished.body_ids
    assert rows[1]["token_ids"] == ids and rows[1]["finish_reason"] == done.finish_reason


def test_settings_change_the_answers(model: Path) -> None:
    def answer(*commands: str) -> str:
        session = opened(model)
        for command in commands:
            session.command(*command.split(" ", 1))
        session.say("Hello")
        return session.speakers[0].turns[-1].text

    assert answer() == answer("seed 0") != answer("seed 1")
    assert answer("temperature 0", "seed 1") == answer("temperature 0", "seed 2")
    assert answer("system Be brief.") != answer() == answer("system Be brief.", "system ")
    session = opened(model)
    for wrong in ("seed x", "temperature -1", "temperature nan", "nothing ", "save /nowhere/x"):
        with pytest.raises(chat.InputError):
            session.command(*wrong.split(" ", 1))
    assert session.temperature == 1.0 and session.seed == 0


def test_a_system_prompt_needs_a_template(model: Path, tmp_path: Path) -> None:
    session = opened(model, checkpoint(tmp_path, template=None))
    before = session.speakers[0].renderer.hash
    with pytest.raises(chat.InputError, match="has no system prompt"):
        session.command("system", "x")
    assert session.speakers[0].renderer.hash == before  # both models have it, or none


def test_the_oldest_turns_make_room(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = opened(model, "--max-len", "120")
    speaker = session.speakers[0]
    for _ in range(5):
        session.say("one two three four five six")
    assert speaker.left_out in (2, 4, 6) and "no longer sees the oldest" in capsys.readouterr().err
    read = Renderer(speaker.tokenizer, speaker.laws).dialogue(speaker.turns[speaker.left_out : -1])
    assert tuple(read) == speaker.kept.token_ids and len(read) + 12 < 120 and len(speaker.turns) == 10
    more = Renderer(speaker.tokenizer, speaker.laws).dialogue(speaker.turns[speaker.left_out - 2 : -1])
    assert len(more) + 12 >= 120  # no more was left out than had to be
    session.say("x" * 200)
    assert "is longer than the 107 tokens" in capsys.readouterr().err and len(speaker.turns) == 10


def test_words_that_a_model_does_not_know_are_counted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = opened(model)
    session.say("bee")
    assert "vocabulary" not in capsys.readouterr().err
    session.speakers[0].tokenizer.unk_id = session.speakers[0].tokenizer.encode("e")[0]
    session.say("bee")
    assert "cannot read 2 words of this: they are not in its vocabulary" in capsys.readouterr().err


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_got(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(model)
    speaker, calls = session.speakers[0], []
    whole = alone(model, [Turn("human", "Hello")], 0)[1].token_ids

    def press(printer: Printer, text: str) -> None:
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Printer, "show", press)
    session.say("Hello")
    reply = speaker.replies[0]
    assert (reply.finish_reason, reply.token_ids) == ("interrupted", whole[:3])
    session.command("undo", "")
    session.say("Hello")
    assert speaker.replies[0].finish_reason != "interrupted" and speaker.replies[0].token_ids[:3] == whole[:3]


def test_a_message_that_is_interrupted_between_answers_counts_as_not_sent(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session, path = opened(model, model), tmp_path / "talk.jsonl"
    answer, calls = Speaker.answer, []

    def interrupted(self: Speaker, *given: Any) -> Any:
        calls.append(self)
        if len(calls) == 4:  # the second model's second answer
            raise KeyboardInterrupt
        return answer(self, *given)

    monkeypatch.setattr(Speaker, "answer", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello\nlost\nAnd then?\n/save {path}\n"))
    session.run()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["text"] for row in rows if row["role"] == "human"] == ["Hello", "And then?"] * 2
    assert [len(speaker.turns) for speaker in session.speakers] == [4, 4]


def test_a_text_is_printed_as_it_grows_and_nothing_is_printed_twice(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = opened(model)
    session.live = True
    seen: list[str] = []
    show = Printer.show
    try:
        Printer.show = lambda printer, text: (seen.append(text), show(printer, text))[1]
        session.say("Hello")
    finally:
        Printer.show = show
    assert len(set(seen)) > 3 and all(seen[-1].startswith(text) for text in seen)
    assert capsys.readouterr().out == visible(session.speakers[0].turns[-1].text) + "\n"


def test_an_end_that_may_change_is_held_back(model: Path) -> None:
    speaker = opened(model).speakers[0]
    encode = speaker.tokenizer.encode
    emoji = encode("ok 🚗")
    assert len(emoji) > 4
    shown = [speaker._stable(emoji[:n], ("\n\nHuman:",)) for n in range(1, len(emoji) + 1)]
    assert shown[-2].strip() == "ok" and shown[-1] == "ok 🚗" and all("\ufffd" not in text for text in shown)
    assert speaker._stable(encode("yes\n\nHum"), ("\n\nHuman:",)) == "yes"
    assert speaker._stable(encode("yes Hum"), ("Human:",)) == "yes"
    assert visible("a\x1b[2Jb\nc\td") == "a\ufffd[2Jb\nc\td"


def test_two_models_answer_the_same_messages(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = checkpoint(tmp_path, seed=1).rename(tmp_path / "other")
    assert talk(monkeypatch, ["Hello"], model, other) == 0
    first, second = (alone(folder, [Turn("human", "Hello")], 0)[0].text for folder in (model, other))
    assert capsys.readouterr().out == f"[lm]\n{visible(first)}\n[other]\n{visible(second)}\n"
    session = opened(model, other)
    session.live = True
    monkeypatch.setenv("COLUMNS", "120")
    session.say("Hello")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["lm", "other"] and max(map(len, lines)) <= 120
    assert side_by_side(["a", "b"], ["x y z", "u\n\nw"], 9) == ["a    b", "-    -", "x y  u", "z", "     w"]


def test_a_preference_model_scores_the_answers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pm = checkpoint(tmp_path, head="score")
    session = opened(model, "--pm", pm)
    session.say("Hello")
    turns, reply = [Turn("human", "Hello")], session.speakers[0].replies[0]
    ids = session.speakers[0].renderer.preference(turns, reply.token_ids)
    loaded = load(pm)
    packed = torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        expected = float(loaded.score(loaded.hidden(*packed)[-1:]))
    assert reply.score == pytest.approx(expected, abs=1e-4)
    assert f"score {reply.score:.3f}" in capsys.readouterr().err
    for words, message in (
        ((pm,), "give a preference model as --pm"),
        ((model, "--pm", model), "expected one for --pm"),
    ):
        assert talk(monkeypatch, [], *words) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", "-1"), "temperature must be >= 0"),
        (("--max-len", "2"), "--max-len 2: expected 16 or more"),
        (("--device", "banana"), "--device banana"),
        (("--constitution", "nowhere"), "unknown constitution"),
        (("x", "y"), "3 checkpoints; expected one or two"),
    ],
)
def test_bad_arguments_are_one_message(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple, message: str
) -> None:
    assert talk(monkeypatch, [], model, *words) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.mark.parametrize("pipelined", [False, True])
def test_the_engine_shows_tokens_as_they_come(model: Path, pipelined: bool) -> None:
    engine = Engine(load(model), max_len=64, max_batch=2, pipelined=pipelined)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    specs = [Sampling(max_new_tokens=n) for n in (9, 5, 7)]
    seen: dict[int, list[list[int]]] = {}
    plain = engine.generate(prompts, specs, keys=[1, 2, 3])
    engine.watch = lambda index, tokens: seen.setdefault(index, []).append(tokens)
    assert engine.generate(prompts, specs, keys=[1, 2, 3]) == plain
    for index, completion in enumerate(plain):
        assert sum(seen[index], []) == completion.token_ids
        assert len(seen[index]) > 1 and (pipelined or len(seen[index]) == len(completion.token_ids))


@pytest.mark.parametrize("manifest", [{"name": "an app", "manifest_version": 3}, {"version": 1}, [1], {}])
def test_a_manifest_of_something_else_is_no_run(tmp_path: Path, manifest: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert chat.constitution_of(tmp_path / "models" / "one").name == "none"


@pytest.mark.parametrize(("text", "words"), [
    ('{"stages": {}}', "version: expected 1"), ('{"version": 1, "stages": 3}', "stages: expected"), ("{", "not JSON"),
])  # fmt: skip
def test_a_damaged_manifest_of_a_run_is_not_taken_for_something_else(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(chat.InputError, match=words):
        chat.constitution_of(tmp_path / "checkpoints" / "rl_cai")


def test_a_folder_with_the_name_of_a_manifest_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    assert chat.constitution_of(tmp_path / "models" / "one").name == "none"


def test_speakers_of_a_run_have_its_constitution(tmp_path: Path) -> None:
    import runfolder

    run = runfolder.write(tmp_path / "run")
    (run / "checkpoints").mkdir()
    folder = checkpoint(tmp_path / "made").rename(run / "checkpoints" / "sl_cai")
    speaker = Speaker(folder, None, torch.device("cpu"), torch.float32, 64, 8)
    assert speaker.laws == runfolder.constitution()
