"""Constitutions: the bundled ones, the TOML rules, the published files' schema, and the draw."""

from collections import Counter
from pathlib import Path

import pytest
from support import CUSTOM, MINIMAL, paper_folder, write_constitution

from cai_fast.constitution import load
from cai_fast.errors import InputError


@pytest.mark.parametrize("name", ["harmlessness", "honesty"])
def test_bundled(name):
    constitution = load(name)
    assert constitution.name == name and constitution.description
    assert constitution.few_shot_critique and constitution.few_shot_comparison and constitution.few_shot_cot
    assert constitution.hash == load(name).hash


def test_harmlessness_has_the_properties_of_the_paper():
    constitution = load("harmlessness")
    assert [len(constitution.principles_for(phase)) for phase in ("critique", "comparison")] == [16, 16]
    shots = constitution.few_shot_critique
    assert [len(constitution.few_shot_comparison), len(constitution.few_shot_cot)] == [5, 6]
    assert len(shots) == 5 and sum(len(shot.turns) > 1 for shot in shots) == 3
    assert [shot.response == shot.revision for shot in shots] == [False, False, True, True, False]
    requests = {principle.critique_request for principle in constitution.principles}
    assert {shot.critique_request for shot in shots[:4]} <= requests and shots[4].critique_request not in requests
    assert Counter(shot.answer for shot in constitution.few_shot_cot) == {"A": 3, "B": 3}


def test_hash_follows_content_not_description(tmp_path):
    plain = load(write_constitution(tmp_path, MINIMAL)).hash
    assert load(write_constitution(tmp_path, MINIMAL.replace('version = "1"', 'version = "2"'))).hash == plain
    assert load(write_constitution(tmp_path, MINIMAL.replace("C?", "C!"))).hash != plain
    assert load(write_constitution(tmp_path, MINIMAL.replace("weight = 3", "weight = 2"))).hash != plain


def test_draw_is_weighted_with_replacement_and_keyed(tmp_path):
    constitution = load("harmlessness")
    drawn = [constitution.draw("critique", key).id for key in range(8000)]
    assert drawn == [constitution.draw("critique", key).id for key in range(8000)]
    counts = Counter(drawn)
    assert len(counts) == 16 and sum((n - 500) ** 2 / 500 for n in counts.values()) < 37.7  # 0.1 % of chi², 15 d.o.f.
    repeats = sum(a == b for a, b in zip(drawn, drawn[1:], strict=False))
    assert 400 < repeats < 600, "independent draws repeat their predecessor one time in 16"
    weighted = load(write_constitution(tmp_path, MINIMAL.replace('"C?"', '"C?"\ncomparison = "Or?"')))
    share = sum(weighted.draw("comparison", key).id == "q" for key in range(4000)) / 4000
    assert 0.72 < share < 0.78, "weight 3 against weight 1"
    only = load(write_constitution(tmp_path, MINIMAL))
    assert {only.draw("critique", key).id for key in range(20)} == {"p"}


def test_phase_without_principles(tmp_path):
    text = MINIMAL.split("[[principle]]")[0] + '[[principle]]\nid = "q"\ncomparison = "Which?"\n'
    with pytest.raises(InputError, match="'n' has no principle for the critique phase"):
        load(write_constitution(tmp_path, text)).draw("critique", 1)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('name = "n"\n', "", "lacks the field 'name'"),
        ('id = "p"', "", "principle 1: lacks the field 'id'"),
        ('revision_request = "R!"', "", "principle 'p' lacks the field 'revision_request'"),
        ('comparison = "Which?"', "", "principle 'q' serves no phase"),
        ("comparison = ", "comparision = ", "principle 2: unknown key 'comparision'; did you mean comparison"),
        ('"q"', '"p"', "'p' occurs twice"),
        ("weight = 3", "weight = 0", "weight must be a positive number"),
        ("weight = 3", 'categories = "x"', "categories must be a list of strings"),
        ('"C?"', "3", "critique_request must be a non-empty string"),
        ("[constitution]", "[constitution", "not valid TOML"),
        ("weight = 3", '[format]\nkind = "x"', "kind must be one of auto, paper, chat, custom"),
        ("weight = 3", '[format]\nreply = "x"', "'reply' is for kind = \"custom\""),
        ("weight = 3", '[format]\noptions = ["A"]', "options must be two"),
        (
            "weight = 3",
            '[[few_shot.comparison]]\nturns = ["a"]\nbetter = "b"',
            "few_shot.comparison 1: lacks the field",
        ),
        ("weight = 3", '[[few_shot.critique]]\nturns = ["a", "b"]', "turns must be an odd number"),
        (
            "weight = 3",
            '[[few_shot.cot]]\nturns = ["a"]\nresponse_a = "a"\nresponse_b = "b"\nreasoning = "r"\nanswer = "C"',
            "answer must be A or B",
        ),
    ],
)
def test_bad_toml_names_the_place(old, new, message, tmp_path):
    assert old in MINIMAL
    with pytest.raises(InputError, match=message):
        load(write_constitution(tmp_path, MINIMAL.replace(old, new)))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('cot_answer = "answer :"', "", "lacks the template 'cot_answer'"),
        ('"H {text} "', '"H "', "'human' must hold {text} once"),
        ('"H {text} "', '"H {text} {name}"', "'human' has the unknown placeholder {name}"),
        (
            "C {critique_request} : {critique}",
            "K {critique_request} : {critique}",
            "'revision' must begin with template",
        ),
    ],
)
def test_bad_custom_format(old, new, message, tmp_path):
    assert load(write_constitution(tmp_path, MINIMAL + CUSTOM)).format.options == ("(A)", "(B)")
    assert old in CUSTOM
    with pytest.raises(InputError, match=message):
        load(write_constitution(tmp_path, MINIMAL + CUSTOM.replace(old, new)))


def test_unknown_name_names_the_nearest():
    with pytest.raises(InputError, match="unknown constitution 'harmlesness': did you mean 'harmlessness'"):
        load("harmlesness")


def test_published_schema(tmp_path):
    folder, files = paper_folder(tmp_path)
    constitution = load(folder)
    assert [(p.id, p.critique_request, p.revision_request, p.comparison) for p in constitution.principles] == [
        ("harm0", "Any harm?", "Mend it all.", ""),
        ("harm1", "Any bias?", "Mend the bias.", ""),
        ("comparison0", "", "", "Which is kinder?"),
        ("comparison1", "", "", "Which is safer?"),
    ]
    first, second = constitution.few_shot_critique
    assert first.raw != second.raw and first.revision == second.revision == first.response == "Fine."
    assert constitution.few_shot_comparison[0].better == "Hi."
    cot = constitution.few_shot_cot[2]
    assert [turn.text for turn in cot.turns] == ["Tea?", " Yes", "Milk?"]
    assert (cot.response_a, cot.response_b, cot.reasoning, cot.answer) == ("Some {x}.\n\nMore.", "None.", "A is.", "A")
    (tmp_path / "prompts").mkdir()
    for path in tmp_path.glob("*.json"):
        path.rename(tmp_path / "prompts" / path.name)
    assert load(tmp_path).hash == constitution.hash, "the files may lie in prompts/"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("RLMadisonInstructions", None, "RLMadisonInstructions.json: no such file"),
        ("RLMadisonInstructions", "[", "not JSON"),
        ("RLMadisonInstructions", "{}", "expected a non-empty list"),
        ("RLMadisonInstructions", '["Which? Options:"]', "item 0: expected a string that begins with"),
        ("CritiqueRevisionInstructions", '{"k": {"prompt": "x"}}', "k: expected {prompt"),
        (
            "CritiqueRevisionInstructions",
            '{"k": {"prompt": ["\\n\\nCritiqueRequest: x\\n\\nCritique:"]}}',
            "found None",
        ),
        ("CritiqueRevisionFewShotPrompts", '["\\n\\nHuman: a"]', "item 0: expected a transcript"),
        ("RLMadisonFewShotPrompts", '[{"prompt": "x", "corrects": []}]', "item 0: expected {prompt, corrects"),
        ("RLMadisonPrecogFewShotPrompts", '[{"prompt": "x"}]', "item 0: expected a CoT comparison"),
    ],
)
def test_bad_published_file_names_the_place(name, content, message, tmp_path):
    folder, _ = paper_folder(tmp_path)
    path = folder / f"{name}.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_a_folder_does_not_hide_a_bundled_constitution_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy").mkdir()
    bundled = load("toy")
    monkeypatch.chdir(tmp_path)
    assert load("toy").hash == bundled.hash
    with pytest.raises(InputError, match="CritiqueRevisionInstructions.json"):
        load("./toy")
