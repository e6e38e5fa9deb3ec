"""Values and gradients of the rotation on CPU, against oracles that share no code with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels_peft import determinants, invert, rotate, rotate_reference
from kernels_peft.rotation import blocked
from tests.helpers import GOLDEN, Golden, assert_close, dense_rotation
from tests.kernels_peft.rotations import double_gradients, make

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# (features, coefficients, group): plain, the paper's pairs, one group, no power of two, a tail.
LAYOUTS = ((128, 128, 64), (10, 10, 2), (32, 32, 32), (18, 18, 6), (21, 16, 4), (5, 0, 2))


def _by_hand(case: Golden) -> tuple[Tensor, Tensor]:
    """Write out the coefficients of RoAd1, RoAd2 and RoAd4 from PEFT's layout of parameters."""
    g, half = case.group_size, case.group_size // 2
    theta, alpha = (torch.tensor(v, dtype=torch.float64) for v in (case.theta, case.alpha))
    channels = torch.arange(len(case.h))
    group, within = channels // g, channels % g
    diagonal, off = {
        "road_1": (group * half + within % half, group * half + within % half),
        "road_2": (channels, channels),
        "road_4": (group * 2 * g + within, group * 2 * g + g + within),
    }[case.variant]
    return alpha[diagonal] * theta[diagonal].cos(), alpha[off] * theta[off].sin()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c.variant}-{c.group_size}")
@pytest.mark.parametrize("function", [rotate, rotate_reference])
def test_golden_numbers(function, case: Golden) -> None:
    first, second = _by_hand(case)
    z = function(torch.tensor(case.h, dtype=torch.float64), first, second, case.group_size)
    # The numbers were computed in float32.
    assert_close(z, torch.tensor(case.z, dtype=torch.float64), dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "n", "group"), LAYOUTS)
def test_forward_and_gradients_are_those_of_the_dense_matrix(d, n, group, dtype) -> None:
    inputs = make((3, 7, d), n, dtype)
    leaves = [t.double().clone().requires_grad_() for t in inputs[:3]]
    expected = leaves[0] @ dense_rotation(leaves[1], leaves[2], group, d).T
    wanted = torch.autograd.grad(
        expected, leaves, inputs.grad.double(), allow_unused=True, materialize_grads=True
    )

    ours = [t.clone().requires_grad_() for t in inputs[:3]]
    y = rotate(*ours, group)
    y.backward(inputs.grad)

    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_close(y, expected, "y")
    for name, leaf, reference in zip(("x", "first", "second"), ours, wanted, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, reference, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "n", "group"), LAYOUTS)
def test_recompute_gives_the_gradients_of_its_output(d, n, group, dtype) -> None:
    inputs = make((3, 7, d), n, dtype)
    ours = [t.clone().requires_grad_() for t in inputs[:3]]
    y = rotate(*ours, group, recompute=True)
    y.backward(inputs.grad)
    assert torch.equal(y, rotate(*inputs[:3], group))
    for leaf, (name, wanted) in zip(ours, double_gradients(inputs, group, y).items(), strict=True):
        assert_close(leaf.grad, wanted, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_recompute_costs_a_rounding_of_the_gradient(dtype: torch.dtype) -> None:
    inputs = make((64, 128), 128, dtype)
    # A pure rotation: its inverse does not enlarge what the output lost in rounding.
    angle = torch.randn(2, 1, 32).expand(-1, 2, -1).flatten().to(inputs.first.dtype)
    inputs = inputs._replace(first=angle.cos(), second=angle.sin())
    ours = [t.clone().requires_grad_() for t in inputs[:3]]
    rotate(*ours, 64, recompute=True).backward(inputs.grad)
    for leaf, (name, wanted) in zip(ours, double_gradients(inputs, 64).items(), strict=True):
        assert_close(leaf.grad, wanted, f"gradient of {name}", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 8, 12])
def test_road1_is_complex_multiplication(group: int, dtype: torch.dtype) -> None:
    pairs = 24
    theta, alpha = torch.randn(pairs).double(), 1 + 0.5 * torch.rand(pairs).double()
    x = torch.randn(5, 2 * pairs, dtype=torch.float64).to(dtype)
    # Members of a pair side by side in the last dimension.
    beside = x.double().view(5, -1, 2, group // 2).transpose(-1, -2).contiguous()
    turned = torch.view_as_complex(beside) * torch.polar(alpha, theta).view(-1, group // 2)
    expected = torch.view_as_real(turned).transpose(-1, -2).reshape(5, -1)

    def both(values: Tensor) -> Tensor:
        wide = values.to(torch.promote_types(dtype, torch.float32))
        return wide.view(-1, 1, group // 2).expand(-1, 2, -1).flatten()

    y = rotate(x, both(alpha * theta.cos()), both(alpha * theta.sin()), group)
    assert_close(y, expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck_of_the_operator(recompute: bool) -> None:
    x, first, second, _ = make((3, 11), 8, torch.float64)
    leaves = [t.requires_grad_() for t in (x, first, second)]
    assert torch.autograd.gradcheck(lambda x, u, v: rotate(x, u, v, 4, recompute=recompute), leaves)


@pytest.mark.parametrize("dim", [-1, 0])
def test_gradcheck_of_the_reference(dim: int) -> None:
    x, first, second, _ = make((9, 3) if dim == 0 else (3, 9), 8, torch.float64)
    leaves = [t.requires_grad_() for t in (x, first, second)]
    assert torch.autograd.gradcheck(lambda x, u, v: rotate_reference(x, u, v, 4, dim), leaves)


def test_reference_along_another_dimension() -> None:
    x, first, second, _ = make((21, 3, 5), 16)
    along = rotate_reference(x, first, second, 4, dim=0)
    assert torch.equal(along.movedim(0, -1), rotate_reference(x.movedim(0, -1), first, second, 4))


@given(
    tokens=st.integers(0, 9),
    groups=st.integers(0, 4),
    half=st.integers(1, 9),
    tail=st.integers(0, 5),
    leading=st.sampled_from([(), (1,), (2, 3)]),
    dtype=st.sampled_from(DTYPES),
    recompute=st.booleans(),
)
def test_any_shape(tokens, groups, half, tail, leading, dtype, recompute) -> None:
    n = 2 * half * groups
    inputs = make((*leading, tokens, n + tail), n, dtype)
    x, first, second = (t.clone().requires_grad_() for t in inputs[:3])
    y = rotate(x, first, second, 2 * half, recompute=recompute)
    y.backward(inputs.grad)
    assert_close(y, rotate_reference(*(t.double() for t in inputs[:3]), 2 * half), "y")
    assert torch.equal(y[..., n:], x[..., n:])
    reference = double_gradients(inputs, 2 * half, y if recompute else None)
    for leaf, (name, wanted) in zip((x, first, second), reference.items(), strict=True):
        assert_close(leaf.grad, wanted, f"gradient of {name}")


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _inside_wider_rows(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


@pytest.mark.parametrize("view", [_transposed, _strided, _inside_wider_rows])
@pytest.mark.parametrize("recompute", [False, True])
def test_strides_change_nothing(view, recompute: bool) -> None:
    inputs = make((4, 5, 21), 16)
    results = []
    for layout in (torch.clone, view):
        x, first, second = (t.clone() for t in inputs[:3])
        x = layout(x).requires_grad_()
        assert layout is torch.clone or not x.is_contiguous()
        leaves = [x, first.requires_grad_(), second.requires_grad_()]
        y = rotate(*leaves, 4, recompute=recompute)
        assert y.is_contiguous()
        results.append((y, *torch.autograd.grad(y, leaves, layout(inputs.grad))))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


def test_blocks_of_rows_change_only_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make((37, 24), 16)
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 5 * 24)
    x, first, second = (t.clone().requires_grad_() for t in inputs[:3])
    y = rotate(x, first, second, 8)
    y.backward(inputs.grad)
    wanted = double_gradients(inputs, 8)
    assert_close(y, rotate_reference(*inputs[:3], 8), "y")
    for name, leaf in (("x", x), ("first", first), ("second", second)):
        assert_close(leaf.grad, wanted[name], f"gradient of {name}")


def test_rounds_once() -> None:
    x, first, second, _ = make((64, 64), 64, torch.bfloat16)
    exact = rotate_reference(x.double(), first.double(), second.double(), 64)
    # Two roundings would differ from one in a tenth of all values; ties of float32 in almost none.
    assert (rotate(x, first, second, 64) != exact.bfloat16()).float().mean() < 1e-3


def test_identity_is_exact_and_is_a_copy() -> None:
    x = torch.randn(3, 8)
    y = rotate(x, torch.ones(8), torch.zeros(8), 4)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_inputs_are_left_alone() -> None:
    inputs = make((3, 9), 8)
    before = [t.clone() for t in inputs]
    y = rotate(*(t.requires_grad_() for t in inputs[:3]), 4, recompute=True)
    y.backward(inputs.grad)
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


def test_only_what_needs_a_gradient_gets_one() -> None:
    inputs = make((3, 8), 8)
    names = ("x", "first", "second")
    for wanted in range(1, 8):
        leaves = [t.clone() for t in inputs[:3]]
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(bool(wanted >> i & 1))
        rotate(*leaves, 4).backward(inputs.grad)
        reference = double_gradients(inputs, 4)
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            assert (leaf.grad is not None) == bool(wanted >> i & 1)
            if leaf.grad is not None:
                assert_close(leaf.grad, reference[name], f"gradient of {name}")


@pytest.mark.parametrize("group", [2, 6, 8])
def test_inverse_undoes_the_rotation(group: int) -> None:
    x, first, second, _ = make((5, 24), 24, torch.float64)
    y = rotate(x, first, second, group)
    assert_close(rotate(y, *invert(first, second, group), group), x)


def test_inverse_and_determinant_by_hand() -> None:
    # [[.8, -.3], [.2, 1.1]] has determinant .94.
    first, second = torch.tensor([0.8, 1.1]), torch.tensor([0.3, 0.2])
    assert_close(determinants(first, second, 2), torch.tensor([0.94]))
    inverse = dense_rotation(*invert(first, second, 2), 2, 2)
    wanted = torch.tensor([[1.1702128, 0.3191489], [-0.2127660, 0.8510638]])
    assert_close(inverse, wanted)


@pytest.mark.parametrize("group", [2, 6])
def test_determinants_are_those_of_the_blocks(group: int) -> None:
    _, first, second, _ = make((1,), 12, torch.float64)
    whole = torch.linalg.det(dense_rotation(first, second, group, 12))
    assert_close(determinants(first, second, group).prod(), whole)
