"""The Triton kernels of the packed linear layer where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels_peft.packed_linear import dequantize_reference, packed_linear, packed_linear_rotated
from kernels_peft.packed_linear.kernel.tiles import FUSED_ROWS
from kernels_peft.packing import FORMATS
from tests.helpers import assert_close
from tests.kernels_peft.packed_linears import adapter, adapters, make_packed, row_by_row
from tests.kernels_peft.rotation_banks import bits as bit_pattern
from tests.kernels_peft.rotation_banks import make_bank

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows that are fused, in tiles of each height, and rows that take the library.
ROWS = (1, 17, 33, FUSED_ROWS, FUSED_ROWS + 3)
K, N, GROUPS = 256, 352, 4
NAMES = ("x", "bias", "lora_a", "lora_b")


def _draw(rows: int, dtype: torch.dtype, bits: int, count: int = 0) -> tuple[Any, ...]:
    """Draw x, a packed weight, a bias, and an adapter or a stack of them."""
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, K).to(dtype), torch.randn(N).to(dtype)
    lora = adapters(count, K, N, 20, dtype) if count else adapter(K, N, 20, dtype)
    return x, make_packed(bits, K, N, GROUPS), bias, *lora


def _on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [t.cuda() for t in tensors]


def _slots(rows: int, count: int) -> Tensor:
    return torch.arange(rows).mul(3).add(1) % (count + 1) - 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_slot", [False, True], ids=["one", "by-slot"])
@pytest.mark.parametrize("bits", FORMATS)
def test_agrees_with_double_precision_and_with_the_cpu(
    bits: int, by_slot: bool, dtype: torch.dtype, rows: int
) -> None:
    x, packed, bias, lora_a, lora_b = _draw(rows, dtype, bits, 3 if by_slot else 0)
    slots = _slots(rows, 3) if by_slot else None
    grad, results = torch.randn(rows, N).to(dtype), []
    for device in ("cuda", "cpu"):
        leaves = [t.to(device).requires_grad_() for t in (x, bias, lora_a, lora_b)]
        given = [t.to(device) for t in packed]
        named = None if slots is None else slots.to(device)
        y = packed_linear(leaves[0], *given, leaves[1], bits, *leaves[2:], 0.5, None, named)
        gradients = torch.autograd.grad(y, leaves, grad.to(device))
        results.append([t.detach().cpu() for t in (y, *gradients)])
    for one, other, name in zip(*results, ("y", *NAMES), strict=True):
        assert_close(one, other, name)
    weight = dequantize_reference(*packed, bits, dtype)
    stacks = (lora_a, lora_b) if by_slot else (lora_a[None], lora_b[None])
    every = torch.zeros(rows, dtype=torch.int64) if slots is None else slots
    assert_close(results[0][0], row_by_row(x, weight, *stacks, 0.5, every) + bias.double(), "y")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_adapter_are_bit_equal_whatever_others_hold(
    dtype: torch.dtype, rows: int
) -> None:
    x, packed, bias, lora_a, lora_b = _draw(rows, dtype, 2, 3)
    lora_a[1], lora_b[1] = float("nan"), float("inf")
    slots = _slots(rows, 4)  # 3 is past the stack
    x, bias, lora_a, lora_b, named, *packed = _on_gpu(x, bias, lora_a, lora_b, slots, *packed)
    y = packed_linear(x, *packed, bias, 2, lora_a, lora_b, -0.5, None, named).cpu()
    bare = packed_linear(x, *packed, bias, 2).cpu()
    absent = (slots < 0) | (slots > 2)
    assert torch.equal(bit_pattern(y[absent]), bit_pattern(bare[absent]))
    assert y[(slots == 0) | (slots == 2)].isfinite().all()
    assert y[slots == 1].isnan().all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_slot", [False, True], ids=["one", "by-slot"])
def test_the_rotation_is_that_of_the_finished_layer(
    by_slot: bool, dtype: torch.dtype, rows: int
) -> None:
    x, packed, bias, lora_a, lora_b = _draw(rows, dtype, 3, 3 if by_slot else 0)
    turns = torch.arange(rows).add(1) % 7 - 1
    bank = make_bank((rows, N), [8, 64, N, 2, 0, 2 * N], turns, dtype)
    slots = _slots(rows, 3) if by_slot else None
    results = []
    for device in ("cuda", "cpu"):
        given, a, b = [t.to(device) for t in (*packed, bias)], lora_a.to(device), lora_b.to(device)
        named = None if slots is None else slots.to(device)
        layer = (x.to(device), *given, 3, a, b, 0.5, None, named)
        rotation = dict(
            zip(
                ("table", "group_sizes", "rotation_slots"),
                (t.to(device) for t in bank[1:4]),
                strict=True,
            )
        )
        z, y = packed_linear_rotated(*layer, **rotation), packed_linear(*layer)
        alone = (turns < 0) | (turns >= 4)
        assert torch.equal(bit_pattern(z.cpu()[alone]), bit_pattern(y.cpu()[alone]))
        results.append(z.cpu())
    assert_close(*results, "z")


def test_runs_are_bit_equal() -> None:
    x, packed, bias, lora_a, lora_b = _draw(33, torch.bfloat16, 2, 3)
    x, bias, lora_a, lora_b, slots, *packed = _on_gpu(
        x, bias, lora_a, lora_b, _slots(33, 3), *packed
    )
    leaves = [t.requires_grad_() for t in (x, bias, lora_a, lora_b)]
    results = []
    for _ in range(2):
        y = packed_linear(x, *packed, bias, 2, lora_a, lora_b, 0.5, None, slots)
        results.append((y, *torch.autograd.grad(y, leaves, y.detach())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [32, FUSED_ROWS + 3], ids=["few", "many"])
def test_nothing_waits_for_the_device_and_a_graph_replays_with_other_slots(rows: int) -> None:
    x, packed, bias, lora_a, lora_b = _draw(rows, torch.bfloat16, 2, 8)
    bank = make_bank((rows, N), [8] * 8, torch.arange(rows) % 8, torch.bfloat16)
    x, bias, lora_a, lora_b, grad, *packed = _on_gpu(x, bias, lora_a, lora_b, bank.grad, *packed)
    # Distinct slots of both kinds, one of them for all rows, none.
    table, group_sizes, slots, turns = _on_gpu(
        bank.table, bank.group_sizes, torch.arange(rows) % 8, bank.slots
    )
    backward = torch.ops.kernels_peft.low_rank_by_slot_backward.default

    def step() -> tuple[Tensor, ...]:
        layer = (x, *packed, bias, 2, lora_a, lora_b, 0.5, None, slots)
        rotation = {"table": table, "group_sizes": group_sizes, "rotation_slots": turns}
        return (
            packed_linear(*layer),
            packed_linear_rotated(*layer, **rotation),
            *backward(grad, x, lora_a, lora_b, 0.5, slots, True),
        )

    # Compilation has to be over before the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    others = (torch.randint(-1, 8, (rows,)), torch.full((rows,), 5), torch.full((rows,), -1))
    for sizes, other in zip((64, 2, 0), others, strict=True):
        slots.copy_(other)
        turns.copy_(other.flip(0))
        group_sizes.fill_(sizes)
        lora_b.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        for replayed, eager in zip(captured, step(), strict=True):
            assert torch.equal(replayed, eager)
