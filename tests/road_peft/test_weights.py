"""The arithmetic of merging a weight, and putting the old one back.

| property                                    | oracle                                     |
|---------------------------------------------|--------------------------------------------|
| W', b', z of a small layer                  | numbers computed by hand                   |
| R (W + before) + after, any layout          | dense matrices in float64                  |
| one rounding in half precision              | the float64 product, rounded once          |
| no tensor larger than the weight            | every tensor that torch makes, watched     |
| a snapshot                                  | bytes; device and dtype of the moment      |
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.road.layer import _get_delta_weight
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from road_peft import weights
from road_peft.variants import VARIANTS
from road_peft.weights import Snapshot, rotate_bias, rotate_weight
from tests.helpers import assert_close, dense_rotation

HALF = (torch.bfloat16, torch.float16)
OWN = ("weight", "bias")
W = torch.tensor([[1.0, 0, 2], [0, 1, -1], [3, 1, 0], [1, -2, 1]], dtype=torch.float64)
B = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
THETA = torch.tensor([math.pi / 6, math.pi / 2], dtype=torch.float64)
ALPHA = torch.tensor([2.0, 0.5], dtype=torch.float64)
ROOT = math.sqrt(3)

# group size: W' and b' of W and B above. With g = 2, rows (0, 1) and (2, 3) are pairs: rows 0 and 1
# turn by 30 degrees and double, 2 and 3 turn by 90 degrees and halve. With g = 4 the pairs are
# (0, 2) and (1, 3).
MERGED = {
    2: (
        [[ROOT, -1, 2 * ROOT + 1], [1, ROOT, 2 - ROOT], [-0.5, 1, -0.5], [1.5, 0.5, 0]],
        [ROOT / 2 + 1, 0.5 - ROOT, -1, 0],
    ),
    4: (
        [
            [ROOT - 3, -1, 2 * ROOT],
            [-0.5, 1, -0.5],
            [1 + 3 * ROOT, ROOT, 2],
            [0, 0.5, -0.5],
        ],
        [ROOT / 2, -1, 0.5, -0.5],
    ),
}


@pytest.mark.parametrize("group", MERGED)
def test_a_weight_and_a_bias_merged_by_hand(group: int) -> None:
    rotation = (*VARIANTS["road_1"].coefficients(THETA, ALPHA, group), group)
    weight, bias = (torch.tensor(v, dtype=torch.float64) for v in MERGED[group])
    assert_close(rotate_weight(W, [rotation]), weight)
    assert_close(rotate_bias(B, [rotation]), bias)
    assert_close(rotate_weight(W.T.contiguous(), [rotation], feature_dim=1), weight.T)


def _rotation(n: int, group: int, dtype: torch.dtype = torch.float64) -> weights.Rotation:
    return 1 + 0.3 * torch.randn(n, dtype=dtype), 0.4 * torch.randn(n, dtype=dtype), group


def _delta(out: int, columns: int, rank: int = 2) -> weights.Delta:
    a, b = torch.randn(rank, columns), torch.randn(out, rank)
    return a.double(), b.double(), 0.7


# (outputs, rotated outputs, group size): the paper's pairs, a tail, no power of two, one group
LAYOUTS = st.sampled_from([(8, 8, 2), (13, 12, 4), (18, 18, 6), (16, 16, 16)])


@given(
    layout=LAYOUTS,
    columns=st.integers(0, 9),
    rotations=st.integers(0, 3),
    deltas=st.tuples(st.booleans(), st.booleans()),
    feature_dim=st.sampled_from([0, 1]),
    transposed=st.booleans(),
    block=st.sampled_from([1, 40, 1 << 19]),
)
def test_rotate_weight_is_the_dense_product(
    layout, columns, rotations, deltas, feature_dim, transposed, block
) -> None:
    out, n, group = layout
    source = torch.randn(out, columns, dtype=torch.float64)
    turns = [_rotation(n, group) for _ in range(rotations)]
    before, after = ([_delta(out, columns)] if there else [] for there in deltas)

    wanted = source + sum(s * b @ a for a, b, s in before)
    for first, second, g in turns:
        wanted = dense_rotation(first, second, g, out) @ wanted
    wanted = wanted + sum(s * b @ a for a, b, s in after)

    weight = source if feature_dim == 0 else source.T
    if transposed:
        weight = weight.T.contiguous().T  # the other memory layout
    kept = weight.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "BLOCK_ELEMENTS", block)
        merged = rotate_weight(weight, turns, before=before, after=after, feature_dim=feature_dim)
    assert merged.shape == weight.shape
    assert merged.dtype == weight.dtype
    assert_close(merged, wanted if feature_dim == 0 else wanted.T)
    assert torch.equal(weight, kept)


@given(layout=LAYOUTS, rotations=st.integers(0, 3))
def test_rotate_bias_is_the_dense_product(layout, rotations) -> None:
    out, n, group = layout
    bias = torch.randn(out, dtype=torch.float64)
    turns = [_rotation(n, group) for _ in range(rotations)]
    wanted = bias
    for first, second, g in turns:
        wanted = dense_rotation(first, second, g, out) @ wanted
    assert_close(rotate_bias(bias, turns), wanted)


def test_deltas_of_a_wider_dtype_than_a_weight_in_float32_are_taken() -> None:
    weight, delta = torch.randn(8, 5), _delta(8, 5)
    wanted = weight.double() + delta[2] * delta[1] @ delta[0]
    merged = rotate_weight(weight, [], after=[delta])
    assert merged.dtype == torch.float32
    assert_close(merged, wanted)


def _relative(weight: Tensor, exact: Tensor) -> float:
    return ((weight.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_weight_is_rounded_once_where_stock_peft_rounds_three_times(dtype) -> None:
    theta, alpha = 0.3 * torch.randn(64), 1 + 0.2 * torch.randn(64)
    weight = torch.randn(128, 64).to(dtype)
    rotation = (*VARIANTS["road_1"].coefficients(theta, alpha, 64), 64)
    wide = VARIANTS["road_1"].coefficients(theta.double(), alpha.double(), 64)
    exact = dense_rotation(*wide, 64, 128) @ weight.double()
    floor = _relative(exact.to(dtype), exact)

    merged = rotate_weight(weight, [rotation])
    theirs = _get_delta_weight("road_1", 64, theta, alpha).to(dtype) @ weight

    assert _relative(merged, exact) <= floor * 1.001
    assert (merged == exact.to(dtype)).double().mean() > 0.999  # a tie after float32 may fall apart
    assert _relative(theirs, exact) > floor * 1.2


@pytest.mark.parametrize("dtype", HALF)
def test_two_adapters_in_half_precision_are_still_rounded_once(dtype) -> None:
    weight, bias = torch.randn(32, 16).to(dtype), torch.randn(32).to(dtype)
    turns = [_rotation(32, 4, torch.float32), _rotation(32, 16, torch.float32)]
    exact, exact_bias = weight.double(), bias.double()
    for first, second, group in turns:
        dense = dense_rotation(first.double(), second.double(), group, 32)
        exact, exact_bias = dense @ exact, dense @ exact_bias
    merged, merged_bias = rotate_weight(weight, turns), rotate_bias(bias, turns)
    assert _relative(merged, exact) <= _relative(exact.to(dtype), exact) * 1.001
    assert _relative(merged_bias, exact_bias) <= _relative(exact_bias.to(dtype), exact_bias) * 1.001


class _LargestTensor(TorchDispatchMode):
    """Watches how many elements the largest tensor has that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_the_weight_where_stock_peft_makes_a_square() -> None:
    theta, alpha, weight = torch.randn(64), torch.ones(64), torch.randn(128, 3)
    with _LargestTensor() as ours:
        rotate_weight(weight, [(*VARIANTS["road_1"].coefficients(theta, alpha, 64), 64)])
    assert ours.elements == weight.numel()
    with _LargestTensor() as theirs:
        _get_delta_weight("road_1", 64, theta, alpha)
    assert theirs.elements == 128 * 128


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_snapshot_puts_the_very_bytes_back(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 4).to(dtype)
    weight, bias = layer.weight.data.clone(), layer.bias.data.clone()
    parameter = layer.weight
    snapshot = Snapshot.take(layer, OWN)
    layer.weight.data = torch.zeros_like(weight)
    layer.bias.data = torch.zeros_like(bias)
    assert torch.equal(snapshot.tensors()["weight"], weight)
    snapshot.restore()
    assert layer.weight is parameter  # an optimizer may hold it
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)


def test_a_snapshot_copies_nothing() -> None:
    layer = nn.Linear(3, 4)
    snapshot = Snapshot.take(layer, OWN)
    assert snapshot.tensors()["weight"].data_ptr() == layer.weight.data_ptr()


def test_a_snapshot_follows_the_dtype_that_the_layer_has_by_now() -> None:
    layer = nn.Linear(3, 4)
    weight = layer.weight.data.clone()
    snapshot = Snapshot.take(layer, OWN)
    layer.weight.data = torch.zeros_like(weight)
    layer.bfloat16()
    snapshot.restore()
    assert torch.equal(layer.weight, weight.bfloat16())


def test_a_snapshot_of_a_layer_without_bias_has_a_weight_only() -> None:
    assert list(Snapshot.take(nn.Linear(3, 4, bias=False), OWN).tensors()) == ["weight"]
