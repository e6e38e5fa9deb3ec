"""Rotate and scale pairs of features, every row by coefficients of its own."""

from kernels_peft.rotation_bank.op import rotate_by_slot
from kernels_peft.rotation_bank.reference import rotate_by_slot_reference

__all__ = ["rotate_by_slot", "rotate_by_slot_reference"]
