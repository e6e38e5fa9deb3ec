"""Multiplying with packed codes, against the same product with the weight written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels_peft.packed_linear import (
    blocked,
    dequantize,
    dequantize_reference,
    packed_linear,
    packed_linear_reference,
    packed_sizes,
)
from kernels_peft.packing import FORMATS, pack
from tests.helpers import assert_close
from tests.kernels_peft.packed_linears import adapter, draw_codes, make_packed, written_out

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATORS: Any = torch.ops.kernels_peft


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bits", FORMATS)
def test_the_weight_is_what_the_codes_stand_for(bits: int, groups: int) -> None:
    codes, zeros, scales = draw_codes(bits, 128, 96, groups)
    qweight, qzeros = pack(codes, bits), pack(zeros, bits, dim=1)
    weight = written_out(codes, zeros, scales)
    assert torch.equal(dequantize(qweight, qzeros, scales, bits), weight.float())
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantize(qweight, qzeros, scales, bits, dtype), weight.to(dtype))
    assert packed_sizes(qweight, bits) == codes.shape


def _exact(
    bits: int, packed: Any, x: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, lora_x: Tensor
) -> tuple[Tensor, ...]:
    """Give the layer and its gradients, in float64, for a gradient of y that is y."""
    leaves = [t.detach().double().requires_grad_() for t in (x, bias, lora_a, lora_b, lora_x)]
    weight = dequantize_reference(*packed, bits, torch.float64)
    y = leaves[0] @ weight + leaves[1] + 0.5 * leaves[4] @ leaves[2].t() @ leaves[3].t()
    return y, *torch.autograd.grad(y, leaves, y.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 9, 64), (0, 64), (1, 1, 64)], ids=str)
@pytest.mark.parametrize("bits", FORMATS)
def test_forward_and_gradients(bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed = make_packed(bits)
    x, bias, lora_x = (torch.randn(s).to(dtype).requires_grad_() for s in (shape, 96, shape))
    lora_a, lora_b = (t.requires_grad_() for t in adapter(64, 96, 8, dtype))
    for branch in (None, lora_x):
        y = packed_linear(x, *packed, bias, bits, lora_a, lora_b, 0.5, branch)
        exact, *slopes = _exact(
            bits, packed, x, bias, lora_a, lora_b, x if branch is None else lora_x
        )
        assert y.dtype == dtype
        assert_close(y, exact)
        if branch is None:
            slopes[0] = slopes[0] + slopes.pop()
        leaves = {"x": x, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, "lora_x": branch}
        given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        gradients = torch.autograd.grad(y, list(given.values()), exact.detach().to(dtype))
        for name, gradient, slope in zip(given, gradients, slopes, strict=True):
            assert gradient.dtype == dtype
            assert_close(gradient, slope, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("K", "groups"), [(256, 4), (256, 1), (192, 2), (96, 6)])
@pytest.mark.parametrize("bits", FORMATS)
def test_in_many_blocks(
    bits: int, K: int, groups: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 96 * 64)
    monkeypatch.setattr(blocked, "LEAST_COLUMNS", 32)
    packed = make_packed(bits, K, 96, groups)
    weight = dequantize_reference(*packed, bits, dtype)
    assert torch.equal(dequantize(*packed, bits, dtype), weight)
    x = torch.randn(rows, K).to(dtype).requires_grad_()
    y = packed_linear(x, *packed, None, bits)
    assert_close(y, x.double() @ weight.double())
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert_close(dx, y.double() @ weight.double().t(), "gradient of x")


class _Largest(TorchDispatchMode):
    """Note the most elements that a result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // 4)
        return out


def test_the_whole_weight_is_never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 256 * 64)
    monkeypatch.setattr(blocked, "LEAST_COLUMNS", 32)
    packed, x = make_packed(4, 256, 512, 2), torch.randn(3, 256)
    with _Largest() as largest:
        y = blocked.packed_linear_blocked(x, *packed, None, 4)
        blocked.packed_linear_backward_blocked(y, *packed, 4)
    assert 0 < largest.elements < 256 * 512 // 4


def test_gradients_of_the_reference_in_double_precision() -> None:
    packed = make_packed(3, 32, 32, 1)
    x, lora_x, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 32), (2, 32), 32))
    leaves = [t.requires_grad_() for t in (x, bias, *adapter(32, 32, 2, torch.float64), lora_x)]

    def run(x: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, lora_x: Tensor) -> Tensor:
        return packed_linear_reference(x, *packed, bias, 3, lora_a, lora_b, 0.5, lora_x)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("trained", "apart"), [(False, False), (True, False), (True, True)], ids=str
)
def test_what_is_kept_for_the_backward(trained: bool, apart: bool) -> None:
    packed = make_packed(2)
    x, lora_x = torch.randn(7, 64, requires_grad=True), torch.randn(7, 64)
    lora_a, lora_b = (t.requires_grad_(trained) for t in adapter(64, 96, 8))
    kept: list[Tensor] = []

    def pack_hook(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        packed_linear(x, *packed, None, 2, lora_a, lora_b, 1.0, lora_x if apart else None)
    branch = [lora_x if apart else x] if trained else []
    expected = {t.data_ptr() for t in (*packed, lora_a, lora_b, *branch)}
    assert {t.data_ptr() for t in kept} == expected


def test_an_adapter_of_another_dtype_takes_part_in_that_of_x() -> None:
    packed, x = make_packed(2), torch.randn(3, 64).bfloat16()
    lora_a, lora_b = (t.requires_grad_() for t in adapter(64, 96, 8))
    y = packed_linear(x, *packed, None, 2, lora_a, lora_b)
    same = packed_linear(x, *packed, None, 2, lora_a.bfloat16(), lora_b.bfloat16())
    assert torch.equal(y, same)
    y.sum().backward()
    assert lora_a.grad is not None
    assert lora_a.grad.dtype == torch.float32


def test_dropout_of_the_branch_is_the_same_when_recomputed() -> None:
    packed, x = make_packed(2), torch.randn(9, 64)
    lora_a, lora_b = (t.requires_grad_() for t in adapter(64, 96, 8))

    def run(x: Tensor) -> Tensor:
        return packed_linear(x, *packed, None, 2, lora_a, lora_b, 0.5, F.dropout(x, 0.5))

    results = []
    for recomputed in (False, True):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = checkpoint(run, leaf, use_reentrant=False) if recomputed else run(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, lora_a, lora_b), y.detach())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("bits", "view"),
    [(2, lambda x: x), (3, lambda x: x.t().contiguous().t()), (4, lambda x: x[:0])],
    ids=["contiguous", "transposed", "empty"],
)
def test_opcheck(bits: int, view: Any) -> None:
    packed, x = make_packed(bits), view(torch.randn(3, 64)).detach().requires_grad_()
    bias, lora_x = (torch.randn(s, requires_grad=True) for s in (96, tuple(x.shape)))
    lora_a, lora_b = (t.requires_grad_() for t in adapter(64, 96, 8))
    layer = OPERATORS.packed_linear.default
    torch.library.opcheck(layer, (x, *packed, bias, bits, lora_a, lora_b, 0.5, lora_x, None))
    torch.library.opcheck(layer, (x, *packed, None, bits, None, None, 1.0, None, None))
    grad, d_low = view(torch.randn(3, 96)), torch.randn(x.shape[0], 8)
    backward = OPERATORS.packed_linear_backward.default
    torch.library.opcheck(backward, (grad, *packed, bits, d_low, lora_a.detach()))
    torch.library.opcheck(OPERATORS.dequantize.default, (*packed, bits, torch.bfloat16))


def test_compiled_in_one_graph() -> None:
    packed = make_packed(3)
    lora_a, lora_b = (t.requires_grad_() for t in adapter(64, 96, 8))

    def run(x: Tensor) -> Tensor:
        return packed_linear(x, *packed, None, 3, lora_a, lora_b, 0.5).relu()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5):
        x, results = torch.randn(rows, 64), []
        for function in (run, compiled):
            y = function(x)
            results.append((y, *torch.autograd.grad(y, (lora_a, lora_b), y.detach())))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_a_second_derivative_is_refused() -> None:
    packed, x = make_packed(2), torch.randn(3, 64, requires_grad=True)
    y = packed_linear(x, *packed, None, 2)
    grad = torch.ones_like(y, requires_grad=True)
    (slope,) = torch.autograd.grad(y, x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


def test_triton_serves_cuda_where_it_is_installed() -> None:
    for name in ("packed_linear", "packed_linear_backward", "dequantize"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kernels_peft::{name}", "CUDA")


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
    "half an adapter": ({"lora_a": torch.zeros(8, 64)}, "give both or neither"),
    "a branch without one": ({"lora_x": torch.zeros(3, 64)}, "is given without lora_a and lora_b"),
    "no rank": (
        {"lora_a": torch.zeros(0, 64), "lora_b": torch.zeros(96, 0)},
        r"\(r, 64\) without slots, with a rank r of at least 1",
    ),
    "inputs of A": (
        {"lora_a": torch.zeros(8, 32), "lora_b": torch.zeros(96, 8)},
        r"lora_a has shape \(8, 32\).* must be \(8, 64\)",
    ),
    "rank of B": (
        {"lora_a": torch.zeros(8, 64), "lora_b": torch.zeros(96, 4)},
        r"lora_b has shape \(96, 4\).* must be \(96, 8\)",
    ),
    "shape of the branch": (
        {
            **{"lora_a": torch.zeros(8, 64), "lora_b": torch.zeros(96, 8)},
            "lora_x": torch.zeros(2, 64),
        },
        r"lora_x has shape \(2, 64\).* must be \(3, 64\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_refused(case: str) -> None:
    qweight, qzeros, scales = make_packed(2)
    change, message = ERRORS[case]
    arguments: dict[str, Any] = {
        **{"x": torch.zeros(3, 64), "qweight": qweight, "qzeros": qzeros, "scales": scales},
        **{"bias": None, "bits": 2},
        **change,
    }
    with pytest.raises(ValueError, match=message):
        packed_linear(**arguments)
