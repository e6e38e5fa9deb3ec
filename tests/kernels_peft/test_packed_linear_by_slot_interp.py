"""The adapters and rotations by slot of the packed linear layer in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels_peft.packed_linear import dequantize_reference
from kernels_peft.packed_linear.by_slot import low_rank_by_slot_backward_torch
from kernels_peft.packed_linear.kernel import (
    low_rank_by_slot_backward_triton,
    packed_linear_rotated_triton,
    packed_linear_triton,
    tiles,
)
from kernels_peft.packing import FORMATS
from kernels_peft.rotation_bank import rotate_by_slot_reference
from tests.helpers import assert_close
from tests.kernels_peft.interpreter_guard import guarded
from tests.kernels_peft.packed_linears import adapter, adapters, make_packed, row_by_row
from tests.kernels_peft.rotation_banks import bits as bit_pattern
from tests.kernels_peft.rotation_banks import make_bank

pytestmark = pytest.mark.interp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# K, N, groups, shape of the rows: as in the tests of the plain layer.
CASES = {
    "groups-of-32": (128, 96, 4, (3,)),
    "groups-of-64": (128, 160, 2, (17,)),
    "groups-of-128": (256, 32, 2, (1,)),
    "a-whole-row": (96, 64, 1, (5, 7)),
}
BITS = dict(zip(CASES, (*FORMATS, 2), strict=True))


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    with guarded():
        yield


@pytest.fixture(autouse=True)
def _fused_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse float32 as well, which shows the arithmetic without roundings, and cut short sums."""
    monkeypatch.setattr(tiles, "FUSED_DTYPES", DTYPES)
    monkeypatch.setattr(tiles, "LEAST_STEPS", 1)
    monkeypatch.setattr(tiles, "processors", lambda device: 4)


@pytest.fixture(params=[64, 0], ids=["few", "many"])
def _rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of few rows and that of many."""
    monkeypatch.setattr(tiles, "FUSED_ROWS", request.param)


def _slots(rows: tuple[int, ...], count: int) -> torch.Tensor:
    """Name the slots of a stack one after the other, none in between, in no order."""
    slots = torch.arange(rows[0]).mul(3).add(1) % (count + 1) - 1
    return slots.to(torch.int32)


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_row_has_its_adapter(name: str, dtype: torch.dtype) -> None:
    (K, N, groups, rows), bits = CASES[name], BITS[name]
    packed, x = make_packed(bits, K, N, groups), torch.randn(*rows, K).to(dtype)
    lora_a, lora_b = adapters(3, K, N, 20, dtype)
    slots = _slots(rows, 3)
    y = packed_linear_triton(x, *packed, None, bits, lora_a, lora_b, 0.5, None, slots)
    weight = dequantize_reference(*packed, bits, dtype)
    assert y.dtype == dtype
    assert_close(y, row_by_row(x, weight, lora_a, lora_b, 0.5, slots))


@pytest.mark.usefixtures("_rows")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_adapter_are_bit_equal_whatever_others_hold(dtype: torch.dtype) -> None:
    packed, x, bias = make_packed(2), torch.randn(9, 64).to(dtype), torch.randn(96).to(dtype)
    lora_a, lora_b = adapters(3, 64, 96, 8, dtype)
    slots = torch.tensor([0, -1, 2, 1, 3, 1, 0, -9, 2])  # 3 is past the stack
    run = (x, *packed, bias, 2)
    y = packed_linear_triton(*run, lora_a, lora_b, -0.5, None, slots)
    lora_a[1], lora_b[1] = float("nan"), float("inf")
    broken = packed_linear_triton(*run, lora_a, lora_b, -0.5, None, slots)
    bare, absent = packed_linear_triton(*run), (slots < 0) | (slots > 2)
    assert torch.equal(bit_pattern(broken[absent]), bit_pattern(bare[absent]))
    assert torch.equal(broken[slots != 1], y[slots != 1])
    assert broken[slots == 1].isnan().all()
    none = packed_linear_triton(*run, lora_a, lora_b, -0.5, None, torch.full((9,), -1))
    assert torch.equal(bit_pattern(none), bit_pattern(bare))


def test_a_branch_apart_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "FINISH_TILE", tiles.Tile(16, 16, 64, 1, 1))
    monkeypatch.setattr(tiles, "LOW_TILE", tiles.Tile(16, 64, 16, 1, 1))
    packed, x, lora_x = make_packed(3), torch.randn(4, 5, 64), torch.randn(4, 5, 64)
    lora_a, lora_b = adapters(3, 64, 96, 40)
    slots = torch.tensor([2, -1, 0, 2])
    y = packed_linear_triton(x, *packed, None, 3, lora_a, lora_b, 0.5, lora_x, slots)
    weight = dequantize_reference(*packed, 3, torch.float32)
    low = row_by_row(lora_x, torch.zeros(64, 96), lora_a, lora_b, 0.5, slots)
    assert_close(y, x.double() @ weight.double() + low)
    strided = (t.mT.contiguous().mT for t in (lora_a, lora_b))
    wide = torch.full((4, 5, 70), float("nan"))
    wide[..., 3:67] = x
    every = torch.stack((slots, slots), 1)[:, 0]
    again = packed_linear_triton(wide[..., 3:67], *packed, None, 3, *strided, 0.5, lora_x, every)
    assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(9,), (4, 20), (0,), (2, 0)], ids=str)
def test_gradients_of_the_branch(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    grad, x = torch.randn(*rows, 96).to(dtype), torch.randn(*rows, 64).to(dtype)
    lora_a, lora_b = adapters(3, 64, 96, 8, dtype)
    slots = _slots(rows, 3)
    arguments = (lora_a, lora_b, 0.5, slots)
    results = low_rank_by_slot_backward_triton(grad, x, *arguments, True)
    double = (t.double() for t in (grad, x, lora_a, lora_b))
    grad_64, x_64, *stacks = double
    exact = low_rank_by_slot_backward_torch(grad_64, x_64, *stacks, 0.5, slots, True)
    for one, other, name in zip(results, exact, ("x", "lora_a", "lora_b"), strict=True):
        assert one.dtype == dtype
        assert_close(one, other, f"gradient of {name}")
    absent = results[0][slots < 0]
    assert torch.equal(absent, torch.zeros_like(absent))
    dx, *others = low_rank_by_slot_backward_triton(grad, None, *arguments, True)
    assert torch.equal(dx, results[0])
    assert [t.numel() for t in others] == [0, 0]
    assert low_rank_by_slot_backward_triton(grad, x, *arguments, False)[0].numel() == 0


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("branch", ["none", "one", "by-slot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_rotation_is_that_of_the_finished_layer(
    name: str, dtype: torch.dtype, branch: str
) -> None:
    (K, N, groups, rows), bits = CASES[name], BITS[name]
    packed, x = make_packed(bits, K, N, groups), torch.randn(*rows, K).to(dtype)
    lora = {"none": (None, None), "one": adapter(K, N, 8, dtype)}.get(branch)
    lora, slots = lora or adapters(3, K, N, 8, dtype), _slots(rows, 3)
    layer = (x, *packed, torch.randn(N).to(dtype), bits, *lora, 0.5, None)
    layer = (*layer, slots if branch == "by-slot" else None)
    # Pairs side by side, in one tile, across tiles; a tail; none; wider than the layer; odd.
    turns = torch.arange(rows[0]).add(1) % 8 - 1
    sizes = [8, 64, N, 2, 0, 2 * N, 3]
    bank = make_bank((*rows, N), sizes, turns, dtype)
    z = packed_linear_rotated_triton(*layer, *bank[1:4])
    y = packed_linear_triton(*layer)
    rotated = torch.tensor([s if s % 2 == 0 and s <= N else 0 for s in sizes])
    # A value is computed again beside its partner, where a BLAS may sum in another order.
    assert_close(z, rotate_by_slot_reference(y, bank.table, rotated, turns))
    alone = torch.where(turns < 0, True, rotated[turns.clamp(min=0)] == 0)
    assert torch.equal(bit_pattern(z[alone]), bit_pattern(y[alone]))


def test_the_rotation_of_a_stack_of_none() -> None:
    packed, x = make_packed(2), torch.randn(3, 64)
    bank = make_bank((3, 96), [], torch.tensor([-1, 0, 4]))
    layer = (x, *packed, None, 2, None, None, 1.0, None, None)
    z = packed_linear_rotated_triton(*layer, *bank[1:4])
    assert torch.equal(z, packed_linear_triton(*layer))


@pytest.mark.parametrize(
    ("groups", "dtype"), [(4, torch.float32), (2, torch.float64)], ids=["groups-of-16", "float64"]
)
def test_what_the_kernels_do_not_serve_takes_the_path_of_torch(
    groups: int, dtype: torch.dtype
) -> None:
    packed, x = make_packed(4, 64, 96, groups), torch.randn(3, 64, dtype=dtype)
    lora_a, lora_b = adapters(2, 64, 96, 8, dtype)
    slots = torch.tensor([1, -1, 0])
    layer = (x, *packed, None, 4, lora_a, lora_b, 0.5, None, slots)
    exact = row_by_row(x, dequantize_reference(*packed, 4, dtype), lora_a, lora_b, 0.5, slots)
    assert_close(packed_linear_triton(*layer), exact)
    bank = make_bank((3, 96), [8, 32], slots, dtype)
    exact = rotate_by_slot_reference(exact, bank.table.double(), *bank[2:4])
    assert_close(packed_linear_rotated_triton(*layer, *bank[1:4]), exact)
    grad = torch.randn(3, 96, dtype=dtype)
    results = low_rank_by_slot_backward_triton(grad, x, lora_a, lora_b, 0.5, slots, True)
    torch_results = low_rank_by_slot_backward_torch(grad, x, lora_a, lora_b, 0.5, slots, True)
    for one, other in zip(results, torch_results, strict=True):
        assert_close(one, other)
