"""Sampling whose randomness is a function of (key, position) alone: independent of batch, rank and time."""

import torch
from torch import Tensor

from .common import lazy_triton, select

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): 32-bit words in int64 tensors of one shape; four words back."""
    even, odd = torch.stack((counter[0], counter[2])), torch.stack((counter[1], counter[3]))
    lanes = (2,) + (1,) * counter[0].dim()
    multipliers = torch.tensor(_MULTIPLIERS, device=even.device).view(lanes)
    schedule = torch.tensor([[w * r & _MASK for w in _WEYL] for r in range(_ROUNDS)], device=even.device)
    keys = (torch.stack(key) + schedule.view(_ROUNDS, *lanes)).bitwise_and_(_MASK)
    for round_key in keys.unbind():
        product = even * multipliers  # wraps at 64 bits; the bits are those of the unsigned product
        even = (product >> 32).bitwise_and_(_MASK).flip(0).bitwise_xor_(odd).bitwise_xor_(round_key)
        odd = product.bitwise_and_(_MASK).flip(0)
    return even[0], odd[0], even[1], odd[1]


def philox_uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1) with 53 random bits for each (key, position); keys and positions int64, broadcast together.

    Philox key = the 64 bits of `keys`, counter = (position low, position high, 0, 0).
    """
    keys, positions = torch.broadcast_tensors(keys, positions)
    zero = torch.zeros_like(positions)
    counter = (positions & _MASK, positions >> 32 & _MASK, zero, zero)
    high, low, _, _ = philox4x32(counter, (keys & _MASK, keys >> 32 & _MASK))
    return ((high << 21) | (low >> 11)).double().mul_(2.0**-53)


def _truncate(logp: Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    """Renormalised log-probabilities of the top-k, then of the smallest set holding top_p of their mass."""
    ranked, order = logp.sort(dim=-1, descending=True, stable=True)
    if not isinstance(top_k, int) or top_k > 0:
        limit = torch.as_tensor(top_k, device=logp.device).reshape(-1, 1)
        beyond = torch.arange(logp.shape[1], device=logp.device) >= limit
        ranked = ranked.masked_fill(beyond & (limit > 0), -torch.inf).log_softmax(-1)
    mass = ranked.exp()
    before = mass.cumsum(-1, dtype=torch.float64) - mass
    drop = before >= torch.as_tensor(top_p, dtype=torch.float64, device=logp.device).reshape(-1, 1)
    return torch.empty_like(logp).scatter_(1, order, ranked.masked_fill(drop, -torch.inf)).log_softmax(-1)


def _is_off(value: float | Tensor, off: float) -> bool:
    return bool((value == off).all()) if isinstance(value, Tensor) else value == off


def _check_settings(temperature: float | Tensor, top_k: int | Tensor, top_p: float | Tensor) -> None:
    def violated(test: bool | Tensor) -> bool:
        return bool(test.any()) if isinstance(test, Tensor) else bool(test)

    if violated(temperature < 0):
        raise ValueError(f"sample_tokens: temperature must be >= 0, got {temperature}")
    if violated(top_k < 0):
        raise ValueError(f"sample_tokens: top_k must be >= 0 (0 = off), got {top_k}")
    if violated(top_p <= 0) or violated(top_p > 1):
        raise ValueError(f"sample_tokens: top_p must lie in (0, 1] (1 = off), got {top_p}")


def _sample_torch(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    uniform: Tensor | None,
    truncate: bool,
) -> tuple[Tensor, Tensor]:
    greedy = temperature == 0
    z = logits.float()
    if isinstance(temperature, Tensor):
        z = z / torch.where(greedy, 1.0, temperature.float())[:, None]
    elif temperature != 1.0:
        z = z / temperature
    logp = z.log_softmax(-1)
    if truncate:
        off = (torch.as_tensor(top_k) <= 0) & (torch.as_tensor(top_p) >= 1)
        # A row that is not cut keeps its bits beside rows that are.
        logp = torch.where(off.reshape(-1, 1).to(logp.device), logp, _truncate(logp, top_k, top_p))
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1]
    if logits.device.type == "cpu" and not torch.isfinite(total).all():
        raise ValueError("sample_tokens: logits hold NaN or infinity")
    uniform = philox_uniform(keys, positions) if uniform is None else uniform
    # uniform <= 1 - 2^-53, so the product rounds to less than the total and the index stays below V.
    token = torch.searchsorted(cdf, (uniform * total)[:, None], right=True)
    logprob = logp.gather(1, token).squeeze(1)
    token = token.squeeze(1)
    if isinstance(greedy, Tensor):
        token, logprob = torch.where(greedy, logits.argmax(-1), token), logprob.masked_fill(greedy, 0.0)
    return token, logprob


_SAMPLE = {"reference": _sample_torch, "chunked": _sample_torch, "triton": lazy_triton("sampling", "sample_tokens")}


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    uniform: Tensor | None = None,
    truncate: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(token[B] int64, logprob[B] f32) drawn by inverse CDF with one uniform per row.

    logits [B, V]; keys, positions [B] int64 name the row's randomness (`uniform` [B] float64: the same numbers made
    ahead by philox_uniform). temperature, top_k and top_p are scalars or [B]. Temperature 0 is greedy, ties to the
    lowest index. logprob is that of the distribution sampled from (greedy: 0).
    truncate: whether any top_k or top_p is on; None: found out. A caller who knows has checked the settings too, and
    nothing is then read back from the device, so that the call can stand in a CUDA graph.
    """
    if truncate is None:
        _check_settings(temperature, top_k, top_p)
        truncate = not (_is_off(top_k, 0) and _is_off(top_p, 1))
    if not isinstance(temperature, Tensor) and temperature == 0:
        return logits.argmax(-1), torch.zeros(logits.shape[0], device=logits.device)
    implementation = select("sample_tokens", _SAMPLE, backend, logits.device)
    return implementation(logits, keys, positions, temperature, top_k, top_p, uniform, truncate)
