"""Repairs of Triton's CPU interpreter, for tests only. It reaches into private names; `test_interpreter.py` proves it.

As shipped (3.6 to 3.9) the interpreter multiplies the bit patterns of bf16 in `tl.dot`, truncates on conversion to
bf16, computes nonsense in bf16 arithmetic without a conversion, and up to 3.6 fails on run-time loop bounds with
numpy >= 2.4. bf16 is held as uint16.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float32(values: np.ndarray) -> np.ndarray:
    """bf16 bits of fp32, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> np.ndarray:
    return to_float32(handle.data) if _is_bf16(handle) else handle.data


def _cast(self: InterpreterBuilder, source: TensorHandle, target: Any, *_: Any) -> TensorHandle:
    values, scalar = _widened(source), target.scalar
    if scalar == tl.bfloat16:
        data = source.data if _is_bf16(source) else from_float32(values)
    else:
        data = values.astype(interpreter._get_np_dtype(scalar))
    return TensorHandle(data, scalar)


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> TensorHandle:
    left, right = (_widened(x).astype(np.float64) for x in (a, b))
    # One column of the sum after the other: numpy's matmul rounds an element by where in the matrix it stands.
    product = np.zeros(d.data.shape)
    for k in range(left.shape[1]):
        product += left[:, k, None] * right[k]
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _refusing(name: str) -> Any:
    original = getattr(InterpreterBuilder, name)

    def operation(self: InterpreterBuilder, *handles: TensorHandle) -> TensorHandle:
        if any(_is_bf16(handle) for handle in handles):
            raise TypeError(f"{name} in bf16: convert to fp32 first")
        return original(self, *handles)

    return operation


def _patched_language(original: Any) -> Any:
    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        # Set behind the scope's back: it restores what it found, and nothing else reads this attribute.
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    return patch


def _patched_with_core(original: Any) -> Any:
    def patch(fn: Any) -> Any:
        scope = original(fn)
        # Triton's own helpers, such as tl.zeros, use triton.language.core, which a kernel's module does not name.
        scope._changes += original(tl.zeros.fn)._changes
        return scope

    return patch


def repair() -> None:
    """Patch this process's interpreter; a second call changes nothing."""
    if getattr(InterpreterBuilder, "repaired", False):
        return
    InterpreterBuilder.repaired = True
    for name in ("fadd", "fsub", "fmul", "fdiv", "fneg"):
        if not hasattr(InterpreterBuilder, f"create_{name}"):
            continue  # 3.6 has no fneg: it subtracts
        setattr(InterpreterBuilder, f"create_{name}", _refusing(f"create_{name}"))
    InterpreterBuilder.cast_impl = _cast
    float8 = InterpreterBuilder.create_fp_to_fp

    def fp_to_fp(self: InterpreterBuilder, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        narrow = 8 in (source.dtype.scalar.primitive_bitwidth, target.scalar.primitive_bitwidth)
        return float8(self, source, target, rounding) if narrow else _cast(self, source, target)

    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(
        from_float32(np.array([value], dtype=np.float32)), tl.bfloat16
    )
    # A kernel's helpers are called while the kernel has triton.language patched; as shipped every call patches it
    # anew, which takes most of the time.
    interpreter._patch_lang = _patched_with_core(interpreter._patch_lang)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    interpreter._patch_lang_tensor = _patched_language(interpreter._patch_lang_tensor)
