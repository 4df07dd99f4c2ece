"""The toy world's judge and base models of other sizes: the default is what it was, and questions cannot be answered by
a rule that ignores the principle."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import alone

from cai_fast import config, memory, model
from cai_fast.checkpoint import Checkpoints
from cai_fast.errors import InputError
from cai_fast.runlog import RunLog
from cai_fast.toy import corpus, judge, pretrain
from cai_fast.toy.pretrain import Recipe

SAMPLES = [judge.sample(0, number) for number in range(1200)]
WORDS = list(corpus.vocabulary())
PRINCIPLES = corpus.toy_prompts().constitution.principles
RECIPE = Recipe(seed=3, steps=2, tokens_per_step=256, lr=6e-3, muon_lr=0.012, warmup_steps=1)


def test_the_default_base_model_is_the_one_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    default = Recipe(0, 1000, 2048, 6e-3, 0.012, 50)
    assert default.key() == "5f9413761434845a", "caches and all measured numbers are void"
    changed = [replace(default, hidden_size=48), replace(default, layers=2), replace(default, direct=0.24)]
    assert len({default.key(), *(recipe.key() for recipe in changed)}) == 4


def test_a_base_model_of_another_size_is_made_loaded_and_planned(tmp_path: Path) -> None:
    recipe = replace(RECIPE, hidden_size=48, layers=2)
    log = RunLog(tmp_path / "metrics.jsonl")
    pretrain.make_base(recipe, tmp_path / "base", Checkpoints(tmp_path / "state", alone()), log, use_cache=False)
    made = model.load(tmp_path / "base")
    assert (made.config.hidden_size, made.config.num_layers, made.config.num_heads) == (48, 2, 2)
    cfg = config.load(["--base.hidden_size", "48", "--base.layers", "2"])
    assert memory.role_shape(cfg, "base").params == sum(p.numel() for p in made.parameters())
    with pytest.raises(InputError, match=r"base.hidden_size must be a multiple of 24. Got 100."):
        config.load(["--base.hidden_size", "100"])


def test_the_share_of_direct_revisions_takes_the_place_of_critiqued_ones() -> None:
    kinds = Counter(corpus.sample(0, number, 0.24).kind for number in range(corpus.EARLY, corpus.EARLY + 3000))
    assert abs(kinds["direct"] - kinds["revision"]) < 150 and 600 < kinds["direct"] < 850
    assert corpus.sample(0, 9000, corpus.MIXTURE["direct"]) == corpus.sample(0, 9000)


def test_a_base_model_reads_as_many_direct_revisions_as_its_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        pretrain, "loss", lambda model, batch: read.extend(s.kind for s in batch) or model.model.norm.weight.sum()
    )
    shares = []
    for direct in (0.0, 0.48):
        read.clear()
        recipe, log = replace(RECIPE, steps=8, tokens_per_step=512, direct=direct), RunLog(tmp_path / "metrics.jsonl")
        pretrain.train(recipe, Checkpoints(tmp_path / f"state_{direct}", alone()), log)
        counts = Counter(read)
        shares.append((counts["direct"] > 0, counts["revision"] > 0))
    assert shares == [(False, True), (True, False)]


def test_direct_and_critiqued_revisions_drop_a_phrase_with_the_same_chance() -> None:
    """Counted in the corpus itself, so that figures which compare the two compare models."""
    dropped: dict[str, list[int]] = {"revision": [0, 0], "direct": [0, 0]}
    for number in range(corpus.EARLY, corpus.EARLY + 5000):
        sample = corpus.sample(1, number, 0.24)
        if sample.kind in dropped:
            text = " ".join(WORDS[i] for i in sample.ids)
            before, after = text.partition(" <eos>")[0].partition("Assistant: ")[2], text.rpartition("Revision: ")[2]
            harms = [phrase for phrase in corpus.world.CATEGORY_OF if phrase in before]
            dropped[sample.kind][0] += sum(phrase not in after for phrase in harms)
            dropped[sample.kind][1] += len(harms)
    shares = {kind: gone / total for kind, (gone, total) in dropped.items()}
    assert abs(shares["revision"] - shares["direct"]) < 0.05 < min(shares.values())


def questions(kind: str) -> list[tuple[str, str, str, str]]:
    """(key, answer A, answer B, letter) of the judge's samples of a kind."""
    found = []
    for sample in SAMPLES:
        if sample.kind == kind:
            text = " ".join(WORDS[i] for i in sample.ids)
            key = text.partition("less ")[2].partition(" content")[0]
            a, _, rest = text.partition(" (A) ")[2].partition(" (B) ")
            found.append((key, a, rest.partition(" answer :")[0].partition(" think :")[0], text.split()[-2]))
    return found


def harms(text: str, categories: tuple[str, ...] = corpus.world.CATEGORIES) -> int:
    body = text.partition("but i object")[0]
    return sum(phrase in body for phrase, category in corpus.world.CATEGORY_OF.items() if category in categories)


@pytest.mark.parametrize("kind", ["judge", "cot"])
def test_letters_follow_the_principle_and_total_harm_is_no_rule(kind: str) -> None:
    scope = {p.comparison.split()[-3]: p.categories for p in PRINCIPLES}
    told = Counter()
    for key, a, b, letter in questions(kind):
        difference = harms(a, scope[key]) - harms(b, scope[key])
        if difference:
            assert letter == ("(A)" if difference < 0 else "(B)")
            if len(scope[key]) == 1:
                total = harms(a) - harms(b)
                told["against" if total * difference <= 0 else "with"] += 1
    assert sum(told.values()) > 100 and 0.35 < told["against"] / sum(told.values()) < 0.55


def test_a_chain_of_thought_lists_all_that_is_in_scope() -> None:
    principle = next(p for p in PRINCIPLES if p.id == "theft")
    request = corpus.draw_request(random.Random(0), True)
    for seed in range(50):
        a, b = judge.pair(random.Random(seed), request, principle)
        assert judge.is_telling(a, b, principle) == (
            (d := len(corpus.in_scope(a, principle)) - len(corpus.in_scope(b, principle))) != 0
            and d * (len(a.harms) - len(b.harms)) <= 0
        )
    texts = [" ".join(WORDS[i] for i in s.ids) for s in SAMPLES if s.kind == "cot"]
    listed = [t.partition("(A) has ")[2].partition(" ; ")[0] for t in texts if "less harmful content" in t]
    bodies = [t.partition(" (A) ")[2].partition(" (B) ")[0].partition("but i object")[0] for t in texts
              if "less harmful content" in t]  # fmt: skip
    assert listed and all(
        said == (" , ".join(c for c in body.removesuffix(" .").strip(" ,").split(" , ")
                            if c in corpus.world.CATEGORY_OF) or "none")
        for said, body in zip(listed, bodies, strict=True)
    )  # fmt: skip


def test_no_held_out_prompt_is_in_the_judges_corpus() -> None:
    held_out = {r.text for red_team in (True, False) for r in corpus.world.requests(red_team) if r.held_out}
    texts = [" ".join(WORDS[i] for i in s.ids) for s in SAMPLES]
    asked = {t.partition("Human: ")[2].partition(" Question:")[0].partition(" Assistant:")[0] for t in texts}
    assert len(asked) > 600 and not asked & held_out


def test_the_judge_continues_the_base_model_and_resumes(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl")
    pretrain.make_base(RECIPE, tmp_path / "base", Checkpoints(tmp_path / "state", alone()), log, use_cache=False)
    for name in ("a", "b"):
        judge.make_judge(3, tmp_path / "base", tmp_path / name, Checkpoints(tmp_path / f"{name}.s", alone()), log, 1)
    base, a, b = (model.load(tmp_path / name).state_dict() for name in ("base", "a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(
        a["model.norm.weight"], base["model.norm.weight"]
    )
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
