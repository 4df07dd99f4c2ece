"""What a rank of a test trains with sharded models, and one process with whole ones, from the same checkpoint."""

import itertools
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

from cai_fast import distributed, fit, kernels, losses, parallel
from cai_fast.batching import Example, pack, pack_targets
from cai_fast.checkpoint import Checkpoints
from cai_fast.config_sections import RlConfig
from cai_fast.distributed import Distributed
from cai_fast.dpo import STATS
from cai_fast.fit import FitSettings, Task
from cai_fast.model import Model, ModelConfig, ScalarHead, init_random, load, lora
from cai_fast.model.recompute import KINDS
from cai_fast.optim import Optimizer
from cai_fast.policy_gradient import Critic, PolicyGradient
from cai_fast.runlog import RunLog

SETTINGS = FitSettings(
    seed=1, epochs=2, batch_size=60, micro_tokens=40, lr=3e-3, schedule="linear", warmup_steps=2, weight_decay=0.01,
    max_grad_norm=1.0, save_every=0,
)  # fmt: skip
RL = RlConfig(
    steps=10, prompts_per_step=8, epochs=2, minibatches=2, lr=1e-3, critic_lr=1e-3, kl_coef=0.1, micro_tokens=40,
)  # fmt: skip
RLOO = RlConfig(
    algorithm="rloo", samples_per_prompt=3, kl_estimator="exact", steps=10, prompts_per_step=8, epochs=2, minibatches=2,
    lr=1e-3, kl_coef=0.1, micro_tokens=40,
)  # fmt: skip
GROUPS = [0] * 5 + [1] * 6 + [2] * 6 + [3] * 4 + [4] * 3  # of the examples; the third ends where a rank's share does
V = 61  # a vocabulary that two ranks cannot share evenly


def config(tied: bool = True) -> ModelConfig:
    return ModelConfig(V, 32, 48, 3, 4, 2, 8, qk_norm=True, model_type="qwen3", tie_word_embeddings=tied)


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(3, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


EXAMPLES = [Example(str(i), [1, *tokens(i, i % 7)], [*tokens(100 + i, 1 + i % 5), 2]) for i in range(24)]


def write_models(folder: Path, tied: bool = True) -> None:
    """A language model and a preference model."""
    for name, head, seed in (("lm", "lm", 1), ("pm", "score", 2)):
        init_random(config(tied), seed, head=head, std=0.2).save(folder / name)


def trained(folder: Path, dist: Distributed, head: str, new_head: int | None = None) -> Model:
    """The model of a folder, sharded if there are several ranks."""
    prepare = None if dist.world == 1 else lambda model: parallel.shard(model, dist, torch.float32)
    return load(folder, head=head, new_head=new_head, prepare=prepare)


def sft(folder: Path, dist: Distributed, state: str = "", stop: int = 0, rank: int = 0) -> dict[str, Model]:
    """Several steps of supervised fine-tuning; state: name of the folder of states; stop: in this micro-batch; rank: of
    adapters, which are trained instead of the weights."""
    model = load(folder / "lm") if rank else trained(folder / "lm", dist, "lm")
    if rank:
        lora.add_adapters(model, rank, 2.0 * rank, lora.TARGETS, 0)
    passes = itertools.count(1)

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        if next(passes) == stop and dist.rank == dist.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses.sft_loss(model, pack_targets([EXAMPLES[i] for i in items]), scale)

    lengths = [e.tokens for e in EXAMPLES]
    task = Task("sft", lengths, [len(e.target_ids) for e in EXAMPLES], loss, lengths)
    try:
        _fit(model, task, folder, dist, state)
    except distributed.Stopped:
        assert stop
    return {"model": lora.merge(model) if rank else model}


def adapters(folder: Path, dist: Distributed) -> dict[str, Model]:
    """Fine-tuning of adapters, replicated on all ranks."""
    return sft(folder, dist, f"adapters.{dist.world}", rank=4)


def stopped(folder: Path, dist: Distributed) -> dict[str, Model]:
    """Training that a signal to the last rank stops."""
    distributed.install_signal_handlers()
    try:
        return sft(folder, dist, f"begun.{dist.world}", stop=3)
    finally:
        distributed.install_signal_handlers()  # forgets the signal
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def continued(folder: Path, dist: Distributed) -> dict[str, Model]:
    """Training that goes on from what the other number of ranks has left."""
    return sft(folder, dist, f"begun.{3 - dist.world}")


def pm(folder: Path, dist: Distributed) -> dict[str, Model]:
    """Several steps of a preference model with a fresh head on the language model."""
    model = trained(folder / "lm", dist, "score", new_head=3)

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        packed = pack([ids for i in items for ids in (tokens(i, 3 + i % 9), tokens(50 + i, 2 + i % 4))])
        prob_a = torch.tensor([(i % 5) / 4 for i in items])
        return losses.preference_loss(model, packed, prob_a, torch.ones(len(items)), scale)

    task = Task("pm", [5 + i % 13 for i in range(24)], [1.0] * 24, loss, [6.0] * 24, ("loss", "accuracy", "margin"))
    _fit(model, task, folder, dist)
    return {"model": model}


def _fit(model: Model, task: Task, folder: Path, dist: Distributed, state: str = "") -> None:
    log = RunLog(folder / f"metrics{state}.{task.name}.{dist.world}.jsonl", dist.is_main)
    state_dir = folder / (state or f"state.{task.name}.{dist.world}")
    fit.fit(model, task, SETTINGS, stage=task.name, state_dir=state_dir, log=log, dist=dist)


def ppo(folder: Path, dist: Distributed, critic: str = "own", rl: RlConfig = RL) -> dict[str, Model]:
    """Two iterations of PPO, or of RLOO, without a critic; with several ranks, of unequal shares."""
    policy = trained(folder / "lm", dist, "lm")
    reference = trained(folder / "lm", dist, "lm").requires_grad_(False)
    value = ScalarHead(32) if critic == "detached" else trained(folder / "pm", dist, "score")
    network = Critic(value) if rl.network else None
    trainer = PolicyGradient(policy, reference, network, rl, seed=0, dist=dist)
    bounds = [0, 24] if dist.world == 1 else [0, 17, 24]
    mine = slice(bounds[dist.rank], bounds[dist.rank + 1])
    values = {}
    for step in range(2):
        rollouts = trainer.measure(EXAMPLES[mine], step, mine.start, len(EXAMPLES))
        values |= {
            f"advantages.{k}": v for k, v in trainer.set_advantages(rollouts, SCORES[mine], GROUPS[mine]).items()
        }
        values |= {f"{step}.{k}": v for k, v in trainer.update(rollouts, 1.0).items()}
        values |= {f"{step}.kl": float(dist.all_reduce(rollouts.kl.sum()))}
    if dist.is_main:
        (folder / f"ppo.{critic}.{dist.world}.json").write_text(json.dumps(values))
    return {"model": policy, "critic": value} if critic == "own" else {"model": policy}


def ppo_detached(folder: Path, dist: Distributed) -> dict[str, Model]:
    """PPO with a value head on the policy's hidden states."""
    return ppo(folder, dist, "detached")


def rloo(folder: Path, dist: Distributed) -> dict[str, Model]:
    """RLOO with the exact divergence in the loss, for which the reference passes beside the policy."""
    return ppo(folder, dist, "rloo", RLOO)


def dpo(folder: Path, dist: Distributed) -> dict[str, Model]:
    """Several steps of DPO."""
    model = trained(folder / "lm", dist, "lm")
    pairs = [(EXAMPLES[i], EXAMPLES[(i + 5) % 24]) for i in range(24)]

    def loss(items: list[int], scale: float) -> tuple[Tensor, losses.Stats]:
        batch = pack_targets([e for i in items for e in pairs[i]])
        before = torch.tensor([[-2.0 - i % 3, -3.0] for i in items])
        prob_a = torch.tensor([(i % 5) / 4 for i in items])
        return losses.dpo_loss(model, batch, before, prob_a, torch.ones(len(items)), 0.3, scale)

    task = Task("rl", [a.tokens + b.tokens for a, b in pairs], [1.0] * 24, loss, [6.0] * 24, STATS)
    _fit(model, task, folder, dist)
    return {"model": model}


def half(folder: Path, dist: Distributed) -> dict[str, Model]:
    """A state of PPO in bf16, saved after a measurement and loaded again: the exact fp32 weights, or an error."""

    def sharded(name: str) -> Model:
        return load(folder / name, prepare=lambda model: parallel.shard(model, dist, torch.bfloat16))

    saved: list[dict[str, Tensor]] = []
    for attempt in range(2):
        trainer = PolicyGradient(
            sharded("lm"), sharded("lm").requires_grad_(False), Critic(sharded("pm")), RL, seed=0, dist=dist
        )
        with Checkpoints(folder / "half", dist) as states:
            if attempt:
                trainer.restore(states, states.latest())
            else:
                rollouts = trainer.measure(EXAMPLES[dist.rank :: 2], 0, dist.rank * 12, len(EXAMPLES))
                trainer.set_advantages(rollouts, SCORES[dist.rank :: 2])
                trainer.update(rollouts, 1.0)
                trainer.measure(EXAMPLES[dist.rank :: 2], 1, dist.rank * 12, len(EXAMPLES))
                trainer.save(states, 1, {})
        parts = {"policy": trainer.policy, "critic": trainer.critic.module}
        saved.append({f"{n}.{k}": p.full_tensor() for n, m in parts.items() for k, p in m.named_parameters()})
    types = sorted({str(tensor.dtype) for tensors in saved for tensor in tensors.values()})
    alike = all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
    (folder / f"half.{dist.rank}.json").write_text(json.dumps([types, alike]))
    return {"model": trainer.policy}


def fault(folder: Path, dist: Distributed) -> dict[str, Model]:
    """A replica that has missed an update must be noticed; one that is refreshed is right."""
    model = trained(folder / "lm", dist, "lm")
    replica = parallel.Replica(model, torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2.0)
    try:
        replica.check()
        found = "nothing"
    except RuntimeError as error:
        found = str(error)
    replica.refresh()
    (folder / f"fault.{dist.rank}").write_text(found)
    return {"model": model}


def facts(folder: Path, dist: Distributed) -> dict[str, Model]:
    """What must hold of a sharded model, each a fact that is easily lost without any error."""
    batch = pack_targets(EXAMPLES[dist.rank :: 2])
    seen: dict[str, object] = {}

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        seen["in the forward"] = [str(hidden.dtype), str(weight.dtype), type(weight).__name__, list(weight.shape)]
        rows = hidden.index_select(0, batch.rows)
        return kernels.linear_cross_entropy(rows, weight, batch.targets, weights=batch.weights, scale=0.01)

    def shard(model: Model) -> Model:
        return parallel.shard(model, dist, torch.bfloat16)

    grads: dict[str, dict[str, Tensor]] = {}
    for kind in KINDS:
        model = load(folder / "lm", prepare=shard)
        for block in model.model.layers:
            block.recompute = kind
        value = model(batch.packed, loss=loss)
        blocks = [type(p).__name__ for p in model.model.layers.parameters()]
        value.backward()
        grads[kind] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    seen["layers after a forward"] = sorted(set(blocks))
    seen["gradients"] = sorted({f"{type(p.grad).__name__} {p.grad.dtype}" for p in model.parameters()})
    seen["recomputed alike"] = [all(torch.equal(g, grads["none"][n]) for n, g in grads[k].items()) for k in KINDS]
    seen["parameters"] = [len(list(model.parameters())), model.lm_head_weight is model.model.embed_tokens.weight]
    optimizer = Optimizer.adamw(model.named_parameters(), 1e-3)
    seen["norm"] = type(optimizer.clip(1.0)).__name__
    clipped = torch.stack([p.grad.full_tensor().square().sum() for p in model.parameters()]).sum().sqrt()
    seen["clipped"] = float(clipped)
    optimizer.step()
    seen["state"] = sorted({f"{type(t).__name__} {t.dtype}" for t in optimizer.state_dict().values() if t.ndim})
    try:
        model.hidden(batch.packed.token_ids, batch.packed.positions, batch.packed.cu_seqlens)
        seen["without forward"] = "nothing"
    except RuntimeError as error:
        seen["without forward"] = str(error)
    (folder / f"facts.{dist.rank}.json").write_text(json.dumps(seen))
    return {"model": model}


SCORES = torch.linspace(-1, 1, len(EXAMPLES))
Work = Callable[[Path, Distributed], dict[str, Model]]


def _rank(rank: int, names: list[str], folder: Path, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist = distributed.init("cpu")
    for name in names:
        for part, model in globals()[name](folder, dist).items():
            whole = parallel.gather(model, torch.float32) if world > 1 else model
            if dist.is_main:
                whole.save(folder / f"{name}.{part}.{world}")
    dist.barrier()
    distributed.shutdown()


def run(folder: Path, names: list[str], world: int = 2) -> None:
    """Do the functions of this file that `names` says, on `world` gloo ranks, and save the models they give."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if world == 1:
        alone = Distributed(0, 1, torch.device("cpu"))
        for name in names:
            for part, model in globals()[name](folder, alone).items():
                model.save(folder / f"{name}.{part}.1")
    else:
        mp.spawn(_rank, (names, folder, world, port), nprocs=world)


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a saved model."""
    return load_file(folder / name / "model.safetensors")
