"""Trained models over several ranks: FSDP2 shards, their whole replica for the engine, and activation checkpointing.

Parameters, gradients and optimizer state are fp32 shards; each layer is gathered in the compute type when its turn
comes. Gradients are summed over the ranks, not averaged, because every loss carries its global normaliser already.
"""

import contextlib

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cai_fast import heartbeat
from cai_fast.distributed import Distributed
from cai_fast.model import Model
from cai_fast.model.hf import own_rows, row_range


def shard(model: Model, dist: Distributed, compute: torch.dtype) -> Model:
    """Shard a model over all ranks, in place: each layer by itself, then embedding, final norm and head together.

    Forward and backward passes of `model(batch, loss=...)` are collective from then on, and nothing else than calling
    the model gathers its weights. compute: the type that they are gathered and computed in.
    """
    mesh = init_device_mesh(dist.device.type, (dist.world,))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        # Also the last group, which by default stays gathered until a backward pass: after a pass without one its
        # parameters would be the computation's copies, and a state would save those.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to leave the sum undivided
        module.set_gradient_divide_factor(1.0)
    return model


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(module, FSDPModule)


def together(sharded: bool) -> contextlib.AbstractContextManager[None]:
    """Around a pass of a model: if it is `sharded`, all ranks do it together, and wait for those that do not come."""
    return heartbeat.waiting() if sharded else contextlib.nullcontext()


def gather(model: Model, dtype: torch.dtype) -> Model | None:
    """Collective: the whole model in `dtype` on the CPU of rank 0; None on other ranks."""
    main = torch.distributed.get_rank() == 0
    whole = _empty_like(model, dtype, "cpu") if main else None
    targets = dict(whole.named_parameters()) if whole is not None else {}
    with heartbeat.waiting():
        for name, parameter in model.named_parameters():
            full = _full(parameter, dtype)
            if main:
                targets[name].copy_(full)
    return whole


class Replica:
    """A whole model with the weights of a sharded one, at addresses that stay: what an engine decodes with."""

    def __init__(self, source: Model, dtype: torch.dtype) -> None:
        self.source = source
        self.model = _empty_like(source, dtype, source.device)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Collective: take over the source's weights as they are now, and make sure that they have arrived."""
        targets = dict(self.model.named_parameters())
        with heartbeat.waiting():
            for name, parameter in self.source.named_parameters():
                targets[name].copy_(_full(parameter, self.model.dtype))
        self.check()

    def check(self) -> None:
        """Collective: RuntimeError unless the replica's weights are the source's, bit for bit, on every rank."""
        dtype = self.model.dtype
        held = torch.stack([_fingerprint(p, dtype) for p in self.model.parameters()])
        shards = torch.stack([_fingerprint(p, dtype) for p in self.source.parameters()])
        with heartbeat.waiting():
            torch.distributed.all_reduce(shards)  # integers: exact in any order
            wrong = (held != shards).nonzero().flatten().tolist()
        if wrong:
            names = [name for name, _ in self.model.named_parameters()]
            found = ", ".join(names[i] for i in wrong[:3])
            raise RuntimeError(f"the engine's weights are not the trained ones, starting with {found}")


def _full(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Collective for a sharded parameter: the whole of it. Converted before it travels."""
    part = parameter.detach().to(dtype)
    return part.full_tensor() if isinstance(part, DTensor) else part


def _empty_like(model: Model, dtype: torch.dtype, device: torch.device | str) -> Model:
    with torch.device("meta"):
        whole = Model(model.config, model.head).to(dtype)
    whole.to_empty(device=device).requires_grad_(False)
    whole.source = model.source
    return whole


def _fingerprint(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 sum of the bit patterns of this rank's rows in `dtype`, each row's times its number in the whole."""
    rows, kind = row_range(parameter), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = own_rows(parameter).detach().to(dtype).contiguous().view(kind)
    sums = bits.sum(1, dtype=torch.int64) if bits.ndim > 1 else bits.long()
    return (sums * torch.arange(rows.start + 1, rows.stop + 1, device=bits.device)).sum()
