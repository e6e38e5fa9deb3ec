"""Rounding to a grid on CPU: values by hand, the closed form of the gradient, and autograd's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels_peft import fake_quantize, fake_quantize_reference
from kernels_peft.fake_quantization import blocked
from kernels_peft.packing import FORMATS
from tests.helpers import assert_close
from tests.kernels_peft.fake_quantizations import (
    GridInputs,
    bit_equal,
    by_group,
    by_hand,
    exact_gradient,
    make_grid,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Function = Callable[..., Tensor]
FUNCTIONS = pytest.mark.parametrize("function", [fake_quantize, fake_quantize_reference])


def _apply(
    function: Function, inputs: GridInputs, bits: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Give the values and the gradient of the scale."""
    scale = inputs.scale.detach().clone().requires_grad_()
    y = function(inputs.weight, scale, inputs.zero, bits, dtype)
    (gradient,) = torch.autograd.grad(y, scale, inputs.grad.to(y.dtype))
    return y.detach(), gradient


def _compare(inputs: GridInputs, bits: int, dtype: torch.dtype | None = None) -> None:
    y, gradient = _apply(fake_quantize, inputs, bits, dtype)
    wanted, wanted_gradient = _apply(fake_quantize_reference, inputs, bits, dtype)
    assert bit_equal(y, wanted)
    assert y.is_contiguous()
    assert gradient.dtype == inputs.scale.dtype
    assert_close(gradient, wanted_gradient, "gradient of scale")


@FUNCTIONS
@pytest.mark.parametrize("group_size", [1, 3, 4, 12])
@pytest.mark.parametrize("bits", FORMATS)
def test_values_and_the_gradient_of_the_scale(function, group_size: int, bits: int) -> None:
    inputs = make_grid(5, 12, group_size, bits, torch.float64)
    value, slope = by_hand(inputs, bits)
    y, gradient = _apply(function, inputs, bits)
    assert_close(y, value)
    assert_close(gradient, by_group(inputs.grad * slope, inputs.scale), "gradient of scale")


@pytest.mark.parametrize("wanted", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FORMATS)
def test_bits_are_those_of_the_reference(bits: int, dtype, wanted) -> None:
    for sizes in ((7, 96, 32), (3, 128, 64), (5, 40, 40)):
        _compare(make_grid(*sizes, bits, dtype), bits, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FORMATS)
def test_a_row_that_is_one_long_group(bits: int, dtype: torch.dtype) -> None:
    inputs = make_grid(3, 3000, 3000, bits, dtype)
    y, gradient = _apply(fake_quantize, inputs, bits)
    assert bit_equal(y, fake_quantize_reference(*inputs[:3], bits))
    assert_close(gradient, exact_gradient(inputs, bits), "gradient of scale")


@given(
    rows=st.integers(0, 7),
    groups=st.integers(1, 5),
    group_size=st.integers(0, 33),
    bits=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    wanted=st.sampled_from([None, *DTYPES]),
    elements=st.sampled_from([1, 50, 1 << 18]),
)
def test_any_shape(rows, groups, group_size, bits, dtype, wanted, elements) -> None:
    inputs = make_grid(rows, groups * max(1, group_size), max(1, group_size), bits, dtype)
    if group_size == 0:
        inputs = inputs._replace(weight=inputs.weight[:, :0], grad=inputs.grad[:, :0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "BLOCK_ELEMENTS", elements)
        y, gradient = _apply(fake_quantize, inputs, bits, wanted)
    assert (y.shape, y.dtype) == (inputs.weight.shape, wanted or dtype)
    if inputs.weight.numel():
        expected, expected_gradient = _apply(fake_quantize_reference, inputs, bits, wanted)
        assert bit_equal(y, expected)
        assert_close(gradient, expected_gradient, "gradient of scale")
    else:
        assert torch.equal(gradient, torch.zeros_like(inputs.scale))


# With s = 1, z = 1 and two bits: what a weight becomes, and its share of the gradient.
ENDS = {
    -1.0: (-1.0, 0.0),  # code 0, the lowest: the clamp passes the gradient on
    -1.5: (-1.0, -1.0),  # rounds to -2, code -1: outside
    -1.25: (-1.0, 0.25),
    2.0: (2.0, 0.0),  # code 3, the highest
    2.5: (2.0, -0.5),  # rounds to 2 as halves go to even: inside
    2.75: (2.0, 2.0),  # rounds to 3, code 4: outside
    0.5: (0.0, -0.5),
    1.5: (2.0, 0.5),
    -0.0: (0.0, 0.0),
    1e30: (2.0, 2.0),
    -1e30: (-1.0, -1.0),
}


@FUNCTIONS
@pytest.mark.parametrize("weight", ENDS)
def test_the_ends_of_the_grid(function, weight: float) -> None:
    one = torch.ones(1, 1)
    y, gradient = _apply(function, GridInputs(one * weight, one, one, one), 2)
    value, slope = ENDS[weight]
    assert bit_equal(y, one * value)
    assert torch.equal(gradient, one * slope)


@pytest.mark.parametrize("bits", FORMATS)
def test_gradcheck_where_nothing_is_rounded(bits: int) -> None:
    # Past the ends the code does not depend on the scale, so the straight-through gradient is true.
    _, scale, zero, _ = make_grid(3, 12, 4, bits, torch.float64)
    far = (torch.randint(2, (3, 12)) * 2 - 1) * 100.0
    weight = far.double()
    scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: fake_quantize(weight, s, zero, bits), scale)


@pytest.mark.parametrize("bits", FORMATS)
def test_gradcheck_of_what_the_straight_through_gradient_stands_for(bits: int) -> None:
    # Rounding adds an error to w / s that straight-through holds fixed: differentiate that.
    weight, scale, zero, grad = inputs = make_grid(3, 12, 4, bits, torch.float64)
    weight = (weight / scale.repeat_interleave(4, 1) + 0.01) * scale.repeat_interleave(4, 1)
    inputs = inputs._replace(weight=weight)  # no code is just at an end any more

    def loss(s: Tensor) -> Tensor:
        ratio, z = weight / s.repeat_interleave(4, 1), zero.repeat_interleave(4, 1)
        codes = ratio + error + z
        inside = (codes0 >= -0.5) & (codes0 <= 2**bits - 0.5)
        held = torch.where(inside, codes, codes0.clamp(0, 2**bits - 1))
        return (grad * (held - z) * s.repeat_interleave(4, 1)).sum()

    ratio0 = weight / scale.repeat_interleave(4, 1)
    error = ratio0.round() - ratio0
    codes0 = ratio0.round() + zero.repeat_interleave(4, 1)
    numeric = torch.empty_like(scale)
    for n in range(scale.shape[0]):
        for group in range(scale.shape[1]):
            step = torch.zeros_like(scale)
            step[n, group] = 1e-6
            numeric[n, group] = (loss(scale + step) - loss(scale - step)) / 2e-6
    _, gradient = _apply(fake_quantize, inputs, bits)
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-7)


@FUNCTIONS
def test_the_zero_point_has_no_gradient(function) -> None:
    weight, scale, zero, _ = make_grid(6, 16, 4, 2)
    zero.requires_grad_()
    y = function(weight, scale.requires_grad_(), zero, 2)
    assert torch.autograd.grad(y.sum(), zero, allow_unused=True) == (None,)


def test_values_round_once_to_their_dtype() -> None:
    weight, scale, zero, _ = make_grid(6, 16, 4, 3, torch.bfloat16)
    y = fake_quantize(weight, scale, zero, 3)
    assert y.dtype == torch.bfloat16
    wide = fake_quantize(weight, scale, zero, 3, torch.float32)
    assert bit_equal(wide, fake_quantize(weight.float(), scale, zero, 3))
    assert bit_equal(y, wide.bfloat16())


def test_values_on_the_grid_stay() -> None:
    _, scale, zero, _ = make_grid(6, 16, 4, 2, torch.float64)
    codes = torch.randint(0, 4, (6, 16)).double()
    on_grid = (codes.view(6, 4, 4) - zero[..., None]) * scale[..., None]
    assert_close(fake_quantize(on_grid.flatten(1), scale, zero, 2), on_grid.flatten(1))


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def _every_other_column(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], 2 * x.shape[1]), float("nan"))
    wide[:, ::2] = x
    return wide[:, ::2]


def _inside_wider_rows(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], x.shape[1] + 3), float("nan"))
    wide[:, 1:-2] = x
    return wide[:, 1:-2]


@pytest.mark.parametrize("view", [_transposed, _every_other_column, _inside_wider_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1 << 18, 50])
def test_strides_change_nothing(view, dtype, elements, monkeypatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", elements)
    inputs = make_grid(6, 24, 8, 3, dtype)
    views = GridInputs(*map(view, inputs))
    assert not views.weight.is_contiguous()
    scale = views.scale.requires_grad_()
    y = fake_quantize(views.weight, scale, views.zero, 3)
    assert y.is_contiguous()
    (gradient,) = torch.autograd.grad(y, scale, views.grad)
    for actual, expected in zip((y, gradient), _apply(fake_quantize, inputs, 3), strict=True):
        assert bit_equal(actual.detach(), expected)


def test_a_gradient_that_is_one_number_everywhere() -> None:
    inputs = make_grid(5, 24, 8, 2)._replace(grad=torch.ones(()).expand(5, 24))
    assert inputs.grad.stride() == (0, 0)
    _compare(inputs, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_nothing(dtype, monkeypatch) -> None:
    inputs = make_grid(7, 24, 8, 4, dtype)
    expected = _apply(fake_quantize, inputs, 4)
    for elements in (1, 24, 70, 24 * 7):
        monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", elements)
        for actual, wanted in zip(_apply(fake_quantize, inputs, 4), expected, strict=True):
            assert bit_equal(actual, wanted)


def test_a_nan_stays_in_its_place() -> None:
    inputs = make_grid(4, 24, 8, 2)
    clean, clean_gradient = _apply(fake_quantize, inputs, 2)
    inputs.weight[2, 9] = float("nan")
    y, gradient = _apply(fake_quantize, inputs, 2)
    assert y[2, 9].isnan()
    assert gradient[2, 1].isnan()
    clean[2, 9], clean_gradient[2, 1] = y[2, 9], gradient[2, 1]
    assert bit_equal(y, clean)
    assert bit_equal(gradient, clean_gradient)


def test_inputs_are_left_alone() -> None:
    inputs = make_grid(4, 24, 8, 2)
    before = [t.clone() for t in inputs]
    _apply(fake_quantize, inputs, 2)
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)
