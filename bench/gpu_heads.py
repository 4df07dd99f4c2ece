"""The head's shapes of kernels.md §6, and the small operations: time, ratio to bare GEMMs, extra memory, error."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import extra_memory, interleaved, summary
from cai_fast import kernels

HEADS = ((2048, 128256), (4096, 128256), (3584, 152064))
ROWS = (1024, 4096, 8192, 16384)
TERA = 1e12
FLOOR = 790 * TERA  # dense bf16 on an H200, FLOP/s (kernels.md)


def head(rows: int, width: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden [N, H], weight [V, H] (logits of standard deviation 3) and targets, bf16 (fp32 on CPU)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=g, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g, device=device) * 3 * width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=g, device=device)


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], object] | None:
    if importlib.util.find_spec("liger_kernel") is None or not hidden.is_cuda:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: torch.autograd.grad(loss(weight, hidden, targets), (hidden, weight))


def _bare_gemms(hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    """The three products of a training step in row chunks, nothing else: the denominator of every ratio."""
    h, w = hidden.detach(), weight.detach()
    rows = min(2048, h.shape[0])
    logits = h.new_empty(rows, w.shape[0])

    def work() -> None:
        for start in range(0, h.shape[0], rows):
            part = h[start : start + rows]
            z = logits[: part.shape[0]]
            torch.mm(part, w.t(), out=z)
            torch.mm(z, w)
            torch.mm(z.t(), part)

    return work


def _works(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    rows, vocab = hidden.shape[0], weight.shape[0]
    h, w = hidden.detach(), weight.detach()
    old = torch.full((rows,), -3.0, device=h.device)
    grads = (hidden, weight)

    def policy() -> object:
        out = kernels.linear_policy_loss(hidden, weight, targets, old, old, ref_logprob=old, kl_coef=0.1)
        return torch.autograd.grad(out.loss, grads)

    works: dict[str, Callable[[], object]] = {
        "3 bare GEMMs": _bare_gemms(hidden, weight),
        "cross entropy": lambda: torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, targets), grads),
        "policy loss": policy,
        "logprob + entropy, no grad": lambda: kernels.linear_logprob(h, w, targets, entropy=True),
        "logprob + entropy, tiled": lambda: kernels.linear_logprob(h, w, targets, entropy=True, tiled=True),
    }
    if hidden.is_cuda:
        from cai_fast.kernels.triton import fused_logprob

        works["logprob + entropy, one kernel"] = lambda: fused_logprob.statistics(h, w, targets, 1.0)
    if rows * vocab <= 8192 * 152064:
        works["eager cross entropy"] = lambda: torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), targets), grads)
        works["exact KL with grad"] = lambda: torch.autograd.grad(
            kernels.linear_kl(hidden, weight, h.flip(0), w).kl.sum(), grads
        )
    liger = _liger(hidden, weight, targets)
    return works if liger is None else {**works, "liger": liger}


def _errors(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, float]:
    """Largest |log-prob - fp64| over 64 rows: of ours, and of eager logits in the inputs' own precision."""
    h, w, t = hidden.detach()[:64], weight.detach(), targets[:64]
    exact = torch.cat([(part.double() @ h.double().t()).t() for part in w.split(16384)], 1).log_softmax(-1)
    exact = exact.gather(1, t[:, None])[:, 0]
    ours = kernels.linear_logprob(h, w, t).logprob
    eager = (h @ w.t()).float().log_softmax(-1).gather(1, t[:, None])[:, 0]
    return {name: (x - exact).abs().max().item() for name, x in (("ours", ours), ("eager", eager))}


def head_shape(width: int, vocab: int, rows: int, device: torch.device, seconds: float = 6.0) -> dict[str, object]:
    hidden, weight, targets = head(rows, width, vocab, device)
    works = _works(hidden, weight, targets)
    times = interleaved(works, device, seconds=seconds)
    bare = times["3 bare GEMMs"].median
    return {
        "ms": summary(times),
        "ratio to bare GEMMs": {name: t.median / bare for name, t in times.items()},
        "share of the floor": {name: 6e3 * rows * width * vocab / FLOOR / t.median for name, t in times.items()},
        "extra MiB, gradients included": {name: extra_memory(work, device) for name, work in works.items()},
        "max logprob error": _errors(hidden, weight, targets),
    }


def heads(width: int, vocab: int, device: torch.device) -> dict[str, object]:
    return {f"N {rows}": head_shape(width, vocab, rows, device) for rows in ROWS}


def fp32_output(device: torch.device) -> dict[str, object]:
    """What an fp32 result costs a bf16 GEMM: it decides between fp32 chunks and recomputation (kernels.md, risks)."""
    out: dict[str, object] = {}
    for width, vocab in HEADS[:2]:
        hidden, weight, _ = head(2048, width, vocab, device)
        h, w = hidden.detach(), weight.detach()
        narrow, wide = (torch.empty(2048, vocab, device=device, dtype=t) for t in (h.dtype, torch.float32))

        def bf16(h: Tensor = h, w: Tensor = w, into: Tensor = narrow) -> None:
            torch.mm(h, w.t(), out=into)

        def fp32(h: Tensor = h, w: Tensor = w, into: Tensor = wide) -> None:
            torch.mm(h, w.t(), out_dtype=torch.float32, out=into)

        times = interleaved({"bf16": bf16, "fp32": fp32}, device)
        out[f"H {width}"] = {**summary(times), "ratio": times["fp32"].median / times["bf16"].median}
    return out


def small_operations(device: torch.device) -> dict[str, object]:
    """GAE, option scoring, sampling and the block's operations."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    out: dict[str, object] = {}
    for sequences, length in ((256, 256), (1024, 2048)):
        rewards, values = torch.randn(2, sequences * length, device=device)
        cu = torch.arange(sequences + 1, device=device) * length

        def advantages(r: Tensor = rewards, v: Tensor = values, cu: Tensor = cu) -> object:
            return kernels.gae(r, v, cu)

        out[f"gae {sequences}x{length}"] = summary(interleaved({"ms": advantages}, device))["ms"]
    hidden, weight = torch.randn(256 * 32, 4096, device=device, dtype=dtype), torch.randn(1000, 4096, device=device)
    weight, ids = weight.to(dtype), torch.tensor([[5, 7], [9, -1]], device=device)
    logits = torch.randn(256, 128256, device=device)
    keys = torch.arange(256, device=device)
    x, scale = torch.randn(8192, 4096, device=device, dtype=dtype), torch.ones(4096, device=device, dtype=dtype)
    gate, up = torch.randn(2, 8192, 14336, device=device, dtype=dtype)
    q, k = (torch.randn(8192, heads, 128, device=device, dtype=dtype) for heads in (32, 8))
    cos, sin = torch.randn(2, 8192, 64, device=device)
    works = {
        "score_options 8192 rows": lambda: kernels.score_options(hidden, weight, ids),
        "sample 256x128256": lambda: kernels.sample_tokens(logits, keys, keys),
        "sample top-p": lambda: kernels.sample_tokens(logits, keys, keys, top_p=0.9),
        "rms_norm 8192x4096": lambda: kernels.rms_norm(x, scale, 1e-5),
        "swiglu 8192x14336": lambda: kernels.swiglu(gate, up),
        "rope 8192": lambda: kernels.rope(q, k, cos, sin),
    }
    return {**out, **summary(interleaved(works, device, seconds=5.0))}
