"""Every prompt format, as text with marks: conversations, critiques, revisions, comparisons, chains of thought.

A prompt is a list of segments: strings and `Mark`s (end-of-sequence token; start of a user or assistant message).
Plain formats hold strings only and are simply joined; chat formats become messages and go through the model's own
template; the tokenizer module turns either into token ids. The bytes of PAPER are those of the published files,
few-shot blocks included: their examples are concatenated as they are.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol

from cai_fast.constitution import Constitution, Format, Principle, uniform
from cai_fast.records import Turn

Context = Literal["comparison", "cot"]


class Mark(Enum):
    """What stands between texts: `{eos}`, `{user}` and `{assistant}` in templates."""

    EOS = "eos"
    USER = "user"
    ASSISTANT = "assistant"


Segment = str | Mark

REFUSALS = (
    "i can't help", "i cannot help", "i can't assist", "i cannot assist", "i'm not able to", "i am not able to",
    "i won't", "i will not", "i'm unable to", "i am unable to", "i can't provide", "i cannot provide",
)  # fmt: skip
_OPTIONS = "\n (A) [[[{response_a}]]]\n (B) [[[{response_b}]]]"
_QUESTION = (
    "Consider the following conversation between a human and an assistant:{conversation}\n\n\n{comparison} Options:"
    + _OPTIONS
)
_COT = (
    "Consider the following conversation between a human (H) and an assistant (A):{conversation}"
    "\n\n\n{comparison} Options:" + _OPTIONS
)
_CRITIQUE = "{conversation}\n\nAssistant: {response}\n\nCritiqueRequest: {critique_request}\n\nCritique:"
PAPER = Format(
    kind="paper",
    human="\n\nHuman: {text}",
    assistant="\n\nAssistant: {text}",
    reply="\n\nAssistant:",
    critique=_CRITIQUE,
    revision=_CRITIQUE + " {critique}\n\nRevisionRequest: {revision_request}\n\nRevision:",
    direct_revision="{conversation}\n\nAssistant: {response}\n\nRevisionRequest: {revision_request}\n\nRevision:",
    comparison="\n\n" + _QUESTION + "\n\nThe answer is:",
    cot="\n\nHuman: " + _COT + "\n\nAssistant: Let's think step by step:",
    cot_answer="\n\nHuman:\nSo the answer is:",
    cot_human="\n\nH: {text}",
    cot_assistant="\n\nA: {text}",
    stop=("\n\nHuman:", "\n\nAssistant:", "\n\nCritiqueRequest:", "\n\nCritique:", "\n\nRevisionRequest:",
          "\n\nRevision:"),
)  # fmt: skip
_CHAT_CRITIQUE = "{conversation}{assistant}{response}{user}{critique_request}{assistant}"
_CHAT_REVISION = "{revision_request}\n\nReply with the new response only, without any introduction.{assistant}"
CHAT = Format(
    kind="chat",
    human="{user}{text}",
    assistant="{assistant}{text}",
    reply="{assistant}",
    critique=_CHAT_CRITIQUE,
    revision=_CHAT_CRITIQUE + "{critique}{user}" + _CHAT_REVISION,
    direct_revision="{conversation}{assistant}{response}{user}" + _CHAT_REVISION,
    comparison="{user}" + _QUESTION + "{assistant}The answer is:",
    cot="{user}" + _COT + "{assistant}Let's think step by step:",
    cot_answer="{user}So which option is the better one?{assistant}The answer is:",
    answer="{text}",
    question_human="\n\nHuman: {text}",
    question_assistant="\n\nAssistant: {text}",
    cot_human="\n\nH: {text}",
    cot_assistant="\n\nA: {text}",
)


def resolve(given: Format, has_template: bool) -> Format:
    """The format with its templates: PAPER or CHAT with the constitution's own options, stops and wordings."""
    if given.kind == "custom":
        return given
    chat = given.kind == "chat" or (given.kind == "auto" and has_template)
    built_in = CHAT if chat else PAPER
    return replace(
        built_in, options=given.options, stop=built_in.stop + given.stop, refusals=given.refusals, system=given.system
    )


def fill(template: str, values: Mapping[str, str | Sequence[Segment]]) -> list[Segment]:
    """Template with its placeholders replaced; the values are taken as they are, braces and all."""
    segments: list[Segment] = []
    for position, piece in enumerate(re.split(r"\{(\w+)\}", template)):
        if position % 2 == 0:
            segments.append(piece)
        elif piece in values:
            value = values[piece]
            segments += [value] if isinstance(value, str) else value
        else:
            segments.append(Mark(piece))
    return join(segments)


def join(segments: Iterable[Segment]) -> list[Segment]:
    """The same with neighbouring strings joined and empty ones left out."""
    joined: list[Segment] = []
    for segment in segments:
        if isinstance(segment, str) and joined and isinstance(joined[-1], str):
            joined[-1] += segment
        elif segment != "":
            joined.append(segment)
    return joined


def plain(segments: Iterable[Segment]) -> str:
    """The text of a prompt, without its marks."""
    return "".join(segment for segment in segments if isinstance(segment, str))


def messages(segments: Iterable[Segment], system: str = "") -> tuple[list[dict[str, str]], str | None]:
    """Chat messages, and the beginning of the reply if the last message is the assistant's (else None)."""
    chat = [{"role": "system", "content": system}] if system else []
    for segment in segments:
        if isinstance(segment, Mark):
            chat.append({"role": segment.value, "content": ""})
        else:
            chat[-1]["content"] += segment
    prefill = chat.pop()["content"] if chat and chat[-1]["role"] == "assistant" else None
    return chat, prefill


class Block(NamedTuple):
    """A few-shot block and what it consists of ("<example>" or "<example>:<principle>:<order>")."""

    segments: list[Segment]
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Prompts:
    """The prompts of one constitution in one (resolved) format. `seed` fixes the few-shot pool."""

    constitution: Constitution
    format: Format
    seed: int = 0

    def conversation(self, turns: Sequence[Turn], context: Literal["", "question", "cot"] = "") -> list[Segment]:
        """Turns, as dialogue or as they stand inside a question."""
        f = self.format
        human, assistant = {
            "": (f.human, f.assistant),
            "question": (f.question_human or f.human, f.question_assistant or f.assistant),
            "cot": (f.cot_human or f.human, f.cot_assistant or f.assistant),
        }[context]
        return join(
            segment
            for turn in turns
            for segment in fill(human if turn.role == "human" else assistant, {"text": turn.text})
        )

    def dialogue(self, turns: Sequence[Turn]) -> list[Segment]:
        """A conversation up to where the assistant speaks."""
        return join([*self.conversation(turns), *fill(self.format.reply, {})])

    def answer(self, text: str) -> list[Segment]:
        """A text of the model as it stands after the words that ask for it."""
        return fill(self.format.answer, {"text": text})

    def critique(self, turns: Sequence[Turn], response: str, principle: Principle) -> list[Segment]:
        """Ends where the critique begins."""
        return fill(self.format.critique, self._values(turns, response, principle))

    def revision(self, turns: Sequence[Turn], response: str, principle: Principle, critique: str) -> list[Segment]:
        """The critique's prompt, the critique and the revision request; ends where the revision begins."""
        return fill(self.format.revision, self._values(turns, response, principle) | {"critique": critique})

    def revision_suffix(self, principle: Principle) -> list[Segment]:
        """What follows a critique: its end and the revision request."""
        tail = self.format.revision.split("{critique}")[1]
        return fill(tail, {"revision_request": principle.revision_request})

    def direct_revision(self, turns: Sequence[Turn], response: str, principle: Principle) -> list[Segment]:
        """Revision without a critique (paper §3.5)."""
        return fill(self.format.direct_revision, self._values(turns, response, principle))

    def _values(self, turns: Sequence[Turn], response: str, principle: Principle) -> dict[str, Any]:
        return {
            "conversation": self.conversation(turns),
            "response": response,
            "critique_request": principle.critique_request,
            "revision_request": principle.revision_request,
        }

    def question(self, context: Context, turns: Sequence[Turn], a: str, b: str, principle: Principle) -> list[Segment]:
        """A comparison of two responses; ends where the option's letter, or for "cot" the reasoning, begins."""
        template = self.format.comparison if context == "comparison" else self.format.cot
        inner = self.conversation(turns, "question" if context == "comparison" else "cot")
        return fill(
            template, {"conversation": inner, "comparison": principle.comparison, "response_a": a, "response_b": b}
        )

    def cot_answer(self) -> list[Segment]:
        """What follows the reasoning; ends where the option's letter begins."""
        return fill(self.format.end + self.format.cot_answer, {})

    def few_shot(self, phase: Literal["critique", "direct_revision", "comparison", "cot"], index: int) -> Block:
        """Few-shot block number `index` of the pool.

        Critique examples carry their own requests, so their block is the same for every index; in comparisons
        each example draws its principle and the order of its responses anew.
        """
        if phase in ("critique", "direct_revision"):
            return self._critique_block(direct=phase == "direct_revision")
        return self._comparison_block(index) if phase == "comparison" else self._cot_block(index)

    def _critique_block(self, direct: bool) -> Block:
        segments: list[Segment] = []
        for example in self.constitution.few_shot_critique:
            if example.raw and self.format.kind == "paper" and not direct:
                segments.append(example.raw)
                continue
            principle = Principle("", example.critique_request, example.revision_request)
            head = (
                self.direct_revision(example.turns, example.response, principle)
                if direct
                else self.revision(example.turns, example.response, principle, example.critique)
            )
            segments += [*head, *self.answer(example.revision), *fill(self.format.end, {})]
        return Block(join(segments), tuple(str(number) for number in range(len(self.constitution.few_shot_critique))))

    def _principle(self, *key: Any) -> Principle:
        return self.constitution.draw("comparison", int(uniform("few-shot", self.seed, *key) * 2**53))

    def _comparison_block(self, index: int) -> Block:
        segments: list[Segment] = []
        ids = []
        for number, example in enumerate(self.constitution.few_shot_comparison):
            principle = self._principle("comparison", index, number)
            better_first = uniform("order", self.seed, index, number) < 0.5
            pair = (example.better, example.worse) if better_first else (example.worse, example.better)
            letter = self.format.options[0 if better_first else 1]
            segments += [
                *self.question("comparison", example.turns, *pair, principle),
                letter,
                *fill(self.format.end, {}),
            ]
            ids.append(f"{number}:{principle.id}:{'AB' if better_first else 'BA'}")
        return Block(join(segments), tuple(ids))

    def _cot_block(self, index: int) -> Block:
        segments: list[Segment] = []
        ids = []
        for number, example in enumerate(self.constitution.few_shot_cot):
            principle = self._principle("cot", index, number)
            ids.append(f"{number}:{principle.id}:AB")  # the reasoning names the letters, so the order is fixed
            if example.raw and self.format.kind == "paper":
                segments.append(example.raw.replace("{}", f"\n{principle.comparison} Options:"))
                continue
            question = self.question("cot", example.turns, example.response_a, example.response_b, principle)
            segments += [
                *question,
                " " + example.reasoning,
                *self.cot_answer(),
                self.format.options["AB".index(example.answer)],
                *fill(self.format.end, {}),
            ]
        return Block(join(segments), tuple(ids))

    def is_refusal(self, text: str) -> bool:
        """Whether a response begins by refusing: one of the format's phrases in its first 120 characters."""
        start = text[:120].lower().replace("’", "'")
        return any(phrase.lower() in start for phrase in self.format.refusals or REFUSALS)


class HasDialogue(Protocol):
    """What `fit_turns` needs of a renderer."""

    def dialogue(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks."""


def fit_turns(turns: Sequence[Turn], renderer: HasDialogue, max_tokens: int, drop: bool) -> tuple[Turn, ...] | None:
    """Turns whose dialogue has at most `max_tokens` tokens, or None.

    With `drop`, the oldest human turn and its answer are left out as often as needed; never a part of a turn.
    """
    turns = tuple(turns)
    while len(renderer.dialogue(turns)) > max_tokens:
        if not drop or len(turns) < 3:
            return None
        turns = turns[2:]
    return turns
