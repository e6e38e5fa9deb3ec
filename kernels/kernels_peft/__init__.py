"""Tensor operators of RoAd and ApiQ: plain torch everywhere, Triton on CUDA and ROCm.

An operator knows tensors, not methods. Each is a folder: `reference.py` defines what is correct,
`op.py` registers it with torch, `kernel.py` holds the Triton functions, `blocked.py` the fast path
without a GPU, `README.md` the mathematics. The package imports without triton.
"""

from kernels_peft.rotation import determinants, invert, rotate, rotate_reference

__all__ = ["determinants", "invert", "rotate", "rotate_reference"]
