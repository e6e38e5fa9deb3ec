"""A packed layer on a CPU multiplies few rows by a copy of its codes in another order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from apiq_peft import PackedLinear
from apiq_peft.layer import pack_layer
from kernels_peft.packed_linear.few_rows import AlongOutputs, Words


@pytest.fixture
def layer() -> PackedLinear:
    torch.manual_seed(0)
    return pack_layer(nn.Linear(128, 64), 2, 64, "asymmetric").eval()


def kept(layer: PackedLinear) -> bool:
    return layer._copied is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_those_of_many(layer: PackedLinear, dtype: torch.dtype) -> None:
    x = torch.randn(2, 20, 128).to(dtype)
    lora_a, lora_b = torch.randn(4, 128) * 0.1, torch.randn(64, 4) * 0.1
    with torch.no_grad():
        many = layer.product(x, lora_a, lora_b, 2.0)
        assert not kept(layer)
        few = layer.product(x[:, :3], lora_a, lora_b, 2.0)
        assert kept(layer)
        again = layer.product(x[:, :3], lora_a, lora_b, 2.0, 2 * x[:, :3])
    error = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(few, many[:, :3], rtol=error, atol=error)
    torch.testing.assert_close(
        again - few,
        2.0 * (x[:, :3] @ lora_a.t().to(dtype)) @ lora_b.t().to(dtype),
        rtol=10 * error,
        atol=10 * error,
    )


def test_what_learns_takes_the_other_way(layer: PackedLinear) -> None:
    x = torch.randn(2, 128)
    lora_a = torch.zeros(4, 128, requires_grad=True)
    layer.product(x, lora_a, torch.ones(64, 4)).sum().backward()
    layer(x.clone().requires_grad_()).sum().backward()
    assert lora_a.grad is not None
    assert not kept(layer)
    layer(x)
    assert kept(layer)
    layer.train()
    assert not kept(layer)
    layer(x)
    assert not kept(layer)


def test_new_codes_are_noticed(layer: PackedLinear) -> None:
    x = torch.randn(AlongOutputs.most_rows, 128)
    first = layer(x)
    other = pack_layer(nn.Linear(128, 64), 2, 64, "asymmetric").eval()
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x))
    assert not torch.allclose(layer(x), first)
    layer.scales.mul_(2)
    bias = layer.bias
    torch.testing.assert_close(layer(x) - bias, 2 * (other(x) - bias))


def test_the_copy_is_not_saved_and_may_be_copied(layer: PackedLinear) -> None:
    x = torch.randn(1, 128)
    with torch.inference_mode():
        first = layer(x)
    assert layer.state_dict().keys() == {"qweight", "qzeros", "scales", "bias"}
    torch.testing.assert_close(copy.deepcopy(layer)(x), first)
    torch.testing.assert_close(layer.half()(x.half()).float(), first, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_last_of_many_positions(bits: int) -> None:
    layer = pack_layer(nn.Linear(128, 64), bits, 64, "asymmetric").eval()
    x, lora_a, lora_b = torch.randn(2, 5, 128).bfloat16(), torch.randn(4, 128), torch.randn(64, 4)
    with torch.no_grad():
        last = layer.product(x[:, -1], lora_a, lora_b, 1.0, x[:, -1])
        same = layer.product(x[:, -1].contiguous(), lora_a, lora_b)
    assert torch.equal(last, same)


@pytest.mark.parametrize("bits", [3, 4])
def test_bfloat16_has_a_copy_of_its_own_for_more_rows(bits: int) -> None:
    torch.manual_seed(0)
    layer = pack_layer(nn.Linear(128, 64), bits, 64, "asymmetric").eval()
    x = torch.randn(Words.most_rows + 1, 128).bfloat16()
    with torch.no_grad():
        many = layer(x)
        assert not kept(layer)
        few = layer(x[:-1])
        assert layer._copied is not None
        assert isinstance(layer._copied[1], Words)
        torch.testing.assert_close(few, many[:-1], rtol=2e-2, atol=2e-2)
        layer(x[:1].float())
        assert isinstance(layer._copied[1], AlongOutputs)
