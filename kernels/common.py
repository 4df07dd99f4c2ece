"""Shared parts of the head kernels: backend choice, row chunks of logits, gradient sums, row selection.

Shapes: N rows (tokens), H hidden, V vocabulary, C rows of one chunk. Logits and every statistic are fp32
(fp64 for fp64 inputs, which is how the tests check gradients).
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable)

BACKENDS = ("auto", "reference", "chunked", "triton")
BACKEND_VARIABLE = "CAI_FAST_KERNELS"
LOG_RATIO_LIMIT = 20.0
"""Largest |log ratio| that is exponentiated; beyond it the gradient is zero."""

# MKL picks another blocking, hence other roundings, for few rows or a long reduction over several threads.
# Measured on CPU: with H <= 512 a row's result does not depend on the number of rows once that is a multiple
# of 32; with a longer reduction only a constant number of rows guarantees it.
_ROW_MULTIPLE = 32
_SPLIT_K = 512
_CPU_ELEMENTS = 2**19
_CUDA_ROWS = 2048


def lazy_triton(module: str, name: str) -> Callable:
    """`name` of kernels/triton/`module`.py, imported at the first call: importing the package needs no triton."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f".triton.{module}", __package__), name)(*args)

    return call


@cache
def _has_triton() -> bool:
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def select(op: str, implementations: Mapping[str, _F], backend: str, device: torch.device) -> _F:
    """The implementation of `op` for tensors on `device`.

    `auto` is what CAI_FAST_KERNELS names, else triton on CUDA and chunked elsewhere. Triton works on CPU tensors only
    in its interpreter, which is slow and asked for by TRITON_INTERPRET=1 before triton is imported.
    """
    if backend == "auto":
        backend = os.environ.get(BACKEND_VARIABLE) or "auto"
    if backend == "auto":
        on_gpu = device.type == "cuda" and "triton" in implementations and _has_triton()
        backend = "triton" if on_gpu else "chunked"
    if backend in implementations:
        if backend == "triton" and not (_has_triton() and (device.type == "cuda" or _interpreted())):
            reason = f"needs CUDA tensors, got {device.type}" if _has_triton() else "needs the package triton"
            raise ValueError(f"{op}: backend 'triton' {reason}")
        return implementations[backend]
    available = ", ".join(sorted(implementations))
    if backend in BACKENDS:
        raise ValueError(f"{op}: backend {backend!r} is not available in this version; available: auto, {available}")
    raise ValueError(f"{op}: unknown backend {backend!r}; expected one of auto, {available}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def differentiates(*tensors: Tensor) -> bool:
    """Whether autograd will record: an autograd.Function costs more than a small tensor's operations, so inference on a
    CPU goes without."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def check_head(op: str, hidden: Tensor, weight: Tensor, **rows: Tensor | None) -> None:
    """Raise ValueError unless hidden is [N, H], weight [V, H] and every named row tensor [N], all on one device."""
    check_tensor(op, "weight", weight)
    for name, value in {"hidden": hidden, **rows}.items():
        check_tensor(op, name, value, integer=name == "targets", device=weight.device)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: expected hidden [N, H] and weight [V >= 1, H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    for name, value in rows.items():
        if value is not None and value.shape != hidden.shape[:1]:
            raise ValueError(f"{op}: expected {name} of shape [{hidden.shape[0]}], got {list(value.shape)}")


def check_tensor(op: str, name: str, value: Any, *, integer: bool = False, device: torch.device | None = None) -> None:
    """Raise ValueError unless `value` is a tensor of floating-point (or integer) type, on `device`; None passes."""
    if value is None:
        return
    kind = "an integer" if integer else "a floating-point"
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be {kind} tensor, got {type(value).__name__}")
    right = not (value.is_floating_point() or value.dtype == torch.bool) if integer else value.is_floating_point()
    if not right:
        raise ValueError(f"{op}: {name} must be {kind} tensor, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {value.device}")


def check_number(op: str, name: str, value: Any, low: float, *, above: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number >= low (`above`: > low)."""
    number = isinstance(value, int | float) and math.isfinite(value)
    if not (number and (value > low if above else value >= low)):
        raise ValueError(f"{op}: {name} must be a finite number {'>' if above else '>='} {low:g}, got {value!r}")


def check_temperature(op: str, temperature: float) -> None:
    check_number(op, "temperature", temperature, 0, above=True)


def chunk_rows(vocab: int, device: torch.device) -> int:
    """C, a multiple of 32. GPU: enough rows for the fp32 weight gradient to be compute-bound. CPU: cache-sized."""
    if device.type != "cpu":
        return _CUDA_ROWS
    return min(2048, max(256, _CPU_ELEMENTS // vocab // _ROW_MULTIPLE * _ROW_MULTIPLE))


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """CPU has no mixed-precision GEMM with fp32 output, so half types are widened there."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return accumulate_dtype(dtype) if hidden.device.type == "cpu" else dtype


def operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix operands of one dtype."""
    dtype = operand_dtype(hidden, weight)
    return hidden.detach().to(dtype), weight.detach().to(dtype)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b with fp32 accumulation and an fp32 result also for half operands."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _padded_rows(rows: int, reduction: int, chunk: int) -> int:
    return chunk if reduction > _SPLIT_K else -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def logit_chunks(hidden: Tensor, weight: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits[n, V] / temperature); every chunk reuses one buffer, which the consumer may overwrite.

    On CPU a row's logits do not depend on the chunk they fall in. On CUDA the library chooses an algorithm, and with it
    the order of a row's additions, by the shape, strides and alignment of the product: a row has the same bits in two
    calls if both have the same rows in the same order, hence the same chunks, down to the size of the last one, which
    N alone decides; and the same dtypes, weight strides and device. A row dropped before a call moves every row after
    it and shortens the last chunk, so that no bit is promised then.
    """
    total, (vocab, width) = hidden.shape[0], weight.shape
    chunk, on_cpu = chunk_rows(vocab, hidden.device), hidden.device.type == "cpu"
    first = min(chunk, total)
    capacity = _padded_rows(first, width, chunk) if on_cpu else first
    buffer = hidden.new_empty(capacity if total else 0, vocab, dtype=accumulate_dtype(hidden.dtype))
    for start in range(0, total, chunk):
        rows = slice(start, min(start + chunk, total))
        count = rows.stop - start
        part = hidden[rows]
        padded = _padded_rows(count, width, chunk) if on_cpu else count
        if padded != count:
            part = torch.nn.functional.pad(part, (0, 0, 0, padded - count))
        _mm(part, weight.t(), buffer[:padded])
        logits = buffer[:count]
        yield rows, logits if temperature == 1.0 else logits.mul_(1.0 / temperature)


def log_softmax_(logits: Tensor) -> Tensor:
    """In place: one fused pass. All backends' log-probs come from here, so equal logits give equal bits."""
    return torch.log_softmax(logits, -1, out=logits)


def like_chunk(scratch: Tensor | None, chunk: Tensor) -> Tensor:
    """A second buffer shaped as `chunk`; `scratch` is the one of the chunk before (chunks never grow)."""
    return torch.empty_like(chunk) if scratch is None else scratch[: chunk.shape[0]]


def main_grad_of(hidden: Tensor, weight: Tensor, wanted: bool) -> Tensor | None:
    """`weight.main_grad`, checked, where the caller set one and a gradient is wanted.

    It is a [V, H] buffer of the precision in which gradients are summed (fp32; fp64 where an operand is fp64), on the
    weight's device, to which the weight's gradient through the head is added; autograd then gets None for it, while
    that of other uses, such as a tied embedding, still goes to weight.grad. The caller sets it only on an unsharded
    weight, outside recomputed regions, and clears it.
    """
    main_grad = getattr(weight, "main_grad", None) if wanted else None
    if main_grad is None:
        return None
    dtype = accumulate_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    if main_grad.dtype != dtype or main_grad.shape != weight.shape or main_grad.device != weight.device:
        raise ValueError(
            f"weight.main_grad must be {dtype} of shape {list(weight.shape)} on {weight.device}. "
            f"Got {main_grad.dtype} of shape {list(main_grad.shape)} on {main_grad.device}."
        )
    return main_grad


class HeadGrad:
    """Gradients of hidden and weight, summed over chunks of dL/dlogits; weight's sum is kept in fp32.

    With `main_grad` [V, H] the weight's gradient is added to it from the first chunk on: no second such tensor exists.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, want_hidden: bool, want_weight: bool, main_grad: Tensor | None = None
    ) -> None:
        self._hidden, self._weight = hidden, weight
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
        self._sum = main_grad
        if main_grad is None and want_weight:
            self._sum = torch.empty(weight.shape, dtype=accumulate_dtype(weight.dtype), device=weight.device)
        self._own, self._empty = main_grad is None, main_grad is None

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """dlogits: [n, V] gradient of the rows' logits (before the division by the temperature)."""
        dlogits = dlogits.to(self._hidden.dtype)
        if self.hidden is not None:
            torch.mm(dlogits, self._weight, out=self.hidden[rows])
        if self._sum is None:
            return
        left, right = dlogits.t(), self._hidden[rows]
        if self._empty:
            _mm(left, right, self._sum)
        elif left.dtype == self._sum.dtype:
            torch.addmm(self._sum, left, right, out=self._sum)
        else:
            torch.addmm(self._sum, left, right, out_dtype=self._sum.dtype, out=self._sum)
        self._empty = False

    def weight_sum(self) -> Tensor | None:
        """[V, H]; None if it was not wanted, or is in main_grad."""
        if not self._own:
            return None
        if self._empty and self._sum is not None:
            self._sum.zero_()
        return self._sum


def kept_rows(targets: Tensor, vocab: int, weights: Tensor | None) -> Tensor | None:
    """Indices of the rows that count (0 <= target < V, weight not 0), or None if all do. One host read."""
    keep = (targets >= 0) & (targets < vocab)
    if weights is not None:
        keep &= weights != 0
    index = keep.nonzero().squeeze(1)
    return None if index.numel() == targets.numel() else index


def take(rows: Tensor | None, index: Tensor | None) -> Tensor | None:
    return rows if rows is None or index is None else rows.index_select(0, index)
