"""The plan: tokens, pages and times by hand, and as an upper bound of what a real run counted."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import textworld
import torch
from tiny import CONFIG, alone

from cai_fast import capacity, config, pipeline, workload
from cai_fast.capacity import Rates
from cai_fast.planner import Planner
from cai_fast.workload import Phase, Work

# A prompt of the toy world: 64 tokens; answers 48, critiques 32. Its words are tokens: 13 around a critique's
# conversation and response, 8 from the critique to its revision, 17 around a comparison, 3 from thoughts to the answer.
TOY = {"--model.device": "cpu", "--revise.num_red_team": "10", "--revise.num_helpful": "5", "--revise.rounds": "2",
       "--revise.helpful_samples": "3", "--sft.revisions": "last", "--compare.num_prompts": "10",
       "--compare.pairs_per_prompt": "2"}  # fmt: skip
TOKEN = 2 * 2 * 2 * 8 * 4  # bytes of the tiny model's keys and values: keys and values, layers, heads, size, fp32


@pytest.fixture(scope="module")
def inputs(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return build_once("text_inputs", textworld.build)


def work(stage: str, words: str) -> Work:
    """The work of a stage that has one engine, by the toy preset with other settings."""
    names, values = words.split()[::2], words.split()[1::2]
    settings = TOY | {"--stages": stage} | dict(zip(names, values, strict=True))
    cfg = config.load([word for pair in settings.items() for word in pair])
    (made,) = workload.works(cfg, workload.prompt_counts(cfg), workload.renderers(cfg), cpu=True)[stage]
    return made


@pytest.mark.parametrize(
    ("words", "prefill", "decode"),
    [
        # First look, chains' answers, samples of 5 prompts; then critiques, and revisions after them.
        ("", 640 + 640 + 320 + 20 * (64 + 48 + 13) + 20 * (32 + 8), (10 + 10 + 15 + 20) * 48 + 20 * 32),
        ("--engine.deterministic false", 1600 + 20 * 125 + 20 * (1 + 8), 55 * 48 + 20 * 32),
        ("--revise.critique false", 1600 + 20 * (64 + 48 + 13), 55 * 48),
        ("--revise.helpful_samples 0", 1280 + 20 * 125 + 20 * 40, 40 * 48 + 20 * 32),
    ],
)
def test_tokens_of_revise_by_hand(words: str, prefill: int, decode: int) -> None:
    made = work("revise", words)
    assert (made.prefill, made.decode) == (prefill, decode)


@pytest.mark.parametrize(
    ("stage", "words", "prefill", "decode"),
    [
        ("compare", "--compare.base_fraction 0", 20 * 64, 40 * 48),  # the prompt of a pair once
        ("compare", "--compare.base_fraction 0.5", (20 + 10) * 64, 40 * 48),  # by two models for half of the pairs
        ("label", "--label.principles 3", 20 * (64 + 3 * 2 * (96 + 17)), 0),  # the conversation of a pair once
        ("label", "--label.principles 3 --label.orders single", 20 * (64 + 3 * (96 + 17)), 0),
        (
            "label", "--label.cot true --label.cot_samples 2 --label.cot_max_new_tokens 20",
            2 * 20 * (64 + 2 * (96 + 17)) + 40 * 2 * (20 + 3), 40 * 2 * 20,  # to reason, and to read the answer
        ),
        ("rl", "--rl.steps 4 --rl.prompts_per_step 8 --rl.samples_per_prompt 3", 5 * 8 * 64, 5 * 8 * 3 * 48),
    ],
)  # fmt: skip
def test_tokens_of_other_stages_by_hand(stage: str, words: str, prefill: int, decode: int) -> None:
    made = work(stage, words)
    assert (made.prefill, made.decode) == (prefill, decode)


def test_few_shot_blocks_are_computed_once(inputs: Path, tmp_path: Path) -> None:
    def made(**settings: Any) -> Work:
        cfg = config.load(textworld.arguments(inputs, tmp_path, stages="label", **settings))
        return workload.works(cfg, workload.prompt_counts(cfg), workload.renderers(cfg), cpu=True)["label"][0]

    one, bare = made(), made(label__few_shot=False)
    assert len(one.blocks) == 1 and bare.blocks == ()
    assert bare.prefill == one.prefill - one.blocks[0]
    assert made(compare__num_prompts=10).prefill - one.blocks[0] == (one.prefill - one.blocks[0]) // 2


def request(at_once: int = 9, requests: int = 8) -> Work:
    """Requests of 100 tokens, 40 of them a shared block and 10 sampled."""
    return Work("x", "base", 100, (Phase(requests, at_once, 90, 10, 500, 40),), (40,))


def engine(**settings: int) -> Any:
    words = [word for name, value in settings.items() for word in (f"--engine.{name}", str(value))]
    return config.load(["--engine.max_batch", "4", *words]).engine


def test_pages_by_hand() -> None:
    pool = capacity.pool(engine(page_size=16), CONFIG, 4, request(), None)
    assert (pool.pages, pool.page_bytes, pool.nbytes) == (4 * 7, 16 * TOKEN, 29 * 16 * TOKEN)
    assert (pool.shared, pool.running(request().phases[0]), pool.used(request())) == (2, 4, 2 + 4 * 5)
    small = capacity.pool(engine(page_size=16, num_pages=13), CONFIG, 4, request(), None)
    assert (small.pages, small.running(request().phases[0]), small.used(request())) == (13, 2, 2 + 2 * 5)
    gpu = capacity.pool(engine(), CONFIG, 4, request(), 10**9)
    assert (gpu.paged, gpu.pages, gpu.size) == (True, 4 * 2, 64)
    assert capacity.pool(engine(), CONFIG, 4, request(), 7 * 64 * TOKEN).pages == 3  # half of the free memory


def test_slots_by_hand() -> None:
    pool = capacity.pool(engine(), CONFIG, 4, request(), None)
    assert (pool.paged, pool.pages, pool.page_bytes) == (False, 4, 128 * TOKEN)
    assert (pool.shared, pool.used(request()), pool.used(request(at_once=3))) == (0, 4, 3)
    windowed = CONFIG.replace(sliding_window=99)
    assert not capacity.pool(engine(), windowed, 4, request(), 10**9).paged
    assert capacity.pool(engine(), CONFIG, 4, Work("x", "base", 100), None).nbytes == 0  # scores only


def test_a_plan_has_the_pages_of_the_engine(inputs: Path, tmp_path: Path) -> None:
    for number, settings in enumerate(
        ({}, {"engine__page_size": 16}, {"engine__page_size": 16, "engine__num_pages": 90})
    ):
        ctx = textworld.context(inputs, tmp_path / str(number), alone(), **settings)
        model = ctx.model("base")
        made = ctx.engine(model, ctx.renderer("base"), 300)
        planned = capacity.pool(ctx.config.engine, model.config, 4, replace(request(), room=300), None)
        assert made._cache.kv.nbytes == planned.nbytes
        assert made.pages.total == (planned.pages if planned.paged else 0)
        ctx.run.close()


@pytest.mark.parametrize(("flops", "step"), [(1e6, 4000 / 1e4), (1e4, 2 * 1000 * 4 / 1e4)])  # weights or product
def test_time_by_hand(flops: float, step: float) -> None:
    job = request()
    pool = capacity.pool(engine(), CONFIG, 4, job, None)
    packed = 2 * 1000 * (500 + 40) / (0.4 * flops)
    decoding = (8 * 10 / 4 * step + 8 * 10 * (90 + 5) * TOKEN / 1e4) / 0.6
    assert capacity.seconds(job, pool, 1000, 4, Rates(flops, 1e4, "by hand")) == pytest.approx(packed + decoding)


def test_speeds_are_measured_or_those_of_the_gpu_that_is_assumed() -> None:
    assumed = capacity.sheet("GH200")
    assert (assumed.flops, assumed.bandwidth) == (9.89e14, 4.0e12)
    assert "data sheet of GH200, not measured" in str(assumed) and "40%" in str(assumed) and "60%" in str(assumed)
    measured = capacity.rates(torch.device("cpu"), torch.float32)
    assert 1e8 < measured.flops < 1e14 and 1e7 < measured.bandwidth < 1e13
    assert "measured just now on this CPU" in str(measured) and "50%" in str(measured)
    assert set(capacity.PEAK_BANDWIDTH) == set(capacity.PEAK_FLOPS) == set(capacity.MEMORY)


def test_the_tables_fit_a_screen_and_hold_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert textworld.main(["--config", "toy", "--model.device", "cpu", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    starts = [line.split()[0] for line in lines]
    assert [starts.count(stage) for stage in config.STAGES] == [2, 2, 1, 2, 1, 1, 2, 1, 1]  # label only scores
    assert sum(line.startswith("evaluate: ") for line in lines) == 2  # nor does the judge generate
    assert "slots of 256" in next(line for line in lines if line.startswith("revise    ") and "slots" in line)


@pytest.mark.parametrize("cot", [False, True])
def test_a_run_computes_less_than_planned(
    cot: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real prompts are half as long as allowed here, real texts end sooner: 1 to 4 times the tokens are planned."""
    counted: dict[str, Counter[str]] = {}
    rooms: set[int] = set()
    log_work, make = pipeline.Context.log_work, pipeline.Context.engine

    def count(ctx: pipeline.Context, stage: str, *rest: Any) -> None:
        for used in ctx.engines:
            counted.setdefault(stage, Counter()).update(used.counters)
        log_work(ctx, stage, *rest)

    def noted(ctx: pipeline.Context, *arguments: Any) -> Any:
        made = make(ctx, *arguments)
        rooms.add(made.max_len)
        return made

    monkeypatch.setattr(pipeline.Context, "log_work", count)
    monkeypatch.setattr(pipeline.Context, "engine", noted)
    words = textworld.arguments(
        inputs, tmp_path / "run", stages="revise,sft,compare,label", data__max_prompt_tokens=100, label__cot=cot,
        label__principles=2, **({"label__cot_samples": 3, "label__cot_max_new_tokens": 24} if cot else {}),
    )  # fmt: skip
    assert textworld.main(words) == 0
    planner = Planner(config.load(words))
    summary = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["compare"]["summary"]
    asked = {"label": summary["kept"] / summary["requested"]}  # the other pairs are not judged
    for stage, (made,) in planner.works.items():
        share, found = asked.get(stage, 1.0), counted[stage]
        assert 1.0 <= share * made.prefill / found["prefill_tokens"] <= 4.0, stage
        assert share * made.decode >= found["generated_tokens"] >= share * made.decode / 8, stage
    assert rooms == {made.room for works in planner.works.values() for made in works}


def sliding(inputs: Path, folder: Path) -> Path:
    """The checkpoint of the inputs with a sliding window of 64 tokens."""
    shutil.copytree(inputs / "base", folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    values = {name: value for name, value in values.items() if name not in ("attention_bias", "mlp_bias")}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_pages_that_cannot_work_are_refused_before_any_work(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    windowed = {"model__base": sliding(inputs, tmp_path / "sliding")}
    cases = (
        ({"engine__num_pages": 20, "engine__page_size": 16}, "engine.num_pages = 20 must be at least 84: pages of 16"),
        ({**windowed, "engine__page_size": 16}, "engine.page_size = 16: model.assistant has a sliding window of 64"),
    )
    for settings, message in cases:
        for action in ([], ["--check"]):
            assert textworld.main([*textworld.arguments(inputs, tmp_path / "run", **settings), *action]) == 2
            error = capfd.readouterr().err
            assert message in error and "stage revise" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    for settings in (windowed, {"engine__num_pages": 84, "engine__page_size": 16}):
        assert textworld.main([*textworld.arguments(inputs, tmp_path / "run", **settings), "--check"]) == 0


def test_a_stage_beyond_the_models_positions_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "smoke", "--model.device", "cpu", "--check", "--label.cot"]
    assert textworld.main([*words, "false"]) == 0
    assert textworld.main([*words, "true"]) == 2
    assert "Stage label needs sequences of up to 512 tokens" in capsys.readouterr().err
