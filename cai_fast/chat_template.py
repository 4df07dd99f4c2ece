"""Chat templates: what they may vary is pinned, and what they do around a message is found out by trying them.

Templates differ in what they write before a reply, in how they close it, and in what becomes of a system prompt. Their
text is not interpreted here; a short conversation is rendered, and a template whose prompt is not the beginning of the
prompt with its reply is refused: what would be trained is then not what is sampled later.
"""

import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from jinja2 import TemplateError

from cai_fast.errors import InputError
from cai_fast.tokenizer_files import WRONG

Messages = list[dict[str, str]]

_DATE = "26 Jul 2024"  # the date Llama 3.x's own template falls back to
# Templates may ask for today's date; this answers with a fixed one. A macro, because the library passes no functions.
_PINNED_DATE = "{% macro strftime_now(format) %}{{ format" + "".join(
    f" | replace('%{code}', '{text}')" for code, text in {
        "-d": "26", "d": "26", "e": "26", "-m": "7", "m": "07", "b": "Jul", "B": "July", "Y": "2024", "y": "24",
        "a": "Fri", "A": "Friday", "j": "208", "F": "2024-07-26", "H": "00", "I": "12", "M": "00", "S": "00",
        "p": "AM", "Z": "", "z": "",
    }.items()) + " }}{% endmacro %}{{ '' }}"  # fmt: skip
CUT = "@@cut-here@@"
_SYSTEM, _FIRST, _SECOND = "@@system@@", "@@first@@", "@@second@@"
_MARKER = re.compile(r"<[^\s<>]+>|\[/?[A-Z_]+\]")
_REMEDY = 'Use a model with another template, or [format] kind = "paper" in the constitution.'


class Style(NamedTuple):
    """What a template does around a reply."""

    opening: str
    """White space between the generation prompt and the reply, which a model says itself: " " in Mistral's."""
    folds_system: bool
    """The system prompt goes into the first user message: the template has no place for one, or a moving one."""


def markers(text: str) -> set[str]:
    """Words of a template that look like control tokens, whether or not the tokenizer has tokens for them."""
    return set(_MARKER.findall(text))


def without_control(serialized: str) -> tuple[dict[str, int], tokenizers.Tokenizer]:
    """Ids of a tokenizer's control tokens (special ones, and added ones that look like them, such as <think>), and the
    same tokenizer reading them as ordinary characters. serialized: the content of tokenizer.json."""
    plain = json.loads(serialized)
    control = {}
    for token in plain["added_tokens"]:
        token["special"] |= token["content"] in markers(token["content"])
        if token["special"]:
            control[token["content"]] = token["id"]
    backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
    backend.encode_special_tokens = True
    return control, backend


def fold_system(messages: Messages) -> Messages:
    """The messages with the text of a leading system message before that of the first user message."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return rest
    rest[first] = rest[first] | {"content": system["content"] + "\n\n" + rest[first]["content"]}
    return rest


class Template:
    """The chat template of a tokenizer (of several, the default one)."""

    def __init__(self, wrapped: Any, path: Path, control: dict[str, int]) -> None:
        self._wrapped, self.path, self.control = wrapped, path, control
        try:
            self.text: str = wrapped.get_chat_template()
        except ValueError as error:  # there is none, or none of several is the default
            raise InputError(
                f"{path}: the tokenizer has no chat template; use a chat model, or [format] "
                f'kind = "paper" in the constitution ({error})'
            ) from error

    def render(self, messages: Messages, *, reply: bool) -> str:
        """The text of a conversation, date and thinking pinned; `reply` opens the assistant's message."""
        return self._render([message | {"content": self.neutralise(message["content"])} for message in messages], reply)

    def _render(self, messages: Messages, reply: bool) -> str:
        try:
            return self._wrapped.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply, enable_thinking=False, thinking=False,
                date_string=_DATE, chat_template=_PINNED_DATE + self.text,
            )  # fmt: skip
        except (TemplateError, *WRONG) as error:  # what it raises, and what an expression of it does
            raise InputError(f"{self.path}: the chat template refuses our messages: {str(error):.300}") from error

    @cached_property
    def _forbidden(self) -> re.Pattern[str]:
        """Control tokens, and markers of the template that are ordinary text, such as [INST] in early ones."""
        talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        words = {*self.control, *markers(self.text), *markers(self._render(talk, reply=True))}
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")

    def neutralise(self, text: str) -> str:
        """A text in which none of them can be recognised: a space after its first character."""
        return self._forbidden.sub(lambda match: match[0][:1] + " " + match[0][1:], text)

    def style(self, has_system: bool) -> Style:
        """What it does around replies; InputError where a prompt with its reply does not continue the prompt.

        has_system: whether conversations will begin with a system message.
        """
        folds = has_system and not self._keeps_system()
        start = [{"role": "system", "content": _SYSTEM}] if has_system else []
        one = [*start, {"role": "user", "content": _FIRST}]
        two = [*one, {"role": "assistant", "content": "x"}, {"role": "user", "content": _SECOND}]
        openings = {self._opening(fold_system(talk) if folds else talk) for talk in (one, two)}
        if len(openings) > 1:
            raise InputError(f"{self.path}: the chat template begins replies with one of {openings}. {_REMEDY}")
        return Style(openings.pop(), folds)

    def _keeps_system(self) -> bool:
        """Whether the system prompt stands before the first user message, also in a longer conversation."""
        roles = (("system", _SYSTEM), ("user", _FIRST), ("assistant", "x"), ("user", _SECOND))
        try:
            text = self.render([{"role": role, "content": content} for role, content in roles], reply=True)
        except InputError:  # there is no system role
            return False
        return 0 <= text.find(_SYSTEM) < text.find(_FIRST)

    def _opening(self, talk: Messages) -> str:
        prompt = self.render(talk, reply=True)
        whole = self.render([*talk, {"role": "assistant", "content": CUT}], reply=False)
        opening, cut, _ = whole.removeprefix(prompt).partition(CUT)
        if not whole.startswith(prompt) or not cut or opening.strip():
            at = len(os.path.commonprefix([prompt, whole]))
            asked, said = prompt[max(0, at - 40) :], whole[max(0, at - 40) : at + 40]
            raise InputError(
                f"{self.path}: the chat template asks for a reply with {asked!r} but writes {said!r} where there is "
                f"one, so a prompt is not the beginning of the prompt with its reply. {_REMEDY}"
            )
        return opening
