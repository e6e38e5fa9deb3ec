"""What operators return may be written to, with a gradient or without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels_peft import fake_quantize, packed_linear, rotate, rotate_by_slot
from kernels_peft.packed_linear.op import dequantize
from tests.kernels_peft.packed_linears import adapter, adapters, make_packed

SIZES = torch.tensor([8, 12, 0])


def packed(x: Tensor) -> Tensor:
    return packed_linear(x, *make_packed(2), None, 2, *adapter(64, 96, 4))


def packed_by_slot(x: Tensor) -> Tensor:
    slots = torch.arange(len(x)) % 4 - 1
    return packed_linear(
        x,
        *make_packed(2),
        None,
        2,
        *adapters(3, 64, 96, 4),
        1.0,
        None,
        slots if x.dim() > 1 else None,
    )


def quantised(x: Tensor) -> Tensor:
    weight = torch.randn(x.shape[-1], 64)
    scale = x.detach().reshape(-1, x.shape[-1])[:1].t().abs().requires_grad_(x.requires_grad)
    return fake_quantize(weight, scale, torch.ones_like(scale), 2)


def turned_by_slot(x: Tensor) -> Tensor:
    return rotate_by_slot(x, torch.randn(3, 2, 64), SIZES, torch.arange(len(x)) % 4 - 1)


OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[int, ...]]]] = {
    "packed_linear": (packed, [(64,), (3, 64), (2, 20, 64)]),
    "packed_linear by slot": (packed_by_slot, [(5, 64), (4, 3, 64)]),
    "rotate": (lambda x: rotate(x, x.flatten()[:64], x.flatten()[:64], 8), [(64,), (2, 3, 64)]),
    "rotate_by_slot": (turned_by_slot, [(5, 64), (4, 3, 64), (4, 3, 2, 64)]),
    "one rotation": (
        lambda x: rotate_by_slot(x, torch.randn(1, 2, 64), SIZES[:1], torch.zeros(len(x)).long()),
        [(5, 64), (4, 3, 64)],
    ),
    "fake_quantize": (quantised, [(3, 64)]),
}


@pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for n, (_, shapes) in OPERATORS.items() for s in shapes], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_not_views(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    run, _ = OPERATORS[name]
    if name in ("rotate", "fake_quantize"):  # coefficients and scales are in float32
        dtype = torch.float32
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = run(x)
    assert y.requires_grad
    assert not y._is_view()
    y += 1
    y[..., 0] += x.sum()  # as PEFT adds an adapter to some rows
    y.sum().backward()
    with torch.no_grad():
        y = run(x)
    assert not y._is_view()
    y[..., 0] += x.sum()


def test_the_weight_is_not_a_view() -> None:
    assert not dequantize(*make_packed(2), 2)._is_view()
