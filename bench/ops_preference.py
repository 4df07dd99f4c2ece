"""Contests of preference scoring and RL: option scores, soft labels, the preference loss, advantages.

All are bound by memory traffic or by launches: the unit is a copy of the bytes that must move.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import OURS, Contest, Outputs, Work, compiled, copying, gather, graphed
from cai_fast import kernels

SCORES = {"tiny": (8, 16, 50), "cpu": (512, 256, 8192), "gpu": (8192, 4096, 128256)}  # leaf rows, hidden, vocabulary
LABELS = {"tiny": (4, 2), "cpu": (256, 16), "gpu": (256, 16)}  # comparisons, principles
PAIRS = {"tiny": 8, "cpu": 4096, "gpu": 65536}
ROLLOUTS = {
    "tiny": {"3x5": (3, 5)},
    "cpu": {"256x64": (256, 64)},
    "gpu": {"256x256": (256, 256), "1024x2048": (1024, 2048)},
}
OPTIONS = [[5, 7], [9, -1]]  # one option with two token variants, one with one
GAMMA, LAMBDA = 1.0, 0.95


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _contest(
    op: str, size: str, inputs: list, works: dict[str, Work], traffic: float, device: torch.device, *, eager: Work,
    exact: Work, compile: bool,
) -> Contest:  # fmt: skip
    candidates = {"torch.compile": compiled(eager)} if compile else {}
    if OURS in works and device.type == "cuda":
        candidates["cai_fast, CUDA graph"] = graphed(works[OURS], inputs[0])
    found, absent = gather(candidates)
    works = {"copy": copying(traffic, device), **works, "eager": eager, **found}
    return Contest(op, size, inputs, works, baseline="copy", exact=exact, bytes=traffic, absent=absent)


def score_options(scale: str, device: torch.device, compile: bool) -> Contest:
    rows, width, vocab = SCORES[scale]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ids = torch.tensor(OPTIONS, device=device)

    def make(seed: int) -> tuple[Tensor, Tensor]:
        g = _generator(device, seed)
        hidden, weight = (torch.randn(n, width, generator=g, device=device) for n in (rows, vocab))
        return hidden.to(dtype), (weight * width**-0.5).to(dtype)

    def eager(x: tuple[Tensor, Tensor]) -> Outputs:
        """The straightforward way: the logits of the whole vocabulary."""
        logits = (x[0] @ x[1].t()).float()[:, ids.clamp_min(0)].masked_fill(ids < 0, -torch.inf)
        return {"logprob": logits.logsumexp(-1).log_softmax(-1)}

    works = {
        OURS: lambda x: {"logprob": kernels.score_options(*x, ids)},
        "last-logit slice": lambda x: {
            "logprob": (x[0] @ x[1][ids.clamp_min(0).flatten()].t()).float().unflatten(1, ids.shape)
            .masked_fill(ids < 0, -torch.inf).logsumexp(-1).log_softmax(-1)
        },
    }  # fmt: skip
    size = rows * width * hidden_bytes(dtype)
    return _contest(
        "score_options", f"{rows} rows H{width} V{vocab}", [make(s) for s in range(2)], works, size, device,
        eager=eager, exact=lambda x: {"logprob": kernels.score_options(*(t.double() for t in x), ids,
                                                                       backend="reference")}, compile=compile,
    )  # fmt: skip


def hidden_bytes(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def preference_labels(scale: str, device: torch.device, compile: bool) -> Contest:
    comparisons, principles = LABELS[scale]

    def make(seed: int) -> Tensor:
        g = _generator(device, seed)
        return torch.randn(comparisons, principles, 2, 2, generator=g, device=device).log_softmax(-1)

    def eager(x: Tensor) -> Outputs:
        prob = x.softmax(-1)
        each = torch.stack((prob[:, :, 0, 0], prob[:, :, 1, 1]), -1)
        return {"prob_a": each.nanmean(-1).clamp(0.4, 0.6).nanmean(-1)}

    def ours(x: Tensor) -> Outputs:
        return {"prob_a": kernels.preference_labels(x, clamp=(0.4, 0.6)).prob_a}

    return _contest(
        "preference_labels", f"{comparisons}x{principles}", [make(s) for s in range(2)], {OURS: ours},
        comparisons * principles * 7 * 4.0, device, eager=eager, exact=lambda x: eager(x.double()), compile=compile,
    )  # fmt: skip


def preference_loss(scale: str, device: torch.device, compile: bool) -> Contest:
    pairs = PAIRS[scale]

    def make(seed: int) -> tuple[Tensor, ...]:
        rewards = torch.randn(2, pairs, generator=_generator(device, seed), device=device)
        prob = torch.rand(pairs, generator=_generator(device, seed + 100), device=device)
        return (*(r.requires_grad_() for r in rewards.unbind()), prob)

    def eager(x: tuple[Tensor, ...]) -> Outputs:
        margin = x[0] - x[1]
        loss = F.binary_cross_entropy_with_logits(margin, x[2].to(margin.dtype), reduction="sum") / pairs
        with torch.no_grad():
            agreement = (0.5 + 0.5 * torch.sign(margin) * torch.sign(x[2] - 0.5)).sum()
        return {"loss": loss, "accuracy": agreement, "d_a": torch.autograd.grad(loss, x[0])[0]}

    def ours(x: tuple[Tensor, ...]) -> Outputs:
        out = kernels.preference_loss(*x, scale=1 / pairs)
        return {"loss": out.loss, "accuracy": out.stats["accuracy"], "d_a": torch.autograd.grad(out.loss, x[0])[0]}

    def exact(x: tuple[Tensor, ...]) -> Outputs:
        return eager(tuple(t.detach().double().requires_grad_(t.requires_grad) for t in x))

    return _contest(
        "preference_loss", f"{pairs} pairs", [make(s) for s in range(2)], {OURS: ours}, pairs * 5 * 4.0, device,
        eager=eager, exact=exact, compile=compile,
    )  # fmt: skip


def gae(size: str, shape: tuple[int, int], device: torch.device, compile: bool) -> Contest:
    sequences, length = shape
    cu = torch.arange(sequences + 1, device=device) * length

    def make(seed: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2, sequences * length, generator=_generator(device, seed), device=device).unbind()

    def loop(x: tuple[Tensor, Tensor]) -> Outputs:
        """Backwards over time, all sequences at once, as the usual single-file PPO does; needs equal lengths."""
        rewards, values = (t.view(sequences, length) for t in x)
        advantages, carry = torch.empty_like(values), torch.zeros_like(values[:, 0])
        for t in range(length - 1, -1, -1):
            following = values[:, t + 1] if t + 1 < length else 0.0
            carry = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAMBDA * carry
            advantages[:, t] = carry
        return {"advantages": advantages.flatten()}

    def ours(x: tuple[Tensor, Tensor]) -> Outputs:
        return {"advantages": kernels.gae(*x, cu, gamma=GAMMA, lam=LAMBDA)[0]}

    def exact(x: tuple[Tensor, Tensor]) -> Outputs:
        return loop(tuple(t.double() for t in x))

    # torch.compile unrolls the loop over time, which takes minutes beyond a few dozen steps.
    return _contest(
        "gae", size, [make(s) for s in range(2)], {OURS: ours}, sequences * length * 4 * 4.0, device,
        eager=loop, exact=exact, compile=compile and length <= 64,
    )  # fmt: skip


def policy_statistics(size: str, rows: int, device: torch.device, compile: bool) -> Contest:
    """The weighted sums that linear_policy_loss returns, from its rows' numbers: on a GPU one or two launches."""

    def make(seed: int) -> tuple[Tensor, Tensor]:
        g = _generator(device, seed)
        return torch.randn(8, rows, generator=g, device=device), torch.rand(rows, generator=g, device=device)

    def eager(x: tuple[Tensor, Tensor]) -> Outputs:
        _, _, entropy, loss, pg, kl, clipped, ratio = x[0].unbind()
        each = torch.stack((pg, kl, clipped, ratio, ratio.square(), entropy, torch.ones_like(ratio)))
        return {"loss": loss.sum(), "stats": (each * x[1]).sum(1)}

    def ours(x: tuple[Tensor, Tensor]) -> Outputs:
        from cai_fast.kernels.triton.sums import policy_sums

        loss, stats = policy_sums(*x)
        return {"loss": loss, "stats": stats}

    works: dict[str, Work] = {OURS: ours} if device.type == "cuda" else {}
    contest = _contest(
        "policy statistics", size, [make(s) for s in range(2)], works, rows * 28.0, device, eager=eager,
        exact=lambda x: eager((x[0].double(), x[1].double())), compile=compile,
    )  # fmt: skip
    return contest if works else replace(contest, absent={OURS: "part of the loss itself but on a GPU"})


def contests(scale: str, device: torch.device, *, compile: bool = True) -> Iterator[Contest]:
    """Contests at the sizes of `scale` (tiny, cpu, gpu)."""
    for make in (score_options, preference_labels, preference_loss):
        yield make(scale, device, compile)
    for size, shape in ROLLOUTS[scale].items():
        yield gae(size, shape, device, compile)
        yield policy_statistics(f"{shape[0] * shape[1]} tokens", shape[0] * shape[1], device, compile)
