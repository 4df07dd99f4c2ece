"""The engine's measurements on a GPU, tried on a CPU: that every one is made, and that the floors are right."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_suite
from bench.bench_gpu_engine import guarded, sections
from bench.engine_work import Load, Place, TimedEngine, attempt, compared, decode_step, ragged
from bench.shapes import SHAPES, Ceilings, decode_floor, layer_weights, pass_seconds, random_model, step_weights, twin
from cai_fast.engine import Sampling

CPU = torch.device("cpu")
H200 = Ceilings(790e12, 4.3e12, "by hand")
MEASUREMENTS = {
    "decode tiny": [
        "batch 4",
        "batch 4, 24 behind 512 shared, shared_decode off",
        "batch 4, 24 behind 512 shared, shared_decode on",
        "batch 2",
        "batch 4, graphs off",
        "batch 2, graphs off",
    ],
    "judging tiny": [
        "1 x 2 questions",
        "3 x 2 questions",
        "1 x 2 questions, padded, sorted, last logit",
        "3 x 2 questions, padded, sorted, last logit",
    ],
    "throughput tiny": ["batch 4", "batch 2", "batch 4, continuous batching", "batch 2, continuous batching"],
}


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.bench_gpu_engine", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_without_a_gpu_it_says_so_and_succeeds() -> None:
    done = program()
    assert done.returncode == 0 and done.stdout == "bench.bench_gpu_engine: no CUDA GPU here, nothing to measure.\n"


def test_the_tiny_run_measures_everything(tmp_path: Path) -> None:
    done = program("--shapes", "tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("gpu-engine-cpu-*.json")
    report = json.loads(path.read_text())
    assert report["device"] == report["kind"] == "cpu" and report["commit"] and report["versions"]["torch"]
    assert {name: list(parts) for name, parts in report["sections"].items()} == MEASUREMENTS
    for name, parts in report["sections"].items():
        for part, found in parts.items():
            assert all(math.isfinite(value) and value >= 0 for value in found.values()), (name, part, found)
            assert f"{part}: " in done.stdout
    for part, found in report["sections"]["judging tiny"].items():
        assert "padded" not in part or found["largest difference"] < 1e-5 and found["our rate over its"] > 0
    for part, found in report["sections"]["decode tiny"].items():
        length = 512 + 24 if "shared" in part else 24
        assert found["steps"] >= 6 and found["cached a row"] == pytest.approx(length, abs=1)


@pytest.mark.parametrize(
    "shape, rows, length, weights, products, cached",
    [
        ("1b", 64, 512, 0.57, 0.20, 0.25),
        ("1b", 256, 512, 0.57, 0.80, 1.00),
        ("1b", 512, 1024, 0.57, 1.60, 4.00),
        ("8b", 64, 512, 3.49, 1.22, 1.00),
        ("8b", 256, 512, 3.49, 4.86, 4.00),
        ("8b", 512, 512, 3.49, 9.73, 7.99),
    ],
)
def test_floors_of_decoding(shape: str, rows: int, length: int, weights: float, products: float, cached: float) -> None:
    floor = decode_floor(SHAPES[shape].config, rows, rows * length, H200)
    assert floor == pytest.approx((weights, products, cached), abs=0.006)
    assert floor.total == max(floor.weights, floor.products) + floor.cached


def test_weights_are_those_that_a_token_is_multiplied_with() -> None:
    assert step_weights(SHAPES["1b"].config) == 1_235_746_816
    assert step_weights(SHAPES["8b"].config) == 7_504_658_432
    assert pass_seconds(SHAPES["8b"].config, 1000, H200) == pytest.approx(2 * 6_979_321_856 * 1000 / 790e12)
    for tied in (True, False):
        config = SHAPES["tiny"].config.replace(tie_word_embeddings=tied)
        model = random_model(config, CPU, torch.float32)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        embedding = config.vocab_size * config.hidden_size
        assert layer_weights(config) == matrices - embedding * (1 if tied else 2)


@pytest.mark.parametrize("tied", [True, False])
def test_the_twin_is_the_same_model_on_the_same_tensors(tied: bool) -> None:
    model = random_model(SHAPES["tiny"].config.replace(tie_word_embeddings=tied), CPU, torch.float32)
    theirs = twin(model)
    ids = torch.arange(30)
    with torch.no_grad():
        hidden = model.hidden(ids, ids, torch.tensor([0, 30], dtype=torch.int32))
        assert (theirs(ids[None]).logits[0] - hidden @ model.lm_head_weight.t()).abs().max() < 1e-5
    ours = {p.data_ptr() for p in model.parameters()}
    assert ours == {p.data_ptr() for p in theirs.parameters()}
    assert model.model.norm.weight.eq(1).all() and 0.015 < model.lm_head_weight.std() < 0.025


def test_steps_that_capture_a_graph_do_not_count() -> None:
    model = random_model(SHAPES["tiny"].config, CPU, torch.float32)
    options = {"max_batch": 2, "max_len": 600, "page_size": 16, "pipelined": True, "deterministic": False}
    engine = TimedEngine(model, **options)
    engine.generate([[3] * 496, [4] * 496], Sampling(max_new_tokens=40))
    new = [i for i, step in enumerate(engine.steps) if not step.known]
    assert new == [0, 1, 16, 17]  # two calls a shape, and the 513th position is in the next bucket
    times, cached = engine.times()
    assert len(times) == 39 - 6 - 6
    counted = [*range(6, 16), *range(22, 39)]
    assert cached == 2 * sum(496 + 1 + i for i in counted) / len(counted)


def test_who_fails_is_named_and_compared_with_nobody() -> None:
    def breaks() -> dict:
        raise RuntimeError("out of memory\nmore")

    assert attempt(breaks) == {"failed": "RuntimeError: out of memory"}
    assert compared({"tokens/s": 3.0}, attempt(breaks), "tokens/s") == {"failed": "RuntimeError: out of memory"}
    assert compared({"tokens/s": 3.0}, {"tokens/s": 2.0}, "tokens/s")["our rate over its"] == 1.5
    assert list(guarded(lambda: iter([("a", {})]))) == [("a", {})]
    assert list(guarded(breaks)) == [("the section", {"failed": "RuntimeError: out of memory\nmore"})]


def test_goals_and_order() -> None:
    assert (SHAPES["1b"].step_ms, SHAPES["8b"].step_ms, SHAPES["8b"].comparisons) == (2.4, 11.0, 25.0)
    assert list(sections(["8b"], CPU)) == ["decode 8b", "judging 8b", "throughput 8b"]
    suite = list(gpu_suite.sections())
    assert suite[:4] == ["correctness", "engine decode 1b", "engine decode 8b", "engine judging 8b"]
    assert {f"engine {name}" for name in sections(["1b", "8b"], CPU)} <= set(suite)
    lengths = ragged(150, 64, 0)
    assert sum(lengths) == pytest.approx(150 * 64, rel=0.01) and max(lengths) > 1.5 * min(lengths)
    load = Load()
    conversation, response, principle = load.lengths
    assert conversation + 2 * response + principle + 12 == 540


def test_the_shared_part_of_the_cache_counts_once() -> None:
    place = Place(SHAPES["tiny"], Load(steps=6, page=16), CPU, torch.float32, H200)
    model = place.model()
    found = decode_step(place, model, 3, 24, shared=512, shared_decode=True, pipelined=True)
    alone = decode_floor(model.config, 3, 512 + 3 * (found["cached a row"] - 512), H200, 4)
    assert found["floor ms"] == pytest.approx(alone.total)
