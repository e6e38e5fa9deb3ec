"""Operators under `torch.autocast`: cast as torch's own linear layer, and exact inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels_peft import fake_quantize, packed_linear, packed_linear_rotated, rotate, rotate_by_slot
from tests.kernels_peft.packed_linears import adapter, adapters, make_packed

OPERATORS: Any = torch.ops.kernels_peft
DTYPES = (torch.bfloat16, torch.float16)


def under(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_slot", [False, True])
@pytest.mark.parametrize("rows", [2, 40])
def test_inputs_are_cast_before_the_layer(rows: int, by_slot: bool, dtype: torch.dtype) -> None:
    packed = make_packed(2)
    x, lora_x, bias = leaves((rows, 64), (rows, 64), (96,))
    pair = adapters(3, 64, 96, 4) if by_slot else adapter(64, 96, 4)
    lora_a, lora_b = (t.requires_grad_() for t in pair)
    slots = torch.arange(rows) % 4 - 1 if by_slot else None
    given = (x, bias, lora_a, lora_b, lora_x)

    def layer(cast: Callable[[Tensor], Tensor]) -> Tensor:
        ends = (cast(lora_a), cast(lora_b), 0.5, cast(lora_x), slots)
        return packed_linear(cast(x), *packed, cast(bias), 2, *ends)

    wanted = layer(lambda t: t.to(dtype))
    slopes = torch.autograd.grad(wanted, given, wanted.detach())
    with under(dtype):
        y = layer(lambda t: t)
        inside = torch.autograd.grad(y, given, wanted.detach(), retain_graph=True)
    outside = torch.autograd.grad(y, given, wanted.detach())
    assert y.dtype == dtype
    assert torch.equal(y, wanted)
    for found in (inside, outside):
        assert all(torch.equal(a, b) for a, b in zip(found, slopes, strict=True))


def test_the_rotated_layer_is_cast_alike() -> None:
    packed, (x, table) = make_packed(2), leaves((3, 64), (2, 2, 96))
    slots = torch.tensor([1, -1, 0])
    turn: Any = {"table": table, "group_sizes": torch.tensor([8, 32]), "rotation_slots": slots}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            wanted = packed_linear_rotated(x.bfloat16(), *packed, None, 2, **turn)
            with under(torch.bfloat16):
                y = packed_linear_rotated(x, *packed, None, 2, **turn)
        assert torch.equal(y, wanted)


def test_float64_and_meta_tensors_are_left_alone() -> None:
    packed, x = make_packed(2), torch.randn(3, 64, dtype=torch.float64)
    on_meta = [t.to("meta") for t in (x, *packed)]
    with under(torch.bfloat16):
        assert packed_linear(x, *packed, None, 2).dtype == torch.float64
        assert packed_linear(*on_meta, None, 2).dtype == torch.float64  # type: ignore[arg-type]


def test_autocast_is_part_of_a_graph() -> None:
    packed, (x,) = make_packed(3), leaves((3, 64))
    lora_a, lora_b = (t.requires_grad_() for t in adapter(64, 96, 4))

    def run() -> tuple[Tensor, ...]:
        y = packed_linear(x, *packed, None, 3, lora_a, lora_b)
        return y, *torch.autograd.grad(y, (x, lora_a, lora_b), torch.ones_like(y))

    torch._dynamo.reset()
    layer = torch.compile(packed_linear, fullgraph=True, backend="aot_eager")
    with under(torch.bfloat16):
        wanted = run()
        y = layer(x, *packed, None, 3, lora_a, lora_b)
    found = (y, *torch.autograd.grad(y, (x, lora_a, lora_b), torch.ones_like(y)))
    torch._dynamo.reset()
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)


def operators() -> dict[str, Callable[[], Tensor]]:
    packed, (x, y) = make_packed(2), leaves((3, 64), (3, 96))
    (lora_a, lora_b), slots = adapter(64, 96, 4), torch.tensor([0, -1, 1])
    coefficients, table = leaves((64,), (64,)), leaves((2, 2, 64))[0]
    turn = (table.detach(), torch.tensor([8, 32]), slots)
    low = torch.randn(3, 4)
    layer = (*packed, None, 2, lora_a, lora_b, 0.5, None, None)
    return {
        "packed_linear": lambda: OPERATORS.packed_linear(x, *layer),
        "packed_linear_backward": lambda: OPERATORS.packed_linear_backward(
            y.detach(), *packed, 2, low, lora_a
        ),
        "rotate": lambda: rotate(x, *coefficients, 8),
        "rotate_by_slot": lambda: rotate_by_slot(x, *turn),
        "fake_quantize": lambda: fake_quantize(
            x.detach(), x.detach()[:, :2].abs(), torch.ones(3, 2), 2
        ),
    }


@pytest.mark.parametrize("name", operators())
def test_an_operator_computes_in_the_dtype_it_is_given(name: str) -> None:
    run = operators()[name]
    wanted = run()
    with under(torch.bfloat16):
        found = run()
    assert found.dtype == wanted.dtype == torch.float32
    assert torch.equal(found, wanted)
