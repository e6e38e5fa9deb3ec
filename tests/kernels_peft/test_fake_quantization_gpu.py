"""The Triton kernels of fake quantisation where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels_peft import fake_quantize, fake_quantize_reference
from kernels_peft.packing import FORMATS
from tests.helpers import assert_close
from tests.kernels_peft.fake_quantizations import GridInputs, bit_equal, exact_gradient, make_grid

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _on_gpu(inputs: GridInputs) -> GridInputs:
    return GridInputs(*(t.cuda() for t in inputs))


def _run(inputs: GridInputs, bits: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    weight, scale, zero, grad = inputs
    scale = scale.detach().clone().requires_grad_()
    y = fake_quantize(weight, scale, zero, bits, dtype)
    return y.detach(), torch.autograd.grad(y, scale, grad.to(y.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize(
    "sizes", [(33, 576, 64), (7, 1536, 128), (5, 96, 32), (3, 60, 12), (3, 5000, 5000)], ids=str
)
def test_agrees_with_the_cpu(sizes: tuple[int, int, int], bits: int, dtype: torch.dtype) -> None:
    inputs = make_grid(*sizes, bits, dtype)
    y, gradient = (t.cpu() for t in _run(_on_gpu(inputs), bits))
    assert bit_equal(y, fake_quantize_reference(*inputs[:3], bits))
    assert_close(gradient, exact_gradient(inputs, bits), "gradient of scale")


def test_dtypes_may_differ() -> None:
    inputs = make_grid(33, 576, 64, 2, torch.bfloat16)
    y, _ = _run(_on_gpu(inputs), 2, torch.float32)
    assert bit_equal(y.cpu(), fake_quantize_reference(*inputs[:3], 2, torch.float32))


def test_runs_are_bit_equal() -> None:
    inputs = _on_gpu(make_grid(512, 1024, 64, 2))
    for one, other in zip(_run(inputs, 2), _run(inputs, 2), strict=True):
        assert bit_equal(one, other)


def test_nothing_waits_for_the_device() -> None:
    inputs = _on_gpu(make_grid(33, 576, 64, 2))
    _run(inputs, 2)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(inputs, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
