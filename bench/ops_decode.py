"""Contests of decoding: sampling, attention to the paged cache and to a common prefix, the merge of two attentions."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import OURS, Contest, Outputs, Work, compiled, copying, gather, graphed
from cai_fast import kernels

SAMPLES = {"tiny": (3, 50), "cpu": (16, 8192), "gpu": (256, 128256)}  # rows, vocabulary
CACHES = {
    "tiny": {"B2 ctx 40": (2, 40, 4, 2, 16)},
    "cpu": {"B16 ctx 512": (16, 512, 8, 4, 32)},
    "gpu": {
        f"B{batch} ctx {context}": (batch, context, 32, 8, 128)
        for batch, context in ((1, 8192), (16, 2048), (64, 2048), (256, 512), (512, 512), (64, 8192))
    },
}  # sequences, keys each, query heads, key heads, head size
PREFIXES = {
    "tiny": {"B3 shared 64 own 20": (3, 64, 20, 4, 2, 16)},
    "cpu": {"B32 shared 512 own 64": (32, 512, 64, 8, 4, 32)},
    "gpu": {
        f"B{batch} shared {shared} own {own}": (batch, shared, own, 32, 8, 128)
        for batch, shared, own in ((256, 2304, 400), (64, 2304, 400), (16, 2304, 400), (256, 512, 400))
    },
}  # sequences, keys that all share and keys of each, query heads, key heads, head size
PAGE = 64
TILES = (16, 32)  # sequences that one program of shared_attention takes
TOP_P = 0.9


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def sample(scale: str, device: torch.device, top_p: float) -> Contest:
    """Tokens are drawn by chance and not compared; their law is what the tests of the kernel check."""
    rows, vocab = SAMPLES[scale]

    def make(seed: int) -> Tensor:
        return 3 * torch.randn(rows, vocab, generator=torch.Generator(device).manual_seed(seed), device=device)

    keys = torch.arange(rows, device=device)

    def ours(x: Tensor) -> None:
        kernels.sample_tokens(x, keys, keys, top_p=top_p)

    def eager(x: Tensor) -> None:
        """Sort, cut, softmax, multinomial: what generation loops do."""
        if top_p < 1:
            ordered, order = x.sort(descending=False)
            drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
            drop[:, -1:] = False
            x = x.masked_fill(drop.scatter(1, order, drop), -torch.inf)
        logprob = x.log_softmax(-1)
        token = torch.multinomial(logprob.exp(), 1)
        logprob.gather(1, token)

    traffic = rows * vocab * 4.0
    works: dict[str, Work] = {"copy": copying(traffic, device), OURS: ours, "eager": eager}
    op = "sample_tokens" if top_p == 1 else "sample_tokens top-p"
    return Contest(op, f"{rows}x{vocab}", [make(s) for s in range(2)], works, baseline="copy", bytes=traffic)


def paged_attention(size: str, shape: tuple[int, ...], device: torch.device, compile: bool) -> Contest:
    batch, context, q_heads, k_heads, width = shape
    pages = -(-context // PAGE)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)

    def make(seed: int) -> tuple[Tensor, ...]:
        g = torch.Generator(device).manual_seed(seed)
        query = torch.randn(batch, q_heads, width, generator=g, device=device)
        k, v = torch.randn(2, batch * pages, k_heads, PAGE, width, generator=g, device=device)
        table = torch.randperm(batch * pages, generator=g, device=device).view(batch, pages).int()
        k, v, query = (t.to(_dtype(device)) for t in (k, v, query))
        # What a cache without pages holds: for the contestants that cannot read pages.
        flat = (t[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :context].contiguous() for t in (k, v))
        return query, k, v, table, *flat

    def ours(x: tuple[Tensor, ...]) -> Outputs:
        return {"out": kernels.paged_attention(*x[:4], lengths)}

    def contiguous(x: tuple[Tensor, ...]) -> Outputs:
        return {"out": F.scaled_dot_product_attention(x[0][:, :, None], *x[4:], enable_gqa=True)[:, :, 0]}

    def eager(x: tuple[Tensor, ...]) -> Outputs:
        k, v = (t[x[3].long()].transpose(1, 2).flatten(2, 3)[:, :, :context] for t in x[1:3])
        return {"out": F.scaled_dot_product_attention(x[0][:, :, None], k, v, enable_gqa=True)[:, :, 0]}

    found, absent = gather({"torch.compile": compiled(eager)} if compile else {})
    traffic = 2.0 * batch * context * k_heads * width * torch.empty(0, dtype=_dtype(device)).element_size()
    works = {"copy": copying(traffic, device), OURS: ours, "eager (gathers pages)": eager}
    works |= {"SDPA on contiguous cache": contiguous, **found}
    return Contest(
        "paged_attention", size, [make(s) for s in range(2)], works, baseline="copy",
        exact=lambda x: {"out": kernels.paged_attention(*(t.double() for t in x[:3]), x[3], lengths,
                                                        backend="reference")},
        bytes=traffic, absent=absent,
    )  # fmt: skip


def shared_attention(size: str, shape: tuple[int, ...], device: torch.device) -> Contest:
    """A decode step's attention where all sequences begin with the same pages."""
    batch, shared, own, q_heads, k_heads, width = shape
    context, common, pages = shared + own, shared // PAGE, -(-own // PAGE)
    full = {"dtype": torch.int32, "device": device}
    lengths, starts = torch.full((batch,), context, **full), torch.full((batch,), shared, **full)

    def make(seed: int) -> tuple[Tensor, ...]:
        g = torch.Generator(device).manual_seed(seed)
        query = torch.randn(batch, q_heads, width, generator=g, device=device).to(_dtype(device))
        order = torch.randperm(common + batch * pages, generator=g, device=device).int()
        k, v = torch.randn(2, len(order), k_heads, PAGE, width, generator=g, device=device).to(_dtype(device))
        table = torch.cat((order[:common].expand(batch, -1), order[common:].view(batch, pages)), 1)
        # What a cache without pages holds: the shared keys once per sequence.
        flat = (t[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :context].contiguous() for t in (k, v))
        return query, k, v, table, *flat

    def in_tiles(rows: int) -> Work:
        members = torch.arange(batch, **full)
        members = F.pad(members, (0, -batch % rows), value=-1).view(-1, rows)
        prefix = torch.full((1,), shared, **full), torch.zeros(len(members), **full), members

        def work(x: tuple[Tensor, ...]) -> Outputs:
            rest = kernels.paged_attention(*x[:4], lengths, starts=starts, return_lse=True)
            first = kernels.shared_attention(*x[:3], x[3][:1, :common], *prefix)
            return {"out": kernels.merge_attention(*first, *rest)[0]}

        return work

    def plain(x: tuple[Tensor, ...]) -> Outputs:
        return {"out": kernels.paged_attention(*x[:4], lengths)}

    def contiguous(x: tuple[Tensor, ...]) -> Outputs:
        return {"out": F.scaled_dot_product_attention(x[0][:, :, None], *x[4:], enable_gqa=True)[:, :, 0]}

    inputs = [make(s) for s in range(2)]
    traffic = 2.0 * (shared + batch * own) * k_heads * width * inputs[0][0].element_size()
    works = {"copy": copying(traffic, device), OURS: in_tiles(TILES[0])}
    works |= {f"cai_fast, tiles of {rows}": in_tiles(rows) for rows in TILES[1:]}
    works |= {"paged_attention": plain, "SDPA on contiguous cache": contiguous}
    on_gpu = {"cai_fast, CUDA graph": graphed(works[OURS], inputs[0])} if device.type == "cuda" else {}
    found, absent = gather(on_gpu)
    return Contest(
        "shared_attention", size, inputs, works | found, baseline="copy",
        exact=lambda x: {"out": kernels.paged_attention(*(t.double() for t in x[:3]), x[3], lengths,
                                                        backend="reference")},
        flops=4.0 * batch * context * q_heads * width, bytes=traffic, absent=absent,
    )  # fmt: skip


def merge_attention(size: str, shape: tuple[int, ...], device: torch.device, compile: bool) -> Contest:
    batch, _, heads, _, width = shape

    def make(seed: int) -> tuple[Tensor, ...]:
        g = torch.Generator(device).manual_seed(seed)
        out1, out2 = torch.randn(2, batch, heads, width, generator=g, device=device).to(_dtype(device))
        lse1, lse2 = torch.randn(2, batch, heads, generator=g, device=device)
        return out1, lse1, out2, lse2

    def ours(x: tuple[Tensor, ...]) -> Outputs:
        return {"out": kernels.merge_attention(*x)[0]}

    def eager(x: tuple[Tensor, ...]) -> Outputs:
        lse = torch.logaddexp(x[1], x[3])
        out = x[0] * (x[1] - lse).exp()[..., None] + x[2] * (x[3] - lse).exp()[..., None]
        return {"out": out.to(x[0].dtype)}

    found, absent = gather({"torch.compile": compiled(eager)} if compile else {})
    traffic = 3.0 * batch * heads * width * torch.empty(0, dtype=_dtype(device)).element_size()
    works = {"copy": copying(traffic, device), OURS: ours, "eager": eager, **found}
    return Contest(
        "merge_attention", size, [make(s) for s in range(2)], works, baseline="copy",
        exact=lambda x: eager(tuple(t.double() for t in x)), bytes=traffic, absent=absent,
    )  # fmt: skip


def contests(scale: str, device: torch.device, *, compile: bool = True) -> Iterator[Contest]:
    """Contests at the sizes of `scale` (tiny, cpu, gpu)."""
    for size, shape in CACHES[scale].items():
        yield paged_attention(size, shape, device, compile)
    for size, shape in PREFIXES[scale].items():
        yield shared_attention(size, shape, device)
    yield merge_attention(*next(iter(CACHES[scale].items())), device, compile)
    yield sample(scale, device, 1.0)
    yield sample(scale, device, TOP_P)
