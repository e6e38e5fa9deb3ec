"""Fake quantisation as torch sees it: schema, fake tensors, compile, export, errors, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels_peft import fake_quantize, fake_quantize_reference
from tests.kernels_peft.fake_quantizations import bit_equal, make_grid

FORWARD = torch.ops.kernels_peft.fake_quantize.default
BACKWARD = torch.ops.kernels_peft.fake_quantize_backward.default
# Contiguous, transposed, and without a row.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_opcheck(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    weight, scale, zero, grad = map(view, make_grid(4, 12, 4, 2))
    leaf = scale.detach().requires_grad_()
    torch.library.opcheck(FORWARD, (weight, leaf, zero, 2, dtype))
    torch.library.opcheck(BACKWARD, (grad.to(dtype), weight, scale, zero, 2))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break_for_any_number_of_rows(backend: str) -> None:
    def step(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return fake_quantize(weight, scale * 2, zero, 3, torch.float32).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows in (5, 8, 3):
        weight, scale, zero, grad = make_grid(rows, 12, 4, 3, torch.bfloat16)
        results = []
        for function in (step, compiled):
            leaf = scale.clone().requires_grad_()
            y = function(weight, leaf, zero)
            results.append((y, *torch.autograd.grad(y, leaf, grad.float())))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)
    torch._dynamo.reset()


def test_exports_with_a_free_number_of_rows() -> None:
    class Rounded(torch.nn.Module):
        def forward(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
            return fake_quantize(weight, scale, zero, 2)

    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(
        Rounded(), tuple(make_grid(4, 12, 4, 2)[:3]), dynamic_shapes=({0: rows},) * 3
    )
    other = make_grid(7, 12, 4, 2)[:3]
    assert bit_equal(program.module()(*other), fake_quantize(*other, 2))


def test_meta_tensors() -> None:
    weight, scale, zero, _ = (t.to("meta") for t in make_grid(4, 12, 4, 2, torch.bfloat16))
    scale.requires_grad_()
    for dtype, wanted in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        y = fake_quantize(weight.t().contiguous().t(), scale, zero, 2, dtype)
        assert (y.shape, y.dtype, y.device.type) == ((4, 12), wanted, "meta")
        assert y.is_contiguous()
        (gradient,) = torch.autograd.grad(y, scale, torch.empty_like(y))
        assert (gradient.shape, gradient.dtype) == (scale.shape, torch.float32)


def _arguments(**changes: object) -> tuple[object, ...]:
    weight, scale, zero, _ = make_grid(4, 12, 4, 2)
    given = {"weight": weight, "scale": scale, "zero": zero, "bits": 2, "dtype": None}
    return tuple({**given, **changes}.values())


# What was given, and what the message says of it.
ERRORS: tuple[tuple[dict[str, object], str], ...] = (
    ({"bits": 5}, "bits is 5; choose from 2, 3, 4"),
    ({"weight": torch.ones(12)}, r"weight has shape \(12,\) and dtype torch.float32 and is to"),
    ({"weight": torch.ones(2, 2, 12)}, r"weight has shape \(2, 2, 12\).*it must be a matrix"),
    ({"weight": torch.ones(4, 12).int()}, "dtype torch.int32 and is to become torch.int32"),
    ({"dtype": torch.int8}, "is to become torch.int8; it must be a matrix, and both dtypes"),
    ({"scale": torch.ones(12)}, r"scale has shape \(12,\); for a weight of 4 x 12"),
    ({"scale": torch.ones(3, 3)}, r"shape \(3, 3\); for a weight of 4 x 12 it must be \(4, groups"),
    ({"scale": torch.ones(4, 5)}, r"shape \(4, 5\).*the groups of a row divide its 12 inputs"),
    ({"scale": torch.ones(4, 0)}, r"scale has shape \(4, 0\)"),
    ({"scale": torch.ones(4, 3).half()}, "scale has dtype torch.float16; it must be float32"),
    ({"scale": torch.ones(4, 3).double()}, r"float64; it must be float32 \(or float64 if weight"),
    ({"zero": torch.ones(4, 1)}, r"zero has shape \(4, 1\).*must be \(4, 3\) and torch.float32"),
    ({"zero": torch.ones(4, 3).int()}, "dtype torch.int32; it must be"),
    ({"scale": torch.ones(4, 3, device="meta")}, "are on cpu, meta and cpu; move them to one"),
)  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=lambda v: str(v)[:40])
def test_errors_are_the_same_in_every_mode(changes: dict[str, object], message: str) -> None:
    arguments = _arguments(**changes)
    with pytest.raises(ValueError, match=message):
        fake_quantize(*arguments)  # type: ignore[arg-type]

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        with pytest.raises(ValueError, match=message):
            fake_quantize(*fakes)  # type: ignore[arg-type]

    torch._dynamo.reset()
    compiled = torch.compile(fake_quantize, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=message):
        compiled(*arguments)
    torch._dynamo.reset()


def test_backward_refuses_a_gradient_unlike_its_weight() -> None:
    weight, scale, zero, grad = make_grid(4, 12, 4, 2)
    with pytest.raises(ValueError, match=r"grad is \(4, 8\) on cpu.*both must be alike"):
        BACKWARD(grad[:, :8], weight, scale, zero, 2)


def test_a_weight_that_needs_a_gradient_is_refused() -> None:
    weight, scale, zero, _ = make_grid(4, 12, 4, 2)
    weight.requires_grad_()
    with torch.no_grad():  # where none is taken it may
        expected = fake_quantize(weight, scale, zero, 2)
    for leaf in (scale, scale.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"weight requires a gradient.*give weight.detach\(\)"):
            fake_quantize(weight, leaf, zero, 2)
    assert bit_equal(fake_quantize(weight.detach(), scale, zero, 2), expected)
    # The reference is what the message promises: the gradient passes where the code is inside.
    y = fake_quantize_reference(weight, scale, zero, 2)
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert ((gradient == 0) | torch.isclose(gradient, torch.ones(()))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_weight_scale_and_zero_and_nothing_else(dtype: torch.dtype) -> None:
    weight, scale, zero, _ = make_grid(4, 12, 4, 2, dtype)
    scale.requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake_quantize(weight, scale, zero, 2, torch.float32)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (weight, scale, zero)]


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same() -> None:
    weight, scale, zero, _ = make_grid(4, 12, 4, 2)
    expected = fake_quantize(weight, scale.clone().requires_grad_(), zero, 2).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = fake_quantize(weight, scale.clone().requires_grad_(), zero, 2)
        assert not y.requires_grad
        assert bit_equal(y, expected)


def test_a_second_derivative_is_refused() -> None:
    weight, scale, zero, _ = make_grid(4, 12, 4, 2)
    scale.requires_grad_()
    y = fake_quantize(weight, scale, zero, 2)
    (slope,) = torch.autograd.grad((y * scale.sum()).sum(), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


def test_triton_serves_cuda_where_it_is_installed() -> None:
    for name in ("fake_quantize", "fake_quantize_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kernels_peft::{name}", "CUDA")
