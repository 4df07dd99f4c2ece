"""The decoder: Llama, Mistral, Qwen2 and Qwen3 on packed sequences, with Hugging Face's parameter names.

T packed tokens, H hidden size, Hq/Hkv query and key-value heads, D head size, V vocabulary.
No padding inside, no cache inside: the caller's `attend` decides what a token sees. Differences from the textbook:
a tied output head is not a second parameter but the embedding itself, so nothing can untie it; and on the CPU the rows
are padded to a multiple of 32, because the matrix kernels round a row differently when there are few of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cai_fast.kernels import rms_norm, rope, swiglu
from cai_fast.model.attention import Attend, packed_causal
from cai_fast.model.config import ModelConfig
from cai_fast.model.heads import ScalarHead, init_scalar
from cai_fast.model.recompute import recomputed
from cai_fast.model.rope import RopeTables


class PackedBatch(Protocol):
    """What `Model.forward` reads of a batch."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [S+1] int32
    lens: Sequence[int]  # S lengths, on the host


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; with a residual (norm of x + residual, x + residual)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, self.eps, residual)


class Linear(nn.Linear):
    """x [T, in] -> [T, out]. On the CPU long rows are multiplied in pieces of at most 512 columns: beyond that the
    matrix kernel splits the sum between threads depending on T, and a row's bits would depend on its neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.in_features <= 512:
            return F.linear(x, self.weight, self.bias)
        pieces = zip(x.split(512, -1), self.weight.split(512, -1), strict=True)
        out = reduce(torch.add, (F.linear(a, b) for a, b in pieces))
        return out if self.bias is None else out + self.bias


class Attention(nn.Module):
    """Projections, optional query/key norms and RoPE around the caller's `attend`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        hidden, queries = config.hidden_size, config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden, queries, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, hidden, bias=config.o_bias)
        self.q_norm = RmsNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RmsNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rope(self.q_norm(q), self.k_norm(k), cos, sin)
        return self.o_proj(attend(self.layer, q, k, v).flatten(-2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One pre-norm layer: x [T, H] -> [T, H]. The unit of sharding, and of recomputation (see recompute.KINDS)."""

    recompute = "none"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = Mlp(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return recomputed(self.recompute, self._forward, x, cos, sin, attend)

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        # The second sum is not left to the next layer's norm: a layer would then take and give two tensors [T, H], and
        # recomputation keep both, to save one pass over one of them.
        normal, x = self.post_attention_layernorm(x, self.self_attn(self.input_layernorm(x), cos, sin, attend))
        return x + self.mlp(normal)


class Trunk(nn.Module):
    """Embedding, blocks, final norm: a container, so that names are Hugging Face's `model.*`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class Model(nn.Module):
    """A decoder with a language-model head ("lm") or a scalar head ("score"). parallel.shard divides it over ranks."""

    min_rows = 32  # CPU: with a multiple of it, a row's bits do not depend on the other rows

    def __init__(self, config: ModelConfig, head: str = "lm") -> None:
        super().__init__()
        if head not in ("lm", "score"):
            raise ValueError(f"head {head!r}: expected 'lm' or 'score'")
        self.config, self.head = config, head
        self.source: Path | None = None  # the folder it was loaded from: its licence is copied on save
        self.model = Trunk(config)
        if head == "score":
            self.score = ScalarHead(config.hidden_size)  # model.score(hidden [N, H]) -> [N] fp32
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope_tables = RopeTables(config)

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H]: the output head; with tied embeddings the embedding itself."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def head_weight(self) -> Tensor:
        """The weight that `forward` hands to the loss: [V, H], or [1, H] with a scalar head."""
        return self.score.weight if self.head == "score" else self.lm_head_weight

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        *,
        attend: Attend | None = None,
        lens: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states [T, H] after the final norm of packed sequences.

        token_ids, positions [T] int64; cu_seqlens [S+1] int32; lens: the S lengths on the host (without them they are
        read back from cu_seqlens, which stalls a GPU). attend(layer, q [T, Hq, D], k [T, Hkv, D], v) -> [T, Hq, D]
        replaces packed causal attention; the number of rows is then the caller's business, and cu_seqlens is unused.
        """
        rows = token_ids.shape[0]
        if attend is None:
            lens = cu_seqlens.diff().tolist() if lens is None else list(lens)
            if sum(lens) != rows or positions.shape[0] != rows:
                raise ValueError(f"{rows} tokens, {positions.shape[0]} positions, {sum(lens)} tokens in sequences")
            if not token_ids.is_cuda and (extra := -rows % self.min_rows):
                filler = torch.arange(extra)  # one more sequence, whose rows are dropped below
                token_ids, positions = torch.cat([token_ids, torch.zeros_like(filler)]), torch.cat([positions, filler])
                lens.append(extra)
        x = self.model.embed_tokens(token_ids)
        if attend is None:
            attend = packed_causal(self.config, lens, cu_seqlens, x)
        cos, sin = self.rope_tables(positions)
        for block in self.model.layers:
            x = block(x, cos, sin, attend)
        return self.model.norm(x[:rows])

    def forward(self, batch: PackedBatch, loss: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """`loss(hidden [T, H], head weight)` of a packed batch, or the hidden states themselves without `loss`."""
        hidden = self.hidden(batch.token_ids, batch.positions, batch.cu_seqlens, lens=batch.lens)
        return hidden if loss is None else loss(hidden, self.head_weight)

    def clone(self) -> Model:
        """An independent copy of the weights."""
        return copy.deepcopy(self)

    def with_weights(self, tensors: Mapping[str, Tensor], head: str | None = None, *, trained: bool = True) -> Model:
        """A model of this shape on these very tensors, which are not copied; `trained`: they require gradients."""
        with torch.device("meta"):
            out = Model(self.config, self.head if head is None else head)
        out.requires_grad_(trained)  # what is assigned takes it over
        out.load_state_dict(tensors, strict=True, assign=True)
        out.source = self.source
        return out

    def shared(self) -> Model:
        """A model on this one's own parameters, frozen for both; its layers can be replaced, by adapters say."""
        return self.with_weights(dict(self.named_parameters()), trained=False)

    def with_score_head(self, seed: int, zero: bool = False, *, share: bool = False) -> Model:
        """The trunk under a fresh scalar head: random (see `heads.init_scalar`) or zero.

        share: on this one's own parameters, all frozen; else on a copy of them.
        """
        trunk = {f"model.{name}": p if share else p.detach().clone() for name, p in self.model.named_parameters()}
        weight = torch.empty(1, self.config.hidden_size)
        init_scalar(weight, seed, zero=zero)
        trunk["score.weight"] = weight.to(self.device, self.dtype)
        return self.with_weights(trunk, "score", trained=not share)

    def save(
        self,
        path: str | Path,
        *,
        tokenizer: Any = None,
        extra_config: dict[str, Any] | None = None,
        extra_files: dict[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a Hugging Face folder, see `hf.save`."""
        from cai_fast.model.hf import save  # hf builds Models, so it imports this file

        save(self, path, tokenizer=tokenizer, extra_config=extra_config, extra_files=extra_files, dtype=dtype)
