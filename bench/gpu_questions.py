"""The seven questions to settle first on a GPU: one function each, plain data back."""

import dataclasses
import os
from collections.abc import Callable

import torch
from cai_fast.kernels import paged_attention
from torch import Tensor

from bench.measure import GIGA, capture, interleaved, summary
from cai_fast.engine import Engine, Sampling
from cai_fast.model import Model, ModelConfig, attention

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
LLAMA_1B = ModelConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8,
    head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


def _attention_config(head_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=8, hidden_size=32 * head_dim, intermediate_size=8, num_layers=1, num_heads=32, num_kv_heads=8,
        head_dim=head_dim, max_position_embeddings=16384,
    )  # fmt: skip


def _packed(lens: list[int], head_dim: int, backend: str, like: Tensor) -> attention.Attend:
    """Our own attention over packed sequences with the backend forced."""
    os.environ["CAI_ATTN"] = backend
    attention.choose.cache_clear()
    cu = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32, device=like.device)
    return attention.packed_causal(_attention_config(head_dim), lens, cu, like)


def _qkv(tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator(CUDA).manual_seed(0)
    return [
        torch.randn(tokens, heads, head_dim, generator=g, device=CUDA, dtype=torch.float32).to(dtype).requires_grad_()
        for heads in (32, 8, 8)
    ]


def _relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.float() - exact.float()).norm() / exact.float().norm()).item()


def varlen_gqa() -> dict[str, object]:
    """1. Does torch's varlen attention take Hkv < Hq, forward and backward, and agree with the per-sequence loop?"""
    lens = [1, 77, 512, 1, 300, 1024]
    out: dict[str, object] = {"usable": attention.available("cuda", BF16)}
    for head_dim in (64, 128):
        qkv = _qkv(sum(lens), head_dim, BF16)
        wide = [x.detach().float().requires_grad_() for x in qkv]
        exact = _packed(lens, head_dim, "sdpa", wide[0])(0, *wide)
        upstream = torch.randn_like(exact)
        exact_grads = torch.autograd.grad(exact, wide, upstream)
        for backend in attention.available("cuda", BF16):
            got = _packed(lens, head_dim, backend, qkv[0])(0, *qkv)
            grads = torch.autograd.grad(got, qkv, upstream.to(BF16))
            errors = [_relative(got, exact), *(_relative(a, b) for a, b in zip(grads, exact_grads, strict=True))]
            out[f"{backend} D{head_dim} relative error out dq dk dv"] = [round(e, 5) for e in errors]
    return out


def _slots(batch: int, width: int, page: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, k_pages, v_pages, block table, lengths = width: a full cache of `batch` sequences, pages shuffled."""
    pages = batch * width // page
    query = torch.randn(batch, 32, head_dim, device=CUDA, dtype=BF16)
    k, v = (torch.randn(pages, 8, page, head_dim, device=CUDA, dtype=BF16) for _ in range(2))
    table = torch.randperm(pages, device=CUDA).view(batch, -1).int()
    return query, k, v, table, torch.full((batch,), width, device=CUDA, dtype=torch.int32)


def flash_seqused() -> dict[str, object]:
    """2. Does aten's flash attention take seqused_k, so that a slot cache needs no copy? Error and bandwidth."""
    batch, width, head_dim = 64, 2048, 128
    query, k, v, _, _ = _slots(batch, width, width, head_dim)
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))  # slots [B, S, Hkv, D]
    lengths = torch.randint(1, width + 1, (batch,), device=CUDA, dtype=torch.int32)
    cu_q = torch.arange(batch + 1, device=CUDA, dtype=torch.int32)

    def flash() -> Tensor:
        flat = (k.view(-1, 8, head_dim), v.view(-1, 8, head_dim))
        return torch.ops.aten._flash_attention_forward(
            query, *flat, cu_q, cu_q * width, 1, width, 0.0, False, False, seqused_k=lengths
        )[0]

    table = torch.arange(batch, device=CUDA)[:, None]
    exact = paged_attention(query, k.transpose(1, 2), v.transpose(1, 2), table, lengths)
    error = _relative(flash(), exact)
    milliseconds = interleaved({"flash": flash}, CUDA)["flash"].median
    used = lengths.sum().item() * 8 * head_dim * 2 * 2
    return {"relative error": error, "ms": milliseconds, "GB/s of keys used": used / milliseconds / 1e6}


def flash_throughput() -> dict[str, object]:
    """3. TFLOP/s of packed causal attention, forward and backward, at 16,384 tokens."""
    out: dict[str, object] = {}
    for head_dim in (64, 128):
        for lens in ([16384], [4096] * 4, [1024] * 16):
            qkv = _qkv(16384, head_dim, BF16)
            upstream = torch.randn(16384, 32, head_dim, device=CUDA, dtype=BF16)
            flops = sum(2 * n * n * head_dim * 32 for n in lens)  # two products, causal half
            for backend in attention.available("cuda", BF16):
                attend = _packed(lens, head_dim, backend, qkv[0])

                def both(attend: attention.Attend = attend, qkv: list[Tensor] = qkv, up: Tensor = upstream) -> None:
                    torch.autograd.grad(attend(0, *qkv), qkv, up)

                def forward(attend: attention.Attend = attend, qkv: list[Tensor] = qkv) -> None:
                    with torch.no_grad():
                        attend(0, *qkv)

                times = interleaved({"forward": forward, "both": both}, CUDA, rounds=10, seconds=1.5)
                ahead, total = times["forward"].median, times["both"].median
                out[f"{backend} D{head_dim} {len(lens)}x{lens[0]}"] = {
                    "forward TFLOP/s": flops / ahead / GIGA,
                    "backward TFLOP/s": 2.5 * flops / max(total - ahead, 1e-6) / GIGA,
                }
    return out


def triton_paged_decode() -> dict[str, object]:
    """4. GB/s of a plain Triton paged decode inside a CUDA graph, by batch and page size."""
    out: dict[str, object] = {}
    width, head_dim = 1024, 128
    for page in (16, 64, 256):
        for batch in (64, 128, 256, 512):
            inputs = _slots(batch, width, page, head_dim)

            def work(inputs: tuple[Tensor, ...] = inputs) -> Tensor:
                return paged_attention(*inputs, backend="triton")

            error = _relative(work(), paged_attention(*inputs, backend="chunked"))
            graph, _ = capture(work)
            milliseconds = interleaved({"graph": graph.replay}, CUDA, seconds=1.0)["graph"].median
            size = batch * width * 8 * head_dim * 2 * 2
            out[f"page {page} B {batch}"] = {
                "GB/s": size / milliseconds / 1e6, "ms": milliseconds, "relative error": error,
            }  # fmt: skip
    return out


def _random_1b(config: ModelConfig = LLAMA_1B) -> Model:
    with CUDA:
        model = Model(config)
    model.to(BF16).requires_grad_(False)
    g = torch.Generator(CUDA).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=g, device=CUDA) * 0.02)
    return model


class _Decode:
    """One decode step over a static cache whose slots are full to `width`: fixed shapes, nothing read on the host."""

    def __init__(self, model: Model, batch: int, width: int) -> None:
        c = model.config
        self.model, self.width = model, width
        shape = (c.num_layers, 2, batch, c.num_kv_heads, width, c.head_dim)
        self.cache = torch.randn(shape, device=CUDA, dtype=BF16)
        self.token = torch.zeros(batch, dtype=torch.int64, device=CUDA)
        self.position = torch.full_like(self.token, width - 1)
        self.cu = torch.arange(batch + 1, dtype=torch.int32, device=CUDA)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache[layer]
        keys[:, :, -1], values[:, :, -1] = k, v
        attended = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)
        return attended[:, :, 0]

    @torch.no_grad()
    def __call__(self) -> None:
        hidden = self.model.hidden(self.token, self.position, self.cu, attend=self.attend)
        self.token.copy_((hidden @ self.model.lm_head_weight.t()).argmax(-1))


def decode_graphs() -> dict[str, object]:
    """5 and 7. A 1B decode step with and without CUDA graphs, and the time to capture each batch bucket."""
    model, out, width = _random_1b(), {}, 512
    for batch in (1, 16, 64, 128, 256):
        step = _Decode(model, batch, width)
        graph, seconds = capture(step)
        times = interleaved({"eager": step, "graph": graph.replay}, CUDA, seconds=2.0)
        out[f"B {batch}"] = {**summary(times), "capture seconds": seconds}
        del graph, step
        torch.cuda.empty_cache()
    return out


def engine_gap() -> dict[str, object]:
    """6. |log-prob by the engine's decode - log-prob by the trainer's packed forward|, bf16."""
    # A head of its own (a tied random one only repeats the input), scaled to logits with a standard deviation of 3.
    model = _random_1b(dataclasses.replace(LLAMA_1B, tie_word_embeddings=False))
    model.lm_head.weight.mul_(150 / LLAMA_1B.hidden_size**0.5)
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, LLAMA_1B.vocab_size, (32, 64), generator=g).tolist()
    engine = Engine(model, max_len=192, max_batch=32)
    done = engine.generate(prompts, Sampling(max_new_tokens=128))
    packed = engine.logprobs(prompts, [c.token_ids for c in done])
    gap = torch.tensor([a - b for c, p in zip(done, packed, strict=True) for a, b in zip(c.logprobs, p, strict=True)])
    return {
        "tokens": gap.numel(), "mean |gap|": gap.abs().mean().item(), "p99": gap.abs().quantile(0.99).item(),
        "max": gap.abs().max().item(), "mean gap": gap.mean().item(),
        "mean logprob": sum(sum(p) for p in packed) / gap.numel(),
    }  # fmt: skip


QUESTIONS: dict[str, Callable[[], dict[str, object]]] = {
    "1 varlen gqa": varlen_gqa,
    "2 flash seqused": flash_seqused,
    "3 flash throughput": flash_throughput,
    "4 triton paged decode": triton_paged_decode,
    "5+7 decode graphs": decode_graphs,
    "6 engine gap": engine_gap,
}
