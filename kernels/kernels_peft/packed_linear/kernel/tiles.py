"""How a product is shared out among the programs of a device.

The choice depends on the shapes and on the number of processors, and is made anew for each launch:
nothing is tried out. No tile has been timed on a device. One that has belongs in a dict in this
file, from the name that `torch.cuda.get_device_name` gives to rows as those of `FUSED_TILES`, which
`fused_tile` then asks before the rows that serve every device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The share of a program: rows of x, and at most `inputs` x `outputs` of the weight a step."""

    rows: int
    inputs: int
    outputs: int
    warps: int
    stages: int


# (least number of rows, tile); the last one that applies is taken. More rows take the library.
FUSED_TILES = (
    (0, Tile(rows=16, inputs=128, outputs=64, warps=4, stages=3)),
    (17, Tile(rows=32, inputs=64, outputs=64, warps=4, stages=3)),
    (33, Tile(rows=64, inputs=64, outputs=64, warps=4, stages=3)),
)
FUSED_ROWS = 64
# Without matrix units a tile of float32 fills the registers.
FUSED_DTYPES = (torch.float16, torch.bfloat16)
LOW_TILE = Tile(rows=64, inputs=64, outputs=32, warps=4, stages=2)
FINISH_TILE = Tile(rows=16, inputs=32, outputs=64, warps=4, stages=1)
DEQUANTIZE_TILE = Tile(rows=0, inputs=32, outputs=128, warps=4, stages=1)
# A sum is cut until every processor has about two programs, but not below a number of steps for
# each, as a part costs an output 4 bytes written and read.
PROGRAMS_A_PROCESSOR = 2
LEAST_STEPS = 4


def fused_tile(rows: int) -> Tile:
    """Give the tile of a product that unpacks codes in registers."""
    return next(tile for least, tile in reversed(FUSED_TILES) if least <= rows)


def cut(steps: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Cut sums of `steps` for `blocks` tiles of results: how many parts, and the steps of each."""
    wanted = -(-PROGRAMS_A_PROCESSOR * processors(device) // blocks)
    each = -(-steps // max(1, min(wanted, steps // LEAST_STEPS)))
    return -(-steps // each), each


@functools.cache
def processors(device: torch.device) -> int:
    """Give the number of processors (compute units) of a GPU; 1 for a device without them."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
