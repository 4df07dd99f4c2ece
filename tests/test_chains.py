"""Critique-revision chains: what each step sees, which principle it draws, what is rejected; chunks and kills."""

import errno
import os
import re
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import textworld
from planted import PlantedEngine
from support import MINIMAL, byte_tokenizer, write_constitution
from tiny import alone

from cai_fast import records, rng
from cai_fast.chains import Reviser, defect, repetition
from cai_fast.engine import Completion
from cai_fast.errors import InputError
from cai_fast.pipeline import Context
from cai_fast.prefixes import Prefixes
from cai_fast.records import Prompt, Revision, Turn
from cai_fast.stages import revise

LONG = "Say at length what is wrong. " * 100
FILLERS = (
    "Sure, here is a revised response: Lock it.", "Certainly! Here's the rewritten version of the answer: Lock it.",
    "Okay. I have revised the response:\nLock it.", "Below is an updated version: Lock it.",
    "The following is my rewrite: Lock it.",
)  # fmt: skip
CLEAN = ("Here is how to bake bread: mix flour.", "Sure, that works.", "A revised plan: start early.", "I have a lock.")


@pytest.fixture(scope="module")
def inputs(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return build_once("text_inputs", textworld.build)


@pytest.fixture
def open_run(inputs: Path, tmp_path: Path) -> Iterator[Callable[..., Context]]:
    """`open_run(revise__rounds=3, ...)`: the context of a new run folder; of an old one with `folder=`."""
    opened: list[Context] = []

    def get(folder: str = "", **settings: Any) -> Context:
        path = tmp_path / (folder or f"run{len(opened)}")
        opened.append(textworld.context(inputs, path, alone(), **settings))
        return opened[-1]

    yield get
    for ctx in opened:
        ctx.run.close()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str | None]], list[PlantedEngine]]:
    """`plant(reply)`: all engines made from now on answer with `reply`; returns the list they are put into."""

    def put(reply: Callable[[str], str | None]) -> list[PlantedEngine]:
        engines: list[PlantedEngine] = []

        def engine(ctx: Context, model: Any, renderer: Any, max_len: int) -> PlantedEngine:
            engines.append(PlantedEngine(renderer, reply))
            return engines[-1]

        monkeypatch.setattr(Context, "engine", engine)
        return engines

    return put


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{n}", "red_team", (Turn("human", f"Question {n}?"),), "test", "train") for n in range(count)]


def chains(ctx: Context, given: list[Prompt]) -> list[Revision]:
    rows = list(Reviser(ctx).chains(given))
    assert [row["id"] for row in rows] == [p.id for p in given]
    return [Revision.from_json(row["record"]) for row in rows]


def kind(prompt: str) -> str:
    """What a prompt asks for."""
    return re.search(r"(Assistant|Critique|Revision):$", prompt)[1]


def numbered() -> Callable[[str], str]:
    """Replies that can be told apart: "Assistant 1.", "Critique 2.", ..."""
    made = Counter()

    def reply(prompt: str) -> str:
        made.update([""])
        return f"{kind(prompt)} {made['']}."

    return reply


def test_a_step_sees_the_current_response_and_nothing_older(open_run: Any, plant: Any) -> None:
    engines = plant(numbered())
    ctx = open_run(revise__rounds=3, revise__few_shot=False)
    (chain,) = chains(ctx, prompts(1))
    asked = {p.id: p for p in ctx.constitution.principles}
    expected = ["\n\nHuman: Question 0?\n\nAssistant:"]
    current = chain.response
    for step in chain.rounds:
        principle = asked[step.principle]
        start = f"\n\nHuman: Question 0?\n\nAssistant: {current}\n\nCritiqueRequest: {principle.critique_request}"
        expected.append(start + "\n\nCritique:")
        expected.append(f"{expected[-1]} {step.critique}\n\nRevisionRequest: {principle.revision_request}\n\nRevision:")
        current = step.revision
    assert engines[0].prompts == expected
    assert [chain.response, *(t for r in chain.rounds for t in (r.critique, r.revision))] == [
        "Assistant 1.", "Critique 2.", "Revision 3.", "Critique 4.", "Revision 5.", "Critique 6.", "Revision 7."
    ]  # fmt: skip
    assert chain.kept and len(set(engines[0].keys)) == 7


def test_few_shot_examples_come_first(open_run: Any, plant: Any) -> None:
    engines = plant(numbered())
    ctx = open_run(revise__rounds=1)
    (chain,) = chains(ctx, prompts(1))
    block = "".join(example.raw for example in ctx.constitution.few_shot_critique)
    plain, critique, revision = engines[0].prompts
    assert plain == "\n\nHuman: Question 0?\n\nAssistant:"
    assert critique.startswith(block) and revision.startswith(critique)
    assert chain.provenance["few_shot"] == [["0", "1"]]


def test_principles_are_drawn_evenly_with_replacement_and_logged(open_run: Any, plant: Any) -> None:
    engines = plant(numbered())
    ctx = open_run(revise__rounds=2, revise__few_shot=False)
    made = chains(ctx, prompts(400))
    drawn = [tuple(step.principle for step in chain.rounds) for chain in made]
    counts = Counter(drawn)  # two principles: four pairs, 100 of each expected, deviation 8.7
    assert set(counts) == {(a, b) for a in ("harm0", "harm1") for b in ("harm0", "harm1")}
    assert all(65 < n < 135 for n in counts.values())
    requests = {p.id: p.critique_request for p in ctx.constitution.principles}
    for number in (0, 1):
        asked = [p for p in engines[0].prompts if kind(p) == "Critique"][400 * number : 400 * (number + 1)]
        assert all(requests[pair[number]] in prompt for pair, prompt in zip(drawn, asked, strict=True))
    again = chains(open_run(revise__rounds=2, revise__few_shot=False), prompts(400)[::-1])
    assert [tuple(step.principle for step in chain.rounds) for chain in again] == drawn[::-1]
    other = chains(open_run(revise__rounds=2, revise__few_shot=False, seed=1), prompts(400))
    assert [tuple(step.principle for step in chain.rounds) for chain in other] != drawn


def test_provenance_alone_gives_every_key(open_run: Any, plant: Any) -> None:
    engines = plant(numbered())
    ctx = open_run(revise__rounds=3)
    found = {chain.prompt_id: chain for chain in chains(ctx, prompts(2))}
    keys = [chain.provenance["rng"] for chain in found.values()]
    steps = [[k["response"] for k in keys]]
    steps += [[k["rounds"][n][name] for k in keys] for n in range(3) for name in ("critique", "revision")]
    assert engines[0].keys == [rng.key(*parts) for step in steps for parts in step]
    for chain in found.values():
        drawn = [rng.key(*step["principle"]) for step in chain.provenance["rng"]["rounds"]]
        assert [ctx.constitution.draw("critique", key).id for key in drawn] == [r.principle for r in chain.rounds]
    (plain,) = chains(open_run(revise__rounds=1, revise__critique=False, revise__few_shot=False), prompts(1))
    assert set(plain.provenance["rng"]["rounds"][0]) == {"principle", "revision"}


def test_direct_revision_asks_for_no_critique(open_run: Any, plant: Any) -> None:
    engines = plant(numbered())
    ctx = open_run(revise__rounds=2, revise__critique=False)
    (chain,) = chains(ctx, prompts(1))
    assert [kind(p) for p in engines[0].prompts] == ["Assistant", "Revision", "Revision"]
    last = engines[0].prompts[-1].split("Question 0?")[1]
    request = {p.id: p.revision_request for p in ctx.constitution.principles}[chain.rounds[1].principle]
    assert last == f"\n\nAssistant: Revision 2.\n\nRevisionRequest: {request}\n\nRevision:"
    assert [step.critique for step in chain.rounds] == ["", ""]
    assert [step.revision for step in chain.rounds] == ["Revision 2.", "Revision 3."]


def test_a_long_principle_and_a_long_prompt_have_room(open_run: Any, tmp_path: Path) -> None:
    text = MINIMAL.replace('"C?"', f'"{LONG}"').replace('"R!"', f'"{LONG * 2}"')
    for critique in (True, False):
        ctx = open_run(data__constitution=write_constitution(tmp_path, text), revise__critique=critique)
        worker, said = Reviser(ctx), "x" * 179
        (prompt,) = (Prompt("p", "red_team", (Turn("human", said),), "test", "train"),)
        assert len(worker.renderer.dialogue(prompt.turns)) == ctx.config.data.max_prompt_tokens
        principle, answer, shot = ctx.constitution.principles[0], "y" * 24, 0  # the longest: one token for each byte
        asked = worker.renderer.revision(prompt.turns, answer, principle, answer, shot)
        used = len(asked.prefix) + len(asked.ids) + 24
        assert used > 3 * len(LONG) and used <= worker.engine.max_len == worker.room < used + 128
        (row,) = worker.chains([prompt])
        assert row["record"]["rounds"][0]["principle"] == "p"


def test_a_text_that_grows_when_it_is_encoded_anew_rejects_its_chain(open_run: Any, plant: Any) -> None:
    for step, settings in (("Assistant", {}), ("Critique", {}), ("Assistant", {"revise__critique": False})):
        engines = plant(lambda prompt, step=step: "x" * 3000 if kind(prompt) == step else "Short.")
        (chain,) = chains(open_run(revise__rounds=1, revise__few_shot=False, **settings), prompts(1))
        refused = "critique" if step == "Assistant" and not settings else "revision"
        assert chain.reject_reason == f"{refused} 1: over_long"
        assert refused.capitalize() not in [kind(prompt) for prompt in engines[0].prompts]


def completion(reason: str = "stop") -> Completion:
    return Completion([1], [0.0], reason)


@pytest.mark.parametrize("text", FILLERS)
def test_filler_before_a_revision_is_found(text: str) -> None:
    assert defect(text, completion(), 0.5) == "filler_prefix"


@pytest.mark.parametrize("text", CLEAN)
def test_ordinary_beginnings_are_no_filler(text: str) -> None:
    assert defect(text, completion(), 0.5) is None


def test_other_defects() -> None:
    assert defect("fine", completion("length"), 0.5) == "over_long"
    assert defect(" \n", completion(), 0.5) == "empty"
    assert defect("no " * 20, completion(), 0.5) == "repetition" and defect("no " * 20, completion(), 1.0) is None
    assert repetition("a b c d") == repetition("") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("x " * 8) == pytest.approx(4 / 5)


BAD = {"empty": " ", "over_long": None, "filler_prefix": FILLERS[0], "repetition": "no " * 20}
STEPS = ("response", "critique 1", "revision 1", "critique 2", "revision 2")


def spoiled(prompt: str) -> str | None:
    """Prompt number n goes wrong at step n / 4 for reason n mod 4; the last four prompts go well."""
    number = int(re.findall(r"Question (\d+)\?", prompt)[-1])
    said = re.findall(r"Text (\d)\.", prompt)
    step = STEPS.index(f"{kind(prompt).lower()} {1 + int(said[0]) // 2}") if said else 0
    wrong = number // 4 == step
    return list(BAD.values())[number % 4] if wrong else f"Text {step}."


def test_defects_reject_a_chain_where_they_occur(open_run: Any, plant: Any) -> None:
    engines = plant(spoiled)
    ctx = open_run(revise__rounds=2, revise__max_repetition=0.5, revise__few_shot=False)
    made = chains(ctx, prompts(24))
    expected = [f"{step}: {reason}" for step in STEPS for reason in BAD]
    assert [chain.reject_reason for chain in made] == [*expected, *[None] * 4]
    assert [chain.kept for chain in made] == [False] * 20 + [True] * 4
    asked = Counter(kind(p) for p in engines[0].prompts)
    # Rejected chains are not continued: of 24, four end at each step.
    assert (asked["Assistant"], asked["Critique"], asked["Revision"]) == (24, 20 + 12, 16 + 8)


def test_the_stage_counts_rejections_and_writes_kept_helpful_samples(open_run: Any, plant: Any) -> None:
    replies = iter(range(10**6))

    def reply(prompt: str) -> str | None:
        number = next(replies)
        return list(BAD.values())[number // 7 % 4] if number % 7 == 3 else f"Text {number}."

    plant(reply)
    ctx = open_run(revise__max_repetition=0.5)
    summary = run_stage(ctx)
    rows = records.read_jsonl(ctx.run.path("revisions.jsonl"), Revision)
    assert summary["requested"] == len(rows) == summary["kept"] + sum(summary["rejected"].values())
    assert summary["rejected"] == Counter(row.reject_reason for row in rows if not row.kept)
    assert {reason.split(": ")[1] for reason in summary["rejected"]} == set(BAD)
    kept = [line for line in ctx.run.path("helpful.jsonl").read_text().splitlines()]
    assert len(kept) == summary["helpful_kept"] == 12 - sum(summary["helpful_rejected"].values()) < 12
    tokens = records.read_tokens(ctx.run.path("tokens", "revisions.safetensors"))
    assert all(f"{row.id}/{k}" in tokens for row in rows if row.kept for k in range(3))


@pytest.mark.parametrize(("setting", "role"), [
    ("model__base", "base"), ("model__judge", "judge"), ("pm__init", "pm_init"),
])  # fmt: skip
def test_prompts_must_fit_every_tokenizer(open_run: Any, inputs: Path, tmp_path: Path, setting: str, role: str) -> None:
    merged = byte_tokenizer(shutil.copytree(inputs / "base", tmp_path / "merged"))
    settings = dict.fromkeys(["model__base", "model__assistant", "model__judge", "pm__init"], merged)
    settings |= {"data__max_prompt_tokens": 70, "data__num_red_team": 0, "data__max_bad_fraction": 0.9}
    settings["data__drop_oldest_turns"] = False
    fitting = revise.prepare_prompts(alike := open_run(**settings))
    settings[setting] = inputs / "base"  # one token for each byte
    mixed = open_run(**settings)
    dialogue = mixed.renderer(role).dialogue
    short = [p for p in fitting if len(dialogue(p.turns)) <= 70]
    assert revise.prepare_prompts(mixed) == short and 0 < len(short) < len(fitting)
    assert revise.inputs(alike).get("other_templates") is None
    assert revise.inputs(mixed)["other_templates"] == [mixed.renderer(role).hash]
    with pytest.raises(InputError, match="longer than data.max_prompt_tokens = 70"):
        revise.prepare_prompts(open_run(**settings | {"data__max_bad_fraction": 0.0}))


def run_stage(ctx: Context) -> dict[str, Any]:
    ctx.run.begin("revise", revise.inputs(ctx))
    revise.run(ctx)
    return ctx.run.record("revise")["summary"]


def test_refusals_are_reported_before_the_work(open_run: Any, plant: Any, capfd: Any) -> None:
    plant(lambda prompt: "I'm sorry, I cannot help with that.")
    ctx = open_run()
    run_stage(ctx)
    assert "refuses 100% of 20 red-team prompts" in capfd.readouterr().err
    assert '"revise/refusal_rate": 1.0' in ctx.run.path("metrics.jsonl").read_text()


def test_chains_do_not_depend_on_chunk_or_batch(open_run: Any) -> None:
    made = []
    for chunk, batch in ((1, 1), (5, 16), (128, 64)):
        ctx = open_run(revise__chunk=chunk, engine__max_batch=batch)
        run_stage(ctx)
        made.append(textworld.results(ctx.run.root))
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_revision_continues_on_the_keys_of_its_critique(
    open_run: Any, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    start, made = Prefixes._start, []
    for reuse in (True, False):
        if not reuse:
            monkeypatch.setattr(Prefixes, "_start", lambda prefixes, r, kept: start(prefixes, r, None))
        worker = Reviser(open_run(engine__deterministic=str(deterministic).lower()))
        rows = list(worker.chains(prompts(6)))
        made.append((rows, worker.engine.counters))
    (rows, counters), (plain_rows, plain) = made
    assert rows == plain_rows
    assert counters["prompt_tokens"] == plain["prompt_tokens"]
    assert counters["prefill_tokens"] < 0.75 * plain["prefill_tokens"]


def test_no_chain_holds_keys_that_it_does_not_need(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, real_row, held, reasons = Reviser._critiques, Reviser._row, [], []

    def critiques(self: Reviser, chains: list[Any], *rest: Any) -> list[str]:
        texts = real(self, chains, *rest)
        reasons.extend(chain.reject_reason for chain in chains)
        assert all((chain.critique is None) == (chain.reject_reason is not None) for chain in chains)
        held.extend(weakref.ref(chain.critique) for chain in chains if chain.critique is not None)
        return texts

    def row(self: Reviser, chain: Any) -> dict[str, Any]:
        assert not any(handle() for handle in held)  # all chains are still there
        return real_row(self, chain)

    monkeypatch.setattr(Reviser, "_critiques", critiques)
    monkeypatch.setattr(Reviser, "_row", row)
    assert len(list(Reviser(open_run(revise__rounds=1)).chains(prompts(24)))) == 24
    assert held and len(held) == reasons.count(None) < len(reasons)


def test_a_kill_half_way_loses_only_unfinished_rows(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_run(folder="whole")
    run_stage(whole)
    first = open_run(folder="cut", revise__chunk=4)
    real, written = records.Journal.append, []

    def append(journal: records.Journal, row: Any) -> None:
        if len(written) == 9:
            os.write(journal._file.fileno(), b'{"id": "torn li')
            raise OSError(errno.EIO, "pulled the plug")
        real(journal, row)
        written.append(row["id"])

    with monkeypatch.context() as kill, pytest.raises(OSError, match="plug"):
        kill.setattr(records.Journal, "append", append)
        run_stage(first)
    first.run.close()
    second = open_run(folder="cut", revise__chunk=7)
    redone: list[str] = []
    monkeypatch.setattr(records.Journal, "append", lambda j, row: (redone.append(row["id"]), real(j, row))[1])
    run_stage(second)
    assert len(written) == 9 and not set(written) & set(redone) and len(redone) == 20 - 9 + 12
    assert textworld.results(second.run.root) == textworld.results(whole.run.root)
