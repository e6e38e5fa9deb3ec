"""The Triton kernels of the packed linear layer, value by value, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels_peft.packed_linear import (
    dequantize_reference,
    packed_linear_reference,
    packed_sizes,
)
from kernels_peft.packed_linear.kernel import (
    dequantize_triton,
    layer,
    packed_linear_backward_triton,
    packed_linear_triton,
    tiles,
)
from kernels_peft.packed_linear.kernel.tiles import Tile
from kernels_peft.packing import FORMATS
from tests.helpers import assert_close
from tests.kernels_peft.interpreter_guard import guarded
from tests.kernels_peft.packed_linears import adapter, make_packed

pytestmark = pytest.mark.interp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# K, N, groups, rows: groups of 32, 64 and 128 and a whole row that no larger power of two divides;
# outputs that fill no tile; odd numbers of rows, one and several tiles of them.
CASES = {
    "groups-of-32": (128, 96, 4, 3),
    "groups-of-64": (128, 160, 2, 17),
    "groups-of-128": (256, 32, 2, 1),
    "a-whole-row": (96, 64, 1, 35),
}


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    with guarded():
        yield


@pytest.fixture(autouse=True)
def _fused_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse float32 as well, which shows the arithmetic without roundings, and cut short sums."""
    monkeypatch.setattr(tiles, "FUSED_DTYPES", DTYPES)
    monkeypatch.setattr(tiles, "LEAST_STEPS", 1)
    monkeypatch.setattr(tiles, "processors", lambda device: 128)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small tensors into many tiles."""
    monkeypatch.setattr(tiles, "FUSED_TILES", ((0, Tile(16, 32, 32, 1, 1)),))
    monkeypatch.setattr(tiles, "FINISH_TILE", Tile(16, 16, 64, 1, 1))
    monkeypatch.setattr(tiles, "LOW_TILE", Tile(16, 64, 16, 1, 1))
    monkeypatch.setattr(tiles, "processors", lambda device: 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_the_weight_is_bit_equal(bits: int, dtype: torch.dtype) -> None:
    for K, N, groups, _ in CASES.values():
        packed = make_packed(bits, K, N, groups)
        expected = dequantize_reference(*packed, bits, dtype)
        assert torch.equal(dequantize_triton(*packed, bits, dtype), expected)
        scales = packed.scales.to(torch.bfloat16) / 3
        packed = packed._replace(scales=scales)
        expected = dequantize_reference(*packed, bits, dtype)
        assert torch.equal(dequantize_triton(*packed, bits, dtype), expected)


def _check_forward_and_gradient(case: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    K, N, groups, rows = case
    packed = make_packed(bits, K, N, groups)
    x, bias = torch.randn(rows, K).to(dtype), torch.randn(N).to(dtype)
    y = packed_linear_triton(x, *packed, bias, bits)
    weight = dequantize_reference(*packed, bits, dtype).double()
    assert y.dtype == dtype
    assert_close(y, x.double() @ weight + bias.double(), "y")
    grad = torch.randn(rows, N).to(dtype)
    dx = packed_linear_backward_triton(grad, *packed, bits)
    assert_close(dx, grad.double() @ weight.t(), "gradient of x")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_forward_and_gradient(bits: int, dtype: torch.dtype) -> None:
    for case in CASES.values():
        _check_forward_and_gradient(case, bits, dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bits", FORMATS)
def test_many_small_tiles(bits: int) -> None:
    _check_forward_and_gradient(CASES["groups-of-64"], bits, torch.float32)


def test_runs_are_bit_equal_whatever_the_other_rows() -> None:
    packed = make_packed(2, 128, 96, 2)
    x = torch.randn(9, 128)
    y = packed_linear_triton(x, *packed, None, 2)
    assert torch.equal(packed_linear_triton(x, *packed, None, 2), y)
    x[1:] = float("nan")
    assert torch.equal(packed_linear_triton(x, *packed, None, 2)[0], y[0])


def _check_low_rank(rank: int, dtype: torch.dtype, dropped: bool, biased: bool) -> None:
    packed = make_packed(2, 96, 96, 3)
    lora_a, lora_b = adapter(96, 96, rank, dtype)
    x, bias = torch.randn(2, 9, 96).to(dtype), torch.randn(96).to(dtype)
    branch = torch.nn.functional.dropout(x, 0.5) if dropped else None
    y = packed_linear_triton(x, *packed, bias if biased else None, 2, lora_a, lora_b, 0.25, branch)
    weight = dequantize_reference(*packed, 2, dtype).double()
    low = (x if branch is None else branch).double() @ lora_a.double().t()
    exact = x.double() @ weight + 0.25 * low @ lora_b.double().t()
    assert_close(y, exact + bias.double() if biased else exact, "y")
    d_low = torch.randn(2, 9, rank).to(dtype)
    dx = packed_linear_backward_triton(y, *packed, 2, d_low, lora_a)
    exact = y.double() @ weight.t() + d_low.double() @ lora_a.double()
    assert_close(dx, exact, "gradient of x")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rank", "dropped", "biased"), [(1, False, True), (8, True, False), (40, True, True)]
)
def test_the_low_rank_branch(rank: int, dropped: bool, biased: bool, dtype: torch.dtype) -> None:
    _check_low_rank(rank, dtype, dropped, biased)


@pytest.mark.usefixtures("small_tiles")
def test_the_low_rank_branch_in_many_small_tiles() -> None:
    _check_low_rank(40, torch.float32, dropped=False, biased=True)


@pytest.mark.parametrize("bits", FORMATS)
def test_many_rows_take_the_library(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make_packed(bits, 64, 96, 2)
    lora_a, lora_b = adapter(64, 96, 8)
    x, bias, d_low = torch.randn(5, 64), torch.randn(96), torch.randn(5, 8)
    few = packed_linear_triton(x, *packed, bias, bits, lora_a, lora_b, 0.5)
    few_dx = packed_linear_backward_triton(few, *packed, bits, d_low, lora_a)
    monkeypatch.setattr(tiles, "FUSED_ROWS", 4)
    monkeypatch.setattr(layer, "product_in_parts", None)
    assert_close(packed_linear_triton(x, *packed, bias, bits, lora_a, lora_b, 0.5), few, "y")
    dx = packed_linear_backward_triton(few, *packed, bits, d_low, lora_a)
    assert_close(dx, few_dx, "gradient of x")


@pytest.mark.parametrize("rows", [(0,), (3, 0)], ids=str)
def test_no_rows(rows: tuple[int, ...]) -> None:
    packed = make_packed(2, 64, 96, 2)
    y = packed_linear_triton(torch.empty(*rows, 64), *packed, torch.zeros(96), 2)
    assert y.shape == (*rows, 96)
    assert packed_linear_backward_triton(y, *packed, 2).shape == (*rows, 64)


def test_strides() -> None:
    packed = make_packed(3, 64, 96, 2)
    views = packed._replace(**{
        name: t.t().contiguous().t() for name, t in packed._asdict().items()
    })  # fmt: skip
    lora_a, lora_b = adapter(64, 96, 8)
    x = torch.randn(5, 64)
    y = packed_linear_triton(x, *packed, None, 3, lora_a, lora_b)
    wide = torch.full((5, 70), float("nan"))
    wide[:, 3:67] = x
    for given in (wide[:, 3:67], x.t().contiguous().t()):
        strided = (t.t().contiguous().t() for t in (lora_a, lora_b))
        assert torch.equal(packed_linear_triton(given, *views, None, 3, *strided), y)


@pytest.mark.parametrize(
    ("groups", "dtype"), [(4, torch.float32), (2, torch.float64)], ids=["groups-of-16", "float64"]
)
def test_what_the_kernels_do_not_serve_takes_the_path_of_torch(
    groups: int, dtype: torch.dtype
) -> None:
    packed = make_packed(4, 64, 96, groups)
    x = torch.randn(3, 64, dtype=dtype)
    expected = packed_linear_reference(x, *packed, None, 4)
    assert torch.equal(packed_linear_triton(x, *packed, None, 4), expected)
    weight = dequantize_reference(*packed, 4, dtype)
    assert torch.equal(dequantize_triton(*packed, 4, dtype), weight)
    assert packed_sizes(packed.qweight, 4) == weight.shape
    dx = packed_linear_backward_triton(expected, *packed, 4)
    assert_close(dx, expected @ weight.t(), "gradient of x")


@pytest.mark.parametrize("fused", [True, False])
def test_results_are_not_views(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "FUSED_ROWS", 8 if fused else 0)
    packed, (lora_a, lora_b) = make_packed(2), adapter(64, 96, 4)
    x, grad = torch.randn(2, 3, 64), torch.randn(2, 3, 96)
    y = packed_linear_triton(x, *packed, None, 2, lora_a, lora_b)
    dx = packed_linear_backward_triton(grad, *packed, 2, grad @ lora_b, lora_a)
    assert (y.shape, dx.shape) == (grad.shape, x.shape)
    assert not y._is_view()
    assert not dx._is_view()
