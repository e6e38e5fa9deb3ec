"""Multiply with a weight of packed low-bit codes."""

from kernels_peft.packed_linear.checks import check_packed
from kernels_peft.packed_linear.op import dequantize, packed_linear, packed_linear_rotated
from kernels_peft.packed_linear.reference import (
    dequantize_reference,
    packed_linear_reference,
    packed_sizes,
)

__all__ = [
    "check_packed",
    "dequantize",
    "dequantize_reference",
    "packed_linear",
    "packed_linear_reference",
    "packed_linear_rotated",
    "packed_sizes",
]
