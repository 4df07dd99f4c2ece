"""The judge: planted preferences come back un-swapped and averaged; orders, principles, CoT, clamps, hard labels."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import textworld
import torch
from planted import PlantedEngine
from support import MINIMAL, write_constitution
from tiny import alone
from transformers import AutoModelForCausalLM, AutoTokenizer

from cai_fast import records, rng
from cai_fast.errors import InputError
from cai_fast.judging import Judge
from cai_fast.pipeline import Context
from cai_fast.prefixes import Prefixes
from cai_fast.records import Comparison, Label, Prompt, Turn
from cai_fast.stages import label
from cai_fast.tokenizer import Options, Rendered

BIAS = 0.8  # nats by which the planted judge favours letter (A)
TURNS = (Turn("human", "How do I pick a lock?"),)
GRADES = [(9, 1), (1, 9), (5, 4), (4, 4), (2, 7), (8, 0)]


@pytest.fixture(scope="module")
def inputs(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return build_once("text_inputs", textworld.build)


@pytest.fixture
def open_run(inputs: Path, tmp_path: Path) -> Iterator[Callable[..., Context]]:
    """`open_run(label__hard=True, ...)`: the context of a new run folder."""
    opened: list[Context] = []

    def get(**settings: Any) -> Context:
        opened.append(textworld.context(inputs, tmp_path / f"run{len(opened)}", alone(), **settings))
        return opened[-1]

    yield get
    for ctx in opened:
        ctx.run.close()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def grades(question: str) -> list[int]:
    """The grades that the two answers of the last question carry."""
    return [int(n) for n in re.findall(r"grade (\d)", question)[-2:]]


def prefers_grades(question: str) -> float:
    """P(A): the better grade wins, one nat for each three points, and (A) has a head start."""
    a, b = grades(question)
    return sigmoid((a - b) / 3 + BIAS)


def pairs(count: int = len(GRADES)) -> list[tuple[Comparison, tuple[Turn, ...]]]:
    return [
        (Comparison(f"c{n}", "p", "harmless", "ai", f"This is grade {a}.", f"This is grade {b}.", "train"), TURNS)
        for n, (a, b) in enumerate((GRADES * count)[:count])
    ]


def judged(ctx: Context, monkeypatch: pytest.MonkeyPatch, prefer: Any = prefers_grades, reply: Any = None,
           count: int = len(GRADES)) -> tuple[list[Label], PlantedEngine]:  # fmt: skip
    """Labels of the pairs by a planted judge."""
    engines: list[PlantedEngine] = []

    def engine(ctx: Context, model: Any, renderer: Any, max_len: int) -> PlantedEngine:
        engines.append(PlantedEngine(renderer, prefer=prefer, reply=reply or (lambda prompt: "Hm.")))
        return engines[0]

    monkeypatch.setattr(Context, "engine", engine)
    rows = list(Judge(ctx, "judge").label(pairs(count)))
    assert [row["id"] for row in rows] == [f"c{n}" for n in range(count)]
    return [Label.from_json(json.loads(json.dumps(row["record"]))) for row in rows], engines[0]


def test_both_orders_are_unswapped_and_averaged(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, engine = judged(open_run(), monkeypatch)
    for row, (a, b) in zip(labels, GRADES, strict=True):
        (view,) = row.per_principle
        ab, ba = sigmoid((a - b) / 3 + BIAS), 1 - sigmoid((b - a) / 3 + BIAS)
        assert (view.prob_a_ab, view.prob_a_ba) == pytest.approx((ab, ba), rel=1e-6)
        assert row.prob_a == pytest.approx((ab + ba) / 2, rel=1e-6)
        assert (row.prob_a > 0.5 + 1e-9) == (a > b) and (row.prob_a < 0.5 - 1e-9) == (a < b)  # the bias is gone
        assert row.clamp is None and row.provenance["option_mass"] == 0.25
    assert len(engine.questions) == 2 * len(GRADES) - 1 and not engine.prompts  # equal answers: one order is the other
    assert grades(engine.questions[0]) == grades(engine.questions[1])[::-1] == [9, 1]


def test_one_order_is_asked_alone(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, engine = judged(open_run(label__orders="single"), monkeypatch)
    for row, (a, b) in zip(labels, GRADES, strict=True):
        assert row.per_principle[0].prob_a_ba is None
        assert row.prob_a == pytest.approx(sigmoid((a - b) / 3 + BIAS), rel=1e-6)
    assert len(engine.questions) == len(GRADES)
    drawn, _ = judged(open_run(label__orders="random"), monkeypatch, count=200)
    swapped = [row.per_principle[0].prob_a_ab is None for row in drawn]
    assert all((row.per_principle[0].prob_a_ba is None) != s for row, s in zip(drawn, swapped, strict=True))
    assert 70 < sum(swapped) < 130


def test_k_principles_are_drawn_with_replacement_and_averaged(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def prefer(question: str) -> float:
        return 0.9 if "kinder" in question.split("Human:")[-1] else 0.3

    labels, engine = judged(open_run(label__principles=3), monkeypatch, prefer, count=60)
    drawn = [view.principle for row in labels for view in row.per_principle]
    assert len(drawn) == 180 and 60 < drawn.count("comparison0") < 120  # two principles
    variety = {len({view.principle for view in row.per_principle}) for row in labels}
    assert variety == {1, 2}  # with replacement, each draw its own
    different = [len({view.principle for view in row.per_principle}) for row in labels]  # equal ones: asked once
    assert len(engine.questions) == sum(n * (1 + (a != b)) for n, (a, b) in zip(different, GRADES * 10, strict=True))
    for row in labels:
        for view in row.per_principle:
            first = 0.9 if view.principle == "comparison0" else 0.3
            assert (view.prob_a_ab, view.prob_a_ba) == pytest.approx((first, 1 - first), rel=1e-6)
        assert row.prob_a == pytest.approx(0.5, rel=1e-6)


def test_measuring_takes_both_orders_and_the_whole_probability(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def engine(ctx: Context, model: Any, renderer: Any, max_len: int) -> PlantedEngine:
        lengths.append(max_len)
        return PlantedEngine(renderer, prefer=prefers_grades)

    monkeypatch.setattr(Context, "engine", engine)
    ctx = open_run(label__orders="single", label__clamp="[0.4, 0.6]", label__hard=True, evaluate__max_new_tokens=88)
    rows = [row["record"] for row in Judge(ctx, "judge", measuring=True).label(pairs())]
    for row, (a, b) in zip(rows, GRADES, strict=True):
        both = sigmoid((a - b) / 3 + BIAS), 1 - sigmoid((b - a) / 3 + BIAS)
        assert row["prob_a"] == pytest.approx(sum(both) / 2, rel=1e-6) and row["clamp"] is None
    Judge(ctx, "judge")
    assert lengths[0] - lengths[1] == 2 * (88 - 24)  # room for the longest answers of either stage


def test_clamps(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free, _ = judged(open_run(), monkeypatch)
    for settings, (lo, hi) in (({"label__clamp": "[0.2, 0.8]"}, (0.2, 0.8)), ({"label__cot": True}, (0.4, 0.6))):
        bound, _ = judged(open_run(**settings), monkeypatch)
        assert [row.prob_a for row in bound] == pytest.approx([min(max(row.prob_a, lo), hi) for row in free])
        assert {row.clamp for row in bound} == {(lo, hi)}
    unbound, _ = judged(open_run(label__cot=True, label__clamp="none"), monkeypatch)
    assert [row.prob_a for row in unbound] == pytest.approx([row.prob_a for row in free])


def test_hard_labels_keep_ties(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def certain(question: str) -> float:
        a, b = grades(question)
        return 0.5 if a == b else 0.75 if a > b else 0.25

    labels, _ = judged(open_run(label__hard=True), monkeypatch, certain)
    assert [row.prob_a for row in labels] == [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in GRADES]


def test_chain_of_thought_is_read_after_the_reasoning(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    thoughts = iter(f"Thought number {n}." for n in range(1000))
    seen: dict[str, float] = {}

    def after_thought(question: str) -> float:
        found = re.findall(r"step by step: Thought number (\d+)\.\n\nHuman:\nSo the answer is: \($", question)
        assert len(found) == 1
        seen[found[0]] = 0.5 + int(found[0]) / 100
        return seen[found[0]]

    ctx = open_run(label__cot=True, label__cot_samples=2, label__clamp="none", label__few_shot=False)
    labels, engine = judged(ctx, monkeypatch, after_thought, lambda prompt: next(thoughts), count=3)
    assert len(engine.prompts) == len(set(engine.keys)) == 3 * 2 * 2
    assert all(prompt.endswith("Assistant: Let's think step by step:") for prompt in engine.prompts)
    for n, row in enumerate(labels):  # two samples of each question, one after the other; two questions a comparison
        ab, ba = ([4 * n + 2 * order, 4 * n + 2 * order + 1] for order in (0, 1))
        (view,) = row.per_principle
        assert view.cot == tuple(f"Thought number {m}." for m in (*ab, *ba))
        assert view.prob_a_ab == pytest.approx(0.5 + sum(ab) / 200, rel=1e-6)
        assert view.prob_a_ba == pytest.approx(0.5 - sum(ba) / 200, rel=1e-6)


def test_provenance_alone_gives_every_key(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = open_run(label__principles=3, label__orders="random", label__cot=True, label__cot_samples=2)
    labels, engine = judged(ctx, monkeypatch)
    sampled = []
    for row in labels:
        for view, keys in zip(row.per_principle, row.provenance["rng"], strict=True):
            assert ctx.constitution.draw("comparison", rng.key(*keys["principle"])).id == view.principle
            assert rng.choice(rng.key(*keys["order"]), 2) == (view.prob_a_ab is None)
            assert "few_shot" in keys
            sampled.append([rng.key(*parts) for parts in keys["cot"]])
    assert engine.keys == [key for keys in sampled for key in keys]
    (plain, *_), _ = judged(open_run(label__few_shot=False), monkeypatch)
    assert [set(keys) for keys in plain.provenance["rng"]] == [{"principle"}]


def test_a_real_judge_reads_what_the_paper_asks(open_run: Any, inputs: Path) -> None:
    ctx = open_run(label__few_shot=False)
    row = Label.from_json(next(iter(Judge(ctx, "judge").label(pairs(1))))["record"])
    model = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(inputs / "base")
    pair = pairs(1)[0][0]
    texts = [pair.response_a, pair.response_b]
    principle = {p.id: p.comparison for p in ctx.constitution.principles}[row.per_principle[0].principle]
    expected = []
    for first, second in (texts, texts[::-1]):
        prompt = (
            "\n\nConsider the following conversation between a human and an assistant:\n\nHuman: How do I pick a lock?"
            f"\n\n\n{principle} Options:\n (A) [[[{first}]]]\n (B) [[[{second}]]]\n\nThe answer is: ("
        )
        with torch.no_grad():
            logits = model(tokenizer(prompt, return_tensors="pt")["input_ids"]).logits[0, -1]
        letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
        expected.append(float(logits[letters].softmax(0)[0]))
    view = row.per_principle[0]
    assert (view.prob_a_ab, view.prob_a_ba) == pytest.approx((expected[0], 1 - expected[1]), rel=1e-5)


@pytest.mark.parametrize("cot", [False, True])
def test_trees_change_no_label(open_run: Any, monkeypatch: pytest.MonkeyPatch, cot: bool) -> None:
    score, made = Prefixes.score, []
    for separate in (False, True):
        if separate:
            monkeypatch.setattr(Prefixes, "score", lambda p, r, options, groups: score(p, r, options, range(len(r))))
        settings = {"label__cot": cot, "label__cot_samples": 2, "label__cot_max_new_tokens": 12}
        judge = Judge(open_run(label__principles=3, label__few_shot=False, **settings), "judge")
        rows = [row["record"]["per_principle"] for row in judge.label(pairs())]
        made.append((rows, judge.engine.counters["prefill_tokens"]))
    (rows, tokens), (separate_rows, separate_tokens) = made
    assert tokens < 0.75 * separate_tokens
    for views, others in zip(rows, separate_rows, strict=True):
        for view, other in zip(views, others, strict=True):
            assert view["cot"] == other["cot"] and view["principle"] == other["principle"]
            for order in ("prob_a_ab", "prob_a_ba"):
                assert view[order] == pytest.approx(other[order], abs=1e-5)


def test_samples_of_a_question_are_prefilled_once(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prefixes, "score", lambda p, r, options, groups: ([[-1.0, -0.5]] * len(r), [1.0] * len(r)))
    counted = []
    for samples in (1, 3):
        settings = {"label__cot": True, "label__cot_max_new_tokens": 2, "label__cot_samples": samples}
        judge = Judge(open_run(label__few_shot=False, engine__max_batch=64, **settings), "judge")
        list(judge.label(pairs()))
        counted.append(judge.engine.counters["prefill_tokens"])
    assert counted[0] == counted[1]


def test_options_that_no_single_token_tells_apart(open_run: Any) -> None:
    ctx = open_run()
    renderer, model = ctx.renderer("judge"), ctx.model("judge")
    prefixes = Prefixes(ctx.engine(model, renderer, 256))
    encode = renderer.tokenizer.encode
    prefix, prompts = encode("Few shots."), [encode("Better: "), encode("Worse, said he: ")]
    options = [encode("A"), encode("AB")]
    rendered = [Rendered(prefix, ids, ()) for ids in prompts]
    logprobs, mass = prefixes.score(rendered, Options([], [], options), [0, 1])
    for row, share, ids in zip(logprobs, mass, prompts, strict=True):
        totals = []
        for option in options:
            tokens = torch.tensor([*prefix, *ids, *option])
            cu = torch.tensor([0, len(tokens)], dtype=torch.int32)
            hidden = model.hidden(tokens, torch.arange(len(tokens)), cu)
            table = (hidden @ model.lm_head_weight.T).detach().log_softmax(-1)
            totals.append(float(sum(table[-1 - len(option) + i, token] for i, token in enumerate(option))))
        total = math.log(sum(map(math.exp, totals)))
        assert row == pytest.approx([t - total for t in totals], rel=1e-4)
        assert share == pytest.approx(math.exp(total), rel=1e-4)


@pytest.mark.parametrize("cot", [False, True])
def test_a_long_principle_and_a_long_prompt_have_room(open_run: Any, tmp_path: Path, cot: bool) -> None:
    constitution = write_constitution(tmp_path, MINIMAL.replace('"Which?"', f'"{"Which is the kinder one? " * 150}"'))
    ctx = open_run(data__constitution=constitution, label__cot=cot, label__cot_max_new_tokens=16)
    turns, judge = (Turn("human", "x" * 179),), Judge(ctx, "judge")
    assert len(judge.renderer.dialogue(turns)) == ctx.config.data.max_prompt_tokens
    room, engine = judge.room, judge.engine
    (row,) = judge.label([(Comparison("c", "p", "harmless", "ai", "y" * 24, "z" * 24, "train"), turns)])
    assert row["record"]["per_principle"][0]["principle"] == "q"
    assert judge.engine is engine and engine.max_len == room < 25 * 150 + 1000


@pytest.mark.parametrize("cot", [False, True])
def test_responses_that_are_longer_in_the_judges_tokens_are_judged_whole(open_run: Any, cot: bool) -> None:
    long = Comparison("c", "p", "harmless", "ai", "Yes. " * 300, "No. " * 300, "train")
    settings = {"label__cot": cot, "label__cot_max_new_tokens": 16}
    judges = Judge(open_run(**settings), "judge"), Judge(open_run(**settings, compare__max_new_tokens=1500), "judge")
    small = judges[0].room
    first = [row["record"]["prob_a"] for row in judges[0].label(pairs(1))]
    counted = judges[0].engine.counters["trunk_tokens"]
    (grown,), (roomy,) = (list(judge.label([(long, TURNS)])) for judge in judges)
    assert grown["record"]["per_principle"] == roomy["record"]["per_principle"]
    assert judges[0].room > small and judges[0].engine.counters["trunk_tokens"] > counted > 0
    assert [row["record"]["prob_a"] for row in judges[0].label(pairs(1))] == first


def stage_inputs(ctx: Context, count: int) -> list[Comparison]:
    """prompts.jsonl and comparisons.jsonl as the earlier stages would have left them."""
    rows = [c for c, _ in pairs(count)]
    records.write_jsonl(ctx.run.path("prompts.jsonl"), [Prompt("p", "red_team", TURNS, "test", "train")])
    records.write_jsonl(ctx.run.path("comparisons.jsonl"), rows)
    records.write_tokens(ctx.run.path("tokens", "comparisons.safetensors"), {})
    for stage, files in (("revise", ["prompts.jsonl"]), ("compare", ["comparisons.jsonl"])):
        ctx.run.begin(stage, {})
        ctx.run.finish(stage, files, {})
    return rows


def run_stage(ctx: Context) -> list[Label]:
    ctx.run.begin("label", label.inputs(ctx))
    label.run(ctx)
    return records.read_jsonl(ctx.run.path("labels.jsonl"), Label)


def test_the_stage_records_statistics(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = open_run()
    stage_inputs(ctx, 12)
    monkeypatch.setattr(
        Context, "engine", lambda ctx, model, renderer, max_len: PlantedEngine(renderer, prefer=prefers_grades)
    )
    assert len(run_stage(ctx)) == 12
    summary = ctx.run.record("label")["summary"]
    both = [(sigmoid((a - b) / 3 + BIAS), 1 - sigmoid((b - a) / 3 + BIAS)) for a, b in GRADES * 2]
    assert summary["requested"] == summary["kept"] == 12 and summary["option_mass"] == 0.25
    assert summary["position_bias"] == pytest.approx(sum(ab - ba for ab, ba in both) / 12, rel=1e-5)
    assert sum(row["drawn"] for row in summary["principles"].values()) == 12
    mean = sum(row["drawn"] * row["position_bias"] for row in summary["principles"].values()) / 12
    assert len(summary["principles"]) == 2 and mean == pytest.approx(summary["position_bias"])
    assert summary["order_agreement"] == pytest.approx(sum((ab > 0.5) == (ba > 0.5) for ab, ba in both) / 12)
    means = [(ab + ba) / 2 for ab, ba in both]
    entropy = sum(-p * math.log(p) - (1 - p) * math.log1p(-p) for p in means) / 12
    assert summary["entropy"] == pytest.approx(entropy, rel=1e-5)


def test_permuted_labels_are_the_same_labels_elsewhere(open_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Context, "engine", lambda ctx, model, renderer, max_len: PlantedEngine(renderer, prefer=prefers_grades)
    )
    found = []
    for permute in (False, True):
        ctx = open_run(label__permute=permute)
        stage_inputs(ctx, 60)
        found.append(run_stage(ctx))
    plain, permuted = found
    assert [row.comparison_id for row in plain] == [row.comparison_id for row in permuted]
    assert sorted(row.prob_a for row in plain) == sorted(row.prob_a for row in permuted)
    sources = {row.id: row.prob_a for row in plain}
    assert all(row.prob_a == sources[row.provenance["permuted_from"]] for row in permuted)
    assert sum(row.provenance["permuted_from"] == row.id for row in permuted) < 6


def test_imported_labels(open_run: Any, tmp_path: Path) -> None:
    file = textworld.write_rows(tmp_path / "l.jsonl", [{"comparison_id": f"c{n}", "prob_a": n / 10} for n in range(6)])
    ctx = open_run(label__from=file)
    stage_inputs(ctx, 6)
    assert [row.prob_a for row in run_stage(ctx)] == [n / 10 for n in range(6)]
    more = open_run(label__from=file)
    stage_inputs(more, 8)
    with pytest.raises(InputError, match="2 of 8 comparisons have no label, e.g. comparison_id c6"):
        run_stage(more)


def test_labels_do_not_depend_on_the_chunk(open_run: Any) -> None:
    files = []
    for chunk, batch in ((1, 3), (4, 16), (128, 64)):
        ctx = open_run(label__chunk=chunk, engine__max_batch=batch, label__cot=True, label__cot_max_new_tokens=12)
        stage_inputs(ctx, 9)
        run_stage(ctx)
        files.append(ctx.run.path("labels.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
