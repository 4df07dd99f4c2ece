"""The decoder against transformers, and what packing must not change."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from cai_fast.batching import pack
from cai_fast.errors import InputError
from cai_fast.model import Model, ModelConfig, Rope, attention, init_random
from tests.tiny import gradients, relative_difference

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
    {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "rope_theta": 300.0, "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0,
     "mscale_all_dim": 0.7, "beta_fast": 16, "truncate": False},
]  # fmt: skip
V = 89


def hf_pair(family: str, seed: int, **changes: Any) -> tuple[transformers.PreTrainedModel, Model]:
    """A random transformers model and ours with the same weights."""
    draw = random.Random(f"{family}/{seed}")
    heads = draw.choice([2, 4, 6])
    values: dict[str, Any] = {
        "vocab_size": V, "hidden_size": heads * draw.choice([6, 8, 10]),
        "intermediate_size": draw.choice([24, 50, 600]), "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads, "num_key_value_heads": draw.choice([n for n in (1, 2, 3, 6) if heads % n == 0]),
        "head_dim": draw.choice([4, 12, 16]), "rms_norm_eps": draw.choice([1e-6, 1e-3]), "initializer_range": 0.3,
        "max_position_embeddings": 128, "tie_word_embeddings": bool(seed % 2), "rope_parameters": dict(ROPES[seed % 5]),
    }  # fmt: skip
    if family == "llama":
        values |= {"attention_bias": draw.random() < 0.5, "mlp_bias": draw.random() < 0.5}
    if family == "mistral":
        values |= {"sliding_window": draw.choice([None, 2, 7, 20])}
    if family.startswith("qwen"):
        values |= {"use_sliding_window": draw.random() < 0.5, "sliding_window": 9, "max_window_layers": 1}
    config = CONFIGS[family](**(values | changes))
    torch.manual_seed(seed)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():  # from_config leaves biases 0 and norms 1
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
            assert parameter.isfinite().all(), name
    ours = Model(ModelConfig.from_hf(config.to_dict() | {"architectures": None}))
    state = {k: v for k, v in hf.state_dict().items() if not (config.tie_word_embeddings and k == "lm_head.weight")}
    ours.load_state_dict(state, strict=True)
    return hf, ours


def sequences(lens: list[int], seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V - 1, (n,), generator=generator).tolist() for n in lens]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Next-token loss of one sequence, summed."""
    return F.cross_entropy(logits[:-1], ids[1:], reduction="sum")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients_equal_transformers(family: str, seed: int) -> None:
    hf, ours = hf_pair(family, seed)
    seqs = sequences([3, 40, 17, 1, 64], seed)
    expected = [hf(torch.tensor([s]), use_cache=False).logits[0] for s in seqs]
    logits = ours(pack(seqs), loss=lambda h, w: h @ w.t()).split([len(s) for s in seqs])
    for a, b in zip(logits, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    for parts in (logits, expected):
        sum(loss_of(part, torch.tensor(s)) for part, s in zip(parts, seqs, strict=True)).backward()
    theirs = {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}
    assert relative_difference(gradients(ours), theirs) <= 1e-4


def run(model: Model, seqs: list[list[int]]) -> tuple[Tensor, ...]:
    """Hidden states of each sequence, packed in the given order, without gradients."""
    with torch.no_grad():
        return model(pack(seqs)).split([len(s) for s in seqs])


def wide_model(**changes: Any) -> Model:
    """Awkward sizes: an inner dimension beyond 512, odd numbers of heads and columns."""
    sizes: dict[str, Any] = {
        "vocab_size": V, "hidden_size": 72, "intermediate_size": 1080, "num_layers": 2, "num_heads": 6,
        "num_kv_heads": 2, "head_dim": 20, "max_position_embeddings": 1024,
    }  # fmt: skip
    return init_random(ModelConfig(**(sizes | changes)), 1, std=0.3)


@pytest.mark.parametrize(("window", "threads"), [(None, 1), (24, 1), (None, 2), (24, 3)])
def test_a_sequence_has_the_same_bits_packed_and_alone(window: int | None, threads: int) -> None:
    model = wide_model(model_type="mistral", sliding_window=window)
    seqs = sequences([1, 2, 15, 16, 17, 31, 32, 33, 300, 60, 256, 257, 5])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = run(model, seqs)
        for sequence, row in zip(seqs, packed, strict=True):
            assert torch.equal(run(model, [sequence])[0], row)
        backwards = run(model, seqs[::-1])[::-1]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(packed, backwards, strict=True))


def test_training_and_inference_give_the_same_bits() -> None:
    model, seqs = wide_model(), sequences([9, 30, 70])
    assert torch.equal(model(pack(seqs)).detach(), torch.cat(run(model, seqs)))


def test_a_poisoned_neighbour_changes_nothing() -> None:
    model = wide_model(vocab_size=V + 1)
    clean = sequences([20, 40, 7])
    mixed = [[V] * 25, clean[0], [V] * 3, clean[1], [V] * 290, clean[2], [V]]
    expected = run(model, clean)
    with torch.no_grad():
        model.model.embed_tokens.weight[V] = float("nan")
    for a, b in zip(run(model, mixed)[1::2], expected, strict=True):
        assert torch.equal(a, b)
    grads = []
    for seqs, wanted in ((clean, slice(None)), (mixed, slice(1, None, 2))):
        model.zero_grad()
        rows = model(pack(seqs)).split([len(s) for s in seqs])[wanted]
        sum(part.sin().sum() for part in rows).backward()
        grads.append(model.model.embed_tokens.weight.grad[:V].clone())
    assert (grads[1] - grads[0]).norm() <= 1e-6 * grads[0].norm()


def test_a_token_sees_its_past_only() -> None:
    model = wide_model()
    (sequence,) = sequences([50])
    whole = run(model, [sequence])[0]
    changed = run(model, [[*sequence[:30], *[1] * 20]])[0]
    assert torch.equal(whole[:30], changed[:30]) and not torch.allclose(whole[30], changed[30])


def test_attend_replaces_attention_and_sees_every_layer() -> None:
    model, batch, seen = wide_model(), pack(sequences([5, 4])), []

    def own_value(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((layer, q.shape, k.shape, v.shape))
        return v.repeat_interleave(3, dim=1)

    out = model.hidden(batch.token_ids, batch.positions, batch.cu_seqlens, attend=own_value)
    assert out.shape == (9, 72)
    assert seen == [(i, (9, 6, 20), (9, 2, 20), (9, 2, 20)) for i in range(2)]


def test_lengths_and_positions_are_checked() -> None:
    model, batch = wide_model(max_position_embeddings=16), pack(sequences([5, 4]))
    with pytest.raises(ValueError, match="9 tokens, 9 positions, 8 tokens in sequences"):
        model.hidden(batch.token_ids, batch.positions, batch.cu_seqlens, lens=[4, 4])
    with pytest.raises(ValueError, match="position 16 beyond the model's 16"):
        model(pack(sequences([17])))


def test_half_precision_stays_close() -> None:
    model, seqs = wide_model(), sequences([30, 12])
    expected, out = torch.cat(run(model, seqs)), torch.cat(run(model.clone().bfloat16(), seqs))
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() / expected.norm() < 0.05


def test_score_head_and_clone_are_copies() -> None:
    model = wide_model()
    scored, zero = model.with_score_head(3), model.with_score_head(3, zero=True)
    hidden = torch.randn(40, 72)
    assert torch.equal(scored.score(hidden)[:3], scored.score(hidden[:3])) and scored.score(hidden).std() > 0.1
    assert not zero.score(hidden).any() and torch.equal(scored.score.weight, model.with_score_head(3).score.weight)
    copy = model.clone()
    with torch.no_grad():
        for other in (scored, copy):
            other.model.norm.weight.zero_()
    assert (model.model.norm.weight == 1).all() and all(p.requires_grad for p in scored.parameters())


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.choose("cpu", torch.float32) == "sdpa"
    assert attention.available("cuda", torch.float32) == ["sdpa"]
    assert "varlen" in attention.available("cuda", torch.bfloat16)
    monkeypatch.setenv("CAI_ATTN", "flash_attn")
    with pytest.raises(InputError, match="CAI_ATTN=flash_attn: not usable for torch.float64 on cpu"):
        attention.choose("cpu", torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 24])
def test_gpu_backends_equal_the_cpu(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = wide_model(model_type="mistral", sliding_window=window, head_dim=32).config
    lens = [1, 33, 16, 200, 300]
    batch = pack(sequences(lens), "cuda")
    qkv = [torch.randn(sum(lens), n, 32, device="cuda", dtype=torch.bfloat16) for n in (6, 2, 2)]
    wide = [x.float().cpu().requires_grad_() for x in qkv]
    expected = attention.packed_causal(config, lens, batch.cu_seqlens.cpu(), wide[0])(0, *wide)
    expected.cos().sum().backward()
    for name in attention.available("cuda", torch.bfloat16):
        monkeypatch.setenv("CAI_ATTN", name)
        attention.choose.cache_clear()
        half = [x.clone().requires_grad_() for x in qkv]
        out = attention.packed_causal(config, lens, batch.cu_seqlens, half[0])(0, *half)
        out.float().cos().sum().backward()
        assert (out.float().cpu() - expected).norm() / expected.norm() < 0.01, name
        for a, b in zip(half, wide, strict=True):
            assert (a.grad.float().cpu() - b.grad).norm() / b.grad.norm() < 0.02, name
    attention.choose.cache_clear()


def test_config_survives_a_round_trip() -> None:
    for family in CONFIGS:
        for seed in range(5):
            config = hf_pair(family, seed)[1].config
            assert ModelConfig.from_hf(config.to_hf("lm")) == config
    old = {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}  # as transformers 4 wrote it
    assert Rope.from_hf(old) == Rope(7.0, "linear", (("factor", 2.0),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported families: llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; supported: 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"num_local_experts": 8}, "num_local_experts = 8; this field is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "odd": 1}}, "odd"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "multiple of the key-value heads"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_unsupported_configurations_are_named(change: dict[str, Any], message: str) -> None:
    plain = ModelConfig(64, 32, 48, 2, 4, 2, 8).to_hf("lm")
    ModelConfig.from_hf(plain)
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf(plain | change)
