"""Tokenizers, and the one renderer that turns conversations and principles into token ids for every stage.

Texts of users and models never become control tokens: plain formats encode "<eos>" and the like as ordinary text, chat
formats break such strings up before the model's template sees them. Everything a chat template may vary is pinned.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tokenizers

from cai_fast import chat_template, prompts
from cai_fast.constitution import Constitution, Principle, uniform
from cai_fast.errors import InputError
from cai_fast.prompts import Mark, Prompts, Segment
from cai_fast.records import Turn, content_id
from cai_fast.tokenizer_files import generation_stops, open_folder

Kind = Literal["response", "critique", "revision", "cot"]
_CONTEXT_END = re.compile(r"<\|?(eoc|end_of_context)\|?>")


class Rendered(NamedTuple):
    """A prompt: prefix (the few-shot block, shared by many prompts; may be empty) followed by ids."""

    prefix: list[int]
    ids: list[int]
    few_shot_ids: tuple[str, ...]


class Finished(NamedTuple):
    """A generated text. token_ids: as sampled, then one stop token; body_ids: the same without it."""

    text: str
    token_ids: list[int]

    @property
    def body_ids(self) -> list[int]:
        """What stands in a longer context before `revision_suffix` or `cot_answer_suffix`."""
        return self.token_ids[:-1]


class Options(NamedTuple):
    """How to read the two options: append `suffix` to the prompt, compare the next token's probabilities.

    option_ids[k] holds the tokens that stand for option k. Where no single token tells the options apart (one
    continues the other) `sequences` holds whole options to be scored, and option_ids is empty.
    """

    suffix: list[int]
    option_ids: list[list[int]]
    sequences: list[list[int]] | None


class _Block(NamedTuple):
    """A few-shot block: token ids, segments, text under the chat template and its last token, ids of its examples."""

    tokens: list[int]
    segments: list[Segment]
    text: str
    seam: str
    ids: tuple[str, ...]


class Tokenizer:
    """A Hugging Face fast tokenizer folder, with the special tokens that training needs settled once."""

    def __init__(self, wrapped: Any, source_path: Path) -> None:
        self._wrapped = wrapped
        self.source_path = source_path
        serialized = wrapped.backend_tokenizer.to_str()
        self._control = tokenizers.Tokenizer.from_str(serialized)  # control tokens are what they are
        self.control, self._text = chat_template.without_control(serialized)
        for backend in (self._text, self._control):
            backend.no_truncation()
            backend.no_padding()
        added = self._control.get_added_tokens_decoder()
        self.special = {token.content: index for index, token in added.items() if token.special}
        self.vocab_size = max(self._control.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self.hash = content_id(serialized, wrapped.chat_template, wrapped.special_tokens_map)
        if wrapped.eos_token_id is None:
            raise InputError(
                f"{source_path}: the tokenizer has no end-of-sequence token (eos_token); set one in "
                "tokenizer_config.json"
            )
        self.eos_id: int = wrapped.eos_token_id
        self._find_lead()
        self._set_special(serialized)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a local folder; nothing is downloaded, no code of the folder is run."""
        path = Path(path)
        return cls(open_folder(path), path)

    def _find_lead(self) -> None:
        """SentencePiece-style tokenizers put a space before every text; texts after the first must not get one."""
        newline, word = (self._text.encode(text, add_special_tokens=False).ids for text in ("\n", "x"))
        both = self._text.encode("\nx", add_special_tokens=False).ids
        adds_space = both[: len(newline)] == newline and both[len(newline) :] != word
        self._lead = newline if adds_space else []
        self._lead_text = self._control.decode(self._lead) if adds_space else ""

    def _set_special(self, serialized: str) -> None:
        bos = self._wrapped.bos_token_id
        # A tokenizer that wants a BOS puts it there itself; some name one and never use it.
        wants = bos is not None and self._control.encode("x").ids[:1] == [bos]
        self.bos_id: int | None = bos if wants or self._wrapped.init_kwargs.get("add_bos_token") is True else None
        ends = [index for text, index in self.special.items() if _CONTEXT_END.fullmatch(text)]
        reserved = [index for text, index in self.special.items() if "reserved" in text]
        self.eoc_id: int = min(ends or reserved or [self.eos_id])
        pad = self._wrapped.pad_token_id
        if pad is None or pad == self.eoc_id:
            others = chain(reserved[1:], self.special.values(), range(self.vocab_size))
            pad = next((index for index in others if index not in (self.eoc_id, self.eos_id)), None)
        if pad is None:
            raise InputError(f"{self.source_path}: all {self.vocab_size} tokens are taken; expected one for padding")
        self.pad_id: int = pad
        self.unk_id: int | None = self._wrapped.unk_token_id  # what words outside the vocabulary become
        self.stop_ids: list[int] = list(dict.fromkeys([self.eos_id, *generation_stops(self.source_path)]))

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint brings a chat template."""
        return bool(self._wrapped.chat_template)

    def encode(self, text: str) -> list[int]:
        """Ids of a text that continues another; no special tokens are added or recognised."""
        return self._encode(self._text, text)

    def encode_control(self, text: str) -> list[int]:
        """Ids of a rendered template: control tokens recognised, none added."""
        return self._encode(self._control, text)

    def _encode(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        if not self._lead or not text:
            return backend.encode(text, add_special_tokens=False).ids
        return backend.encode("\n" + text, add_special_tokens=False).ids[len(self._lead) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that continue another text; special tokens are left out."""
        return self._control.decode([*self._lead, *ids], skip_special_tokens=True)[len(self._lead_text) :]

    @cached_property
    def template(self) -> chat_template.Template:
        """The chat template; InputError where there is none."""
        return chat_template.Template(self._wrapped, self.source_path, self.control)

    def as_text(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Ids as text with its control tokens, and the ids that transformers makes of that text: mostly the same."""
        text = self._control.decode(list(ids), skip_special_tokens=False)
        return text, self._wrapped(text, add_special_tokens=False)["input_ids"]

    def save(self, path: str | Path) -> None:
        """Write the tokenizer files into a checkpoint folder."""
        self._wrapped.save_pretrained(path)


class Renderer:
    """All prompts of one constitution in the token ids of one tokenizer.

    Text of the prompt and text of the model are encoded apart, so a completion's own ids can be kept: a dialogue,
    then response ids; a critique's prompt, then its body ids, then `revision_suffix`. fs is the number of a few-shot
    block (`draw_few_shot`); a negative one means no examples.
    """

    def __init__(
        self, tokenizer: Tokenizer, constitution: Constitution, *, seed: int = 0, few_shot_pool: int = 4
    ) -> None:
        self.tokenizer = tokenizer
        self.format = prompts.resolve(constitution.format, tokenizer.has_template)
        self.prompts = Prompts(constitution, self.format, seed)
        self.few_shot_pool = few_shot_pool
        self.is_chat = self.format.kind == "chat"
        self.style = chat_template.Style("", False)
        if self.is_chat:
            self.style = tokenizer.template.style(bool(self.format.system))
        self.stop_id = self._turn_end() if self.is_chat else tokenizer.eos_id
        self.hash = content_id(tokenizer.hash, self.format, constitution.hash, seed, few_shot_pool, self.stop_id)
        self._blocks: dict[tuple[str, int], _Block] = {}

    def _turn_end(self) -> int:
        """The control token with which the chat template closes the assistant's message, else the EOS token."""
        after = self.tokenizer.encode_control(self._after_cut([Mark.USER, "x"]).lstrip())
        return after[0] if after and after[0] in self.tokenizer.control.values() else self.tokenizer.eos_id

    def _after_cut(self, segments: Iterable[Segment]) -> str:
        """What the chat template writes after an assistant's text when `segments` follow."""
        text = self._chat_text([Mark.USER, "x", Mark.ASSISTANT, chat_template.CUT, *segments])
        if text.count(chat_template.CUT) != 1:
            raise InputError(f"{self.tokenizer.source_path}: the chat template does not keep the assistant's messages")
        return text.split(chat_template.CUT)[1]

    def _chat_text(self, segments: Iterable[Segment]) -> str:
        messages, prefill = prompts.messages(segments, self.format.system)
        if self.style.folds_system:
            messages = chat_template.fold_system(messages)
        # The prefill goes behind the template's text; it is ours, so nothing in it needs to be broken up.
        text = self.tokenizer.template.render(messages, reply=prefill is not None)
        return text + self.style.opening + prefill if prefill else text

    def _plain_ids(self, segments: Iterable[Segment]) -> list[int]:
        return [
            index
            for segment in segments
            for index in (self.tokenizer.encode(segment) if isinstance(segment, str) else [self.tokenizer.eos_id])
        ]

    @property
    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    def _block(self, phase: Any, fs: int) -> "_Block":
        """A few-shot block, made once."""
        # Critique examples carry their own requests, so all numbers give the same block.
        fs = 0 if phase in ("critique", "direct_revision") else fs % self.few_shot_pool
        if (phase, fs) not in self._blocks:
            segments, ids = self.prompts.few_shot(phase, fs)
            tokens, text, seam = [], "", ""
            if segments and self.is_chat:
                text, seam = self._shared_text(segments)
                tokens = self.tokenizer.encode_control(text)
            elif segments:
                tokens = self._bos + self._plain_ids(segments)
            self._blocks[phase, fs] = _Block(tokens, segments, text, seam, ids)
        return self._blocks[phase, fs]

    def _shared_text(self, segments: list[Segment]) -> tuple[str, str]:
        """(what the chat template writes for `segments` whatever the user says next, the control token it ends with).

        Templates treat a last message unlike one in the middle, so the next message is opened; texts on the two sides
        of a control token are tokenized apart, so the rest can be encoded alone.
        """
        text = self._chat_text([*segments, Mark.USER, chat_template.CUT]).partition(chat_template.CUT)[0]
        ends = [(text.rfind(word) + len(word), word) for word in self.tokenizer.control if word in text]
        end, seam = max(ends, default=(0, ""))
        return text[:end], seam

    def _render(self, phase: str, segments: list[Segment], fs: int) -> Rendered:
        block = self._block(phase, fs) if fs >= 0 else _Block([], [], "", "", ())
        if not self.is_chat:
            bos = [] if block.tokens else self._bos
            return Rendered(block.tokens, bos + self._plain_ids(segments), block.ids)
        text = self._chat_text([*block.segments, *segments])
        if block.text and text.startswith(block.text):
            rest = self.tokenizer.encode_control(block.seam + text[len(block.text) :])[1:]
            return Rendered(block.tokens, rest, block.ids)
        return Rendered([], self.tokenizer.encode_control(text), block.ids)  # the template rewrites earlier messages

    def _suffix(self, segments: list[Segment]) -> list[int]:
        if self.is_chat:
            return self.tokenizer.encode_control(self._after_cut(segments))
        return self._plain_ids(segments)

    def dialogue(self, turns: Sequence[Turn]) -> list[int]:
        """The conversation up to where the assistant speaks."""
        segments = self.prompts.dialogue(turns)
        if self.is_chat:
            return self.tokenizer.encode_control(self._chat_text(segments))
        return self._bos + self._plain_ids(segments)

    def critique(self, turns: Sequence[Turn], response: str, principle: Principle, fs: int) -> Rendered:
        """The request to criticise `response`."""
        return self._render("critique", self.prompts.critique(turns, response, principle), fs)

    def revision(self, turns: Sequence[Turn], response: str, principle: Principle, critique: str, fs: int) -> Rendered:
        """The critique's prompt, the critique, and the request to revise `response`."""
        start = self.critique(turns, response, principle, fs)
        middle = self._answer_ids(critique) + self.revision_suffix(principle)
        return start._replace(ids=start.ids + middle)

    def revision_suffix(self, principle: Principle) -> list[int]:
        """What follows the body ids of a critique."""
        return self._suffix(self.prompts.revision_suffix(principle))

    def direct_revision(self, turns: Sequence[Turn], response: str, principle: Principle, fs: int) -> Rendered:
        """The request to revise `response` without a critique."""
        return self._render("direct_revision", self.prompts.direct_revision(turns, response, principle), fs)

    def comparison(self, turns: Sequence[Turn], a: str, b: str, principle: Principle, fs: int) -> Rendered:
        """Which response is better; ends where the option's letter is read."""
        return self._render("comparison", self.prompts.question("comparison", turns, a, b, principle), fs)

    def cot(self, turns: Sequence[Turn], a: str, b: str, principle: Principle, fs: int) -> Rendered:
        """Which response is better; ends where the reasoning begins."""
        return self._render("cot", self.prompts.question("cot", turns, a, b, principle), fs)

    def cot_answer_suffix(self) -> list[int]:
        """What follows the body ids of the reasoning; ends where the option's letter is read."""
        return self._suffix(self.prompts.cot_answer())

    def options(self, context: prompts.Context) -> Options:
        """How the options are read after `comparison` or `cot_answer_suffix` (the same in both contexts)."""
        first, second = (self.tokenizer.encode(option) for option in self.format.options)
        if first == second:
            raise InputError(
                f"{self.tokenizer.source_path}: the options {self.format.options!r} ({context}) have the "
                f"same tokens {first}; choose other [format] options or another tokenizer"
            )
        common = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
        if common is None:
            return Options([], [], [first, second])
        return Options(first[:common], [[first[common]], [second[common]]], None)

    def preference(self, turns: Sequence[Turn], response_ids: Sequence[int]) -> list[int]:
        """The preference model's input: dialogue, response with its stop token, end-of-context token."""
        return [*self.dialogue(turns), *response_ids, self.tokenizer.eoc_id]

    def response_ids(self, text: str) -> list[int]:
        """A response from a file as if it had been sampled, with its stop token."""
        return [*self._answer_ids(text), self.stop_id]

    def _answer_ids(self, text: str) -> list[int]:
        return self._plain_ids([self.style.opening, *self.prompts.answer(text)])

    def stops(self, kind: Kind) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Stop token ids (the one that SFT trains first) and stop strings of a kind of text."""
        return tuple(dict.fromkeys([self.stop_id, *self.tokenizer.stop_ids])), self.format.stop

    def finish(self, token_ids: Sequence[int], kind: Kind) -> Finished:
        """The text of a completion without what stopped it, and its ids: only a piece cut by a stop string is
        tokenized anew, all other ids stay as sampled."""
        body = list(token_ids)
        stop_ids, stop_strings = self.stops(kind)
        end = next((i for i, index in enumerate(body) if index in stop_ids), len(body))
        del body[end:]
        text = self.tokenizer.decode(body)
        cut = min((at for stop in stop_strings if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            text = text[:cut].rstrip()
            kept = len(body)
            while kept and not text.startswith(self.tokenizer.decode(body[:kept])):
                kept -= 1
            rest = text[len(self.tokenizer.decode(body[:kept])) :]
            body = body[:kept] + (self.tokenizer.encode(rest) if rest else [])
        return Finished(text.strip(), [*body, self.stop_id])

    @cached_property
    def control_ids(self) -> list[int]:
        """Control tokens of a conversation with its reply, in ascending order."""
        turns = [Turn(role, "x") for role in ("human", "assistant", "human")]
        return sorted({*self.dialogue(turns), *self.response_ids("x")} & {*self.tokenizer.control.values()})

    def draw_few_shot(self, key: int) -> int:
        """Number of a few-shot block, a pure function of `key`."""
        return int(uniform("few-shot block", key) * self.few_shot_pool)

    def is_refusal(self, text: str) -> bool:
        """Whether a response begins by refusing."""
        return self.prompts.is_refusal(text)

    @cached_property
    def overhead(self) -> int:
        """Tokens that the longest prompt adds to its conversation, responses and critique: few-shot block, longest
        principle, words of the format. For sizing caches."""
        turns = (Turn("human", "x"),)
        lengths = [0]
        for p in self.prompts.constitution.principles:
            if p.serves("critique"):
                rendered = [self.revision(turns, "x", p, "x", 0), self.direct_revision(turns, "x", p, 0)]
                lengths += [len(r.prefix) + len(r.ids) for r in rendered]
            for fs in range(self.few_shot_pool) if p.serves("comparison") else ():
                rendered = [self.comparison(turns, "x", "x", p, fs), self.cot(turns, "x", "x", p, fs)]
                lengths += [len(r.prefix) + len(r.ids) + len(self.cot_answer_suffix()) + 8 for r in rendered]
        return max(lengths)
