"""Hugging Face folders: what is written, what transformers makes of it, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from cai_fast.batching import pack
from cai_fast.errors import InputError
from cai_fast.model import Model, check, hf, init_random, load
from tests.tiny import CONFIG, tiny_model

SEQS = [[3, 5, 9, 60, 2], [7, 1], [*range(3, 40)]]
UNTIED = CONFIG.replace(tie_word_embeddings=False, qkv_bias=True, model_type="qwen2")


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model(pack(SEQS), loss=lambda h, w: h @ w.t())


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors of the single weight file; `__` in a name stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_policy_is_a_causal_lm_with_equal_logits(config: Any, tmp_path: Path) -> None:
    model = init_random(config, 3, std=0.2)
    model.save(tmp_path / "m", extra_config={"eos_token_id": 2, "pad_token_id": 0})
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report.values()) and theirs.dtype == torch.float32 and theirs.config.pad_token_id == 0
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([s])).logits[0] for s in SEQS])
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = load(tmp_path / "m")
    assert again.head == "lm" and torch.equal(logits(again), logits(model))
    assert (again.lm_head_weight is again.model.embed_tokens.weight) == config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) != config.tie_word_embeddings
    assert dict(again.config.kept)["eos_token_id"] == 2
    assert check(tmp_path / "m").num_parameters == sum(p.numel() for p in model.parameters())


def test_preference_model_is_a_sequence_classifier_with_equal_scores(tmp_path: Path) -> None:
    end, pad = 2, 0
    model = tiny_model().with_score_head(5)
    model.save(tmp_path / "pm", extra_config={"pad_token_id": pad, "eos_token_id": end})
    config = json.loads((tmp_path / "pm" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["num_labels"] == 1
    seqs = [[*s, end] for s in SEQS]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pm")
    longest = max(map(len, seqs))
    ids = torch.tensor([[*s, *[pad] * (longest - len(s))] for s in seqs])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != pad).long()).logits[:, 0]
        ours = load(tmp_path / "pm")
        batch = pack(seqs)
        scores = ours.score(ours(batch)[batch.cu_seqlens[1:].long() - 1])
    assert ours.head == "score" and expected.std() > 0.1
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_dtype_is_widened_exactly_and_written_as_asked(tmp_path: Path) -> None:
    half = tiny_model().bfloat16()
    half.save(tmp_path / "half")
    wide = load(tmp_path / "half")
    assert wide.dtype == torch.float32
    assert all(torch.equal(a, b.float()) for a, b in zip(wide.parameters(), half.parameters(), strict=True))
    wide.save(tmp_path / "wide")
    wide.save(tmp_path / "back", dtype=torch.bfloat16)
    for name, dtype in (("half", torch.bfloat16), ("wide", torch.float32), ("back", torch.bfloat16)):
        assert {t.dtype for t in load_file(tmp_path / name / "model.safetensors").values()} == {dtype}
        assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).dtype == dtype


def test_shards_licence_and_tokenizer_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def save(self, path: Path) -> None:
            (path / "tokenizer.json").write_text("{}")

    model = tiny_model()
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    model.save(tmp_path / "a", tokenizer=Tokenizer())
    for name in ("LICENSE.txt", "NOTICE", "generation_config.json"):
        (tmp_path / "a" / name).write_text("{}")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
    sharded = load(tmp_path / "a")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in sharded.state_dict().items())
    assert torch.equal(logits(sharded), logits(model))
    monkeypatch.undo()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "stale").touch()
    sharded.save(tmp_path / "b")
    files = {"LICENSE.txt", "NOTICE", "config.json", "generation_config.json", "model.safetensors"}
    assert {f.name for f in (tmp_path / "b").iterdir()} == files
    sharded.with_score_head(0).save(tmp_path / "c")
    assert {f.name for f in (tmp_path / "c").iterdir()} == files - {"generation_config.json"}
    (shard := sorted((tmp_path / "a").glob("model-*"))[1]).unlink()
    with pytest.raises(InputError, match=f"{shard.name}: no such file"):
        load(tmp_path / "a")


def test_saving_over_the_folder_it_came_from(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "m")
    model = load(tmp_path / "m")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m").model.norm.weight, torch.full((32,), 2.0))


def test_a_redundant_tied_head_is_accepted_only_if_equal(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path)
    edit_tensors(tmp_path, lm_head__weight=model.lm_head_weight.detach().clone())
    assert torch.equal(logits(load(tmp_path)), logits(model))
    edit_tensors(tmp_path, lm_head__weight=model.lm_head_weight.detach() + 1)
    with pytest.raises(InputError, match="lm_head.weight differs from the embedding"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"missing tensors: model\.norm\.weight"),
        ({"model__layers__0__extra": torch.ones(1)}, r"unexpected tensors: model\.layers\.0\.extra"),
        ({"model__norm__weight": torch.ones(31)}, r"model\.norm\.weight is .*\(31,\); expected .*\(32,\)"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int8)}, r"model\.norm\.weight is \S*[iI](nt)?8"),
    ],
)
def test_tensors_must_match(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    tiny_model().save(tmp_path)
    edit_tensors(tmp_path, **changes)
    for read in (load, check):
        with pytest.raises(InputError, match=message):
            read(tmp_path)


def test_heads_must_match(tmp_path: Path) -> None:
    init_random(UNTIED, 0).save(tmp_path)
    with pytest.raises(InputError, match=r"missing tensors: score\.weight; unexpected tensors: lm_head\.weight"):
        load(tmp_path, head="score")
    edit_config(tmp_path, architectures=["Qwen2Model"])
    with pytest.raises(InputError, match=r"\['Qwen2Model'\]; expected \[Qwen2ForCausalLM\]"):
        load(tmp_path)
    tiny_model(head="score").save(tmp_path)
    edit_config(tmp_path, num_labels=2)
    with pytest.raises(InputError, match="2 labels"):
        load(tmp_path)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "none")
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load(tmp_path)
    tiny_model().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        load(tmp_path)
