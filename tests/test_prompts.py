"""Prompt texts byte for byte, few-shot blocks, custom and chat formats; with CAI_PAPER_DIR the published files too."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from support import CUSTOM, MINIMAL, paper_folder, write_constitution

from cai_fast.constitution import Format, Principle, load
from cai_fast.prompts import CHAT, PAPER, Mark, Prompts, fill, fit_turns, messages, plain, resolve
from cai_fast.readers import parse_dialogue, read_hhh
from cai_fast.records import Turn

TURNS = (Turn("human", "May I {park} here?"), Turn("assistant", "Where?"), Turn("human", "At the gate."))
TALK = "\n\nHuman: May I {park} here?\n\nAssistant: Where?\n\nHuman: At the gate."
RULE = Principle("p", "Any harm?", "Mend it.", "Which is kinder?")
PUBLISHED = os.environ.get("CAI_PAPER_DIR")
published = pytest.mark.skipif(not PUBLISHED, reason="CAI_PAPER_DIR does not name a folder of the published files")


def paper_prompts(constitution="harmlessness", seed=0):
    constitution = load(constitution)
    return Prompts(constitution, resolve(dataclasses.replace(constitution.format, kind="paper"), True), seed)


def test_paper_texts():
    p = paper_prompts()
    assert plain(p.dialogue(TURNS)) == TALK + "\n\nAssistant:"
    start = TALK + "\n\nAssistant: Yes.\n\nCritiqueRequest: Any harm?\n\nCritique:"
    assert plain(p.critique(TURNS, "Yes.", RULE)) == start
    end = "\n\nRevisionRequest: Mend it.\n\nRevision:"
    assert plain(p.revision(TURNS, "Yes.", RULE, "None {critique}.")) == start + " None {critique}." + end
    assert plain(p.revision_suffix(RULE)) == end
    assert plain(p.direct_revision(TURNS, "Yes.", RULE)) == TALK + "\n\nAssistant: Yes." + end
    assert plain(p.question("comparison", TURNS, "a", "b", RULE)) == (
        "\n\nConsider the following conversation between a human and an assistant:"
        + TALK
        + "\n\n\nWhich is kinder? Options:\n (A) [[[a]]]\n (B) [[[b]]]\n\nThe answer is:"
    )
    assert plain(p.question("cot", TURNS, "a", "b", RULE)) == (
        "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):"
        "\n\nH: May I {park} here?\n\nA: Where?\n\nH: At the gate.\n\n\nWhich is kinder? Options:"
        "\n (A) [[[a]]]\n (B) [[[b]]]\n\nAssistant: Let's think step by step:"
    )
    assert plain(p.cot_answer()) == "\n\nHuman:\nSo the answer is:"


def test_published_few_shot_is_concatenated_as_it_is(tmp_path):
    folder, files = paper_folder(tmp_path)
    p = paper_prompts(folder)
    critique = p.few_shot("critique", 0)
    assert plain(critique.segments) == "".join(files["CritiqueRevisionFewShotPrompts"]) and critique.ids == ("0", "1")
    assert p.few_shot("critique", 3) == critique, "one shared block for every prompt"
    assert "Critique" not in plain(p.few_shot("direct_revision", 0).segments)
    cot = p.few_shot("cot", 2)
    names = {f"comparison{i}": text for i, text in enumerate(files["RLMadisonInstructions"])}
    drawn = [names[key.split(":")[1]] for key in cot.ids]
    raw = [row["prompt"] for row in files["RLMadisonPrecogFewShotPrompts"]]
    assert plain(cot.segments) == "".join(
        text.replace("{}", principle) for text, principle in zip(raw, drawn, strict=True)
    )


def test_comparison_examples_draw_principle_and_order():
    p = paper_prompts()
    blocks = [p.few_shot("comparison", index) for index in range(40)]
    assert p.few_shot("comparison", 7) == blocks[7] != blocks[8]
    assert paper_prompts(seed=1).few_shot("comparison", 7) != blocks[7]
    drawn = [key.split(":") for block in blocks for key in block.ids]
    assert len({principle for _, principle, _ in drawn}) == 16
    assert 70 <= sum(order == "AB" for _, _, order in drawn) <= 130, "either order about equally often, of 200"
    for block in blocks[:4]:
        parts = plain(block.segments).split("\n\nConsider the following")[1:]
        for example, part, key in zip(p.constitution.few_shot_comparison, parts, block.ids, strict=True):
            a, b = (example.better, example.worse) if key.endswith("AB") else (example.worse, example.better)
            assert f" (A) [[[{a}]]]\n (B) [[[{b}]]]" in part
            assert part.endswith("The answer is: (A)" if a == example.better else "The answer is: (B)")


def test_own_examples_follow_the_format():
    p = paper_prompts()
    text = plain(p.few_shot("critique", 0).segments)
    assert text.count("\n\nCritique: ") == text.count("\n\nRevision: ") == 5 and "\n\nHuman:\n" not in text
    cot = plain(p.few_shot("cot", 0).segments)
    letters = [f"({example.answer})" for example in p.constitution.few_shot_cot]
    assert [part[:3] for part in cot.split("\n\nHuman:\nSo the answer is: ")[1:]] == letters


def test_custom_format(tmp_path):
    constitution = load(write_constitution(tmp_path, MINIMAL + CUSTOM))
    p = Prompts(constitution, resolve(constitution.format, has_template=True))
    assert p.dialogue(TURNS) == ["H May I {park} here? A Where? ", Mark.EOS, " H At the gate. A"]
    head = ["H May I {park} here? A Where? ", Mark.EOS, " H At the gate. A Yes ", Mark.EOS, " C Any harm? :"]
    assert p.critique(TURNS, "Yes", RULE) == head
    assert p.revision_suffix(RULE) == [" ", Mark.EOS, " R Mend it. :"]
    assert p.revision(TURNS, "Yes", RULE, "None") == [*head[:-1], " C Any harm? : None ", Mark.EOS, " R Mend it. :"]
    assert p.cot_answer() == [" ", Mark.EOS, " answer :"]
    assert p.is_refusal("Sorry , i can not help .") and not p.is_refusal("i'm sorry, I can't help")


def test_chat_format_alternates_roles():
    constitution = load("harmlessness")
    p = Prompts(constitution, resolve(constitution.format, has_template=True))
    assert p.format.kind == "chat"
    chat, prefill = messages(p.revision(TURNS, "Yes.", RULE, "Bad."), "Be brief.")
    assert [m["role"] for m in chat] == ["system", *["user", "assistant"] * 3, "user"]
    assert [m["content"] for m in chat[4:7]] == ["Yes.", "Any harm?", "Bad."] and prefill == ""
    for phase in ("critique", "direct_revision", "comparison", "cot"):
        chat, last = messages([*p.few_shot(phase, 1).segments, *p.dialogue(TURNS)])
        assert [m["role"] for m in chat[::2]] == ["user"] * (len(chat) // 2 + 1) and last == ""
        assert all(m["role"] == "assistant" for m in chat[1::2])
    chat, prefill = messages(p.question("comparison", TURNS, "a", "b", RULE))
    assert len(chat) == 1 and prefill == "The answer is:" and TALK in chat[0]["content"]


def test_resolve():
    assert resolve(Format(), False) == dataclasses.replace(PAPER) and resolve(Format(), True) == CHAT
    assert resolve(Format(kind="paper", stop=("X",)), True).stop == (*PAPER.stop, "X")
    assert resolve(Format(kind="chat"), False).kind == "chat", "a missing template is the renderer's error"


def test_fill_takes_values_as_they_are():
    assert fill("a{x}b{eos}{x}", {"x": "{eos}{x}"}) == ["a{eos}{x}b", Mark.EOS, "{eos}{x}"]


@pytest.mark.parametrize(
    "text, refuses",
    [
        ("I'm sorry, but I can’t help with that.", True),
        ("I cannot assist with this.", True),
        ("Mix the flour. " * 10 + "I can't help more.", False),
        ("Sure, here it is.", False),
    ],
)
def test_refusals(text, refuses):
    assert paper_prompts().is_refusal(text) is refuses


def test_over_long_conversations_lose_whole_oldest_turns():
    class Words:
        def dialogue(self, turns):
            return [0] * sum(len(turn.text.split()) for turn in turns)

    turns = tuple(Turn(("human", "assistant")[i % 2], "w " * n) for i, n in enumerate((5, 1, 4, 2, 3)))
    assert fit_turns(turns, Words(), 15, False) == turns
    assert fit_turns(turns, Words(), 14, False) is None
    assert fit_turns(turns, Words(), 14, True) == turns[2:]
    assert fit_turns(turns, Words(), 8, True) == fit_turns(turns, Words(), 3, True) == turns[4:]
    assert fit_turns(turns, Words(), 2, True) is None


@published
def test_published_chains_are_reproduced():
    p = paper_prompts(PUBLISHED)
    principles = {principle.id: principle for principle in p.constitution.principles}
    steps = 0
    paths = sorted(Path(PUBLISHED, "samples").glob("*SLMADISON.jsonl"))
    for row in (json.loads(line) for path in paths for line in path.read_bytes().splitlines()):
        turns, response = parse_dialogue(row["rl_prompt"]), row["initial_response"][0]["sample"]
        assert plain(p.dialogue(turns)) == row["rl_prompt"]
        for step in row["cst"]:
            principle, critique = principles[step["cst_key"]], step["critique"]["sample"]
            expected = row["rl_prompt"] + response + step["cst_value"]["prompt"][0]
            assert plain(p.critique(turns, response.removeprefix(" "), principle)) == expected
            expected += critique + step["cst_value"]["edit_request"]
            assert (
                plain(p.revision(turns, response.removeprefix(" "), principle, critique.removeprefix(" "))) == expected
            )
            response = step["revision"]["sample"]
            steps += 1
    assert steps and steps % 4 == 0


@published
def test_published_few_shot_files():
    p, folder = paper_prompts(PUBLISHED), Path(PUBLISHED, "prompts")
    transcripts = json.loads((folder / "CritiqueRevisionFewShotPrompts.json").read_text())
    assert plain(p.few_shot("critique", 0).segments) == "".join(transcripts)
    strings = json.loads((folder / "RLMadisonInstructions.json").read_text())
    rows = json.loads((folder / "RLMadisonPrecogFewShotPrompts.json").read_text())
    block = p.few_shot("cot", 0)
    drawn = [strings[int(key.split(":")[1].removeprefix("comparison"))] for key in block.ids]
    assert plain(block.segments) == "".join(
        row["prompt"].replace("{}", text) for row, text in zip(rows, drawn, strict=True)
    )


@published
def test_published_questions_are_reproduced():
    p, path = paper_prompts(PUBLISHED), Path(PUBLISHED, "evals", "438HHHEvaluations.jsonl")
    strings = [principle for principle in p.constitution.principles if principle.comparison]
    questions = read_hhh(path)
    for q in questions:
        (principle,) = [s for s in strings if f"\n\n\n{s.comparison} Options:\n (A)" in q.prompt]
        pair = (q.response_correct, q.response_incorrect)
        a, b = pair if q.correct == p.format.options[0] else pair[::-1]
        assert plain(p.question("comparison", q.turns, a, b, principle)) == q.prompt
    assert len(questions) == 438
