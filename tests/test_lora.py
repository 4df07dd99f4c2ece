"""LoRA layers: arithmetic, gradients, merging, the engine with them, and peft's files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import CONFIG, tiny_model
from torch import Tensor

from cai_fast.engine import Engine, Sampling
from cai_fast.errors import InputError
from cai_fast.model import Model, init_random, load, lora
from cai_fast.model.decoder import Linear
from cai_fast.model.lora import LoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
PROMPTS = [[3, 1, 4], [15, 9, 2, 6, 5, 35], [8] * 40]


def adapted(targets: tuple[str, ...] = lora.TARGETS, seed: int = 1, model: Model | None = None) -> Model:
    """A model with trained adapters: B is not zero."""
    model = model or tiny_model()
    lora.add_adapters(model, 4, 8.0, targets, seed)
    fill(model)
    return model


@torch.no_grad()
def fill(model: Model, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.adapters(model).values():
        layer.lora_B.weight.copy_(0.1 * torch.randn(layer.lora_B.weight.shape, generator=generator))


def states(model: Model) -> Tensor:
    """Hidden states of two packed sequences."""
    ids, positions = torch.arange(40) % 64, torch.cat([torch.arange(25), torch.arange(15)])
    return model.hidden(ids, positions, torch.tensor([0, 25, 40], dtype=torch.int32))


def test_fresh_adapters_change_no_bit_and_alone_require_gradients() -> None:
    model, plain = tiny_model(), states(tiny_model())
    names = lora.add_adapters(model, 4, 8.0, ["q_proj", "down_proj"], 0)
    parts = ("self_attn.q_proj", "mlp.down_proj")
    assert names == [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts]
    assert torch.equal(states(model), plain)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    states(model).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_a_draw_depends_on_seed_and_name_alone() -> None:
    def drawn(targets: list[str], seed: int) -> dict[str, Tensor]:
        model = tiny_model()
        lora.add_adapters(model, 4, 8.0, targets, seed)
        return {name: layer.lora_A.weight for name, layer in lora.adapters(model).items()}

    one, both, other = drawn(["v_proj"], 3), drawn(["up_proj", "v_proj"], 3), drawn(["v_proj"], 4)
    assert all(torch.equal(weight, both[name]) and not torch.equal(weight, other[name]) for name, weight in one.items())
    first, second = one.values()
    bound = 32**-0.5
    assert not torch.equal(first, second) and 0.9 * bound < first.abs().max() <= bound


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("q_proj, .* down_proj; unknown lm_head, qproj", (4, 8.0, ["q_proj", "qproj", "lm_head"], 0)),
        ("targets must be some of q_proj.* found none", (4, 8.0, [], 0)),
        ("rank must be >= 1. Got 0", (0, 8.0, ["q_proj"], 0)),
    ],
)
def test_bad_arguments_are_refused(words: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match=words):
        lora.add_adapters(tiny_model(), *arguments)
    with pytest.raises(InputError, match="has adapters"):
        lora.add_adapters(adapted(), 4, 8.0, ["q_proj"], 0)


@pytest.mark.parametrize("width", [40, 700])  # rows are multiplied in one piece, in two
def test_values_and_gradients_are_those_of_fp64(width: int) -> None:
    torch.manual_seed(0)
    layer = LoraLinear(Linear(width, 24), 3, 6.0)
    layer.reset(7)
    torch.nn.init.normal_(layer.lora_B.weight)
    x, seen = torch.randn(5, width, requires_grad=True), torch.randn(5, 24)
    (layer(x) * seen).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.lora_A.weight, layer.lora_B.weight)]
    y, w, a, b = exact
    out = y @ w.T + layer.bias.double() + (y @ a.T) @ b.T * 2.0
    (out * seen.double()).sum().backward()
    torch.testing.assert_close(layer(x).double(), out, rtol=1e-5, atol=1e-5)
    for mine, true in zip((x, layer.weight, layer.lora_A.weight, layer.lora_B.weight), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-5, atol=1e-5)


def test_bf16_computes_in_the_weights_type_and_adds_to_the_base() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(Linear(64, 48).bfloat16(), 4, 6.0)
    layer.reset(7)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(7, 64).bfloat16()
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    base, low = F.linear(x, layer.weight, layer.bias), F.linear(x, layer.lora_A.weight)
    assert torch.equal(layer(x), base + F.linear((1.5 * low.float()).bfloat16(), layer.lora_B.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_of_a_batch_do_not_depend_on_their_number(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LoraLinear(Linear(1100, 97).to(dtype), 8, 12.0)
    layer.reset(7)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(320, 1100).to(dtype)
    whole = layer(x)
    for rows in range(Model.min_rows, 320, Model.min_rows):
        assert torch.equal(layer(x[:rows]), whole[:rows]) and torch.equal(layer(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("head", ["lm", "score"])
def test_merged_weights_compute_the_same(head: str, tmp_path: Path) -> None:
    model = adapted(model=tiny_model(head=head))
    merged = lora.merge(model)
    assert not lora.adapters(merged) and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(states(merged), states(model), rtol=1e-5, atol=1e-5)
    merged.save(tmp_path / "merged")
    assert torch.equal(states(load(tmp_path / "merged")), states(merged))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in merged.parameters():
            p.add_(1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # a copy of its own


def test_a_model_with_adapters_is_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"LoRA adapters.*lora.merge\(model\).*lora.save_adapters"):
        adapted().save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def engine(model: Model, **options: Any) -> Engine:
    return Engine(model, max_batch=2, max_len=96, **options)


@pytest.mark.parametrize("options", [{}, {"deterministic": False}, {"page_size": 16}])
def test_the_engine_computes_with_adapters(options: dict[str, Any]) -> None:
    model = adapted()
    found, merged, plain = (
        [c.token_ids for c in engine(m, **options).generate(PROMPTS, GREEDY)]
        for m in (model, lora.merge(model), tiny_model())
    )
    assert found == merged != plain


def test_bits_do_not_depend_on_the_engines_batch() -> None:
    model = adapted()
    together = engine(model).generate(PROMPTS, GREEDY)
    alone = [engine(model).generate([prompt], GREEDY, keys=[i])[0] for i, prompt in enumerate(PROMPTS)]
    assert [(c.token_ids, c.logprobs) for c in together] == [(c.token_ids, c.logprobs) for c in alone]


def test_the_engine_sees_an_update_of_an_adapter_and_refuses_older_prefixes() -> None:
    model = adapted()
    runner = engine(model)
    before, handle = runner.generate(PROMPTS, GREEDY), runner.prefix([1, 2, 3])
    runner.generate([[4]], GREEDY, prefix=handle)
    fill(model, seed=6)
    after = runner.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    assert after == engine(lora_copy(model)).generate(PROMPTS, GREEDY)
    with pytest.raises(InputError, match="other weights"):
        runner.generate([[4]], GREEDY, prefix=handle)


def lora_copy(model: Model) -> Model:
    copy = model.clone()
    assert lora.adapters(copy).keys() == lora.adapters(model).keys()
    return copy


def test_files_are_pefts(tmp_path: Path) -> None:
    model = adapted(("q_proj", "down_proj"))
    lora.save_adapters(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [lora.CONFIG, lora.WEIGHTS]
    config = json.loads((tmp_path / "adapter" / lora.CONFIG).read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 8)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "adapter" / lora.WEIGHTS).items()}
    start = "base_model.model.model.layers.1."
    assert len(shapes) == 8 and {name: shape for name, shape in shapes.items() if name.startswith(start)} == {
        start + "self_attn.q_proj.lora_A.weight": (4, 32), start + "self_attn.q_proj.lora_B.weight": (32, 4),
        start + "mlp.down_proj.lora_A.weight": (4, 64), start + "mlp.down_proj.lora_B.weight": (32, 4),
    }  # fmt: skip
    other = tiny_model()
    assert lora.load_adapters(other, tmp_path / "adapter") == list(lora.adapters(model))
    assert torch.equal(states(other), states(model))
    assert {name for name, p in other.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_a_scalar_head_is_trained_and_stored_with_its_adapters(tmp_path: Path) -> None:
    model = adapted(("v_proj",), model=tiny_model(head="score"))
    assert {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name} == {
        "score.weight"
    }
    lora.save_adapters(model, tmp_path, "the/base")
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert config["base_model_name_or_path"] == "the/base"
    tensors = load_file(tmp_path / lora.WEIGHTS)
    assert torch.equal(tensors["base_model.model.score.weight"], model.score.weight) and len(tensors) == 5
    # What peft 0.21 writes of a sequence classifier: its own two names after those that it was given.
    for saved in (["classifier", "score"], ["score", "classifier", "score"]):
        (tmp_path / lora.CONFIG).write_text(json.dumps(config | {"modules_to_save": saved}))
        other = tiny_model(head="score").with_score_head(9)
        lora.load_adapters(other, tmp_path)
        assert torch.equal(other.score.weight, model.score.weight) and torch.equal(states(other), states(model))
    with pytest.raises(InputError, match="modules_to_save"):
        lora.load_adapters(tiny_model(), tmp_path)
    save_file({n: t for n, t in tensors.items() if "score" not in n}, tmp_path / lora.WEIGHTS)
    with pytest.raises(InputError, match="missing tensors: base_model.model.score.weight"):
        lora.load_adapters(tiny_model(head="score"), tmp_path)


def test_reset_draws_the_same_adapters_again() -> None:
    model, fresh = adapted(seed=3), tiny_model()
    lora.add_adapters(fresh, 4, 8.0, lora.TARGETS, 3)
    for p in lora.adapters(model).values():
        torch.nn.init.constant_(p.lora_A.weight, float("inf"))
    lora.reset(model, 3)
    assert all(torch.equal(p, fresh.get_parameter(name)) for name, p in model.named_parameters())


# What peft 0.21 writes besides what it needs, as far as it is not null.
PEFT = {
    "alpha_pattern": {}, "bias": "none", "ensure_weight_tying": False, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.1,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "target_modules": ["v_proj"], "task_type": "CAUSAL_LM",
    "use_dora": False, "use_rslora": False, "base_model_name_or_path": "base",
}  # fmt: skip


def peft_folder(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """An adapter on v_proj as peft writes it; the tensors."""
    folder.mkdir(exist_ok=True)
    start = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight"
    shapes = {"A": (4, 32), "B": (16, 4)}
    tensors = {start.format(i, part): torch.randn(shape) for i in (0, 1) for part, shape in shapes.items()}
    save_file(tensors, folder / lora.WEIGHTS)
    (folder / lora.CONFIG).write_text(json.dumps(PEFT | changes))
    return tensors


def test_an_adapter_of_peft_computes_what_it_says(tmp_path: Path) -> None:
    tensors = peft_folder(tmp_path)
    model, expected = tiny_model(), tiny_model()
    lora.load_adapters(model, tmp_path)
    with torch.no_grad():
        for i, block in enumerate(expected.model.layers):
            a, b = (tensors[f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_{part}.weight"] for part in "AB")
            block.self_attn.v_proj.weight += 2.0 * b @ a
    torch.testing.assert_close(states(model), states(expected), rtol=1e-5, atol=1e-5)
    half = init_random(CONFIG, 0, dtype=torch.bfloat16)
    lora.load_adapters(half, tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"rank_pattern": {"v_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"target_modules": "all-linear"}, "a list target_modules"),
        ({"target_modules": ["v_proj", "fc1"]}, "unknown fc1"),
        ({"target_modules": ["v_proj", "q_proj"]}, "missing tensors: .*q_proj.lora_A.weight"),
        ({"target_modules": ["q_proj"]}, "missing tensors: .*q_proj.* unexpected tensors: .*v_proj.lora_A.weight"),
        ({"r": 8}, r"lora_A.weight is \(4, 32\); expected \(8, 32\)"),
        ({"r": "4"}, "expected numbers r and lora_alpha"),
        ({"peft_type": "IA3"}, "peft_type LORA"),
    ],
)
def test_adapters_are_loaded_strictly_or_not_at_all(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    peft_folder(tmp_path, **changes)
    model = tiny_model()
    with pytest.raises(InputError, match=words):
        lora.load_adapters(model, tmp_path)
    assert not lora.adapters(model) and all(p.requires_grad for p in model.parameters())


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapter_config.json: no such file"):
        lora.load_adapters(tiny_model(), tmp_path)
    peft_folder(tmp_path)
    (tmp_path / lora.WEIGHTS).write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match="adapter_model.safetensors: not a readable safetensors file"):
        lora.load_adapters(tiny_model(), tmp_path)
    (tmp_path / lora.WEIGHTS).unlink()
    with pytest.raises(InputError, match="adapter_model.safetensors: no such file"):
        lora.load_adapters(tiny_model(), tmp_path)
    with pytest.raises(InputError, match="no adapters to save"):
        lora.save_adapters(tiny_model(), tmp_path)
