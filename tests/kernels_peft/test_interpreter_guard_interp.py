"""The guard is itself code, and it replaces private methods: every promise of it is tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels_peft.interpreter_guard import guarded

pytestmark = pytest.mark.interp


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes).to(out_ptr.dtype.element_ty))


@triton.jit
def _add_kernel(x_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    tl.store(out_ptr + lanes, x + x)


@triton.jit
def _compare_kernel(x_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    tl.store(out_ptr + lanes, (x > tl.flip(x)).to(tl.float32))


@triton.jit
def _negate_kernel(x_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out_ptr + lanes, -tl.load(x_ptr + lanes))


@triton.jit
def _sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


@triton.jit
def _where_kernel(x_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    tl.store(out_ptr + lanes, tl.where(lanes % 2 == 0, x, tl.flip(x)))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, shift, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes + shift, mask=lanes < size, other=0.0)
    tl.store(out_ptr + lanes, x, mask=lanes < size)


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    with guarded():
        yield


def test_casts_to_bfloat16_round_to_nearest_even() -> None:
    # Ties to even in both directions, a plain value, the largest finite and non-finite ones.
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.1, -0.1, 3.4e38, float("inf"), 0.0, 1e-40])
    out = torch.empty(8, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, N=8)
    assert torch.equal(out, x.bfloat16())


def test_casts_keep_nan() -> None:
    x = torch.tensor([float("nan"), 1.0])
    out = torch.empty(2, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, N=2)
    assert torch.equal(out.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_casts_from_bfloat16_are_exact(dtype: torch.dtype) -> None:
    x = (torch.randn(64) * 100).bfloat16()
    out = torch.empty(64, dtype=dtype)
    _cast_kernel[(1,)](x, out, N=64)
    assert torch.equal(out, x.to(dtype))


def test_casts_from_float16_to_bfloat16_are_exact() -> None:
    x = torch.randn(64).half()
    out = torch.empty(64, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, N=64)
    assert torch.equal(out, x.bfloat16())


def test_dot_of_bfloat16_multiplies_values() -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_where_of_bfloat16_is_allowed() -> None:
    x = torch.randn(8).bfloat16()
    out = torch.empty_like(x)
    _where_kernel[(1,)](x, out, N=8)
    assert torch.equal(out, torch.where(torch.arange(8) % 2 == 0, x, x.flip(0)))


@pytest.mark.parametrize(
    "kernel", [_add_kernel, _compare_kernel, _negate_kernel, _sum_kernel], ids=lambda k: k.__name__
)
def test_arithmetic_on_bfloat16_is_refused(kernel: triton.JITFunction) -> None:
    with pytest.raises(interpreter.InterpreterError, match="bfloat16; cast to float32"):
        kernel[(1,)](torch.ones(8).bfloat16(), torch.empty(8), N=8)
    kernel[(1,)](torch.ones(8), torch.empty(8), N=8)


@pytest.mark.parametrize("shift", [-1, 1, 1 << 20])
def test_loads_out_of_bounds_are_refused(shift: int) -> None:
    with pytest.raises(interpreter.InterpreterError, match="load out of bounds"):
        _copy_kernel[(1,)](torch.zeros(8), torch.empty(8), 8, shift, N=8)


def test_stores_out_of_bounds_are_refused() -> None:
    with pytest.raises(interpreter.InterpreterError, match="store out of bounds: 1 of 8"):
        _copy_kernel[(1,)](torch.zeros(8), torch.empty(7), 8, 0, N=8)


def test_inactive_lanes_may_point_anywhere() -> None:
    x, out = torch.randn(5), torch.empty(5)
    _copy_kernel[(1,)](x, out, 5, 0, N=8)
    assert torch.equal(out, x)


def test_bounds_are_those_of_the_view() -> None:
    whole = torch.zeros(16)
    with pytest.raises(interpreter.InterpreterError, match="load out of bounds"):
        _copy_kernel[(1,)](whole[:8], torch.empty(8), 8, 1, N=8)


def test_the_guard_leaves_no_trace() -> None:
    inside = interpreter.InterpreterBuilder.cast_impl
    with guarded():
        assert interpreter.InterpreterBuilder.cast_impl is not inside
    assert interpreter.InterpreterBuilder.cast_impl is inside
