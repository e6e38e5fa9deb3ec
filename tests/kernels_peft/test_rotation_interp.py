"""The Triton kernels of the rotation, value by value, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels_peft import rotate_reference
from kernels_peft.rotation import kernel
from kernels_peft.rotation.blocked import rotate_backward_blocked, rotate_blocked
from kernels_peft.rotation.kernel import Tile, rotate_backward_triton, rotate_triton
from tests.helpers import assert_close
from tests.kernels_peft.interpreter_guard import guarded
from tests.kernels_peft.rotations import Inputs, double_gradients, make

pytestmark = pytest.mark.interp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (tokens, features, coefficients, group): every group size, odd sizes, no power of two, tails that
# are short, that end within and past a block, and that are all there is.
CASES = (
    (5, 10, 10, 2),
    (3, 21, 20, 4),
    (7, 18, 18, 6),
    (2, 57, 48, 16),
    (9, 192, 192, 64),
    (4, 300, 256, 128),
    (3, 600, 576, 64),
    (1, 64, 64, 64),
    (6, 13, 0, 2),
)
FLAGS = ((True, True), (True, False), (False, True), (False, False))


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    with guarded():
        yield


@pytest.fixture(autouse=True, params=["shipped", "small"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the shipped tiles, and with small ones that cut these tensors into many."""
    if request.param == "small":
        monkeypatch.setattr(kernel, "FORWARD_TILES", ((0, Tile(2, 64, 1)),))
        monkeypatch.setattr(kernel, "BACKWARD_TILES", ((0, Tile(2, 64, 1, chunk=4)),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, d, n, group = case
    inputs = make((tokens, d), n, dtype)
    y = rotate_triton(*inputs[:3], group)
    assert y.dtype == dtype
    # Without fused multiply-add the interpreter rounds where plain torch does.
    assert torch.equal(y, rotate_reference(*inputs[:3], group))
    # `addcmul` of torch fuses, so in float32 the last bit differs.
    assert_close(y, rotate_blocked(*inputs[:3], group), "y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("saved_is_output", [False, True])
def test_backward(case, dtype: torch.dtype, saved_is_output: bool) -> None:
    tokens, d, n, group = case
    inputs = make((tokens, d), n, dtype)
    y = rotate_reference(*inputs[:3], group)
    wanted = double_gradients(inputs, group, y if saved_is_output else None)
    for flags in FLAGS if case == CASES[1] else FLAGS[:1]:
        input_grad, coefficient_grad = flags
        gradients = rotate_backward_triton(
            inputs.grad, y if saved_is_output else inputs.x, *inputs[1:3], group,
            saved_is_output, *flags,
        )  # fmt: skip
        for gradient, (name, reference) in zip(gradients, wanted.items(), strict=True):
            asked = input_grad if name == "x" else coefficient_grad
            expected = reference if asked else torch.empty(0)
            assert gradient.dtype == (dtype if name == "x" else torch.float32)
            assert_close(gradient, expected, f"gradient of {name}")


def test_gradient_of_x_is_bit_equal_to_plain_torch() -> None:
    inputs = make((5, 21), 20, torch.bfloat16)
    dx, _, _ = rotate_backward_triton(inputs.grad, inputs.x, *inputs[1:3], 4, False, True, False)
    transposed = -inputs.second.unflatten(0, (-1, 2, 2)).flip(1).flatten()
    assert torch.equal(dx, rotate_reference(inputs.grad, inputs.first, transposed, 4))


def test_unasked_coefficients_need_nothing_saved() -> None:
    inputs = make((3, 20), 20)
    nothing = inputs.x.new_empty(0)
    for saved_is_output in (False, True):
        dx, _, _ = rotate_backward_triton(
            inputs.grad, nothing, *inputs[1:3], 4, saved_is_output, True, False
        )
        assert_close(dx, double_gradients(inputs, 4)["x"])


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10), (3, 0), (10,), (2, 3, 10)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    n = shape[-1] // 4 * 4
    inputs = make(shape, n)
    y = rotate_triton(*inputs[:3], 4)
    assert y.shape == shape
    arguments = (inputs.grad, inputs.x, *inputs[1:3], 4, False, True, True)
    assert_close(y, rotate_blocked(*inputs[:3], 4), "y")
    expected = rotate_backward_blocked(*arguments)
    for actual, reference in zip(rotate_backward_triton(*arguments), expected, strict=True):
        assert_close(actual, reference)


def _inside_wider_rows(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def _every_other_feature(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("view", [_inside_wider_rows, _every_other_feature, _transposed])
def test_strides(view) -> None:
    inputs = make((3, 2, 45), 40)
    views = Inputs(*map(view, (inputs.x,)), *inputs[1:3], view(inputs.grad))
    assert not views.x.is_contiguous()
    y = rotate_triton(*views[:3], 8)
    assert y.is_contiguous()
    assert torch.equal(y, rotate_triton(*inputs[:3], 8))
    flags = (8, False, True, True)
    expected = rotate_backward_triton(inputs.grad, inputs.x, *inputs[1:3], *flags)
    actual = rotate_backward_triton(views.grad, views.x, *views[1:3], *flags)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()
        assert other.is_contiguous()


def test_strided_coefficients_and_repeated_rows() -> None:
    inputs = make((4, 16), 16)
    first, second = _every_other_feature(inputs.first), _every_other_feature(inputs.second)
    repeated = inputs.grad[:1].expand(4, 16)
    y = rotate_triton(repeated, first, second, 8)
    assert torch.equal(y, rotate_triton(repeated.contiguous(), *inputs[1:3], 8))


def test_double_precision_takes_the_path_of_torch() -> None:
    inputs = make((3, 10), 8, torch.float64)
    assert torch.equal(rotate_triton(*inputs[:3], 4), rotate_blocked(*inputs[:3], 4))
    arguments = (inputs.grad, inputs.x, *inputs[1:3], 4, False, True, True)
    actual, expected = rotate_backward_triton(*arguments), rotate_backward_blocked(*arguments)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_inputs_are_left_alone() -> None:
    inputs = make((5, 45), 40)
    before = [t.clone() for t in inputs]
    rotate_triton(*inputs[:3], 8)
    rotate_backward_triton(inputs.grad, inputs.x, *inputs[1:3], 8, False, True, True)
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


def test_sums_do_not_share_memory() -> None:
    inputs = make((5, 16), 16)
    _, d_first, d_second = rotate_backward_triton(
        inputs.grad, inputs.x, *inputs[1:3], 8, False, False, True
    )
    pointers = {t.untyped_storage().data_ptr() for t in (d_first, d_second)}
    assert len(pointers) == 2
