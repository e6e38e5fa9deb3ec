"""The packed linear layer in Triton, for CUDA and ROCm."""

from kernels_peft.packed_linear.kernel.dequantization import dequantize_triton
from kernels_peft.packed_linear.kernel.layer import (
    low_rank_by_slot_backward_triton,
    packed_linear_backward_triton,
    packed_linear_rotated_triton,
    packed_linear_triton,
)

__all__ = [
    "dequantize_triton",
    "low_rank_by_slot_backward_triton",
    "packed_linear_backward_triton",
    "packed_linear_rotated_triton",
    "packed_linear_triton",
]
