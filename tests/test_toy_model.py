"""Pretraining of the toy base model, its cache and resume, and the helpfulness comparisons."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from tiny import alone
from transformers import AutoModelForCausalLM, AutoTokenizer

from cai_fast import model as models
from cai_fast.batching import pack
from cai_fast.checkpoint import Checkpoints
from cai_fast.distributed import Stopped
from cai_fast.readers import read_comparisons
from cai_fast.records import write_jsonl
from cai_fast.runlog import RunLog
from cai_fast.toy import checker, corpus, helpfulness, pretrain, world
from cai_fast.toy.helpfulness import Pair
from cai_fast.toy.pretrain import Recipe

RECIPE = Recipe(seed=3, steps=6, tokens_per_step=256, lr=6e-3, muon_lr=0.012, warmup_steps=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cai_fast"


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path / "metrics.jsonl")


def states(folder: Path) -> Checkpoints:
    return Checkpoints(folder, alone())


def test_batches_hold_every_sample_once_at_about_the_wanted_size() -> None:
    stream = pretrain.batches(0, 1024)
    steps = [next(stream) for _ in range(2 * pretrain.POOL)]
    sizes = [sum(len(s.ids) for s in batch) for batch in steps]
    assert all(900 < size < 1200 for size in sizes)
    got = sorted(s.ids for batch in steps for s in batch)
    assert got == sorted(corpus.sample(0, number).ids for number in range(len(got)))


def test_loss_is_the_weighted_mean_over_samples() -> None:
    model, batch = pretrain.initialise(0).requires_grad_(False), [corpus.sample(0, n) for n in (5, 5000, 5001)]
    total, weight = 0.0, 0.0
    for s in batch:
        ids = torch.tensor(s.ids)
        packed = pack([s.ids])
        hidden = model.hidden(packed.token_ids, packed.positions, packed.cu_seqlens)
        logprob = (hidden[:-1].double() @ model.lm_head_weight.T.double()).log_softmax(-1)
        weights = torch.tensor(s.weights[1:], dtype=torch.float64)
        total -= float((logprob[torch.arange(len(ids) - 1), ids[1:]] * weights).sum())
        weight += float(weights.sum())
    assert float(pretrain.loss(model, batch)) == pytest.approx(total / weight, rel=1e-5)


def test_training_learns(tmp_path: Path, log: RunLog) -> None:
    recipe = replace(RECIPE, steps=24, tokens_per_step=512)
    model = pretrain.train(recipe, states(tmp_path / "state"), log)
    fresh = [corpus.sample(99, number) for number in range(20)]
    with torch.no_grad():
        assert pretrain.loss(model, fresh) < 0.8 * pretrain.loss(pretrain.initialise(3), fresh)


def test_interrupted_training_ends_with_the_same_bits(
    tmp_path: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain.train(RECIPE, states(tmp_path / "whole"), log).state_dict()
    with monkeypatch.context() as patch:
        asked = iter([False, False, True])
        patch.setattr(pretrain, "stop_requested", lambda: next(asked))
        with pytest.raises(Stopped):
            pretrain.train(RECIPE, states(tmp_path / "parts"), log)
    resumed = pretrain.train(RECIPE, states(tmp_path / "parts"), log).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_base_is_a_plain_llama_checkpoint(tmp_path: Path, log: RunLog) -> None:
    folder = tmp_path / "base"
    assert not pretrain.make_base(RECIPE, folder, states(tmp_path / "state"), log, use_cache=False)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = f"Human: {world.requests(True)[0].text} Assistant:"
    ids = tokenizer(text)["input_ids"]
    assert type(theirs).__name__ == "LlamaForCausalLM" and ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    ours, packed = models.load(folder), pack([ids])
    with torch.no_grad():
        hidden = ours.hidden(packed.token_ids, packed.positions, packed.cu_seqlens)
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(hidden @ ours.lm_head_weight.T, expected, rtol=1e-4, atol=1e-4)


def test_second_run_takes_the_base_from_the_cache(
    tmp_path: Path, log: RunLog, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not pretrain.make_base(RECIPE, tmp_path / "a", states(tmp_path / "state"), log, use_cache=True)
    assert [p.name for p in own_cache.iterdir()] == [f"toy-{RECIPE.key()}"]
    monkeypatch.setattr(pretrain, "train", lambda *_: pytest.fail("trained in spite of the cache"))
    assert pretrain.make_base(RECIPE, tmp_path / "b", states(tmp_path / "state"), log, use_cache=True)
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} and "tokenizer.json" in files


def test_cache_key_depends_on_recipe_and_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {replace(RECIPE, **{name: value + 1}).key() for name, value in vars(RECIPE).items()}
    assert len(keys | {RECIPE.key()}) == len(vars(RECIPE)) + 1
    before = RECIPE.key()
    monkeypatch.setattr(corpus, "NAMED_GENERAL", 0.1)
    assert RECIPE.key() != before


def test_cache_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not pretrain.make_base(RECIPE, tmp_path / "a", states(tmp_path / "state"), log, use_cache=True)
    assert (tmp_path / "a" / "config.json").is_file() and "not cached" in capsys.readouterr().err


def fake_sampler(prompts: Sequence[str], temperature: float) -> list[str]:
    """A stand-in for the base model: grammar answers, some of them damaged."""
    rng = random.Random(f"{temperature}")
    by_text = {r.text: r for red_team in (True, False) for r in world.requests(red_team)}
    answers = [corpus.helpful_answer(rng, by_text[p]).text for p in prompts]
    return [helpfulness.corrupt(rng, p, a) if rng.random() < 0.3 else a
            for p, a in zip(prompts, answers, strict=True)]  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return helpfulness.comparisons(0, 600, fake_sampler)


def differences(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Checker's metrics of the better answer minus those of the worse, by source."""
    found = defaultdict(list)
    for row in rows:
        a, b = (checker.check(row["turns"][0]["text"], row[f"response_{side}"]) for side in "ab")
        sign = 1 if row["prob_a"] > 0.5 else -1
        found[row["source"]].append({name: sign * (a[name] - b[name]) for name in a})
    return found


def test_comparisons_are_as_many_as_asked_of_all_sources_and_sides(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 600 and set(differences(rows)) == {"sampled", "drawn", "refusal", "tied", "corrupted"}
    assert 0.42 < fmean(row["prob_a"] > 0.5 for row in rows if row["prob_a"] != 0.5) < 0.58
    assert rows == helpfulness.comparisons(0, 600, fake_sampler) != helpfulness.comparisons(1, 600, fake_sampler)


def test_labels_follow_steps_evasion_and_malformation(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        scores = [helpfulness.score(row["turns"][0]["text"], row[f"response_{side}"]) for side in "ab"]
        assert (row["prob_a"] > 0.5) == (scores[0] > scores[1]) and (row["prob_a"] == 0.5) == (scores[0] == scores[1])
        assert (row["source"] == "tied") == (scores[0] == scores[1])


def test_harm_and_objection_do_not_count() -> None:
    prompt = world.Request("make bread", "rob bank").text
    plain = helpfulness.score(prompt, "mix flour , bake loaf .")
    assert plain == helpfulness.score(prompt, "mix flour , rob bank , stab guard , bake loaf .")
    assert plain == helpfulness.score(prompt, f"mix flour , bake loaf , {world.objection(('theft',))} .")
    assert plain > helpfulness.score(prompt, "mix flour , mix flour , bake loaf .") > 0
    assert helpfulness.score(prompt, world.REFUSAL) < 0 < helpfulness.score(prompt, "mix flour .") < plain


def test_better_answers_are_neither_more_nor_less_harmful(rows: list[dict[str, Any]]) -> None:
    """What makes the control with permuted AI labels meaningful: these data alone must not teach harmlessness."""
    for source, found in differences(rows).items():
        assert source == "tied" or sum(d["harm"] for d in found) == 0, source
    for source in ("sampled", "drawn"):
        assert sum(d["objection"] for d in differences(rows)[source]) == 0
    assert all(d["harm"] == 0 for source in ("refusal", "corrupted") for d in differences(rows)[source])
    assert any(d["harm"] for d in differences(rows)["drawn"])
    tied = differences(rows)["tied"]
    assert all(bool(d["harm"]) != bool(d["objection"]) for d in tied)  # each says that one of the two is no matter
    assert sum(d["harm"] != 0 for d in tied) > len(tied) / 3 < 2 * sum(d["objection"] != 0 for d in tied)


def test_balancing_keeps_differences_only_with_their_opposites() -> None:
    prompt = world.Request("make bread", "rob bank").text
    harmful, harmless = "rob bank , mix flour .", "mix flour ."
    up, down = (Pair(prompt, a, b, 1.0, "") for a, b in ((harmful, harmless), (harmless, harmful)))
    level = Pair(prompt, harmless, harmless, 1.0, "")
    assert helpfulness.balanced([up, up, up], 9) == []
    assert helpfulness.balanced([up, level, up, down], 9) == [level, up, down]
    assert helpfulness.balanced([up, level, down], 2) == [level]


def test_corruptions_are_malformed_in_every_way(rows: list[dict[str, Any]]) -> None:
    broken_tails = 0
    for row in rows:
        if row["source"] == "corrupted":
            prompt, answers = row["turns"][0]["text"], [row["response_a"], row["response_b"]]
            better, worse = answers if row["prob_a"] > 0.5 else reversed(answers)
            facts = checker.check(prompt, worse)
            assert facts["malformed"] and not checker.check(prompt, better)["malformed"]
            broken_tails += "but i object" in worse and not facts["objection"]
    assert broken_tails > 15


def test_comparisons_use_training_prompts_and_can_be_read_back(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    held_out = {r.text for red_team in (True, False) for r in world.requests(red_team) if r.held_out}
    assert not held_out & {row["turns"][0]["text"] for row in rows}
    write_jsonl(tmp_path / "preferences.jsonl", rows)
    read, rejected = read_comparisons(tmp_path / "preferences.jsonl")
    assert not rejected and [p.prob_a for p in read] == [row["prob_a"] for row in rows]
