"""Makes Triton's interpreter right for bfloat16, its products the same at every place, and sorting
in it quick: for tests and `fastsae verify`.

The interpreter of Triton 3.8 keeps bf16 as raw uint16 and computes on those bits: sums, products,
comparisons (so sort and topk too), reductions, scans and `tl.dot` come out wrong without an error,
casts truncate, and a bf16 constant cannot be made. Here every such operation runs in fp32 and is
rounded to nearest even, as a GPU does. `tests/triton/test_interpreter.py` holds each against torch.

`tl.dot` there is a product of the machine's BLAS, which sums equal rows differently by where they
lie. Here every element is one sum in the order of k, as an element of a tensor core's result is one
order of sums wherever it lies: ties tie, and a token's scores do not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_ROUND_TO_ZERO = interpreter._ir.ROUNDING_MODE.RTZ
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def _is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(wide: np.ndarray) -> np.ndarray:
    """fp32 to the bits of the nearest bf16, ties to even; any NaN becomes the quiet one."""
    bits = np.ascontiguousarray(wide, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16)


def _wide_handle(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(_widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _dot_operand(handle: TensorHandle, dtype: np.dtype[Any]) -> np.ndarray:
    """A factor of tl.dot in the type of the sum, where products of narrower numbers are exact."""
    data = handle.data
    if _is_bf16(handle):
        data = _widen(data)
    elif handle.dtype.is_floating() and handle.dtype.primitive_bitwidth == 8:
        data = interpreter._convert_float(data, handle.dtype, tl.float16, None).view(np.float16)
    return data.astype(dtype)


class ExactBf16Builder(InterpreterBuilder):
    """The interpreter's builder with bf16 arithmetic in fp32."""

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(_round(np.array([value], dtype=np.float32)), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else self._to_bf16(src.data)
        return super().cast_impl(_wide_handle(src), dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if rounding_mode != _ROUND_TO_ZERO and (_is_bf16(src) or dst_type.scalar == tl.bfloat16):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if op in _COMPARISONS:
            # the interpreter calls the result a number of lhs's type, which 3.9 then makes of it
            wide = [_wide_handle(h).data for h in (lhs, rhs)]
            return TensorHandle(np.asarray(op(*wide), dtype=bool), tl.int1)
        if not _is_bf16(lhs) or op in _BITWISE:
            return super().binary_op(lhs, rhs, op)
        return self._to_bf16(op(_widen(lhs.data), _widen(rhs.data)))

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bf16(arg):
            return super().unary_op(arg, op)
        return self._to_bf16(op(_widen(arg.data)))

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Any) -> TensorHandle:
        if not _is_bf16(other) or op is np.where:  # a selection moves bits
            return super().ternary_op(lhs, rhs, other, op)
        return self._to_bf16(op(*(_widen(h.data) for h in (lhs, rhs, other))))

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        exact = [_widen(h.data).astype(np.float64) for h in (x, y, z)]
        return self._to_bf16(exact[0] * exact[1] + exact[2])

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> Any:
        if _is_bf16(d):
            return self.cast_impl(self.create_dot(a, b, _wide_handle(d), *rest), tl.bfloat16)
        narrow = d.data.dtype == np.float16
        total = d.data.astype(np.float32) if narrow else np.array(d.data)
        left, right = (_dot_operand(h, total.dtype) for h in (a, b))
        for k in range(left.shape[-1]):
            total += left[..., :, k, None] * right[..., None, k, :]
        return TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    @staticmethod
    def _to_bf16(data: np.ndarray) -> TensorHandle:
        return TensorHandle(_round(data.astype(np.float32)), tl.bfloat16)


def _in_fp32(apply_impl: Any) -> Any:
    """Reductions and scans take numpy's shortcuts on the raw data: hand them fp32."""

    def apply(self: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        narrow = [_is_bf16(x.handle) for x in inputs]
        if not any(narrow):
            return apply_impl(self, inputs)
        wide = tuple(
            self.to_tensor(_widen(x.handle.data), tl.float32) if n else x
            for x, n in zip(inputs, narrow)
        )
        outputs = apply_impl(self, wide)
        outputs = outputs if isinstance(outputs, (list, tuple)) else (outputs,)
        return tuple(
            tl.tensor(ExactBf16Builder._to_bf16(x.handle.data), _bf16_like(x.type)) if n else x
            for x, n in zip(outputs, narrow)
        )

    return apply


def _bf16_like(kind: Any) -> Any:
    return tl.block_type(tl.bfloat16, list(kind.shape)) if kind.is_block() else tl.bfloat16


def _reduce_slices(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Any other reduction (tl.sort's exchange is one), a slice at a time: the interpreter's own
    goes element by element, a second for 1024 keys."""
    arrays = [np.ravel(x.handle.data) if self.axis is None else x.handle.data for x in inputs]
    axis = self.axis or 0

    def at(i: int) -> list[Any]:
        return [self.to_tensor(a.take(i, axis), x.dtype) for a, x in zip(arrays, inputs)]

    total = at(0)
    for i in range(1, arrays[0].shape[axis]):
        result = self.combine_fn.fn(*total, *at(i))
        total = list(result) if isinstance(result, tuple) else [result]
    if not self.keep_dims:
        return total
    shape = np.shape(np.sum(inputs[0].handle.data, axis=self.axis, keepdims=True))
    return [self.to_tensor(np.reshape(t.handle.data, shape), t.dtype) for t in total]


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """A bound of a loop is an array of one element, which NumPy 2.4 does not take for a number:
    Triton 3.6 hands it over as it is."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_patch_lang = interpreter._patch_lang


def _patch_lang_once(fn: Any) -> Any:
    """Every call of a device function patches the language again, 5 ms each: once is enough."""
    languages = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
    if languages and not any(tl.core.is_builtin(m.load) for m in languages):
        return interpreter._LangPatchScope()
    return _patch_lang(fn)


def repair() -> None:
    """Installs the repair in this process; a second call changes nothing."""
    if isinstance(interpreter.interpreter_builder, ExactBf16Builder):
        return
    interpreter.interpreter_builder.__class__ = ExactBf16Builder
    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        kind.apply_impl = _in_fp32(kind.apply_impl)
    interpreter.ReduceOps.generic_reduce = _reduce_slices
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._patch_lang = _patch_lang_once
