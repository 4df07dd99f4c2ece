"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al. 2022, arXiv 2205.05198).

A layer keeps its input, or with "selective" also the results of its matrix products and of attention, and computes
the rest again in the backward pass. The same operations on the same numbers: gradients keep their bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

KINDS = ("none", "selective", "full")
_KEPT = (  # namespace and name of the operations whose results "selective" keeps
    "aten.mm", "aten.addmm", "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention", "torch_attn._varlen_attn", "flash_attn._flash_attn_varlen_forward",
)  # fmt: skip


def recomputed(kind: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, of whose activations only what `kind` says is kept for the backward pass."""
    if kind == "none" or not torch.is_grad_enabled():
        return function(*arguments)
    more = {"context_fn": partial(create_selective_checkpoint_contexts, _kept())} if kind == "selective" else {}
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **more)


def _kept() -> list[Any]:
    """Those of the operations that exist in this process."""
    found = []
    for name in _KEPT:
        space, _, op = name.partition(".")
        packet = getattr(getattr(torch.ops, space), op, None)
        if packet is not None:
            found += [getattr(packet, overload) for overload in packet.overloads()]
    return found
