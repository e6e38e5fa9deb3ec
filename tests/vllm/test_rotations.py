"""The operator that rotates rows inside vLLM: eager, and compiled as vLLM does for GPUs.

On a CPU vLLM compiles no model that serves adapters.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels_peft.rotation import rotate
from road_peft.vllm_plugin import rotations

WIDTHS = (32, 16)
GROUPS = ((8, 2, 0), (4, 0, 16))  # of each slice, by slot


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    rotations.install()


def held(slots: list[int], active: bool = True) -> rotations.LayerRotations:
    draw = torch.Generator().manual_seed(0)
    return rotations.LayerRotations(
        [torch.randn(3, 2, width, generator=draw) for width in WIDTHS],
        [torch.tensor(sizes, dtype=torch.int32) for sizes in GROUPS],
        torch.tensor([*slots, *[-1] * 8], dtype=torch.int32),
        torch.tensor([active]),
    )


def run(y: Tensor, at: rotations.LayerRotations) -> Tensor:
    y = y * 1.0
    torch.ops.road_peft.rotate_rows(y, at.tables, at.group_sizes, at.slots, at.active)
    return y


def compiled_run() -> Any:
    return torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)


def by_hand(y: Tensor, at: rotations.LayerRotations) -> Tensor:
    out = y.clone()
    for row, slot in enumerate(at.slots[: len(y)].tolist()):
        start = 0
        for width, table, sizes in zip(WIDTHS, at.tables, at.group_sizes, strict=True):
            cut = slice(start, start + width)
            if slot >= 0 and sizes[slot]:
                out[row, cut] = rotate(y[row : row + 1, cut], *table[slot], int(sizes[slot]))[0]
            start += width
    return out


@pytest.mark.parametrize("compiled", [False, True])
def test_every_row_by_its_slot(compiled: bool) -> None:
    call = (
        torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else run
    )
    for slots in ([0, 1, 2, -1, 2, 0], [2], [-1, -1, 1]):
        y, at = torch.randn(len(slots), sum(WIDTHS)), held(slots)
        torch.testing.assert_close(call(y, at), by_hand(y, at))


def test_the_compiled_graph_reads_whether_a_batch_rotates() -> None:
    call = compiled_run()
    y, at = torch.randn(4, sum(WIDTHS)), held([0, 1, 2, 0], active=False)
    assert torch.equal(call(y, at), y)
    at.active[0] = True
    torch.testing.assert_close(call(y, at), by_hand(y, at))


def test_a_slot_that_is_written_anew_keeps_nothing() -> None:
    y, at = torch.randn(2, sum(WIDTHS)), held([0, 0])
    pair = torch.randn(2, WIDTHS[0])
    at.write(0, [rotations.Shard(pair, 4), None])
    expected = torch.cat((rotate(y[:, :32], *pair, 4), y[:, 32:]), 1)
    torch.testing.assert_close(run(y, at), expected)
    at.write(0, None)
    assert torch.equal(run(y, at), y)
