"""Values and gradients of the rotation by slot on CPU, against oracles that share no code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels_peft import rotate, rotate_by_slot, rotate_by_slot_reference
from kernels_peft.rotation_bank import blocked
from tests.helpers import assert_close
from tests.kernels_peft.rotation_banks import (
    BankInputs,
    bank_gradients,
    bits,
    make_bank,
    odd_numbers,
    row_by_row,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZES = [4, 2, 0, 16, 6, 20, 64, 8]  # of a width of 20: no rotation, a tail, one group, too large
# Slots of six rows: distinct and unsorted, repeated, all one, with rows without an adapter, and
# with nothing else, and those of one group size.
SLOTS = {
    "distinct": [5, 0, 3, 7, 1, 4],
    "repeated": [3, 0, 3, 0, 0, 3],
    "one": [3] * 6,
    "one-size": [0, 8, 0, 8, 8, 0],
    "mixed": [-1, 4, 2, -3, 0, 6],
    "base": [-1] * 6,
    "base-and-one-size": [-1, 0, 8, 2, 0, -1],
}
SHAPES = {"rows": (6, 20), "one-token": (6, 1, 20), "tokens": (6, 5, 20), "deep": (6, 2, 3, 20)}


def _leaves(inputs: BankInputs) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in (inputs.x, inputs.table)]


def _apply(inputs: BankInputs) -> tuple[Tensor, ...]:
    """Give y and the gradients of x and the table."""
    leaves = _leaves(inputs)
    y = rotate_by_slot(*leaves, inputs.group_sizes, inputs.slots)
    return y.detach(), *torch.autograd.grad(y, leaves, inputs.grad)


def _compare(inputs: BankInputs) -> None:
    y, *gradients = _apply(inputs)
    assert (y.dtype, y.shape) == (inputs.x.dtype, inputs.x.shape)
    assert y.is_contiguous()
    assert_close(y, row_by_row(inputs), "y")
    for gradient, (name, wanted) in zip(gradients, bank_gradients(inputs).items(), strict=True):
        assert gradient.dtype == getattr(inputs, name).dtype
        assert_close(gradient, wanted, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_forward_and_gradients_are_those_of_dense_matrices(slots, shape, dtype) -> None:
    _compare(make_bank(shape, [*SIZES, 4], slots, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees_with_dense_matrices(dtype: torch.dtype) -> None:
    inputs = make_bank((6, 5, 20), SIZES, SLOTS["mixed"], dtype)
    assert_close(rotate_by_slot_reference(*inputs[:4]), row_by_row(inputs))


def test_slots_of_tokens() -> None:
    slots = torch.tensor([[0, -1, 3], [1, 0, 5]])
    _compare(make_bank((2, 3, 20), SIZES, slots))
    _compare(make_bank((2, 3, 4, 20), SIZES, slots.int()))


@pytest.mark.parametrize("group", [2, 16, 64])
def test_all_64_slots_at_once(group: int) -> None:
    slots = torch.randperm(64)
    inputs = make_bank((64, 1, 64), [group] * 64, slots)
    y = rotate_by_slot(*inputs[:4])
    for row, slot in enumerate(slots.tolist()):
        assert_close(y[row], rotate(inputs.x[row], *inputs.table[slot], group))
    _compare(inputs)


def test_a_wider_table_index_and_double_precision_of_float32_tables() -> None:
    inputs = make_bank((6, 20), SIZES, SLOTS["mixed"], torch.float64)
    inputs = inputs._replace(table=inputs.table.float(), group_sizes=inputs.group_sizes.long())
    y, dx, d_table = _apply(inputs)
    wanted = bank_gradients(inputs)
    assert_close(y, row_by_row(inputs), "y")
    assert_close(dx, wanted["x"], "gradient of x")
    assert d_table.dtype == torch.float32
    assert_close(d_table, wanted["table"], "gradient of table")


@pytest.mark.parametrize("slots", [SLOTS["mixed"], SLOTS["one"], SLOTS["one-size"]], ids=str)
@pytest.mark.parametrize("shape", [(6, 10), (6, 2, 9)], ids=str)
def test_gradcheck_of_the_operator(shape: tuple[int, ...], slots: list[int]) -> None:
    inputs = make_bank(shape, [4, 2, 0, 8, 6, 10, 64, 8, 4], slots, torch.float64)
    rest = inputs[2:4]
    leaves = _leaves(inputs)
    assert torch.autograd.gradcheck(lambda x, table: rotate_by_slot(x, table, *rest), leaves)
    assert torch.autograd.gradcheck(
        lambda x, table: rotate_by_slot_reference(x, table, *rest), leaves
    )


@given(
    rows=st.integers(0, 9),
    inner=st.sampled_from([(), (1,), (3,), (2, 0)]),
    width=st.integers(0, 25),
    halves=st.lists(st.integers(0, 14), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_shape(rows, inner, width, halves, dtype, data) -> None:
    slots = data.draw(
        st.lists(st.integers(-2, len(halves) - 1), min_size=rows, max_size=rows), "slots"
    )
    slots = torch.tensor(slots, dtype=torch.int64)
    _compare(make_bank((rows, *inner, width), [2 * half for half in halves], slots, dtype))


@pytest.mark.parametrize("shape", [(0, 20), (3, 0, 20), (3, 0), (0, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    y, dx, d_table = _apply(make_bank(shape, [4, 8], torch.zeros(shape[0], dtype=torch.int64)))
    assert y.shape == dx.shape == shape
    assert torch.equal(d_table, torch.zeros(2, 2, shape[-1]))


def test_a_table_without_slots() -> None:
    inputs = make_bank((3, 5, 20), [], [-1, -1, -1])
    y, dx, d_table = _apply(inputs)
    assert torch.equal(y, inputs.x)
    assert torch.equal(dx, inputs.grad)
    assert d_table.shape == (0, 2, 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_not_rotated_comes_back_bit_for_bit(dtype, blocks, monkeypatch) -> None:
    if blocks:
        monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 4 * 20)
    x = odd_numbers(dtype, 6 * 2 * 20).view(6, 2, 20)
    slots = torch.tensor([0, -1, 1, 2, 3, 4])
    sizes = [0, 6, 16, 64, 12]  # slots 1, 2 and 4 leave 2, 4 and 8 features
    inputs = make_bank((6, 2, 20), sizes, slots, dtype)._replace(x=x)
    for chosen in (slots, torch.where(slots == 2, slots, -1), torch.full((6,), 2)):
        for function in (rotate_by_slot, rotate_by_slot_reference):
            y = function(x, inputs.table, inputs.group_sizes, chosen)
            for row, slot in enumerate(chosen.tolist()):
                size = sizes[slot] if slot >= 0 else 0
                body = 20 // size * size if size else 0
                assert torch.equal(bits(y[row, :, body:]), bits(x[row, :, body:]))
        assert y.data_ptr() != x.data_ptr()


def test_a_row_of_nan_stays_among_itself() -> None:
    inputs = make_bank((6, 2, 20), SIZES, SLOTS["mixed"])
    inputs.x[1] = float("nan")
    y, _, d_table = _apply(inputs)
    others = [0, 2, 3, 4, 5]
    assert y[others].isfinite().all()
    assert d_table[[0, 1, 2, 3, 5, 6, 7]].isfinite().all()


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _features_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _inside_wider_rows(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


@pytest.mark.parametrize("view", [_transposed, _features_first, _strided, _inside_wider_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", ["mixed", "one-size"])
@pytest.mark.parametrize("elements", [1 << 18, 50])
def test_strides_change_nothing(view, dtype, slots, elements, monkeypatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", elements)
    inputs = make_bank((6, 5, 20), [*SIZES, 4], SLOTS[slots], dtype)
    expected = _apply(inputs)
    slots_view = torch.stack((inputs.slots, inputs.slots), 1)[:, 0]
    x = view(inputs.x)
    assert not x.is_contiguous()
    assert not slots_view.is_contiguous()
    leaves = [x.requires_grad_(), view(inputs.table).requires_grad_()]
    y = rotate_by_slot(*leaves, inputs.group_sizes, slots_view)
    assert y.is_contiguous()
    actual = (y, *torch.autograd.grad(y, leaves, view(inputs.grad)))
    for one, other in zip(expected, actual, strict=True):
        assert_close(other, one)


@pytest.mark.parametrize("slots", ["mixed", "repeated", "one", "base"])
@pytest.mark.parametrize("elements", [20, 70, 250])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_only_the_order_of_sums(slots, elements, dtype, monkeypatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", elements)
    _compare(make_bank((6, 5, 20), SIZES, SLOTS[slots], dtype))


def test_rounds_once() -> None:
    inputs = make_bank((64, 64), [64] * 64, torch.randperm(64), torch.bfloat16)
    exact = rotate_by_slot_reference(inputs.x.double(), inputs.table.double(), *inputs[2:4])
    # Two roundings would differ from one in a tenth of all values; ties of float32 in almost none.
    assert (rotate_by_slot(*inputs[:4]) != exact.bfloat16()).float().mean() < 1e-3


def test_rows_do_not_depend_on_their_company() -> None:
    inputs = make_bank((6, 2, 20), SIZES, SLOTS["mixed"])
    together = rotate_by_slot(*inputs[:4])
    for row in range(6):
        alone = rotate_by_slot(inputs.x[row : row + 1], *inputs[1:3], inputs.slots[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_runs_are_bit_equal() -> None:
    inputs = make_bank((40, 5, 20), SIZES, torch.randint(-1, len(SIZES), (40,)))
    for one, other in zip(_apply(inputs), _apply(inputs), strict=True):
        assert torch.equal(one, other)


def test_inputs_are_left_alone() -> None:
    for slots in SLOTS.values():
        inputs = make_bank((6, 20), [*SIZES, 4], slots)
        before = [t.clone() for t in inputs]
        _apply(inputs)
        with torch.no_grad():
            rotate_by_slot(*inputs[:4])
        for now, then in zip(inputs, before, strict=True):
            assert torch.equal(now, then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_result_is_the_same(dtype: torch.dtype) -> None:
    inputs = make_bank((6, 20), SIZES, SLOTS["mixed"], dtype)
    wanted, *_ = _apply(inputs)
    leaves = _leaves(inputs)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = rotate_by_slot(*leaves, *inputs[2:4])
        assert not y.requires_grad
        assert torch.equal(y, wanted)


def test_only_what_needs_a_gradient_gets_one() -> None:
    inputs = make_bank((6, 3, 20), SIZES, SLOTS["mixed"])
    wanted = bank_gradients(inputs)
    for wants_x, wants_table in ((True, False), (False, True)):
        x, table = inputs.x.clone(), inputs.table.clone()
        x.requires_grad_(wants_x)
        table.requires_grad_(wants_table)
        rotate_by_slot(x, table, *inputs[2:4]).backward(inputs.grad)
        for name, leaf, wants in (("x", x, wants_x), ("table", table, wants_table)):
            assert (leaf.grad is not None) == wants
            if leaf.grad is not None:
                assert_close(leaf.grad, wanted[name], f"gradient of {name}")


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("sizes", [[4], [4, 10]], ids=str)
@pytest.mark.parametrize("shape", [(32, 20), (32, 1, 20), (32, 3, 20)], ids=str)
def test_the_number_of_operations_is_that_of_group_sizes(sizes, base, shape) -> None:
    counts = []
    for adapters in (2, 4, 16, 32):
        slots = (31 - torch.arange(32)) % adapters
        if base:
            slots[-3:] = -1
        inputs = make_bank(shape, sizes * (32 // len(sizes)), slots)
        with torch.no_grad(), _Count() as count:
            rotate_by_slot(*inputs[:4])
        counts.append(count.calls)
    assert len(set(counts)) == 1
    # A step of decoding with one group size: this many is what "small" means.
    most = 14 + 18 * (len(sizes) - 1) + 6 * base
    assert counts[0] <= most


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [2, 3, 4, 5], [3, 3, 3, 3]], ids=str)
def test_slots_that_follow_in_order_are_read_in_place(slots: list[int]) -> None:
    inputs = make_bank((4, 1, 20), [4] * 8, torch.tensor(slots))
    gathering = make_bank((4, 1, 20), [4] * 8, torch.tensor([3, 1, 0, 2]))
    counts = []
    for case in (inputs, gathering):
        with torch.no_grad(), _Count() as count:
            y = rotate_by_slot(*case[:4])
        counts.append(count.calls)
        assert_close(y, rotate_by_slot_reference(*case[:4]))
    assert counts[0] <= counts[1]
