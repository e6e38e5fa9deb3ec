"""Tensor operators of RoAd and ApiQ: plain torch everywhere, Triton on CUDA and ROCm.

An operator knows tensors, not methods. Each is a folder: `reference.py` defines what is correct,
`op.py` registers it with torch, `kernel.py` or `kernel/` holds the Triton functions, `blocked.py`
the fast path without a GPU, `README.md` the mathematics. The package imports without triton.
"""

from kernels_peft.fake_quantization import fake_quantize, fake_quantize_reference
from kernels_peft.packed_linear import (
    dequantize,
    dequantize_reference,
    packed_linear,
    packed_linear_reference,
    packed_linear_rotated,
)
from kernels_peft.rotation import determinants, invert, rotate, rotate_reference
from kernels_peft.rotation_bank import rotate_by_slot, rotate_by_slot_reference

__all__ = [
    "dequantize",
    "dequantize_reference",
    "determinants",
    "fake_quantize",
    "fake_quantize_reference",
    "invert",
    "packed_linear",
    "packed_linear_reference",
    "packed_linear_rotated",
    "rotate",
    "rotate_by_slot",
    "rotate_by_slot_reference",
    "rotate_reference",
]
