"""The Triton kernels of fake quantisation, value by value, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels_peft import fake_quantize_reference
from kernels_peft.fake_quantization import kernel
from kernels_peft.fake_quantization.blocked import (
    fake_quantize_backward_blocked,
    fake_quantize_blocked,
)
from kernels_peft.fake_quantization.kernel import (
    Tile,
    fake_quantize_backward_triton,
    fake_quantize_triton,
)
from kernels_peft.packing import FORMATS
from tests.helpers import assert_close
from tests.kernels_peft.fake_quantizations import (
    GridInputs,
    bit_equal,
    exact_gradient,
    make_grid,
)
from tests.kernels_peft.interpreter_guard import guarded

pytestmark = pytest.mark.interp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows, inputs, group size: the usual ones with odd rows, any other, and whole rows that take
# several spans of a program, the last one cut off.
CASES = {
    "32": (5, 96, 32),
    "64": (3, 192, 64),
    "128": (7, 128, 128),
    "one": (3, 7, 1),
    "any": (5, 36, 12),
    "row": (3, 40, 40),
    "long-row": (1, 1100, 1100),
}


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    with guarded():
        yield


@pytest.fixture(autouse=True, params=["shipped", "small"])
def _tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the shipped tile, and with a small one that cuts groups into several spans."""
    if request.param == "small":
        monkeypatch.setattr(kernel, "TILE", Tile(64, 1))


def _forward(inputs: GridInputs, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    weight, scale, zero, _ = inputs
    return fake_quantize_triton(weight, scale, zero, bits, dtype or weight.dtype)


def _backward(inputs: GridInputs, bits: int) -> Tensor:
    weight, scale, zero, grad = inputs
    return fake_quantize_backward_triton(grad, weight, scale, zero, bits)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradient(case: tuple[int, int, int], bits: int) -> None:
    inputs = make_grid(*case, bits)
    assert bit_equal(_forward(inputs, bits), fake_quantize_reference(*inputs[:3], bits))
    assert_close(_backward(inputs, bits), exact_gradient(inputs, bits), "gradient of scale")


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, wanted: torch.dtype) -> None:
    inputs = make_grid(5, 96, 32, 3, dtype)
    y = _forward(inputs, 3, wanted)
    assert bit_equal(y, fake_quantize_reference(*inputs[:3], 3, wanted))
    inputs = inputs._replace(grad=inputs.grad.to(wanted))
    gradient = _backward(inputs, 3)
    assert gradient.dtype == torch.float32
    assert_close(gradient, exact_gradient(inputs, 3), "gradient of scale")


def test_the_ends_of_the_grid() -> None:
    # With s = 1, z = 1 and two bits, weights -1 and 2 have the first and the last code.
    weight = torch.tensor([[-1.0, -1.5, -1.25, 2.0, 2.5, 2.75, 0.5, 1.5, -0.0, 1e30, -1e30, 5e6]])
    one = torch.ones(1, 12)
    inputs = GridInputs(weight, one, one, one)
    assert bit_equal(_forward(inputs, 2), fake_quantize_reference(*inputs[:3], 2))
    assert torch.equal(_backward(inputs, 2).double(), exact_gradient(inputs, 2))


@pytest.mark.parametrize("shape", [(0, 24), (3, 0)], ids=str)
def test_empty(shape: tuple[int, int]) -> None:
    weight, scale = torch.ones(shape), torch.ones(shape[0], 3)
    inputs = GridInputs(weight, scale, scale, weight)
    assert _forward(inputs, 2).shape == shape
    assert torch.equal(_backward(inputs, 2), torch.zeros_like(scale))


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def _inside_wider_rows(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], x.shape[1] + 3), float("nan"))
    wide[:, 1:-2] = x
    return wide[:, 1:-2]


@pytest.mark.parametrize("view", [_transposed, _inside_wider_rows])
def test_strides(view) -> None:
    inputs = make_grid(5, 96, 32, 2)
    views = GridInputs(*map(view, inputs))
    assert not views.weight.is_contiguous()
    y, gradient = _forward(views, 2), _backward(views, 2)
    assert y.is_contiguous()
    assert gradient.is_contiguous()
    assert bit_equal(y, _forward(inputs, 2))
    assert bit_equal(gradient, _backward(inputs, 2))


def test_a_nan_stays_in_its_place() -> None:
    inputs = make_grid(3, 96, 32, 2)
    inputs.weight[1, 40] = float("nan")
    y, gradient = _forward(inputs, 2), _backward(inputs, 2)
    assert y.isnan().nonzero().tolist() == [[1, 40]]
    assert gradient.isnan().nonzero().tolist() == [[1, 1]]


def test_double_precision_takes_the_path_of_torch() -> None:
    inputs = make_grid(3, 24, 8, 3, torch.float64)
    weight, scale, zero, grad = inputs
    for dtype in (torch.float64, torch.float32):
        expected = fake_quantize_blocked(weight, scale, zero, 3, dtype)
        assert bit_equal(_forward(inputs, 3, dtype), expected)
    expected = fake_quantize_backward_blocked(grad, weight, scale, zero, 3)
    assert bit_equal(_backward(inputs, 3), expected)


def test_inputs_are_left_alone() -> None:
    inputs = make_grid(5, 96, 32, 2)
    before = [t.clone() for t in inputs]
    _forward(inputs, 2)
    _backward(inputs, 2)
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)
