"""Rounding to a grid: values by hand, the closed form of the gradient, and autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels_peft import fake_quantize, fake_quantize_reference
from tests.helpers import assert_close


def inputs(N: int = 6, K: int = 16, g: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(N, K, dtype=torch.float64)
    scale = torch.rand(N, K // g, dtype=torch.float64) * 0.5 + 0.2
    return weight, scale, torch.randint(0, 3, (N, K // g)).double()


def by_hand(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Give the values, and d(value)/d(scale), entry by entry: ApiQ's closed form."""
    g = weight.shape[1] // scale.shape[1]
    value, slope = torch.empty_like(weight), torch.empty_like(weight)
    for n in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            s, z, w = scale[n, k // g].item(), zero[n, k // g].item(), weight[n, k].item()
            code = round(w / s) + z  # Python rounds halves to even as well
            inside = 0 <= code <= 2**bits - 1
            held = min(max(code, 0), 2**bits - 1)
            value[n, k] = (held - z) * s
            slope[n, k] = held - z - (w / s if inside else 0)
    return value, slope


@pytest.mark.parametrize("function", [fake_quantize, fake_quantize_reference])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_and_the_gradient_of_the_scale(function, bits: int) -> None:
    weight, scale, zero = inputs()
    scale.requires_grad_()
    value, slope = by_hand(weight, scale.detach(), zero, bits)
    y = function(weight, scale, zero, bits)
    assert_close(y, value)
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, scale, grad)
    assert_close(actual, (grad * slope).view(6, 4, 4).sum(-1), "gradient of scale")


def test_the_zero_point_has_no_gradient() -> None:
    weight, scale, zero = inputs()
    zero.requires_grad_()
    y = fake_quantize(weight, scale.requires_grad_(), zero, 2)
    assert torch.autograd.grad(y.sum(), zero, allow_unused=True) == (None,)


def test_narrow_weights_are_rounded_in_float32() -> None:
    weight, scale, zero = (t.float() for t in inputs())
    narrow = weight.bfloat16()
    y = fake_quantize(narrow, scale, zero, 3)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fake_quantize(narrow.float(), scale, zero, 3).bfloat16())


def test_values_on_the_grid_stay() -> None:
    _, scale, zero = inputs()
    codes = torch.randint(0, 4, (6, 16)).double()
    on_grid = (codes.view(6, 4, 4) - zero[..., None]) * scale[..., None]
    assert_close(fake_quantize(on_grid.flatten(1), scale, zero, 2), on_grid.flatten(1))
