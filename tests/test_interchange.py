"""Checkpoints between this program and transformers: shards in both directions, and the memory that loading takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cai_fast.errors import InputError
from cai_fast.model import Model, ModelConfig, check, hf, init_random, load
from tests.test_model_hf import SEQS, UNTIED, logits
from tests.tiny import CONFIG

_READ = """
import sys
from pathlib import Path
import torch
from cai_fast.model import check, load

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

check(sys.argv[1])  # what is imported on first use does not count
for folder, what in (argument.split("=") for argument in sys.argv[2:]):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = kilobytes("VmRSS:")
    kept = check(folder) if what == "check" else load(folder, dtype=getattr(torch, what))
    print(1024 * (kilobytes("VmHWM:") - kilobytes("VmRSS:")), 1024 * (kilobytes("VmRSS:") - before))
    del kept
"""
LLAMA_1B = ModelConfig.from_hf(
    {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }
)  # fmt: skip
SMALL = LLAMA_1B.replace(vocab_size=16000, hidden_size=512, intermediate_size=2048, num_layers=8, num_heads=8)


def memory(*reads: tuple[Path, str]) -> list[tuple[int, int]]:
    """Per (folder, dtype or "check"): (peak minus final, final minus initial) resident bytes, mapped pages included."""
    return_freed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what one read frees is not there for the next
    arguments = [f"{folder}={what}" for folder, what in reads]
    command = [sys.executable, "-c", _READ, str(reads[0][0]), *arguments]
    root = Path(hf.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True, env=return_freed)
    return [(int(over), int(kept)) for over, kept in map(str.split, done.stdout.splitlines())]


def write_shards(config: ModelConfig, folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """A random bfloat16 checkpoint in files of at most `size` bytes: (bytes of the largest, of all)."""
    monkeypatch.setattr(hf, "SHARD_BYTES", size)
    init_random(config, 0, dtype=torch.bfloat16).save(folder)
    sizes = [file.stat().st_size for file in folder.glob("model-*.safetensors")]
    assert len(sizes) >= 3
    return max(sizes), sum(sizes)


def bounded(folder: Path, largest: int, whole: int) -> None:
    """Reading holds at most one file beside the model, in its own dtype or widened; `check` reads no weights."""
    checked, half, wide = memory((folder, "check"), (folder, "bfloat16"), (folder, "float32"))
    assert sum(checked) < 0.05 * whole, "only headers are read"
    assert half[1] >= 0.95 * whole and wide[1] >= 1.95 * whole, "the model is in memory"
    assert max(half[0], wide[0]) <= 1.3 * largest, f"{half}, {wide} bytes, largest file {largest}"


def test_loading_holds_one_file_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded(tmp_path / "m", *write_shards(SMALL, tmp_path / "m", 25_000_000, monkeypatch))


@pytest.mark.slow
def test_loading_a_model_of_a_billion_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded(tmp_path / "m", *write_shards(LLAMA_1B, tmp_path / "m", 900_000_000, monkeypatch))


def test_a_redundant_tied_head_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(SMALL, tmp_path, 25_000_000, monkeypatch)
    file = tmp_path / "model-00001-of-00004.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, file)
    edit_index(tmp_path, {"lm_head.weight": file.name})
    [(over, _)] = memory((tmp_path, "float32"))
    assert over <= 1.3 * file.stat().st_size, "no widened copy of the head, and the file is not kept open"
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, file)
    with pytest.raises(InputError, match="lm_head.weight differs from the embedding"):
        load(tmp_path)


def edit_index(folder: Path, names: dict[str, str]) -> None:
    index = json.loads((folder / hf.INDEX).read_text())
    index["weight_map"] |= names
    (folder / hf.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_our_shards_are_theirs(config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    model = init_random(config, 3, std=0.2)
    model.save(tmp_path / "m")
    model.with_score_head(5).save(tmp_path / "pm", extra_config={"pad_token_id": 0})
    for name, kind in (("m", "ForCausalLM"), ("pm", "ForSequenceClassification")):
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 2
        auto = getattr(transformers, "AutoModel" + kind)
        theirs, report = auto.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report.values())
        ours = load(tmp_path / name).state_dict()
        assert set(theirs.state_dict()) - {"lm_head.weight"} == set(ours) - {"lm_head.weight"}
        assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("tied", [True, False])
def test_their_shards_are_ours(tied: bool, tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=tied)).eval()
    theirs.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    pm = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**shape, num_labels=1)).eval()
    pm.save_pretrained(tmp_path / "pm", max_shard_size="20KB")
    for name in ("m", "pm"):
        assert (tmp_path / name / hf.INDEX).is_file()
        assert check(tmp_path / name).head == load(tmp_path / name).head == ("lm" if name == "m" else "score")
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([s])).logits[0] for s in SEQS])
        assert (logits(load(tmp_path / "m")) - expected).abs().max() <= 1e-5 * expected.abs().max()
        ids = torch.tensor([SEQS[0]])
        ours: Model = load(tmp_path / "pm")
        hidden = ours.hidden(ids[0], torch.arange(5), torch.tensor([0, 5], dtype=torch.int32))
        assert torch.allclose(ours.score(hidden[-1:]), pm(ids).logits[0], atol=1e-6)


def test_extra_files_are_part_of_the_folder(tmp_path: Path) -> None:
    init_random(CONFIG, 0).save(tmp_path / "a", extra_files={"NOTICE": "first", "README.md": "é"})
    load(tmp_path / "a").save(tmp_path / "b", extra_files={"NOTICE": "second"})
    assert (tmp_path / "a" / "README.md").read_text(encoding="utf-8") == "é"
    assert (tmp_path / "b" / "NOTICE").read_text() == "second" and not (tmp_path / "b" / "README.md").exists()
