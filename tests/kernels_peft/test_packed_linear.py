"""Multiplying with packed codes, against the same product with the weight written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels_peft.packed_linear import dequantize, packed_linear, packed_sizes
from kernels_peft.packing import FORMATS, pack
from tests.helpers import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def packed(bits: int, K: int = 64, N: int = 96, groups: int = 2) -> tuple[Tensor, ...]:
    """Give codes (K, N), zero points and scales (G, N), and the packed form of the first two."""
    codes = torch.randint(2**bits, (K, N))
    zeros = torch.randint(2**bits, (groups, N))
    scales = (torch.rand(groups, N) + 0.1).half()
    return codes, zeros, scales, pack(codes, bits), pack(zeros, bits, dim=1)


def written_out(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """Give (code - zero) * scale, entry by entry of a group, in float64."""
    each = codes.shape[0] // scales.shape[0]
    rows = [
        (codes[k] - zeros[k // each]).double() * scales[k // each].double()
        for k in range(codes.shape[0])
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bits", FORMATS)
def test_the_weight_is_what_the_codes_stand_for(bits: int, groups: int) -> None:
    codes, zeros, scales, qweight, qzeros = packed(bits, K=128, groups=groups)
    weight = written_out(codes, zeros, scales)
    assert torch.equal(dequantize(qweight, qzeros, scales, bits), weight.float())
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantize(qweight, qzeros, scales, bits, dtype), weight.to(dtype))
    assert packed_sizes(qweight, bits) == codes.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64), (1, 1, 64)], ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_forward_and_gradients(bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes, zeros, scales, qweight, qzeros = packed(bits)
    weight = written_out(codes, zeros, scales)
    x = torch.randn(shape).to(dtype).requires_grad_()
    bias = torch.randn(96).to(dtype).requires_grad_()
    y = packed_linear(x, qweight, qzeros, scales, bias, bits)
    exact = x.detach().double() @ weight + bias.detach().double()
    assert y.dtype == dtype
    assert_close(y, exact)
    grad = torch.randn_like(y)
    dx, dbias = torch.autograd.grad(y, (x, bias), grad)
    assert_close(dx, grad.double() @ weight.t(), "gradient of x")
    assert_close(dbias, grad.double().reshape(-1, 96).sum(0), "gradient of bias")


def test_only_packed_tensors_are_kept_for_the_backward() -> None:
    _, _, scales, qweight, qzeros = packed(2)
    x = torch.randn(7, 64, requires_grad=True)
    kept: list[Tensor] = []

    def pack_hook(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        packed_linear(x, qweight, qzeros, scales, None, 2)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (qweight, qzeros, scales)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", FORMATS)
def test_opcheck(bits: int, bias: bool) -> None:
    _, _, scales, qweight, qzeros = packed(bits)
    x = torch.randn(3, 64, requires_grad=True)
    added = torch.randn(96, requires_grad=True) if bias else None
    operators: Any = torch.ops.kernels_peft
    torch.library.opcheck(
        operators.packed_linear.default, (x, qweight, qzeros, scales, added, bits)
    )
    torch.library.opcheck(
        operators.packed_linear.default,
        (x.detach().t().contiguous().t(), qweight, qzeros, scales, added, bits),
    )
    torch.library.opcheck(
        operators.dequantize.default, (qweight, qzeros, scales, bits, torch.bfloat16)
    )


def test_compiled_in_one_graph() -> None:
    _, _, scales, qweight, qzeros = packed(3)

    def run(x: Tensor) -> Tensor:
        return packed_linear(x, qweight, qzeros, scales, None, 3).relu()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 5):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), run(x))


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"bits": 8}, "bits is 8; choose from 2, 3, 4"),
    "dtype of the codes": ({"qweight": torch.zeros(4, 96)}, "a matrix of int32"),
    "scales": ({"scales": torch.zeros(2, 96, dtype=torch.int32)}, "a floating-point dtype"),
    "another number of outputs": ({"scales": torch.zeros(2, 64)}, "for 96 outputs, but scales is"),
    "groups": ({"scales": torch.zeros(3, 96)}, "a multiple of the groups"),
    "zero points": ({"qzeros": torch.zeros(2, 5, dtype=torch.int32)}, "qzeros"),
    "inputs": ({"x": torch.zeros(3, 32)}, r"a floating-point tensor \(..., 64\)"),
    "integers": ({"x": torch.zeros(3, 64, dtype=torch.int64)}, "a floating-point tensor"),
    "bias": ({"bias": torch.zeros(95)}, r"bias has shape \(95,\)"),
    "dtype of the bias": ({"bias": torch.zeros(96).half()}, "in the dtype of x"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_refused(case: str) -> None:
    _, _, scales, qweight, qzeros = packed(2)
    change, message = ERRORS[case]
    arguments: dict[str, Any] = {
        **{"x": torch.zeros(3, 64), "qweight": qweight, "qzeros": qzeros, "scales": scales},
        **{"bias": None, "bits": 2},
        **change,
    }
    with pytest.raises(ValueError, match=message):
        packed_linear(**arguments)
