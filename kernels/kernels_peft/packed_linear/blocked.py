"""The packed linear layer in plain torch without autograd, a block of the weight at a time.

A block of the weight is written out in three passes over its elements. A window of codes is put in
the mantissa of 2^23, so that masking one code, at bit s of its window, leaves the float32

    2^23 + code 2^s

without a conversion from integers. One subtraction gives (code - zero) 2^s, exactly, and one
product with scale / 2^s rounds as (code - zero) scale does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_peft.outputs import in_shape
from kernels_peft.packed_linear.reference import (
    dequantize_reference,
    packed_linear_reference,
    packed_sizes,
)
from kernels_peft.packing import FORMATS, RUN, windows

# Larger blocks would not stay in the cache, smaller ones cost their calls.
BLOCK_ELEMENTS = 1 << 20
_IMPLICIT = 1 << 23  # a float32 of this size counts in ones
_IMPLICIT_BITS = 0x4B000000
LEAST_COLUMNS = 128  # shorter rows of a block cost more than what leaves the cache
LEAST_ROWS_BFLOAT16 = 16


def packed_linear_blocked(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    lora_x: Tensor | None = None,
) -> Tensor:
    """Compute what `packed_linear_reference` computes.

    Shapes:
        x: (..., K). bias: (N,). lora_a: (r, K). lora_b: (N, r). lora_x: (..., K). Returns (..., N).
    """
    if not _served(x.dtype, scales, qweight, bits):
        return packed_linear_reference(
            x, qweight, qzeros, scales, bias, bits, lora_a, lora_b, scale, lora_x
        )
    K, N = packed_sizes(qweight, bits)
    rows = _rows(x)
    y = rows.new_empty(len(rows), N)
    codes = _Codes.of(qweight, qzeros, scales, bits)
    for columns in _cut(0, N, max(BLOCK_ELEMENTS // K // RUN * RUN, LEAST_COLUMNS)):
        weight = codes.block(slice(0, K), columns).to(rows.dtype)
        torch.mm(rows, weight, out=y[:, columns])
    if bias is not None:
        y += bias
    if lora_a is not None and lora_b is not None:
        low = F.linear(rows if lora_x is None else _rows(lora_x), lora_a.to(rows.dtype))
        y.addmm_(low, lora_b.to(rows.dtype).t(), alpha=scale)
    return in_shape(y.to(x.dtype), (*x.shape[:-1], N))


def packed_linear_backward_blocked(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    d_low: Tensor | None = None,
    lora_a: Tensor | None = None,
) -> Tensor:
    """Give the gradient of x: that of the codes, and `d_low` A of the low-rank branch if given.

    Shapes:
        grad: (..., N). d_low: (..., r). lora_a: (r, K). Returns (..., K).
    """
    K, N = packed_sizes(qweight, bits)
    if _served(grad.dtype, scales, qweight, bits):
        rows = _rows(grad)
        dx = rows.new_empty(len(rows), K)
        codes = _Codes.of(qweight, qzeros, scales, bits)
        for inputs in _blocks(K, N, K // scales.shape[0]):
            weight = codes.block(inputs, slice(0, N)).to(rows.dtype)
            torch.mm(rows, weight.t(), out=dx[:, inputs])
    else:
        weight = dequantize_reference(qweight, qzeros, scales, bits, grad.dtype)
        dx = grad.reshape(-1, N) @ weight.t()
    if d_low is not None and lora_a is not None:
        low = d_low.reshape(len(dx), lora_a.shape[0]).to(dx.dtype)
        dx.addmm_(low, lora_a.to(dx.dtype))
    return in_shape(dx.to(grad.dtype), (*grad.shape[:-1], K))


def dequantize_blocked(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Compute what `dequantize_reference` computes, bit for bit.

    Shapes:
        Returns (K, N).
    """
    if not _served(dtype, scales, qweight, bits):
        return dequantize_reference(qweight, qzeros, scales, bits, dtype)
    K, N = packed_sizes(qweight, bits)
    weight = scales.new_empty((K, N), dtype=dtype)
    codes = _Codes.of(qweight, qzeros, scales, bits)
    for inputs in _blocks(K, N, K // scales.shape[0]):
        weight[inputs] = codes.block(inputs, slice(0, N))
    return weight


def _served(dtype: torch.dtype, scales: Tensor, qweight: Tensor, bits: int) -> bool:
    """Say whether the blocks serve: float32 is wide enough, and a group is whole words."""
    K, N = packed_sizes(qweight, bits)
    return torch.float64 not in (dtype, scales.dtype) and K // scales.shape[0] % RUN == 0 and N > 0


def _rows(x: Tensor) -> Tensor:
    """Give x as a matrix in the dtype of the product.

    Of 16-bit dtypes, a CPU multiplies float16 slowly, and bfloat16 too if there are few rows.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    narrow = x.dtype == torch.bfloat16 and len(rows) >= LEAST_ROWS_BFLOAT16
    return rows if narrow else rows.float()


class _Codes(NamedTuple):
    """What every block of one weight needs; `powers` are the values of the places in a window."""

    bits: int
    words: Tensor  # (K bits / 32, N)
    masks: Tensor  # (places, 1), int32
    powers: Tensor  # (places, 1)
    zeros: Tensor  # (G, 1, N)
    scales: Tensor  # (G, 1, N)
    buffer: Tensor

    @classmethod
    def of(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int) -> _Codes:
        shifts = torch.arange(
            0, bits * FORMATS[bits].window, bits, dtype=torch.int32, device=qweight.device
        ).unsqueeze(1)
        highest = FORMATS[bits].levels - 1
        zeros = (windows(qzeros.t(), bits).unsqueeze(1) >> shifts) & highest
        return cls(
            bits,
            qweight,
            (highest << shifts) | _IMPLICIT_BITS,
            (1 << shifts).float(),
            zeros.flatten(0, 1).t().unsqueeze(1).float().contiguous(),
            scales.float().unsqueeze(1),
            qweight.new_empty(0),
        )

    def block(self, inputs: slice, columns: slice) -> Tensor:
        """Write out `inputs` of outputs `columns` in float32, where the next block will lie.

        `inputs` is whole groups or lies in one.
        """
        K, G = self.words.shape[0] // self.bits * RUN, len(self.scales)
        words = self.words[
            inputs.start * self.bits // RUN : inputs.stop * self.bits // RUN, columns
        ]
        cut = windows(words, self.bits).bitwise_or_(_IMPLICIT_BITS)
        shape = (len(cut), len(self.masks), cut.shape[1])
        size = math.prod(shape)
        if self.buffer.numel() < size:  # fresh memory costs more than the passes over it
            self.buffer.resize_(size)
        codes = self.buffer[:size].view(shape)
        torch.bitwise_and(cut.unsqueeze(1), self.masks, out=codes)
        groups = slice(inputs.start * G // K, -(-inputs.stop * G // K))
        zeros = (self.zeros[groups, :, columns] * self.powers).add_(_IMPLICIT)
        scales = self.scales[groups, :, columns] / self.powers
        values = codes.view(torch.float32).unflatten(0, (len(scales), -1))
        values.sub_(zeros.unsqueeze(1)).mul_(scales.unsqueeze(1))
        return values.view(-1, shape[2])


def _blocks(K: int, N: int, group: int) -> Iterator[slice]:
    """Cut K inputs of N outputs into blocks: whole groups, or parts of a group that is longer."""
    step = max(BLOCK_ELEMENTS // N // RUN * RUN, RUN)
    if group <= step:
        yield from _cut(0, K, step // group * group)
    else:
        for start in range(0, K, group):
            yield from _cut(start, start + group, step)


def _cut(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
