"""One frozen trunk for every role: what sft, pm and rl train, share, save and write with adapters."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training_stages import PROMPTS, Killed, do, open_run, rows_of, same, weights
from tiny import byte_checkpoint, tiny_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from cai_fast import config, kernels, losses, model, roles
from cai_fast.batching import Example, pack, pack_targets
from cai_fast.errors import InputError
from cai_fast.model import Model, lora
from cai_fast.optim import Optimizer
from cai_fast.pipeline import Context
from cai_fast.stages import pm, rl, sft

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = {
    "lora__rank": 4, "lora__alpha": 8.0, "sft__lr": 1e-2, "pm__lr": 1e-2, "rl__lr": 1e-2, "rl__critic_lr": 1e-2,
    "rl__reward_transform": "none",
}  # fmt: skip
NAMES = ("sl_cai", "pm", "pm_eval", "rl_cai")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Context]:
    """A run with all three stages done."""
    ctx = open_run(tmp_path_factory.mktemp("run") / "run", base, **LORA)
    do(ctx, sft, pm, rl)
    ctx.run.close()
    yield ctx


def another(ctx: Context, folder: Path, base: Path, **changes: Any) -> Context:
    """A run whose stages sft and pm wrote what those of `ctx` did."""
    other = open_run(folder / "run", base, **LORA | changes)
    for stage, names in (("sft", ["sl_cai"]), ("pm", ["pm", "pm_eval"])):
        for name in names:
            shutil.copytree(ctx.checkpoint(name), other.checkpoint(name))
        other.run.begin(stage, {})
        other.run.finish(stage, [f"checkpoints/{name}" for name in names], {})
    return other


def sequences(ctx: Context) -> list[list[int]]:
    return [ctx.renderer("pm").preference(PROMPTS[i].turns, [20 + i, 2]) for i in range(3)]


def hidden(of: Model, ids: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return of(pack(ids))


def bare(of: nn.Module) -> dict[str, Tensor]:
    """The weights that adapters lie on."""
    return {name: t for name, t in of.state_dict().items() if ".lora_" not in name and not name.startswith("score")}


def test_sl_cai_is_the_base_and_its_adapters_after_one_rounding(trained: Context, base: Path) -> None:
    before, merged = model.load(base).state_dict(), weights(trained, "sl_cai")
    adapter = load_file(trained.checkpoint("sl_cai") / "adapter" / lora.WEIGHTS)
    layers = {name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")}
    assert len(adapter) == 2 * len(layers) == 2 * 14
    for name, weight in merged.items():
        path = lora.PREFIX + name.removesuffix(".weight")
        if path not in layers:
            assert torch.equal(weight, before[name]), name
            continue
        a, b = (adapter[f"{path}.lora_{part}.weight"].double() for part in "AB")
        exact = before[name].double() + 2.0 * b @ a  # alpha / rank = 8 / 4
        assert (exact - before[name].double()).abs().max() > 1e-3, "adapters that do nothing prove nothing"
        product = 2.0 * b.abs() @ a.abs()  # of four terms, each of which is rounded in fp32
        assert ((weight.double() - exact).abs() <= exact.abs() * 2**-24 + product * 2**-21).all(), name


def test_checkpoints_name_the_model_below_their_adapters(trained: Context, base: Path) -> None:
    for name in NAMES:
        folder, below = trained.checkpoint(name), "base" if name == "sl_cai" else "sl_cai"
        record = json.loads((folder / "adapter" / roles.TRUNK).read_text())
        assert record == {"sha256": trained.model_hash(below)}
        settings = json.loads((folder / "adapter" / lora.CONFIG).read_text())
        assert settings["base_model_name_or_path"] == (str(base) if below == "base" else "../../sl_cai")
        assert settings["task_type"] == ("SEQ_CLS" if name.startswith("pm") else "CAUSAL_LM")
        assert settings["modules_to_save"] == (["score"] if name.startswith("pm") else None)
        tensors = load_file(folder / "adapter" / lora.WEIGHTS)
        assert (lora.PREFIX + "score.weight" in tensors) == name.startswith("pm")
    outputs = trained.run.record("pm")["outputs"]
    assert {"checkpoints/pm/adapter/adapter_model.safetensors", "checkpoints/pm/adapter/trunk.json"} <= outputs.keys()
    files = trained.run.record("rl")["inputs"]["files"]
    assert files["checkpoints/pm/adapter"] == trained.run.output_hash("checkpoints/pm/adapter")


@pytest.mark.parametrize("role", ["pm", "pm_eval"])
def test_merged_and_unmerged_preference_models_score_alike(trained: Context, role: str) -> None:
    ids, folder = sequences(trained), trained.checkpoint(role)
    unmerged = roles.frozen(trained, role, head="score")
    assert lora.adapters(unmerged) and not any(p.requires_grad for p in unmerged.parameters())
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    longest = max(map(len, ids))
    padded = torch.tensor([t + [theirs.config.pad_token_id] * (longest - len(t)) for t in ids])
    with torch.no_grad():
        scores = losses.scores(unmerged, pack(ids))
        torch.testing.assert_close(losses.scores(model.load(folder), pack(ids)), scores, rtol=1e-4, atol=1e-5)
        mask = (padded != theirs.config.pad_token_id).long()
        torch.testing.assert_close(theirs(padded, attention_mask=mask).logits[:, 0], scores, rtol=1e-4, atol=1e-5)
        before = losses.scores(model.load(trained.checkpoint("sl_cai")).with_score_head(0), pack(ids))
    assert not torch.allclose(scores, before, atol=1e-2)
    bodies = bare(unmerged)
    assert same(bodies, {name: weights(trained, "sl_cai")[name] for name in bodies})


def test_roles_of_one_run_are_drawn_apart(trained: Context) -> None:
    adapters = {name: load_file(trained.checkpoint(name) / "adapter" / lora.WEIGHTS) for name in NAMES}
    start = lora.PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"
    drawn = [tensors[start] for tensors in adapters.values()]
    # Training moves a weight by much less than it was drawn apart from others.
    assert all((a - b).norm() > a.norm() for i, a in enumerate(drawn) for b in drawn[:i])


def test_what_is_trained_is_counted(trained: Context) -> None:
    per_layer = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    summaries = {stage: trained.run.record(stage)["summary"] for stage in ("sft", "pm", "rl")}
    assert summaries["sft"]["trained_parameters"] == summaries["rl"]["trained_parameters"] == 2 * per_layer
    assert summaries["pm"]["pm"]["trained_parameters"] == 2 * per_layer + 32
    whole = sum(t.numel() for t in weights(trained, "sl_cai").values())
    assert summaries["sft"]["parameters"] == whole + 2 * per_layer


def storages(*models: nn.Module) -> dict[int, int]:
    """Bytes by address of everything that the models' parameters lie in."""
    found = [p.untyped_storage() for m in models for p in m.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("critic", ["pm", "own", "detached"])
def test_rl_holds_one_trunk_and_leaves_it_alone(trained: Context, tmp_path: Path, base: Path, critic: str) -> None:
    ctx = another(trained, tmp_path, base, rl__critic=critic, rl__steps=2)
    before = {name: t.clone() for name, t in weights(ctx, "sl_cai").items()}
    ctx.run.begin("rl", rl.inputs(ctx))
    loop = rl.Loop(ctx)
    preference, held_out = loop.sampler.scorer.model, loop.sampler.eval_scorer.model
    models = (loop.policy, loop.reference, loop.trainer.critic.module, preference, held_out)
    adapter = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    critics = 32 if critic == "detached" else adapter + 32
    trunk = sum(t.numel() for t in before.values())
    assert sum(storages(*models).values()) == 4 * (trunk + adapter + 2 * (adapter + 32) + critics)
    assert {n: p.requires_grad for m in models for n, p in m.named_parameters()}["model.norm.weight"] is False
    assert loop.run() is None
    for part in models[:2] if critic == "detached" else models:
        assert all(torch.equal(t, before[name]) for name, t in bare(part).items())
    assert not same(loop.policy.state_dict(), roles.trained(ctx, "sl_cai", head="lm", name="rl").state_dict())
    state = {n: t for n, t in loop.states.newest.latest().tensors.items() if not n.startswith("optimizer.")}
    assert {n for n in state if n.startswith("policy.")} == {
        f"policy.{name}.lora_{part}.weight" for name in lora.adapters(loop.policy) for part in "AB"
    }
    assert sum(t.numel() for t in state.values()) == adapter + critics
    assert set(loop.trainer.optimizer.gradients) == {n for n, p in loop.policy.named_parameters() if p.requires_grad}
    ctx.run.close()


def test_an_algorithm_without_a_critic_holds_none(trained: Context, tmp_path: Path, base: Path) -> None:
    words = {"rl__algorithm": "rloo", "rl__samples_per_prompt": 2, "rl__kl_estimator": "exact", "rl__steps": 2}
    ctx = another(trained, tmp_path, base, **words)
    before = weights(ctx, "sl_cai")
    ctx.run.begin("rl", rl.inputs(ctx))
    loop = rl.Loop(ctx)
    assert loop.trainer.critic is None and loop.run() is None
    for part in (loop.policy, loop.reference):
        assert all(torch.equal(t, before[name]) for name, t in bare(part).items()), "the trunk is the reference"
    state = loop.states.newest.latest().tensors
    assert state and not any("critic" in name for name in state)
    assert rows_of(ctx, "rl")[1]["rl/kl_loss"] > 0 and "rl/value_loss" not in rows_of(ctx, "rl")[1]
    ctx.run.close()


def test_a_critic_from_the_preference_model_starts_with_its_scores(
    trained: Context, tmp_path: Path, base: Path
) -> None:
    ctx = another(trained, tmp_path, base, rl__reward_transform="standardise")
    ctx.run.begin("rl", rl.inputs(ctx))
    loop, ids = rl.Loop(ctx), sequences(ctx)
    scores = loop.sampler.scorer.scores(ids, range(len(ids)))
    batch = pack_targets([Example(str(i), tokens, [0]) for i, tokens in enumerate(ids)])
    with torch.no_grad():
        values = loop.trainer.critic(batch, torch.zeros(len(ids), 32))
    assert loop.extra["deviation"] != 1 and torch.equal(values, (scores - loop.extra["mean"]) / loop.extra["deviation"])
    assert all(
        p.requires_grad == (".lora_" in n or n == "score.weight")
        for n, p in loop.trainer.critic.module.named_parameters()
    )
    ctx.run.close()


def test_the_reference_is_sl_cai_and_so_is_the_first_policy(trained: Context, tmp_path: Path, base: Path) -> None:
    ctx = another(trained, tmp_path, base)
    ctx.run.begin("rl", rl.inputs(ctx))
    loop, ids = rl.Loop(ctx), sequences(ctx)
    expected = hidden(model.load(ctx.checkpoint("sl_cai")), ids)
    assert torch.equal(hidden(loop.reference, ids), expected) and torch.equal(hidden(loop.policy, ids), expected)
    answers = loop.sampler.answer(loop.sampler.items(0), "rl", 0)
    for layer in lora.adapters(loop.policy).values():
        nn.init.normal_(layer.lora_B.weight, std=0.3)
    assert torch.equal(hidden(loop.reference, ids), expected) and not torch.allclose(hidden(loop.policy, ids), expected)
    rollouts = loop.trainer.measure(answers.examples(loop.renderer), 0)
    policy, reference = lora.merge(loop.policy), model.load(ctx.checkpoint("sl_cai"))
    for b in rollouts.bins:
        states = [m(b.batch.packed).detach()[b.batch.rows] for m in (policy, reference)]
        heads = [m.lm_head_weight.detach() for m in (policy, reference)]
        both = kernels.linear_kl(states[0], heads[0], states[1], heads[1], b.batch.targets)
        torch.testing.assert_close(b.k1, both.logprob - both.ref_logprob, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(b.kl, both.kl, rtol=1e-3, atol=1e-5)
    assert rollouts.kl.mean() > 0.01
    after = loop.sampler.answer(loop.sampler.items(0), "rl", 0)
    assert [c.token_ids for c in after.completions] != [c.token_ids for c in answers.completions], "old weights sampled"
    ctx.run.close()


def test_rl_refuses_adapters_of_another_trunk(trained: Context, tmp_path: Path, base: Path) -> None:
    ctx = another(trained, tmp_path, base)
    file = ctx.checkpoint("sl_cai") / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t + 1e-3 for n, t in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"pm.adapter: expected adapters of .*sl_cai.* --restart-from pm"):
        rl.Loop(ctx)
    ctx.run.close()


def test_killed_and_resumed_stages_give_the_same_bits(
    trained: Context, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, call in (("sft_loss", 5), ("preference_loss", 11), ("policy_loss", 11)):
        real, calls = getattr(losses, name), iter(range(10**6))

        def dying(*args: Any, real: Any = real, calls: Any = calls, call: int = call, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(losses, name, dying)
        ctx = open_run(tmp_path / "run", base, sft__save_every=1, **LORA)
        with pytest.raises(Killed):
            do(ctx, sft, pm, rl)
        ctx.run.close()
        monkeypatch.undo()
    ctx = open_run(tmp_path / "run", base, sft__save_every=1, **LORA)
    do(ctx, sft, pm, rl)
    ctx.run.close()
    for name in NAMES:
        files = [path for path in trained.checkpoint(name).rglob("*") if path.is_file()]
        files.remove(trained.checkpoint(name) / "README.md")  # it names the inputs, which are in another folder
        assert len(files) > 5
        for path in files:
            copy = ctx.checkpoint(name) / path.relative_to(trained.checkpoint(name))
            assert copy.read_bytes() == path.read_bytes(), copy
    assert ctx.run.path("rollouts.jsonl").read_bytes() == trained.run.path("rollouts.jsonl").read_bytes()
    losses_of = [[row.get("rl/policy_loss") for row in rows_of(c, "rl")] for c in (ctx, trained)]
    assert losses_of[0] == losses_of[1]


@pytest.mark.parametrize(("setting", "value"), [("guards__max_kl", 1e-9), ("rl__lr", 1e30)])
def test_a_guard_leaves_sl_cai(trained: Context, tmp_path: Path, base: Path, setting: str, value: float) -> None:
    ctx = another(trained, tmp_path, base, rl__save_every=0, **{setting: value})
    do(ctx, rl)
    ctx.run.close()
    assert ctx.run.record("rl")["summary"]["guard"]
    assert same(weights(ctx, "rl_cai"), weights(trained, "sl_cai"))
    adapter = load_file(ctx.checkpoint("rl_cai") / "adapter" / lora.WEIGHTS)
    assert all(not t.any() for name, t in adapter.items() if ".lora_B." in name)


def test_bf16_sums_no_gradient_of_the_frozen_head(trained: Context, tmp_path: Path, base: Path) -> None:
    ctx = open_run(tmp_path / "run", base, **LORA | {"model__dtype": "bfloat16", "pm__epochs": 1, "rl__steps": 1})
    do(ctx, sft, pm)
    ctx.run.begin("rl", rl.inputs(ctx))
    loop = rl.Loop(ctx)
    assert loop.run() is None
    assert not hasattr(loop.policy.lm_head_weight, "main_grad")
    assert {t.dtype for t in loop.policy.parameters()} == {torch.bfloat16}
    assert len(loop.trainer.optimizer.state_dict()) == 4 * 2 * 14, (
        "moments, remainder, step of every adapter's two weights"
    )
    ctx.run.close()


def operations(of: Model, policy: bool) -> float:
    """Floating-point operations of one training step a token and weight."""
    torch.manual_seed(0)
    ids = torch.randint(64, (4, 33)).tolist()
    batch = pack_targets([Example(str(i), tokens[:1], tokens[1:]) for i, tokens in enumerate(ids)])
    old, advantage = torch.zeros(128), torch.ones(128)

    def loss(states: Tensor, weight: Tensor) -> Tensor:
        rows = states.index_select(0, batch.rows)
        if policy:
            return kernels.linear_policy_loss(rows, weight, batch.targets, old, advantage).loss
        return kernels.linear_cross_entropy(rows, weight, batch.targets)

    with FlopCounterMode(display=False) as counter:
        value = of(batch.packed, loss=loss)
        held = value.grad_fn.saved_tensors[1]
        value.backward()
    assert (held is None) == (not of.lm_head_weight.requires_grad), "a gradient of a frozen head was formed"
    weights_used = sum(p.numel() for n, p in of.named_parameters() if p.ndim == 2 and ".lora_" not in n)
    return counter.get_total_flops() / (128 * weights_used)


@pytest.mark.parametrize("policy", [False, True])
def test_nothing_is_spent_on_gradients_of_frozen_weights(policy: bool) -> None:
    whole, adapted = tiny_model(), tiny_model()
    lora.add_adapters(adapted, 1, 2.0, lora.TARGETS, 0)
    small = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    share = small / sum(p.numel() for n, p in whole.named_parameters() if p.ndim == 2)
    spent, attention = operations(adapted, policy), operations(whole, policy) - 6
    assert 0 <= attention < 1
    assert spent < 4 + attention + 6 * share + 0.01
    optimizer = Optimizer.adamw(adapted.named_parameters(), 1e-3, head=adapted.lm_head_weight)
    optimizer.step()
    assert all(".lora_" in name for name in optimizer.gradients) and len(optimizer.gradients) == 28
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)


@pytest.mark.parametrize(("words", "message"), [
    (["--pm.init", "other"], r"pm.init = 'other': with lora.rank > 0 .* Leave pm.init out"),
    (["--lora.targets", "q_proj,lm_head"], r"lora.targets must be some of q_proj, .* Got \['q_proj', 'lm_head'\]"),
    (["--lora.targets", "[]"], "lora.targets must be some of"),
    (["--lora.alpha", "0"], "lora.alpha = 0 would train nothing"),
])  # fmt: skip
def test_bad_settings_are_refused_before_any_work(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config.load(["--lora.rank", "4", *words])


def test_adapters_may_be_on_some_layers_only(tmp_path: Path, base: Path) -> None:
    ctx = open_run(tmp_path / "run", base, **LORA | {"lora__targets": "q_proj,v_proj"})
    do(ctx, sft)
    ctx.run.close()
    settings = json.loads((ctx.checkpoint("sl_cai") / "adapter" / lora.CONFIG).read_text())
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    before, after = model.load(base).state_dict(), weights(ctx, "sl_cai")
    changed = {name.split(".")[-2] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj"}
    assert math.isfinite(rows_of(ctx, "sft")[-1]["sft/loss"])


def test_a_shared_model_takes_the_others_weights_and_freezes_them() -> None:
    first = tiny_model()
    second, third = first.shared(), first.with_score_head(3, share=True)
    assert second.lm_head_weight is first.lm_head_weight and third.model.norm.weight is first.model.norm.weight
    assert not any(p.requires_grad for m in (first, second, third) for p in m.parameters())
    assert torch.equal(third.score.weight, first.with_score_head(3).score.weight)
    lora.add_adapters(second, 2, 4.0, ["q_proj"], 0)
    assert not lora.adapters(first) and not lora.adapters(third)
