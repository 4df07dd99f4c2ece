"""Two FSDP2 ranks on the CPU: the fused losses run inside the sharded root forward and agree with one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cai_fast.kernels import linear_cross_entropy, linear_policy_loss
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from cai_fast.batching import Packed, pack
from cai_fast.model import Model, ModelConfig, init_random
from tests.tiny import gradients, relative_difference

V, WORLD = 61, 2  # a vocabulary that two ranks cannot share evenly
SEQS = [[(7 * i + j * j) % V for j in range(n)] for i, n in enumerate((9, 30, 17, 4, 40))]
Loss = Callable[[Tensor, Tensor], Tensor]


def model(tied: bool) -> Model:
    config = ModelConfig(V, 32, 48, 2, 4, 2, 8, qk_norm=True, model_type="qwen3", tie_word_embeddings=tied)
    return init_random(config, 1, std=0.2)


def losses(batch: Packed, first: int, scale: float) -> dict[str, Loss]:
    """Both losses of a batch whose tokens start at row `first` of the whole one."""
    targets = torch.roll(batch.token_ids, -1)
    rows = torch.arange(first, first + targets.shape[0], dtype=torch.float32)
    old, advantage = -4 + (rows * 1.7).sin(), (rows * 0.9).cos()

    def policy(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"ref_logprob": old + 0.1, "kl_coef": 0.3, "scale": scale}
        return linear_policy_loss(hidden, weight, targets, old, advantage, **options).loss

    return {"sft": lambda h, w: linear_cross_entropy(h, w, targets, scale=scale), "policy": policy}


def halves() -> list[tuple[int, Packed]]:
    """(first row, batch) of each rank: unequal shares."""
    return [(0, pack(SEQS[:2])), (sum(map(len, SEQS[:2])), pack(SEQS[2:]))]


def single(tied: bool, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients) of both ranks' batches in one process."""
    whole, total = model(tied), torch.zeros(())
    for first, batch in halves():
        loss = whole(batch, loss=losses(batch, first, 0.01)[name])
        loss.backward()
        total += loss.detach()
    return total, gradients(whole)


def worker(rank: int, folder: str) -> None:
    """One rank: shard, one step of each loss, whole gradients to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    first, batch = halves()[rank]
    for tied in (True, False):
        sharded = model(tied)
        for block in sharded.model.layers:
            fully_shard(block)
        fully_shard(sharded)
        # FSDP averages gradients over the ranks, hence the factor.
        for name, fn in losses(batch, first, 0.01 * WORLD).items():
            sharded.zero_grad()
            loss = sharded(batch, loss=fn)
            loss.backward()
            total = loss.detach() / WORLD
            dist.all_reduce(total)
            grads = {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}
            if rank == 0:
                save_file({"loss": total, **grads}, f"{folder}/{tied}-{name}")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_fused_losses_in_a_sharded_forward_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    for tied in (True, False):
        for name in ("sft", "policy"):
            expected_loss, expected = single(tied, name)
            grads = load_file(tmp_path / f"{tied}-{name}")
            loss = grads.pop("loss")
            assert ("lm_head.weight" in grads) != tied
            assert torch.allclose(loss, expected_loss, rtol=1e-6)
            assert relative_difference(grads, expected) <= 1e-5
