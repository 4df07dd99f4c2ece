"""All stages with adapters, by the command line: everything that the loop promises without them, and their files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import textworld
import torch
from test_text_loop import (  # noqa: F401 they run here on this module's `run`
    STAGES,
    summary,
    test_counts_add_up,
    test_evaluation_has_the_contracts_shape,
    test_every_file_is_there_and_the_folder_is_private,
    test_metrics_carry_the_contracts_names,
    test_policies_load_in_transformers_with_equal_logits,
    test_preference_models_load_in_transformers_with_equal_scores,
    test_provenance_of_every_generated_row,
    test_provenance_of_measured_answers,
    test_records_parse_and_refer_to_each_other,
    test_tokens_belong_to_their_texts,
)

from cai_fast import model
from cai_fast.hashing import hash_model
from cai_fast.model import lora

SETTINGS = {"lora__rank": 4, "sft__lr": 1e-2, "pm__lr": 1e-2, "rl__lr": 1e-3, "rl__critic": "own"}
NAMES = {"sl_cai": "lm", "pm": "score", "pm_eval": "score", "rl_cai": "lm"}


def words(inputs: Path, folder: Path, **changes: object) -> list[str]:
    return textworld.arguments(inputs, folder, evaluate__hhh=inputs / "hhh.jsonl", **SETTINGS | changes)


@pytest.fixture(scope="module")
def inputs(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return build_once("text_inputs", textworld.build)


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after every stage; rl is asked for only when all stages before it have ended."""
    folder = tmp_path_factory.mktemp("loop") / "run"
    for stages in (STAGES[: STAGES.index("rl")], STAGES):
        assert textworld.main([*words(inputs, folder), "--stages", ",".join(stages)]) == 0
    return folder


def test_every_merged_model_is_the_one_below_with_its_adapter(run: Path, inputs: Path) -> None:
    for name, head in NAMES.items():
        folder = run / "checkpoints" / name
        below = inputs / "base" if name == "sl_cai" else run / "checkpoints" / "sl_cai"
        assert json.loads((folder / "adapter" / "trunk.json").read_text()) == {"sha256": hash_model(below)}
        adapted, merged = model.load(below), model.load(folder)
        adapted = adapted if head == "lm" else adapted.with_score_head(0)
        lora.load_adapters(adapted, folder / "adapter")
        ids, cu = torch.arange(40), torch.tensor([0, 40], dtype=torch.int32)
        with torch.no_grad():
            got, expected, plain = (m.hidden(ids, ids, cu) for m in (merged, adapted, model.load(below)))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-4), f"{name} was not trained"
        if head == "score":
            assert torch.equal(merged.score.weight, adapted.score.weight)


def test_adapters_are_small_and_counted(run: Path, inputs: Path) -> None:
    for name in NAMES:
        files = {p.name: p.stat().st_size for p in (run / "checkpoints" / name / "adapter").iterdir()}
        assert files.keys() == {lora.CONFIG, lora.WEIGHTS, "trunk.json"}
        made = summary(run, {"sl_cai": "sft", "rl_cai": "rl"}.get(name, "pm"))
        trained = made.get(name, made)["trained_parameters"]
        assert 4 * trained < files[lora.WEIGHTS] < 4 * trained + 8192


def test_the_same_command_again_does_nothing_and_another_rank_is_refused(
    run: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = textworld.results(run)
    assert textworld.main(words(inputs, run)) == 0
    assert textworld.results(run) == before
    assert textworld.main(words(inputs, run, lora__rank=8)) == 2
    assert "lora.rank: 4 -> 8" in capsys.readouterr().err
