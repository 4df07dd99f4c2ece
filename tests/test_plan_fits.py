"""Plans for GPUs that are not here: presets that must fit, configurations that must not, and what is said of both."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import textworld
import torch

from bench.make_checkpoint import byte_tokenizer
from bench.shapes import SHAPES
from cai_fast import capacity, config, workload
from cai_fast.config_sections import HardwareConfig
from cai_fast.errors import InputError
from cai_fast.memory import Layout
from cai_fast.model import Model, ModelConfig
from cai_fast.planner import GIB, Planner, machine
from cai_fast.remedies import refusal

PRESETS = {"hf-1b": ("1b", "H100", 1), "hf-8b": ("8b", "H200", 1), "node-8b": ("8b", "H200", 8)}


def write_sparse(file: Path, model: ModelConfig) -> None:
    """Weights of a real size as a file with a true header, whose tensors' bytes were never written."""
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in Model(model).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)


def build(folder: Path) -> None:
    """Checkpoints of real shapes without contents, and prompts enough for the presets."""
    for name in ("1b", "8b"):
        (folder / name).mkdir()
        shape = SHAPES[name].config.replace(max_position_embeddings=131072)
        (folder / name / "config.json").write_text(json.dumps(shape.to_hf("lm")))
        byte_tokenizer().save_pretrained(folder / name)
        write_sparse(folder / name / "model.safetensors", shape)
    for kind, count in (("red_team", 2000), ("helpful", 2000)):
        textworld.write_rows(folder / f"{kind}.jsonl", ({"prompt": f"{kind} {i}: why?"} for i in range(count)))
    textworld.write_rows(folder / "preferences.jsonl", textworld.helpful_rows())


@pytest.fixture(scope="module")
def shapes(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return build_once("real_shapes", build)


def words_of(shapes: Path, preset: str, model: str, gpu: str, count: int, more: str = "") -> list[str]:
    data = " ".join(f"--data.{kind} {shapes / kind}.jsonl" for kind in ("red_team", "helpful", "preferences"))
    words = (
        f"--config {preset} --model.base {shapes / model} {data} --hardware.gpu {gpu} --hardware.count {count} {more}"
    )
    return words.split()


def planner_of(shapes: Path, preset: str, model: str, gpu: str, count: int = 1, more: str = "") -> Planner:
    return Planner(config.load(words_of(shapes, preset, model, gpu, count, more)))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_fit_the_gpus_they_are_for(preset: str, shapes: Path, capfd: Any) -> None:
    model, gpu, count = PRESETS[preset]
    assert textworld.main([*words_of(shapes, preset, model, gpu, count), "--check"]) == 0
    checked = capfd.readouterr().out
    assert f"{count} x {gpu}" in checked and "All inputs are usable." in checked


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_says_of_memory_and_hours_is_its_plan(preset: str, shapes: Path) -> None:
    model, gpu, count = PRESETS[preset]
    planner = planner_of(shapes, preset, model, gpu, count)
    text = (config.PRESETS / f"{preset}.toml").read_text()
    said = re.search(r"stage rl ([\d.]+) GiB of each (\w+) and ([\d.]+) h, stage sft ([\d.]+) GiB", text)
    assert said and said[2] == gpu
    rl = planner.stage("rl")
    assert float(said[1]) == pytest.approx(rl.memory.total / GIB, rel=0.1)
    assert float(said[3]) == pytest.approx(rl.seconds / 3600, rel=0.1)
    assert float(said[4]) == pytest.approx(planner.moments.peak("sft").total / GIB, rel=0.1)


def test_a_plan_needs_no_weights_but_a_check_does(shapes: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "bare").mkdir()
    for file in (shapes / "1b").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    words = [*words_of(shapes, "hf-1b", "1b", "H100", 1, f"--run-dir {tmp_path / 'run'}")]
    words[words.index("--model.base") + 1] = str(tmp_path / "bare")
    assert textworld.main([*words, "--plan"]) == 0
    out = capfd.readouterr().out
    assert "1 x H100, 79 GiB each, assumed" in out and "data sheet of H100, not measured" in out and "GiB" in out
    assert max(map(len, out.splitlines())) <= 120
    assert textworld.main([*words, "--check"]) == 2
    assert "model.safetensors: no such file" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("preset", "model", "gpu", "more", "expected"), [
    ("hf-1b", "1b", "H100", "--rl.micro_tokens 16384", ["rl.micro_tokens", "critic detached", "recompute", "4 GPUs"]),
    ("hf-8b", "8b", "H200", "--lora.rank 0", ["--lora.rank 16", "8 GPUs"]),
    ("hf-1b", "1b", "H100", "--rl.micro_tokens 9216", ["--guards.pm_eval_every 0"]),
    ("paper", "8b", "H100", "", ["--lora.rank 16"]),
])  # fmt: skip
def test_every_remedy_that_is_named_fits(
    preset: str, model: str, gpu: str, more: str, expected: list[str], shapes: Path, capfd: Any
) -> None:
    words = words_of(shapes, preset, model, gpu, 1, more)
    assert textworld.main([*words, "--check"]) == 2
    error = capfd.readouterr().err
    assert "Stage rl needs" in error and error.count("\n") == 1 and all(part in error for part in expected), error
    for remedy in error.partition("What would fit: ")[2].rstrip(".\n").split("; or "):
        count, extra = re.match(r"(\d+) GPUs(?: with)?", remedy), re.findall(r"--(\S+) (\S+)", remedy)
        peak = float(re.search(r"\(([\d.]+) GiB", remedy)[1])
        settings = dict(zip(words[::2], words[1::2], strict=True)) | {f"--{name}": value for name, value in extra}
        settings |= {"--hardware.count": count[1]} if count else {}
        tried = Planner(config.load([word for pair in settings.items() for word in pair]))
        assert refusal(tried) == "", remedy
        assert tried.worst()[1].total / GIB == pytest.approx(peak, rel=0.01)


def test_a_plan_that_does_not_fit_is_printed_and_says_so(shapes: Path, capfd: Any) -> None:
    assert textworld.main([*words_of(shapes, "paper", "8b", "H200", 1), "--plan"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("rl ") for line in lines)
    assert lines[-2].startswith("Does not fit: Stage rl") and lines[-1] == "No work was done."


def test_caches_take_half_of_what_is_free_and_the_optimizer_comes_on_top(shapes: Path) -> None:
    wide = "--engine.max_batch 2048 --rl.micro_tokens 8192"
    planner = planner_of(shapes, "hf-1b", "1b", "H100", 1, wide)
    (work,) = planner.works["rl"]
    pool = planner.pool("rl", work)
    loaded = planner.moments.loaded("rl", work).total
    # Standardisation samples before there are critic and optimizer: policy, reference and preference models are loaded.
    assert loaded == 4 * 2 * planner.shape("base").params + 2 * 2 * 2048
    unwatched = planner_of(shapes, "hf-1b", "1b", "H100", 1, f"{wide} --guards.pm_eval_every 0")
    assert unwatched.moments.loaded("rl", work).total == loaded * 3 / 4 - 2048
    assert pool.nbytes == pytest.approx((planner.machine.memory - loaded) / 2, rel=0.01)
    peak = planner.moments.peak("rl")
    assert peak.cache == pool.nbytes and peak.optimizer > 20 * GIB and peak.total > planner.room
    assert "--engine.max_batch" in refusal(planner)
    few = planner_of(shapes, "hf-1b", "1b", "H100", 1, "--engine.num_pages 3000").moments.peak("rl")
    assert few.cache == 3001 * 64 * 32 * 1024


def test_no_room_for_one_request_is_refused(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--stages compare --data.max_prompt_tokens 100000 --engine.max_batch 1 --engine.prefill_tokens 2048"
    assert refusal(planner_of(shapes, "hf-1b", "1b", "L40S", 1, words)) == ""
    monkeypatch.setitem(capacity.MEMORY, "L40S", 6)  # GiB: 2.3 for the weights, 3.1 for a request
    reason = refusal(planner_of(shapes, "hf-1b", "1b", "L40S", 1, words))
    assert "No memory is left for the keys and values of one request of stage compare" in reason
    assert "Nothing that was tried fits" in reason


def test_shards_by_hand(shapes: Path) -> None:
    """fp32 weights, gradients and moments divided by 8; two layers and the ends whole in bf16, and their gradient."""
    planner = planner_of(shapes, "node-8b", "8b", "H200", 8)
    layout, sizes = planner.moments.layout, planner.shape("base")
    assert layout.sharded and not planner_of(shapes, "hf-8b", "8b", "H200", 8).moments.layout.sharded
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    ends = 2 * 128256 * 4096 + 4096
    assert sizes.layer == layer and sizes.root("lm") == ends and sizes.params == 32 * layer + ends
    own = sizes.params / 8
    trained = layout.trained("rl", "base")
    assert trained.weights == pytest.approx(4 * own + 2 * (ends + 2 * layer))
    assert trained.gradients == pytest.approx(4 * own + 2 * (ends + layer) + 4 * layer)
    assert trained.optimizer == pytest.approx(8 * own)
    beside = planner.moments._beside_policy().weights  # sharded reference; whole preference models and engine's copy
    score = sizes.params - 128256 * 4096 + 4096
    assert beside == pytest.approx(2 * own + 2 * (ends + 2 * layer) + 2 * 2 * score + 2 * sizes.params)
    replicated = Layout(planner.changed({"parallel": {"shard": False}}).config, planner.machine).trained("rl", "base")
    assert replicated.weights == 2 * sizes.params


def test_one_trunk_serves_every_role(shapes: Path) -> None:
    planner = planner_of(shapes, "hf-8b", "8b", "H200", 1, "--rl.critic own")
    sizes = planner.shape("base")
    one = 16 * 32 * (8192 + 2 * 5120 + 8192 + 2 * 18432 + 18432)  # A and B of every matrix of every layer
    update = next(m for m in planner.moments.of("rl") if m.moment == "update")
    assert update.weights == 2 * (sizes.params + 4 * one + 3 * 4096)  # policy, preference models, critic; three heads
    assert update.gradients == 4 * (2 * one + 4096)
    assert update.optimizer == 10 * (2 * one + 4096)


def test_work_is_divided_by_the_ranks(shapes: Path) -> None:
    alone, eight = (planner_of(shapes, "hf-1b", "1b", "H100", n, "--parallel.shard false") for n in (1, 8))
    for stage in ("sft", "pm", "label"):
        assert eight.stage(stage).seconds == pytest.approx(alone.stage(stage).seconds / 8)
    assert alone.works["rl"][0].phases[0].at_once == 256 and eight.works["rl"][0].phases[0].at_once == 32
    assert 1 / 8 < eight.stage("rl").seconds / alone.stage("rl").seconds < 1 / 2  # small batches decode slowly
    again = alone.changed({"parallel": {"recompute": "full"}})
    assert again.stage("sft").seconds == pytest.approx(alone.stage("sft").seconds * 8 / 6)


def test_the_machine_is_the_one_here_or_the_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert capacity.machine(HardwareConfig(), "cpu") == capacity.Machine("cpu", 1, total)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert capacity.machine(HardwareConfig(), "cpu") == capacity.Machine("cpu", 2, total), "one of two nodes"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert capacity.machine(HardwareConfig(), "cpu") == capacity.Machine("cpu", 2, total // 2)
    assert capacity.machine(HardwareConfig(gpu="B200"), "auto") == capacity.Machine("cuda", 2, 178 * GIB, "B200")
    assert capacity.machine(HardwareConfig(gpu="B200", count=4), "auto").count == 4
    for gpu, device, message in (("H20", "auto", "Did you mean 'H200'"), ("H200", "cpu", "exclude each other")):
        with pytest.raises(InputError, match=message):
            capacity.machine(HardwareConfig(gpu=gpu), device)


def test_a_run_is_checked_for_the_machine_it_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cai_fast import plan, preflight

    seen: list[str] = []
    monkeypatch.setattr(plan, "check_memory", lambda planner: seen.append(planner.machine.kind) or "")
    cfg = config.load(["--hardware.gpu", "H200", "--run-dir", str(tmp_path / "run")])
    preflight.check(cfg)
    with pytest.raises(InputError, match="leave them out of a run"):
        preflight.check(cfg, here=True)
    preflight.check(config.load(["--run-dir", str(tmp_path / "run")]), here=True)
    assert seen == ["cuda", "cuda" if torch.cuda.is_available() else "cpu"]
    assert machine(cfg).name == "H200"


def test_the_disk_of_a_run_that_is_on_its_way_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_fast import preflight

    asked: list[int] = []
    monkeypatch.setattr(preflight, "require_free", lambda path, size: asked.append(size))
    cfg = config.load(["--run-dir", str(tmp_path)])
    preflight.check(cfg)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.safetensors").write_bytes(bytes(10**6))
    preflight.check(cfg)
    own = [size for size in asked if size > 10**6]
    assert len(own) == 2 and own[0] - own[1] == 10**6


@pytest.mark.parametrize(
    "words", ["--lora.rank 4 --parallel.recompute selective", "--lora.rank 4 --parallel.shard true"]
)
def test_what_adapters_do_not_go_with_is_refused(words: str) -> None:
    with pytest.raises(InputError, match="adapters"):
        config.load(words.split())


def test_tokens_of_the_largest_pass() -> None:
    def micro(words: str, count: int = 1) -> int:
        sizes = "--data.max_prompt_tokens 64 --revise.max_new_tokens 36 "
        cfg = config.load((sizes + words).split())
        return Layout(cfg, capacity.Machine("cpu", count, 2**36)).micro("sft")

    assert micro("--sft.batch_tokens 1000 --sft.micro_tokens 300") == 300
    assert micro("--sft.batch_tokens 1000 --sft.micro_tokens 3000") == 1000
    assert micro("--sft.batch_tokens 1000 --sft.micro_tokens 3000", count=4) == 250
    assert micro("--sft.batch_tokens 1000 --sft.micro_tokens 50") == 100  # the longest example is alone in its pass


def test_the_first_preference_model_is_gone_when_the_second_is_trained(
    build_once: Callable[[str, Callable[[Path], None]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan counts one."""
    import weakref

    from cai_fast.stages import pm

    made: list[weakref.ref[Model]] = []
    alive: list[int] = []

    def train(ctx: Any, model: Model, *rest: Any) -> int:
        made.append(weakref.ref(model))
        alive.append(sum(ref() is not None for ref in made))
        return original(ctx, model, *rest)

    original = pm.train
    monkeypatch.setattr(pm, "train", train)
    inputs = build_once("text_inputs", textworld.build)
    words = textworld.arguments(inputs, tmp_path / "run", stages="revise,sft,compare,label,pm")
    assert textworld.main(words) == 0
    assert alive == [1, 1]


def test_prompts_are_counted_from_the_sources(shapes: Path) -> None:
    counts = workload.prompt_counts(config.load(words_of(shapes, "hf-1b", "1b", "H100", 1)))
    assert counts["red_team"] + counts["red_team_eval"] == 2000 and counts["preferences"] == 24
