"""Rounding to a grid and back in Triton: one launch for the values, one for the gradient.

A program owns a tile of whole groups and walks along them, a span at a time if they are longer than
the tile is wide. It sums over a group by itself, so runs are bit-equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_peft.fake_quantization.blocked import (
    fake_quantize_backward_blocked,
    fake_quantize_blocked,
)
from kernels_peft.rotation.kernel import DTYPES, FP_FUSION


class Tile(NamedTuple):
    """The weights that a program holds at a time, a power of two."""

    weights: int
    warps: int

    def sides(self, group_size: int) -> tuple[int, int]:
        """Give the tile as groups x weights of a group."""
        span = min(triton.next_power_of_2(group_size), self.weights)
        return self.weights // span, span


# A program is one warp: sums over a group stay in its registers, and each thread has 16 weights in
# flight, four loads of 16 bytes in float32.
TILE = Tile(weights=512, warps=1)


def fake_quantize_triton(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Compute what `fake_quantize_blocked` computes, on the device of `weight`.

    Shapes:
        weight: (N, K). scale, zero: (N, K / g). Returns (N, K), contiguous.
    """
    if not {weight.dtype, dtype} <= set(DTYPES):
        return fake_quantize_blocked(weight, scale, zero, bits, dtype)
    out = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    if weight.numel():
        _launch(_fake_quantize_fwd_kernel, scale, zero, bits, weight, out)
    return out


def fake_quantize_backward_triton(
    grad: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> Tensor:
    """Compute what `fake_quantize_backward_blocked` computes, on the device of `weight`.

    Shapes:
        grad, weight: (N, K). scale, zero: (N, K / g). Returns (N, K / g), contiguous, float32.
    """
    if not {weight.dtype, grad.dtype} <= set(DTYPES):
        return fake_quantize_backward_blocked(grad, weight, scale, zero, bits)
    if not weight.numel():
        return torch.zeros_like(scale, memory_format=torch.contiguous_format)
    out = torch.empty_like(scale, memory_format=torch.contiguous_format)
    _launch(_fake_quantize_bwd_kernel, scale, zero, bits, weight, grad, out)
    return out


def _launch(kernel: triton.JITFunction, scale: Tensor, zero: Tensor, bits: int, *tensors: Tensor):
    """Run a kernel over all groups; its pointers are `tensors` and then scale and zero."""
    groups, group_size = scale.numel(), tensors[0].shape[-1] // scale.shape[-1]
    block_m, block_k = TILE.sides(group_size)
    with torch.cuda.device_of(scale):
        kernel[(triton.cdiv(groups, block_m),)](
            *(t.contiguous() for t in (*tensors, scale, zero)),
            groups,
            HIGHEST=2**bits - 1,
            GROUP=group_size,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=TILE.warps,
            enable_fp_fusion=FP_FUSION,
        )


@triton.jit
def _fake_quantize_fwd_kernel(
    weight_ptr,
    out_ptr,
    scale_ptr,
    zero_ptr,
    groups,
    HIGHEST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    starts, live, scale, zero = _load_groups(scale_ptr, zero_ptr, groups, GROUP, BLOCK_M)
    for first in range(0, GROUP, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)[None, :]
        mask = live & (columns < GROUP)
        weight = tl.load(weight_ptr + starts + columns, mask=mask, other=0.0).to(tl.float32)
        code = _round(tl.div_rn(weight, scale)) + zero
        value = (_hold(code, HIGHEST) - zero) * scale
        tl.store(out_ptr + starts + columns, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fake_quantize_bwd_kernel(
    weight_ptr,
    grad_ptr,
    out_ptr,
    scale_ptr,
    zero_ptr,
    groups,
    HIGHEST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    starts, live, scale, zero = _load_groups(scale_ptr, zero_ptr, groups, GROUP, BLOCK_M)
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, GROUP, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)[None, :]
        mask = live & (columns < GROUP)
        weight = tl.load(weight_ptr + starts + columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + starts + columns, mask=mask, other=0.0).to(tl.float32)
        ratio = tl.div_rn(weight, scale)
        code = _round(ratio) + zero
        held = _hold(code, HIGHEST)
        sums += grad * (held - zero - tl.where(code == held, ratio, 0.0))
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    tl.store(out_ptr + rows, tl.sum(sums, 1, keep_dims=True), mask=live)


@triton.jit
def _load_groups(scale_ptr, zero_ptr, groups, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Give where each group of this program starts, whether it exists, its scale and zero point."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    live = rows < groups
    scale = tl.load(scale_ptr + rows, mask=live, other=1.0)
    zero = tl.load(zero_ptr + rows, mask=live, other=0.0)
    return rows.to(tl.int64) * GROUP, live, scale, zero


@triton.jit
def _round(x):
    """Round to the nearest whole number, halves to even.

    Near 3 * 2**22 the floats are the whole numbers, so the addition rounds. What is so large that
    it gets there inexactly lies outside every grid all the same.
    """
    SHIFT: tl.constexpr = 12582912.0
    return (x + SHIFT) - SHIFT


@triton.jit
def _hold(code, HIGHEST: tl.constexpr):
    """Move what lies outside the grid to its end; a NaN stays."""
    # HIGHEST is a whole number, which a minimum would take for an integer.
    high = tl.full((1, 1), HIGHEST, tl.float32)
    return tl.clamp(code, tl.zeros((1, 1), tl.float32), high, propagate_nan=tl.PropagateNan.ALL)
