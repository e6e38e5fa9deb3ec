"""Rotate and scale pairs of features."""

from kernels_peft.rotation.op import rotate
from kernels_peft.rotation.reference import determinants, invert, rotate_reference

__all__ = ["determinants", "invert", "rotate", "rotate_reference"]
