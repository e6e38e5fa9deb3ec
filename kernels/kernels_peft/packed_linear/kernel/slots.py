"""Slots of rows in Triton. A tile takes one turn for each distinct slot of its rows, mostly one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_slots(slots_ptr, rows, M, rows_per_slot, S):
    """Give the slot of each row, and -1 where there is none: negative, S or more, past M rows."""
    slots = tl.load(slots_ptr + rows // rows_per_slot, mask=rows < M, other=-1)
    return tl.where((slots >= 0) & (slots < S), slots, -1).to(tl.int32)
