"""Make Triton's interpreter strict: bfloat16 that is right or refused, and no access out of bounds.

The interpreter keeps bfloat16 as its bits in uint16. Arithmetic on it works on those bits, casts to
it truncate, and an address outside every tensor is read without complaint. Under `guarded()`

- casts from and to bfloat16 are exact and round to nearest even; products of bfloat16 matrices are
  those of their values;
- other arithmetic, comparison or reduction of bfloat16 raises: kernels widen right after the load;
- a load or store of an active lane outside the arguments of the launch raises.

The methods replaced are private to Triton; `test_interpreter_guard.py` tells when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_BUILDER = interpreter.InterpreterBuilder
_EXECUTOR = interpreter.GridExecutor
_REDUCTION = interpreter.ReduceScanOpInterface
_SELECT = np.where


@contextmanager
def guarded() -> Iterator[None]:
    """Replace the lenient methods of the interpreter, and put them back at the end."""
    spans = _Spans()
    replacements: list[tuple[type, str, Callable[[Any], Any]]] = [
        (_BUILDER, "cast_impl", _exact_cast),
        (_BUILDER, "create_fp_to_fp", _exact_rounding),
        (_BUILDER, "create_dot", _wide_dot),
        (_BUILDER, "unary_op", _refuse_bfloat16),
        (_BUILDER, "binary_op", _refuse_bfloat16),
        (_BUILDER, "ternary_op", _refuse_bfloat16),
        (_BUILDER, "create_fma", _refuse_bfloat16),
        (_REDUCTION, "apply", _refuse_reduction),
        (_EXECUTOR, "_init_args_hst", spans.record),
        (_BUILDER, "create_masked_load", spans.check_load),
        (_BUILDER, "create_masked_store", spans.check_store),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for (owner, name, original), (_, _, replace) in zip(originals, replacements, strict=True):
            setattr(owner, name, replace(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """Give the float32 values of a bfloat16 handle; leave others."""
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(
        (handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32
    )


def _narrow(values: np.ndarray) -> Any:
    """Round float32 values to bfloat16, to nearest and to even in a tie."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet_nan = np.uint16(0x7FC0)
    rounded = np.where(np.isnan(values), quiet_nan, rounded).reshape(values.shape)
    return interpreter.TensorHandle(rounded, tl.bfloat16)


def _exact_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        wanted = dtype.scalar
        if source.dtype.scalar == wanted:
            return original(self, source, dtype)
        if wanted == tl.bfloat16:
            return _narrow(_widen(source).data.astype(np.float32))
        wide = _widen(source)
        return wide if wide.dtype == wanted else original(self, wide, dtype)

    return cast_impl


def _exact_rounding(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
        nearest = interpreter._ir.ROUNDING_MODE.RTNE
        if dtype.scalar == tl.bfloat16 and rounding in (None, nearest):
            return self.cast_impl(source, dtype)
        return original(self, _widen(source), dtype, rounding)

    return create_fp_to_fp


def _wide_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, _widen(a), _widen(b), *rest)

    return create_dot


def _refuse_bfloat16(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *args: Any) -> Any:
        # tl.where moves bits and does no arithmetic.
        if args[-1] is not _SELECT and any(map(_is_bfloat16, args)):
            raise TypeError("arithmetic on bfloat16; cast to float32 right after the load")
        return original(self, *args)

    return operation


def _refuse_reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, inputs: Any) -> Any:
        operands = inputs if isinstance(inputs, tuple) else (inputs,)
        if any(_is_bfloat16(operand.handle) for operand in operands):
            raise TypeError("reduction of bfloat16; cast to float32 right after the load")
        return original(self, inputs)

    return apply


class _Spans:
    """The addresses that the arguments of the current launch occupy."""

    def __init__(self) -> None:
        self.starts = np.empty(0, np.uint64)
        self.ends = np.empty(0, np.uint64)

    def record(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def init_args(executor: Any, args: Any, kwargs: Any) -> Any:
            on_host, on_host_by_name = original(executor, args, kwargs)
            tensors = [
                value
                for value in (*on_host, *on_host_by_name.values())
                if isinstance(value, torch.Tensor) and value.numel()
            ]
            spans = sorted(map(_span, tensors))
            self.starts = np.array([start for start, _ in spans], np.uint64)
            # Spans may nest, as those of two views do: what begins at or before a span counts.
            ends = np.array([end for _, end in spans], np.uint64)
            self.ends = np.maximum.accumulate(ends) if len(ends) else ends
            return on_host, on_host_by_name

        return init_args

    def check_load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def create_masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._check(pointers, mask, "load")
            return original(builder, pointers, mask, *rest)

        return create_masked_load

    def check_store(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def create_masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any):
            self._check(pointers, mask, "store")
            return original(builder, pointers, value, mask, *rest)

        return create_masked_store

    def _check(self, pointers: Any, mask: Any, action: str) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        # The last span that starts at or before each address; 0 stands for none.
        place = np.searchsorted(self.starts, addresses, side="right")
        ends = np.concatenate((np.zeros(1, np.uint64), self.ends))[place]
        outside = addresses + size > ends
        if outside.any():
            raise IndexError(
                f"{action} out of bounds: {int(outside.sum())} of {outside.size} active lanes are"
                " outside every argument of the launch"
            )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
