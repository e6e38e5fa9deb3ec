"""The table of variants: parameters, coefficients, and the way back.

| property                                   | oracle                                           |
|--------------------------------------------|--------------------------------------------------|
| number of parameters                       | half, one and two per feature, for each vector   |
| coefficients of parameters                 | channel by channel by hand; upstream's function  |
| parameters of coefficients                 | the same function again; exact for road_4        |
| equal functions of different parameters    | theta + 2 pi; (theta + pi, -alpha)               |
| determinants                               | alpha^2; a_l a_h cos(t_l - t_h); a d + b c       |
| closures under product and weighted sum    | dense matrices                                   |
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.road.layer import _prepare_cols
from torch import Tensor

from kernels_peft import determinants, rotate_reference
from road_peft.variants import VARIANTS
from tests.helpers import assert_close, dense_rotation
from tests.road_peft._models import by_hand

# (features, group): the paper's pairs, PEFT's default, no power of two, one group
LAYOUTS = st.sampled_from([(8, 2), (64, 64), (18, 6), (12, 4), (16, 16)])
SEEDS = st.integers(0, 2**32 - 1)
NAMES = st.sampled_from(sorted(VARIANTS))


def _draw(name: str, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw angles of any size and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    size = VARIANTS[name].size(features)
    theta = 4 * torch.randn(size, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    scale = 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)
    return theta, sign * scale


def test_the_table_holds_the_variants_of_the_paper() -> None:
    assert list(VARIANTS) == ["road_1", "road_2", "road_4"]
    assert all(name == variant.name for name, variant in VARIANTS.items())


@pytest.mark.parametrize(("name", "size"), [("road_1", 32), ("road_2", 64), ("road_4", 128)])
def test_a_layer_of_64_features_has_so_many_thetas_and_alphas(name: str, size: int) -> None:
    assert VARIANTS[name].size(64) == size


@given(NAMES, LAYOUTS, SEEDS)
def test_coefficients_follow_the_layout_of_a_peft_file(name, layout, seed) -> None:
    features, group = layout
    theta, alpha = _draw(name, features, seed)
    coefficients = VARIANTS[name].coefficients(theta, alpha, group)
    upstream = _prepare_cols(name, group, theta, alpha)
    for got, wanted, theirs in zip(
        coefficients, by_hand(name, theta, alpha, group), upstream, strict=True
    ):
        assert got.shape == (features,)
        assert_close(got, wanted)
        assert_close(got, theirs)


@pytest.mark.parametrize("name", VARIANTS)
def test_alpha_one_and_theta_zero_are_exactly_the_identity(name: str) -> None:
    size = VARIANTS[name].size(16)
    first, second = VARIANTS[name].coefficients(torch.zeros(size), torch.ones(size), 8)
    assert torch.equal(first, torch.ones(16))
    assert torch.equal(second, torch.zeros(16))


@pytest.mark.parametrize("name", ["road_2", "road_4"])
def test_theta_zero_scales_each_output_like_ia3(name: str) -> None:
    alpha = torch.arange(1, VARIANTS[name].size(8) + 1).float()
    scales = alpha if name == "road_2" else alpha.view(-1, 2, 4)[:, 0].flatten()
    first, second = VARIANTS[name].coefficients(torch.zeros_like(alpha), alpha, 4)
    assert torch.equal(first, scales)
    assert torch.equal(second, torch.zeros(8))


@given(NAMES, LAYOUTS, SEEDS)
def test_parameters_give_back_the_same_coefficients(name, layout, seed) -> None:
    features, group = layout
    variant = VARIANTS[name]
    coefficients = variant.coefficients(*_draw(name, features, seed), group)
    theta, alpha = variant.parameters(*coefficients, group)
    assert theta.shape == alpha.shape == (variant.size(features),)
    again = variant.coefficients(theta, alpha, group)
    for got, wanted in zip(again, coefficients, strict=True):
        assert_close(got, wanted)


@given(LAYOUTS, SEEDS)
def test_road_4_holds_any_coefficients_bit_for_bit(layout, seed) -> None:
    features, group = layout
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(2, features, generator=generator)
    variant = VARIANTS["road_4"]
    got = variant.coefficients(*variant.parameters(*wanted, group), group)
    assert torch.equal(torch.stack(got), wanted)


@pytest.mark.parametrize("name", ["road_1", "road_2"])
def test_parameters_are_canonical_where_alpha_was_negative(name: str) -> None:
    variant = VARIANTS[name]
    theta, alpha = _draw(name, 16, seed=3)
    assert (alpha < 0).any()
    theta, alpha = variant.parameters(*variant.coefficients(theta, alpha, 4), 4)
    assert (alpha > 0).all()
    assert (theta.abs() <= math.pi).all()


@given(NAMES, LAYOUTS, SEEDS)
def test_a_full_turn_and_a_half_turn_with_the_opposite_sign_change_nothing(
    name, layout, seed
) -> None:
    features, group = layout
    theta, alpha = _draw(name, features, seed)
    variant = VARIANTS[name]
    wanted = torch.stack(variant.coefficients(theta, alpha, group))
    full = torch.stack(variant.coefficients(theta + 2 * math.pi, alpha, group))
    half = torch.stack(variant.coefficients(theta + math.pi, -alpha, group))
    assert_close(full, wanted)
    assert_close(half, wanted)


@given(LAYOUTS, SEEDS)
def test_road_1_multiplies_complex_numbers(layout, seed) -> None:
    features, group = layout
    theta, alpha = _draw("road_1", features, seed)
    h = torch.randn(3, features, dtype=torch.float64)
    pairs = h.view(3, -1, 2, group // 2).transpose(2, 3).contiguous()  # (low, high) side by side
    turned = torch.view_as_complex(pairs) * torch.polar(alpha, theta).view(-1, group // 2)
    wanted = torch.view_as_real(turned).transpose(2, 3).reshape(3, features)
    coefficients = VARIANTS["road_1"].coefficients(theta, alpha, group)
    assert_close(rotate_reference(h, *coefficients, group), wanted)


def test_determinants_of_each_variant() -> None:
    """Pairs of a group of 4 are (0, 2) and (1, 3)."""
    a = torch.tensor([2.0, 0.5, 1.5, 3.0], dtype=torch.float64)
    t = torch.tensor([0.3, -0.2, 1.1, 0.4], dtype=torch.float64)
    road_1 = VARIANTS["road_1"].coefficients(t[:2], a[:2], 4)
    assert_close(determinants(*road_1, 4), a[:2] ** 2)
    road_2 = VARIANTS["road_2"].coefficients(t, a, 4)
    wanted = torch.stack(
        (a[0] * a[2] * torch.cos(t[0] - t[2]), a[1] * a[3] * torch.cos(t[1] - t[3]))
    )
    assert_close(determinants(*road_2, 4), wanted)
    zero = VARIANTS["road_4"].coefficients(torch.zeros(8), torch.zeros(8), 4)
    assert torch.equal(determinants(*zero, 4), torch.zeros(2))


def _entries(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Read first and second off a block-diagonal matrix, and see that nothing else is in it."""
    features = matrix.shape[0]
    channel = torch.arange(features)
    low = channel % group < group // 2
    partner = torch.where(low, channel + group // 2, channel - group // 2)
    first = matrix[channel, channel]
    second = torch.where(low, -1.0, 1.0) * matrix[channel, partner]
    assert_close(dense_rotation(first, second, group, features), matrix)
    return first, second


@given(NAMES, LAYOUTS, SEEDS)
def test_the_closure_holds_every_product_of_two_adapters(name, layout, seed) -> None:
    features, group = layout
    variant = VARIANTS[name]
    matrices = [
        dense_rotation(*variant.coefficients(*_draw(name, features, s), group), group, features)
        for s in (seed, seed + 1)
    ]
    product = matrices[1] @ matrices[0]
    closure = VARIANTS[variant.closure]
    theta, alpha = closure.parameters(*_entries(product, group), group)
    again = dense_rotation(*closure.coefficients(theta, alpha, group), group, features)
    assert_close(again, product)


@given(NAMES, LAYOUTS, SEEDS, st.floats(-2, 2))
def test_the_closure_holds_every_weighted_sum_of_two_adapters(name, layout, seed, weight) -> None:
    features, group = layout
    variant = VARIANTS[name]
    matrices = [
        dense_rotation(*variant.coefficients(*_draw(name, features, s), group), group, features)
        for s in (seed, seed + 1)
    ]
    total = weight * matrices[0] + (1 - weight) * matrices[1]
    closure = VARIANTS[variant.closure]
    theta, alpha = closure.parameters(*_entries(total, group), group)
    again = dense_rotation(*closure.coefficients(theta, alpha, group), group, features)
    assert_close(again, total)


@given(LAYOUTS, SEEDS)
def test_road_1_is_a_commutative_group(layout, seed) -> None:
    """(t1, a1)(t2, a2) = (t1 + t2, a1 a2)."""
    features, group = layout
    (t1, a1), (t2, a2) = (_draw("road_1", features, s) for s in (seed, seed + 1))

    def matrix(theta: Tensor, alpha: Tensor) -> Tensor:
        coefficients = VARIANTS["road_1"].coefficients(theta, alpha, group)
        return dense_rotation(*coefficients, group, features)

    assert_close(matrix(t1, a1) @ matrix(t2, a2), matrix(t1 + t2, a1 * a2))
    assert_close(matrix(t2, a2) @ matrix(t1, a1), matrix(t1 + t2, a1 * a2))


def test_products_of_road_2_depend_on_the_order_and_are_no_longer_road_2() -> None:
    one, two = (
        dense_rotation(*VARIANTS["road_2"].coefficients(*_draw("road_2", 4, s), 4), 4, 4)
        for s in (1, 2)
    )
    assert (one @ two - two @ one).abs().max() > 0.1
    assert VARIANTS["road_2"].closure == "road_4"


@pytest.mark.parametrize("name", VARIANTS)
def test_coefficients_are_differentiable_and_leave_parameters_alone(name: str) -> None:
    parameters = [p.requires_grad_() for p in _draw(name, 8, seed=5)]
    before = [p.detach().clone() for p in parameters]
    torch.autograd.gradcheck(lambda *p: VARIANTS[name].coefficients(*p, 4), parameters)
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter, old)
