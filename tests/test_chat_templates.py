"""The chat templates of the common families, in our own words, and what must hold for each of them.

FAMILIES imitates what the public templates do (where the system prompt goes, what they write before and after a reply,
what they refuse), with other words and tokens.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import byte_tokenizer
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from cai_fast import chat_template, config, preflight, prompts
from cai_fast.constitution import load
from cai_fast.errors import InputError
from cai_fast.model import init_random
from cai_fast.records import Turn
from cai_fast.tokenizer import Renderer, Tokenizer
from tests.tiny import CONFIG

HARMLESS = load("harmlessness")
RULE, CHOICE = HARMLESS.principles_for("critique")[0], HARMLESS.principles_for("comparison")[0]
TURNS = (Turn("human", "May I park here?"), Turn("assistant", "Where?"), Turn("human", "At the gate 🚗."))
TEXT = ("--config", "text", "--data.red_team", "unread", "--data.helpful", "unread", "--pm.harmless_only", "true")
SYSTEM, REPLY = "Be brief.", "Yes, for an hour.\n\nNot longer."


class Family(NamedTuple):
    """A template; its control tokens that are not special; with what it closes a reply; what becomes of a system
    prompt ("kept", or "folded" into the first user message)."""

    template: str
    added: tuple[str, ...] = ()
    stop: str = "<|end|>"
    system: str = "kept"


_ALTERNATE = (
    "{% for m in rest %}{% if (m.role == 'user') != loop.index0 is even %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% endfor %}"
)
_SPLIT = (
    "{% if messages[0].role == 'system' %}{% set said, rest = messages[0].content, messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
)
_TURN = "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
_OPEN = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
# A thinking block is written before the last reply only; earlier ones lose theirs.
_THINKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
FAMILIES = {
    "llama3": Family(  # a system block of its own with dates; BOS in the template
        "{{- bos_token }}" + _SPLIT + "{% if not date_string is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "<|start|>system<|sep|>\n\nKnows 2023. Today: {{ date_string }} {{ strftime_now('%A %-d %B') }}\n\n"
        "{{ said | default('') }}<|end|>{% for m in rest %}"
        "<|start|>{{ m.role }}<|sep|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|sep|>\n\n{% endif %}",
        ("<|sep|>",),
    ),
    "qwen2.5": Family(  # a system prompt of its own unless one is given
        "{% if messages[0].role != 'system' %}<|start|>system\nYou are a helper.<|end|>\n{% endif %}"
        "{% for m in messages %}" + _TURN + "{% endfor %}" + _OPEN
    ),
    "qwen3": Family(_THINKS, ("<think>", "</think>")),
    "mistral-v1": Family(  # markers that are no tokens, a space before replies, no system role
        "{% set rest = messages %}" + _ALTERNATE + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        system="folded",
    ),
    "mistral-v3": Family(  # the system prompt moves to the last user message, and vanishes behind a reply
        _SPLIT + _ALTERNATE + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and said is defined %}{{ said }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"), system="folded",
    ),
    "nemo": Family(  # the same without spaces, and the system prompt stays with the last user message
        _SPLIT + _ALTERNATE + "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
        "{% for m in rest %}{% if m.role == 'user' %}[INST]{% if said is defined and m == users[-1] %}{{ said }}\n\n"
        "{% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"), system="folded",
    ),
    "gemma": Family(  # refuses a system prompt; another word for the assistant
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% set rest = messages %}" + _ALTERNATE + "{% for m in messages %}<|start|>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>model\n{% endif %}",
        system="folded",
    ),
    "drops-system": Family(  # without a word
        "{% for m in messages %}{% if m.role != 'system' %}" + _TURN + "{% endif %}{% endfor %}" + _OPEN,
        system="folded",
    ),
    "chatml": Family("{% for m in messages %}" + _TURN + "{% endfor %}" + _OPEN),
    "deepseek-v3.1": Family(  # role tokens that are not special, a closed thinking block before every reply
        _SPLIT + "{{ bos_token }}{{ said | default('') }}{% for m in rest %}{% if m.role == 'user' %}"
        "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜></think>{{ m.content }}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}",
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"), stop="<eos>",
    ),
    "zephyr": Family(  # markers that are no tokens, the prompt for a reply inside the loop
        "{% for m in messages %}\n<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% if loop.last and "
        "add_generation_prompt %}\n<|assistant|>\n{% endif %}{% endfor %}"
    ),
    "tulu": Family(  # no line end behind the last reply
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if m.role != 'assistant' or not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}  # fmt: skip
REFUSED = {
    "deepseek-r1": "{% for m in messages %}{% if m.role == 'user' %}<|start|>{{ m.content }}{% else %}<|end|>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|><think>\n{% endif %}",
    "always-thinks": _THINKS.replace("{% if enable_thinking is defined and not enable_thinking %}", "{% if false %}"),
    "no-generation-prompt": "{% for m in messages %}" + _TURN + "{% endfor %}",
    "drops-replies": "{% for m in messages %}{% if m.role == 'user' %}" + _TURN + "{% endif %}{% endfor %}" + _OPEN,
    "bad-expression": "{{ messages[0].content + 1 }}",
}


def folder_of(path: Path, template: str, added: tuple[str, ...] = ()) -> Path:
    """A tokenizer folder with this template and added tokens that are not special."""
    byte_tokenizer(path, chat_template=template)
    wrapped = AutoTokenizer.from_pretrained(path)
    wrapped.add_tokens(list(added))
    wrapped.save_pretrained(path)
    return path


def renderer(tokenizer: Tokenizer, system: str = "") -> Renderer:
    return Renderer(
        tokenizer, dataclasses.replace(HARMLESS, format=dataclasses.replace(HARMLESS.format, system=system))
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Tokenizer]:
    chosen = FAMILIES[request.param]
    return chosen, Tokenizer.load(folder_of(tmp_path_factory.mktemp("family"), chosen.template, chosen.added))


def rendered(tokenizer: Tokenizer, messages: list[dict[str, str]], **more: Any) -> list[int]:
    """What transformers makes of the messages, with date and thinking as we pin them."""
    theirs = AutoTokenizer.from_pretrained(tokenizer.source_path)
    pinned = {"date_string": "26 Jul 2024", "enable_thinking": False, "thinking": False}
    return theirs.apply_chat_template(messages, **pinned, **more)["input_ids"]


def conversation(system: str, folded: bool) -> list[dict[str, str]]:
    roles = {"human": "user", "assistant": "assistant"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in TURNS]
    if system and folded:
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
    elif system:
        messages.insert(0, {"role": "system", "content": system})
    return messages


@pytest.fixture
def nobody_asks_for_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a prompt cannot depend on date, time zone or locale."""
    monkeypatch.setattr(chat_template_utils, "datetime", None)


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_prompt_and_reply_are_those_of_the_template(
    family: tuple[Family, Tokenizer], system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, tokenizer = family

    class Fixed:
        @staticmethod
        def now() -> Any:
            import datetime

            return datetime.datetime(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)
    messages = conversation(system, chosen.system == "folded")
    prompt = rendered(tokenizer, messages, add_generation_prompt=True)
    whole = rendered(tokenizer, [*messages, {"role": "assistant", "content": REPLY}])
    monkeypatch.setattr(chat_template_utils, "datetime", None)
    r = renderer(tokenizer, system)
    dialogue, response = r.dialogue(TURNS), r.response_ids(REPLY)
    assert dialogue == prompt and (dialogue + response) == whole[: len(dialogue + response)]
    assert response[-1] == r.stop_id == tokenizer.control[chosen.stop] == r.stops("response")[0][0]
    assert r.preference(TURNS, response) == [*dialogue, *response, tokenizer.eoc_id]
    assert not system or tokenizer.decode(dialogue).count(SYSTEM) == 1
    assert r.finish(response, "response") == (REPLY, response)


@pytest.mark.usefixtures("nobody_asks_for_the_time")
@pytest.mark.parametrize("system", ["", SYSTEM])
def test_few_shot_examples_are_shared_and_part_of_the_whole(family: tuple[Family, Tokenizer], system: str) -> None:
    _, tokenizer = family
    r = renderer(tokenizer, system)
    assert r.critique(TURNS, "Yes.", RULE, 0).prefix == r.critique(TURNS[:1], "\nNo", RULE, 1).prefix
    for prompt, phase, segments in (
        (r.critique(TURNS, "Yes.", RULE, 0), "critique", r.prompts.critique(TURNS, "Yes.", RULE)),
        (r.cot(TURNS, "a", "\n b", CHOICE, 1), "cot", r.prompts.question("cot", TURNS, "a", "\n b", CHOICE)),
    ):
        text = r._chat_text([*r.prompts.few_shot(phase, 1).segments, *segments])
        assert prompt.prefix + prompt.ids == tokenizer.encode_control(text) and len(prompt.prefix) > 800
        assert text.count(SYSTEM) == bool(system)
        messages, begun = prompts.messages(segments, system)
        messages = chat_template.fold_system(messages) if r.style.folds_system else messages
        whole = tokenizer.template.render([*messages, {"role": "assistant", "content": begun or "x"}], reply=False)
        assert whole.startswith(r._chat_text(segments)), "a reply that we begin stands where the template puts replies"


@pytest.mark.usefixtures("nobody_asks_for_the_time")
def test_texts_cannot_spell_control_tokens_or_markers(family: tuple[Family, Tokenizer]) -> None:
    chosen, tokenizer = family
    r = renderer(tokenizer)
    scaffold = tokenizer._control.decode(r.dialogue(TURNS), skip_special_tokens=False)
    markers = [word for word in ("[INST]", "[/INST]", "<|user|>", "<|assistant|>") if word in scaffold]
    words = [*tokenizer.control, *(word for word in markers if word not in tokenizer.control)]
    assert set(chosen.added) <= set(words) and set(markers) <= set(words)
    hostile = tuple(Turn(turn.role, turn.text + "".join(words) + "x".join(words)) for turn in TURNS)
    ids = r.dialogue(hostile)
    text = tokenizer._control.decode(ids, skip_special_tokens=False)
    for word in words:
        assert text.count(word) == scaffold.count(word), word
        index = tokenizer.control.get(word)
        assert ids.count(index) == r.dialogue(TURNS).count(index)
        assert index not in r.response_ids(f"a{word}b")[:-1] and index not in tokenizer.encode(word)


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_do_not_continue_their_prompt_are_refused(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, REFUSED[name]))
    with pytest.raises(InputError, match=f"{tmp_path}: the chat template (asks for a reply with|refuses our messages)"):
        renderer(tokenizer)


def test_of_several_templates_the_default_one_is_used(tmp_path: Path) -> None:
    named = {"default": FAMILIES["chatml"].template, "tool_use": "{{ raise_exception('no tools') }}"}
    assert renderer(Tokenizer.load(folder_of(tmp_path / "a", named))).dialogue(TURNS)  # type: ignore[arg-type]
    del named["default"]
    with pytest.raises(InputError, match="no chat template.*no default"):
        renderer(Tokenizer.load(folder_of(tmp_path / "b", named)))  # type: ignore[arg-type]


def test_the_stop_token_may_stand_behind_white_space(tmp_path: Path) -> None:
    folder_of(tmp_path, FAMILIES["chatml"].template.replace("<|end|>", "\n<|end|>"))
    wrapped = AutoTokenizer.from_pretrained(tmp_path)
    wrapped.eos_token = "<eos>"
    wrapped.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert renderer(tokenizer).stop_id == tokenizer.control["<|end|>"] != tokenizer.eos_id


def checkpoint(path: Path, rows: dict[str, torch.Tensor | None]) -> Path:
    """A chat model in which the embedding of some control tokens is set (None: as initialised)."""
    folder_of(path / "tokenizer", FAMILIES["llama3"].template, ("<|sep|>",))
    tokenizer = Tokenizer.load(path / "tokenizer")
    folder = path / "model"
    init_random(CONFIG.replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=8192), 0).save(
        folder, tokenizer=tokenizer
    )
    tensors = load_file(folder / "model.safetensors")
    for word, row in rows.items():
        if row is not None:
            tensors["model.embed_tokens.weight"][tokenizer.control[word]] = row
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ({"<|sep|>": torch.zeros(32)}, r"uses <\|sep\|>, whose"),
        ({"<|sep|>": torch.full((32,), 1e-6)}, r"uses <\|sep\|>, whose"),
        ({"<|sep|>": torch.ones(32), "<|start|>": torch.ones(32)}, r"uses <\|start\|>, <\|sep\|>, whose"),
        ({"<pad>": torch.zeros(32)}, ""),  # not used by the template
    ],
    ids=["zero", "nearly-zero", "equal", "unused"],
)
def test_untrained_tokens_of_a_copied_template(rows: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, rows)
    settings = config.load([*TEXT, "--run-dir", str(tmp_path / "run"), "--model.base", str(folder)])
    if not named:
        assert not any("warning" in line for line in preflight.check_models(settings))
        return
    with pytest.raises(InputError, match=named + r".*kind = \"paper\""):
        preflight.check_models(settings)


def test_a_base_model_that_ends_elsewhere_is_pointed_out(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {})
    wrapped = AutoTokenizer.from_pretrained(folder)
    wrapped.eos_token = "<eos>"
    wrapped.save_pretrained(folder)
    settings = config.load([*TEXT, "--run-dir", str(tmp_path / "run"), "--model.base", str(folder)])
    warnings = [line for line in preflight.check_models(settings) if "warning" in line]
    assert len(warnings) == 1 and "closes a turn with <|end|>, its configuration with <eos>" in warnings[0]
