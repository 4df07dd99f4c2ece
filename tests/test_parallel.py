"""FSDP2 on two gloo ranks: steps of every trained role equal one process; loading, gathering and replicas are exact."""

import json
from pathlib import Path

import pytest
import sharded
import torch
from tiny import relative_difference

from cai_fast.model import load

pytestmark = pytest.mark.distributed
STEPS = ["sft", "pm", "ppo", "ppo_detached", "rloo", "dpo", "adapters"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """(folder of what one and two ranks made of the same models, whether the embedding is the output head)."""
    folder, tied = tmp_path_factory.mktemp("sharded"), request.param
    sharded.write_models(folder, tied)
    sharded.run(folder, [*STEPS, "stopped"], 1)
    sharded.run(folder, [*STEPS, "stopped", "continued", "half", "fault", "facts"], 2)
    sharded.run(folder, ["continued"], 1)
    return folder, tied


def lines(folder: Path, name: str, world: int) -> list[dict[str, float]]:
    rows = (folder / f"metrics.{name}.{world}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(row).items() if k.startswith(name)} for row in rows]


@pytest.mark.parametrize("name", [*(f"{name}.model" for name in STEPS), "ppo.critic"])
def test_steps_of_every_role_equal_one_process(results: tuple[Path, bool], name: str) -> None:
    folder, tied = results
    one, two = (sharded.weights(folder, f"{name}.{world}") for world in (1, 2))
    assert relative_difference(two, one) <= 1e-5
    assert ("lm_head.weight" in one) == (not tied and name not in ("pm.model", "ppo.critic"))
    start = sharded.weights(folder, "lm")
    moved = {n: t for n, t in one.items() if n in start}
    assert relative_difference(moved, {n: start[n] for n in moved}) > 1e-3, "nothing was trained"


@pytest.mark.parametrize("world", [1, 2])
def test_training_continues_on_another_number_of_ranks(results: tuple[Path, bool], world: int) -> None:
    folder, _ = results
    whole, half, done = (
        sharded.weights(folder, name)
        for name in ("sft.model.1", f"stopped.model.{3 - world}", f"continued.model.{world}")
    )
    assert relative_difference(half, whole) > 1e-3, "the signal came too late"
    assert relative_difference(done, whole) <= 1e-5


@pytest.mark.parametrize("name", ["sft", "pm", "rl"])
def test_metrics_equal_those_of_one_process(results: tuple[Path, bool], name: str) -> None:
    one, two = (lines(results[0], name, world) for world in (1, 2))
    assert len(one) > 3
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("critic", ["own", "detached", "rloo"])
def test_ppo_statistics_equal_those_of_one_process(results: tuple[Path, bool], critic: str) -> None:
    one, two = (json.loads((results[0] / f"ppo.{critic}.{world}.json").read_text()) for world in (1, 2))
    assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    assert one["0.first_ratio_gap"] == two["0.first_ratio_gap"] == 0, "the ratio must start at one exactly"


def test_a_state_in_bf16_holds_the_exact_weights(results: tuple[Path, bool]) -> None:
    for rank in (0, 1):
        assert json.loads((results[0] / f"half.{rank}.json").read_text()) == [["torch.float32"], True]


def test_a_stale_replica_is_noticed_and_named(results: tuple[Path, bool]) -> None:
    folder, _ = results
    for rank in (0, 1):
        assert "model.layers.1.mlp.up_proj.weight" in (folder / f"fault.{rank}").read_text()
    expected, gathered = load(folder / "lm").state_dict(), sharded.weights(folder, "fault.model.2")
    expected["model.layers.1.mlp.up_proj.weight"].mul_(2.0)
    assert all(torch.equal(gathered[name], tensor) for name, tensor in expected.items())


def test_what_is_easily_lost_in_a_sharded_model_holds(results: tuple[Path, bool]) -> None:
    folder, tied = results
    for rank in (0, 1):
        seen = json.loads((folder / f"facts.{rank}.json").read_text())
        assert seen["in the forward"] == ["torch.bfloat16", "torch.bfloat16", "Parameter", [sharded.V, 32]]
        assert seen["layers after a forward"] == ["DTensor"], "every layer is given back after its turn"
        assert seen["gradients"] == seen["state"] == ["DTensor torch.float32"]
        assert seen["recomputed alike"] == [True, True, True]
        assert seen["parameters"] == [35 if tied else 36, tied]
        assert seen["norm"] == "Tensor" and seen["clipped"] == pytest.approx(1.0, rel=1e-3)
        assert "DTensor" in seen["without forward"]
