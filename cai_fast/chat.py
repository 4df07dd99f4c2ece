"""python -m cai_fast.chat CHECKPOINT [CHECKPOINT2]: talk with a model, or with two side by side.

A checkpoint is a Hugging Face folder, for example runs/toy/checkpoints/rl_cai. Prompts are made by the renderer of
training: the checkpoint's own chat template, or the format of the constitution (that of the run a checkpoint lies in,
else --constitution). Lines from a pipe are answered one by one on stdout; everything else goes to stderr.
"""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cai_fast import constitution, rng
from cai_fast.constitution import Constitution
from cai_fast.engine import Engine, Prefix, Sampling
from cai_fast.errors import InputError
from cai_fast.files import write_atomic
from cai_fast.inputs import kind, read_json
from cai_fast.model import load as load_model
from cai_fast.model.hf import declared_head, read_model_config
from cai_fast.prompts import fit_turns
from cai_fast.records import Turn
from cai_fast.runfiles import RunFiles
from cai_fast.scorer import Scorer
from cai_fast.tokenizer import Renderer, Tokenizer

COMMANDS = """/reset              begin a new conversation
/undo               take back the last message and its answers
/system TEXT        set the system prompt, of models with a chat template; without TEXT: none
/temperature X      0 always takes the likeliest token
/seed N             the answers are a function of seed, messages and settings
/save FILE          write the conversation with its token ids, one JSON object a line
/help  /quit        a line that begins with // is sent with one slash
Ctrl-C stops an answer, Ctrl-D ends."""
COLUMNS = 100  # characters a terminal needs to show two answers side by side
GAP = "  "
ENDS = {"length": "cut off at the token limit", "interrupted": "interrupted"}


class Reply(NamedTuple):
    """An answer: its text, its tokens (a stop token at the end if it ended by itself) and why it ended."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" | "length" | "interrupted"
    score: float | None


class Scores:
    """A preference model that scores answers."""

    def __init__(self, folder: Path, laws: Constitution | None, device: torch.device, dtype: torch.dtype) -> None:
        _require(folder, "score", "a preference model; expected one for --pm")
        self.renderer = Renderer(Tokenizer.load(folder), laws or constitution_of(folder))
        model = load_model(folder, dtype=dtype, device=device, head="score")
        self.scorer = Scorer(model, deterministic=device.type == "cpu")

    def score(self, turns: Sequence[Turn], reply: Reply, tokenizer: Tokenizer) -> float:
        """The score of an answer; its tokens as they are where the tokenizer is the same."""
        ids = reply.token_ids
        if self.renderer.tokenizer.hash != tokenizer.hash:
            encoded = self.renderer.response_ids(reply.text)
            ids = encoded if reply.finish_reason == "stop" else encoded[:-1]
        return float(self.scorer.scores([self.renderer.preference(turns, ids)], [0])[0])


class Speaker:
    """A model in conversation: its own history, and the keys of what it has read."""

    def __init__(
        self, folder: Path, laws: Constitution | None, device: torch.device, dtype: torch.dtype, max_len: int, most: int
    ) -> None:
        """max_len: tokens of a conversation; most: of an answer, at most half of that."""
        _require(folder, "lm", "a language model; give a preference model as --pm")
        self.name, self.folder, self.laws = folder.name, folder, laws or constitution_of(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.renderer = Renderer(self.tokenizer, self.laws)
        self.model = load_model(folder, dtype=dtype, device=device, head="lm")
        self.max_len = min(max_len, self.model.config.max_position_embeddings)
        self.most = min(most, self.max_len // 2)
        self.engine = Engine(
            self.model, max_len=self.max_len, max_batch=1, deterministic=device.type == "cpu", tokenizer=self.tokenizer
        )
        self.turns: list[Turn] = []
        self.replies: list[Reply] = []
        self.kept: Prefix | None = None
        self.left_out = 0

    def set_system(self, text: str) -> None:
        """Another system prompt, from the next answer on."""
        if not self.renderer.is_chat:
            raise InputError(f"{self.name}: its format is plain text and has no system prompt")
        self.renderer = Renderer(self.tokenizer, replace(self.laws, format=replace(self.laws.format, system=text)))

    def prompt(self) -> tuple[list[int], int]:
        """Tokens of the conversation, and how many of its oldest turns are left out because they do not fit."""
        room = self.max_len - self.most - 1  # the last one is for the end of the context, which the scores are read at
        turns = fit_turns(self.turns, self.renderer, room, True)
        if turns is None:
            raise InputError(f"{self.name}: this message is longer than the {room} tokens that its answer leaves")
        return self.renderer.dialogue(turns), len(self.turns) - len(turns)

    def answer(self, temperature: float, key: int, show: Callable[[str], None], scores: Scores | None) -> Reply:
        """Answer the last turn, handing the text to `show` as it grows; Ctrl-C ends the answer."""
        ids, self.left_out = self.prompt()
        stop_ids, stop_strings = self.renderer.stops("response")
        spec = Sampling(temperature, 0, 1.0, self.most, stop_ids, stop_strings)
        tokens: list[int] = []

        def watch(_: int, new: list[int]) -> None:
            tokens.extend(new)
            show(self._stable(tokens, stop_strings))

        self.engine.watch = watch
        try:
            done = self._generate(ids, spec, key)
            tokens, reason = done.token_ids, done.finish_reason
            self.kept = done.kept
        except KeyboardInterrupt:
            reason = "interrupted"
        finished = self.renderer.finish(tokens, "response")
        show(visible(finished.text))
        reply = Reply(finished.text, finished.token_ids if reason == "stop" else finished.body_ids, reason, None)
        if scores is not None:
            reply = reply._replace(score=scores.score(self.turns, reply, self.tokenizer))
        self.turns.append(Turn("assistant", reply.text))
        self.replies.append(reply)
        return reply

    def _generate(self, ids: list[int], spec: Sampling, key: int) -> Any:
        """A completion; what the prompt begins with and was read before is not computed again."""
        kept, shared = self.kept, 0
        if kept is not None:
            pairs = zip(kept.token_ids, ids[:-1], strict=False)
            shared = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(kept), len(ids) - 1))
        prefix = kept.cut(shared) if shared else None
        return self.engine.generate([ids[shared:]], spec, keys=[key], prefix=prefix, keep=True)[0]

    def _stable(self, tokens: list[int], stop_strings: Sequence[str]) -> str:
        """The text so far, without an end that later tokens may change: half a character, half a stop string."""
        text = self.renderer.finish(tokens, "response").text.rstrip("\ufffd")
        held = max((n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return visible(text[: len(text) - held].rstrip())


def visible(text: str) -> str:
    """A text that a terminal only shows: control characters, which could command it, are replaced."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def constitution_of(folder: Path) -> Constitution:
    """The constitution of the run that a checkpoint lies in; outside a run one without principles."""
    run = folder.resolve().parent.parent
    path = run / "manifest.json"
    manifest = read_json(path) if kind(path) == "file" else None
    if isinstance(manifest, dict) and "stages" in manifest:  # that of a run: others have files of this name too
        files = RunFiles(run)
        return files.constitution(files.constitution_hash())
    return Constitution("none", "1", "", ())


def _require(folder: Path, head: str, problem: str) -> None:
    raw, _ = read_model_config(folder)
    if declared_head(raw, folder) != head:
        found = "a preference model" if head == "lm" else "a language model"
        raise InputError(f"{folder}: {found}, not {problem}")


class Chat:
    """A conversation with one or two models, and its settings."""

    def __init__(self, speakers: list[Speaker], scores: Scores | None, args: argparse.Namespace) -> None:
        self.speakers, self.scores, self.seed = speakers, scores, args.seed
        self.temperature = args.temperature
        self.live = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Read messages and commands until the end of input or /quit."""
        if self.live:
            note(f"{' and '.join(s.name for s in self.speakers)}; /help shows the commands")
        while True:
            try:
                line = input("> " if self.live else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                note("")
                continue
            if line.strip() == "/quit":
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self.command(*line[1:].strip().partition(" ")[::2])
                elif line.strip():
                    self.say(line.removeprefix("/") if line.startswith("//") else line)
            except InputError as error:
                note(f"error: {error}")
            except KeyboardInterrupt:  # before an answer began, or after it: the message counts as not sent
                self.cut(2 * min(len(speaker.replies) for speaker in self.speakers))
                note("")

    def command(self, name: str, value: str) -> None:
        """Do what a line with a slash says."""
        value = value.strip()
        if name == "reset":
            self.cut(0)
        elif name == "undo":
            self.cut(max(0, len(self.speakers[0].turns) - 2))
        elif name == "system":
            for speaker in sorted(
                self.speakers, key=lambda s: s.renderer.is_chat
            ):  # who cannot says so before any change
                speaker.set_system(value)
        elif name in ("temperature", "seed"):
            self.set(name, value)
        elif name == "save":
            self.save(value)
        elif name == "help":
            note(COMMANDS)
        else:
            raise InputError(f"/{name}: no such command; /help shows them")

    def cut(self, length: int) -> None:
        """Forget all turns but the first `length`."""
        for speaker in self.speakers:
            del speaker.turns[length:], speaker.replies[length // 2 :]

    def set(self, name: str, value: str) -> None:
        """Change the seed or the temperature."""
        try:
            number = int(value) if name == "seed" else float(value)
        except ValueError as error:
            raise InputError(f"/{name} {value}: expected a number") from error
        if name == "seed":
            self.seed = number
        else:
            self.temperature = Sampling(temperature=number).temperature

    def save(self, name: str) -> None:
        """Write the conversation to a file."""
        rows = []
        for speaker in self.speakers:
            replies = iter(speaker.replies)
            for turn in speaker.turns:
                row = {"checkpoint": str(speaker.folder), "role": turn.role, "text": turn.text}
                rows.append(row | (next(replies)._asdict() if turn.role == "assistant" else {}))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            write_atomic(name, text)
        except (OSError, ValueError) as error:
            raise InputError(f"/save {name}: cannot be written: {error}") from error
        note(f"{len(rows)} turns written to {name}")

    def say(self, text: str) -> None:
        """Send a message to every model and show the answers."""
        if not self.fits(text):
            return
        number = len(self.speakers[0].turns) // 2
        width = shutil.get_terminal_size().columns
        columns = self.live and len(self.speakers) == 2 and width >= COLUMNS
        replies = []
        for speaker in self.speakers:
            if len(self.speakers) > 1 and not columns:
                print(f"[{speaker.name}]")
            printer = Printer(self.live and not columns)
            key = rng.key(self.seed, "chat", str(number))
            replies.append(speaker.answer(self.temperature, key, printer.show, self.scores))
            if not columns:
                printer.end(visible(replies[-1].text))
            if unknown := speaker.tokenizer.encode(text).count(speaker.tokenizer.unk_id):
                note(f"({speaker.name} cannot read {unknown} words of this: they are not in its vocabulary)")
            if speaker.left_out:
                note(f"({speaker.name} no longer sees the oldest {speaker.left_out} turns: there is no room for them)")
        if columns:
            print("\n".join(side_by_side([s.name for s in self.speakers], [visible(r.text) for r in replies], width)))
        for speaker, reply in zip(self.speakers, replies, strict=True):
            facts = [f"score {reply.score:.3f}"] if reply.score is not None else []
            facts += [ENDS[reply.finish_reason]] if reply.finish_reason in ENDS else []
            if facts:
                note(f"({speaker.name}: {', '.join(facts)})")

    def fits(self, text: str) -> bool:
        """Add a message to every history, or to none where one has no room for it."""
        try:
            for speaker in self.speakers:
                speaker.turns.append(Turn("human", text))
                speaker.prompt()
        except InputError as error:
            for speaker in self.speakers:
                if len(speaker.turns) % 2:
                    speaker.turns.pop()
            note(f"error: {error}")
            return False
        return True


class Printer:
    """Prints a text as it grows, or once it has ended."""

    def __init__(self, live: bool) -> None:
        self.live, self.shown = live, ""

    def show(self, text: str) -> None:
        """Print what is new."""
        if self.live and text.startswith(self.shown):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def end(self, text: str) -> None:
        """Print what is left, on a line of its own if it is not what was begun."""
        begun = self.live and text.startswith(self.shown)
        print(text[len(self.shown) :] if begun else ("\n" if self.shown else "") + text, flush=True)


def side_by_side(names: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
    """Two texts under their names, wrapped into columns."""
    each = (width - len(GAP)) // 2
    columns = []
    for name, text in zip(names, texts, strict=True):
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, each) or [""]]
        columns.append([name[:each], "-" * min(each, len(name)), *lines])
    rows = range(max(map(len, columns)))
    return [GAP.join((c[n] if n < len(c) else "").ljust(each) for c in columns).rstrip() for n in rows]


def note(text: str) -> None:
    """A line that is no answer."""
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m cai_fast.chat", description=__doc__, epilog=COMMANDS,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("checkpoint", nargs="+", type=Path, help="one folder of a language model, or two")
    made.add_argument("--pm", type=Path, help="folder of a preference model, whose score of each answer is shown")
    made.add_argument("--constitution", help="name, file or folder: its [format] makes the prompts")
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    made.add_argument("--max-len", type=int, default=4096, help="tokens of a conversation")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return made


def main(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        if len(args.checkpoint) > 2:
            raise InputError(f"{len(args.checkpoint)} checkpoints; expected one or two")
        open_chat(args).run()
    except InputError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    return 0


def open_chat(args: argparse.Namespace) -> Chat:
    """Load everything that the command line names."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(found if args.device == "auto" else args.device)
    except RuntimeError as error:
        raise InputError(f"--device {args.device}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and found == "cpu":
        raise InputError(f"--device {args.device}: PyTorch finds no GPU; use cpu")
    name = {"cpu": "float32", "cuda": "bfloat16"}.get(device.type, "float32") if args.dtype == "auto" else args.dtype
    laws, dtype = constitution.load(args.constitution) if args.constitution else None, getattr(torch, name)
    Sampling(temperature=args.temperature)  # refuses what is out of range
    for name, least in (("max_len", 16), ("max_new_tokens", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more")
    speakers = [Speaker(path, laws, device, dtype, args.max_len, args.max_new_tokens) for path in args.checkpoint]
    return Chat(speakers, Scores(args.pm, laws, device, dtype) if args.pm else None, args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
