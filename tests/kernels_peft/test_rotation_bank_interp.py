"""The Triton kernels of the rotation by slot, value by value, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels_peft import rotate_by_slot_reference
from kernels_peft.rotation_bank import kernel
from kernels_peft.rotation_bank.blocked import (
    rotate_by_slot_backward_blocked,
    rotate_by_slot_blocked,
)
from kernels_peft.rotation_bank.kernel import (
    Tile,
    rotate_by_slot_backward_triton,
    rotate_by_slot_triton,
)
from tests.helpers import assert_close
from tests.kernels_peft.interpreter_guard import guarded
from tests.kernels_peft.rotation_banks import (
    BankInputs,
    bank_gradients,
    bits,
    make_bank,
    odd_numbers,
)

pytestmark = pytest.mark.interp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Shape, group sizes, slots: sizes in runs of eight and not, whole widths, tails that are short,
# that cross a block and that are all there is, tiles of one slot and of several.
CASES = {
    "pairs": ((5, 10), [2, 10], [1, 0, 0, -1, 1]),
    "tails": ((7, 21), [4, 16, 6, 64, 0], [0, 1, 2, 3, 4, -1, 1]),
    "wide": ((4, 1, 300), [64, 128, 2, 256], [3, 1, 0, 2]),
    "crossing": ((3, 2, 150), [144, 32, 148], [2, 0, 1]),
    "uniform": ((6, 3, 64), [16] * 3, [2, 2, 2, 0, 0, 2]),
    "one-slot": ((4, 48), [16], [0, 0, 0, 0]),
    "one-token": ((1, 64), [64, 8], [1]),
    "base": ((5, 20), [4], [-1, -2, -1, -1, -1]),
}


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    with guarded():
        yield


@pytest.fixture(autouse=True, params=["shipped", "small"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the shipped tiles, and with small ones that cut these tensors into many."""
    if request.param == "small":
        monkeypatch.setattr(kernel, "FORWARD_TILES", ((0, Tile(4, 32, 1)),))
        monkeypatch.setattr(kernel, "TABLE_TILES", ((0, Tile(2, 32, 1)),))
        monkeypatch.setattr(kernel, "PROGRAMS", 24)
        monkeypatch.setattr(kernel, "LEAST_TOKENS", 2)


def _backward(inputs: BankInputs, *flags: bool) -> tuple[Tensor, Tensor]:
    flags = flags or (True, True)
    return rotate_by_slot_backward_triton(inputs.grad, *inputs[:4], *flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case, dtype: torch.dtype) -> None:
    inputs = make_bank(*case, dtype)
    y = rotate_by_slot_triton(*inputs[:4])
    assert y.dtype == dtype
    # Without fused multiply-add the interpreter rounds where plain torch does.
    assert torch.equal(y, rotate_by_slot_reference(*inputs[:4]))
    # `addcmul` of torch fuses, so in float32 the last bit differs.
    assert_close(y, rotate_by_slot_blocked(*inputs[:4]), "y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_backward(case, dtype: torch.dtype) -> None:
    inputs = make_bank(*case, dtype)
    dx, d_table = _backward(inputs)
    wanted = bank_gradients(inputs)
    assert (dx.dtype, d_table.dtype) == (dtype, torch.float32)
    assert_close(dx, wanted["x"], "gradient of x")
    assert_close(d_table, wanted["table"], "gradient of table")


def test_what_is_not_asked_for_comes_back_empty() -> None:
    inputs = make_bank(*CASES["tails"])
    expected = _backward(inputs)
    nothing = inputs._replace(x=inputs.x.new_empty(0))
    for given, flags in (
        (nothing, (True, False)),
        (inputs, (False, True)),
        (nothing, (False, False)),
    ):
        for gradient, whole, asked in zip(_backward(given, *flags), expected, flags, strict=True):
            assert torch.equal(gradient, whole if asked else torch.empty(0))


def test_all_64_slots_in_any_order() -> None:
    for slots in (torch.randperm(64), torch.arange(64), torch.randint(-1, 64, (64,))):
        inputs = make_bank((64, 1, 32), [16, 2, 32, 12] * 16, slots)
        assert torch.equal(
            rotate_by_slot_triton(*inputs[:4]), rotate_by_slot_reference(*inputs[:4])
        )
    assert_close(_backward(inputs)[1], bank_gradients(inputs)["table"])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_slots_of_tokens(kind: torch.dtype) -> None:
    slots = torch.tensor([[0, -1, 3], [1, 0, 3]], dtype=kind)
    inputs = make_bank((2, 3, 20), [4, 2, 0, 16], slots)
    inputs = inputs._replace(group_sizes=inputs.group_sizes.to(kind))
    assert torch.equal(rotate_by_slot_triton(*inputs[:4]), rotate_by_slot_reference(*inputs[:4]))
    for actual, wanted in zip(_backward(inputs), bank_gradients(inputs).values(), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("shape", [(0, 20), (3, 0, 20), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    inputs = make_bank(shape, [4, 8], torch.zeros(shape[0], dtype=torch.int64))
    assert rotate_by_slot_triton(*inputs[:4]).shape == shape
    dx, d_table = _backward(inputs)
    assert dx.shape == shape
    assert torch.equal(d_table, torch.zeros(2, 2, shape[-1]))


def test_a_table_without_slots() -> None:
    inputs = make_bank((3, 5, 20), [], [-1, -1, -1])
    assert torch.equal(rotate_by_slot_triton(*inputs[:4]), inputs.x)
    dx, d_table = _backward(inputs)
    assert torch.equal(dx, inputs.grad)
    assert d_table.shape == (0, 2, 20)


def test_values_that_cannot_be_reported_stand_for_no_rotation() -> None:
    slots = torch.tensor([4, 1 << 40, 0, 1, 2, 3, -(1 << 40)])
    inputs = make_bank((7, 20), [3, -4, 4, 0], slots)
    y = rotate_by_slot_triton(*inputs[:4])
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(y[others], inputs.x[others])
    dx, d_table = _backward(inputs)
    assert torch.equal(dx[others], inputs.grad[others])
    assert torch.equal(d_table[[0, 1, 3]], torch.zeros(3, 2, 20))
    right = inputs._replace(
        group_sizes=torch.tensor([0, 0, 4, 0]), slots=torch.tensor([-1] * 4 + [2, -1, -1])
    )
    assert torch.equal(y, rotate_by_slot_reference(*right[:4]))
    assert_close(d_table, bank_gradients(right)["table"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_rotated_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    sizes, slots = [0, 6, 16, 64, 12], [0, -1, 1, 2, 3, 4]
    x = odd_numbers(dtype, 6 * 2 * 20).view(6, 2, 20)
    inputs = make_bank((6, 2, 20), sizes, slots, dtype)._replace(x=x)
    y = rotate_by_slot_triton(*inputs[:4])
    for row, slot in enumerate(slots):
        size = sizes[slot] if slot >= 0 else 0
        body = 20 // size * size if size else 0
        assert torch.equal(bits(y[row, :, body:]), bits(x[row, :, body:]))


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
    inputs = make_bank((3, 2, 45), [8, 40, 16], [2, 0, 1])
    views = inputs._replace(
        x=view(inputs.x), table=view(inputs.table), grad=view(inputs.grad),
        slots=torch.stack((inputs.slots, inputs.slots), 1)[:, 1],
    )  # fmt: skip
    assert not views.x.is_contiguous()
    y = rotate_by_slot_triton(*views[:4])
    assert y.is_contiguous()
    assert torch.equal(y, rotate_by_slot_triton(*inputs[:4]))
    for one, other in zip(_backward(inputs), _backward(views), strict=True):
        assert torch.equal(one, other)
        assert other.is_contiguous()


def test_double_precision_takes_the_path_of_torch() -> None:
    inputs = make_bank((3, 10), [4, 2], [1, 0, -1], torch.float64)
    assert torch.equal(rotate_by_slot_triton(*inputs[:4]), rotate_by_slot_blocked(*inputs[:4]))
    expected = rotate_by_slot_backward_blocked(inputs.grad, *inputs[:4], True, True)
    for one, other in zip(_backward(inputs), expected, strict=True):
        assert torch.equal(one, other)


def test_inputs_are_left_alone() -> None:
    inputs = make_bank(*CASES["tails"])
    before = [t.clone() for t in inputs]
    rotate_by_slot_triton(*inputs[:4])
    _backward(inputs)
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


def test_a_row_of_nan_stays_among_itself() -> None:
    inputs = make_bank((4, 20), [4, 16, 20], [1, 0, 2, 0])
    inputs.x[0] = float("nan")
    assert rotate_by_slot_triton(*inputs[:4])[1:].isfinite().all()
    assert _backward(inputs)[1][[0, 2]].isfinite().all()
