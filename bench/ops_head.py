"""Contests of the language-model head: cross-entropy, policy loss, log-probabilities, exact KL.

Floors: G = 2 N H V operations is one matrix product of the head. Losses with gradient need 3 of them, log-probabilities
alone 1, the exact KL 4 with gradient. Memory traffic is far below; the losses' fp32 logits are not counted.
"""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from bench import peers
from bench.contest import OURS, Absent, Contest, Outputs, Work, compiled, exact_by_rows, gather
from bench.measure import interleaved, summary
from bench.peers import CLIP, KL, HeadInput, gradients
from cai_fast import kernels

HEADS = {"Llama-3.2-1B": (2048, 128256), "Llama-3-8B": (4096, 128256), "Qwen2.5-7B": (3584, 152064)}
SIZES = {
    "tiny": {"tiny": (48, 16, 70)},
    "cpu": {"toy": (1500, 96, 300), "small": (512, 256, 32768)},
    "gpu": {f"{name} N{rows}": (rows, *HEADS[name]) for rows in (8192, 4096, 1024, 16384) for name in HEADS},
}
EAGER_ELEMENTS = 8192 * 152064
"""Largest N x V whose full logits are made several times over without filling a GPU."""
EXACT_ROWS = 8192
"""Largest N whose fp64 results are computed in full."""


def head_input(rows: int, width: int, vocab: int, device: torch.device, seed: int = 0) -> HeadInput:
    """Random data with logits of standard deviation 3 (zeros would run faster on a GPU): bf16, fp32 on the CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, device=device) * scale

    hidden, weight = normal(rows, width).to(dtype), normal(vocab, width, scale=3 * width**-0.5).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=g, device=device)
    with torch.no_grad():
        logprob = kernels.linear_logprob(hidden, weight, targets).logprob
    old, ref, advantage = logprob + normal(rows, scale=0.2), logprob + normal(rows, scale=0.3), normal(rows)
    ref_hidden = (hidden.float() + normal(rows, width, scale=0.1)).to(dtype)
    return HeadInput(hidden.requires_grad_(), weight.requires_grad_(), targets, old, advantage, ref, ref_hidden)


def bare_gemms(products: int) -> Work:
    """The matrix products of the work in chunks of 2048 rows, and nothing else: the unit of every ratio."""

    def work(x: HeadInput) -> None:
        h, w = x.hidden.detach(), x.weight.detach()
        rows = min(2048, h.shape[0])
        logits = h.new_empty(rows, w.shape[0])
        for start in range(0, h.shape[0], rows):
            part = h[start : start + rows]
            z = logits[: part.shape[0]]
            torch.mm(part, w.t(), out=z)
            if products == 4:
                torch.mm(part, w.t(), out=z)
            if products >= 3:
                torch.mm(z, w)
                torch.mm(z.t(), part)

    return work


def _cross_entropy(x: HeadInput) -> Outputs:
    return gradients(kernels.linear_cross_entropy(x.hidden, x.weight, x.targets, scale=x.scale), x)


def _policy_loss(x: HeadInput) -> kernels.PolicyLoss:
    return kernels.linear_policy_loss(
        x.hidden, x.weight, x.targets, x.old, x.advantage,
        ref_logprob=x.ref, clip_coef=CLIP, kl_coef=KL, kl_estimator="k2", scale=x.scale,
    )  # fmt: skip


def _policy(x: HeadInput) -> Outputs:
    out = _policy_loss(x)
    return gradients(out.loss, x) | {"entropy": out.stats["entropy"]}


def _in_main_grad(loss: Callable[[HeadInput], Tensor]) -> Callable[[], Work]:
    """A candidate: as the trainer runs it, the weight's gradient summed in a buffer that is there already."""

    def candidate() -> Work:
        buffers: dict[int, Tensor] = {}

        def work(x: HeadInput) -> Outputs:
            weight = x.weight.detach().requires_grad_()  # the others must not find the buffer
            if id(x) not in buffers:
                buffers[id(x)] = torch.zeros_like(weight, dtype=torch.float32)
            weight.main_grad = buffers[id(x)]
            value = loss(x._replace(weight=weight))
            (d_hidden,) = torch.autograd.grad(value, x.hidden)
            return {"loss": value, "d_hidden": d_hidden, "d_weight": weight.main_grad}

        return work

    return candidate


def _logprob(x: HeadInput) -> Outputs:
    with torch.no_grad():
        out = kernels.linear_logprob(x.hidden, x.weight, x.targets, entropy=True)
    return {"logprob": out.logprob, "entropy": out.entropy}


def _tiled(x: HeadInput) -> Outputs:
    with torch.no_grad():
        out = kernels.linear_logprob(x.hidden, x.weight, x.targets, entropy=True, tiled=True)
    return {"logprob": out.logprob, "entropy": out.entropy}


def _one_kernel() -> Work:
    """The product and its statistics in one Triton kernel: measured against `tiled` before it replaces it anywhere."""
    if not torch.cuda.is_available():
        raise Absent("runs on a GPU only")
    from cai_fast.kernels.triton import fused_logprob

    def work(x: HeadInput) -> Outputs:
        logprob, _, entropy = fused_logprob.statistics(x.hidden.detach(), x.weight.detach(), x.targets, 1.0)
        return {"logprob": logprob, "entropy": entropy}

    return work


def _kl(x: HeadInput) -> Outputs:
    out = kernels.linear_kl(x.hidden, x.weight, x.ref_hidden, x.weight.detach())
    return gradients(out.kl.sum() * x.scale, x)


def _log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.t()).log_softmax(-1)


def _exact(op: str, x: HeadInput) -> Outputs:
    """fp64 results, 256 rows at a time."""

    def loss(h: Tensor, w: Tensor, part: slice) -> Outputs:
        z = _log_softmax(h, w)
        logprob = z.gather(1, x.targets[part, None])[:, 0]
        if op == "linear_logprob":
            return {"logprob": logprob, "entropy": -(z.exp() * z).sum(-1)}
        if op == "linear_cross_entropy":
            return {"loss": -logprob.sum() * x.scale}
        if op == "linear_kl":
            q = _log_softmax(x.ref_hidden[part].double(), w.detach())
            return {"loss": (z.exp() * (z - q)).sum() * x.scale}
        rows = x._replace(old=x.old[part], advantage=x.advantage[part], ref=x.ref[part])
        return {"loss": peers.ppo(logprob, rows), "entropy": -(z.exp() * z).sum().detach()}

    return exact_by_rows(loss, x.hidden, x.weight, "" if op == "linear_logprob" else "loss")


def _operations() -> dict[str, tuple[int, Work, Work, dict[str, Callable[[], Work]]]]:
    """Operation -> (matrix products, ours, eager, candidates of other people)."""
    return {
        "linear_cross_entropy": (3, _cross_entropy, peers.eager_cross_entropy, {
            "cai_fast, main_grad": _in_main_grad(
                lambda x: kernels.linear_cross_entropy(x.hidden, x.weight, x.targets, scale=x.scale)
            ),
            "torch linear_cross_entropy": peers.torch_cross_entropy, "Liger": peers.liger_cross_entropy(),
            "Liger, fp32 sums": peers.liger_cross_entropy(accum_dtype=torch.float32),
            "cut-cross-entropy": peers.cce_cross_entropy,
        }),
        "linear_policy_loss": (3, _policy, peers.eager_policy, {
            "cai_fast, main_grad": _in_main_grad(lambda x: _policy_loss(x).loss), **peers.TRL_POLICY,
            "cut-cross-entropy": peers.cce_policy,
        }),
        "linear_logprob": (1, _logprob, peers.eager_logprob, {
            "cai_fast, tiled": lambda: _tiled, "cai_fast, one kernel": _one_kernel,
            **peers.TRL_LOGPROB, "cut-cross-entropy": peers.cce_logprob,
        }),
        "linear_kl": (4, _kl, peers.eager_kl, {}),
    }  # fmt: skip


def contests(
    scale: str, device: torch.device, *, compile: bool = True, sizes: Collection[str] = ()
) -> Iterator[Contest]:
    """Contests at the sizes of `scale` (tiny, cpu, gpu), or only at the named ones; with `compile`, torch.compile of
    the eager form takes part."""
    for size, (rows, width, vocab) in SIZES[scale].items():
        if sizes and size not in sizes:
            continue
        inputs = [head_input(rows, width, vocab, device, seed) for seed in range(2 if rows <= 4096 else 1)]
        for op, (products, ours, eager, others) in _operations().items():
            name = f"{products} bare GEMM{'s' if products > 1 else ''}"
            works = {name: bare_gemms(products), OURS: ours}
            candidates = dict(others)
            if rows * vocab > EAGER_ELEMENTS:
                absent = dict.fromkeys(("eager", "torch.compile", "TRL log-softmax"), "its logits would not fit")
                candidates = {n: make for n, make in candidates.items() if n not in absent}
            else:
                absent, works["eager"] = {}, eager
                if compile:
                    candidates["torch.compile"] = compiled(eager)
            found, reasons = gather(candidates)
            yield Contest(
                op, size, inputs, works | found, baseline=name,
                exact=(lambda x, op=op: _exact(op, x)) if rows <= EXACT_ROWS else None,
                flops=products * 2.0 * rows * width * vocab, absent=absent | reasons,
            )  # fmt: skip


def fp32_output(device: torch.device) -> dict[str, object]:
    """What an fp32 result costs a bf16 GEMM: it decides between fp32 chunks and recomputation."""
    out: dict[str, object] = {}
    for name, (width, vocab) in HEADS.items():
        x = head_input(2048, width, vocab, device)
        h, w = x.hidden.detach(), x.weight.detach()
        narrow, wide = (torch.empty(2048, vocab, device=device, dtype=t) for t in (h.dtype, torch.float32))

        def bf16(h: Tensor = h, w: Tensor = w, into: Tensor = narrow) -> None:
            torch.mm(h, w.t(), out=into)

        def fp32(h: Tensor = h, w: Tensor = w, into: Tensor = wide) -> None:
            torch.mm(h, w.t(), out_dtype=torch.float32, out=into)

        times = interleaved({"bf16": bf16, "fp32": fp32}, device)
        out[name] = {**summary(times), "ratio": times["fp32"].median / times["bf16"].median}
    return out
