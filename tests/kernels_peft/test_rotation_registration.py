"""The rotation as torch sees it: schema, fake tensors, compile, export, errors, saved memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels_peft import rotate
from tests.kernels_peft.rotations import make

ROTATE = torch.ops.kernels_peft.rotate.default
ROTATE_BACKWARD = torch.ops.kernels_peft.rotate_backward.default
# Contiguous, transposed, and without a token.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("view", SHAPES.values(), ids=SHAPES)
def test_opcheck_forward(view: Callable[[Tensor], Tensor], recompute: bool) -> None:
    x, first, second, _ = make((3, 4, 9), 8)
    leaves = [t.requires_grad_() for t in (view(x).detach(), first, second)]
    torch.library.opcheck(ROTATE, (*leaves, 4, recompute))


@pytest.mark.parametrize("flags", [(1, 1), (1, 0), (0, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("view", SHAPES.values(), ids=SHAPES)
def test_opcheck_backward(view: Callable[[Tensor], Tensor], flags: tuple[int, int]) -> None:
    x, first, second, grad = make((3, 4, 9), 8)
    for saved_is_output in (False, True):
        args = (view(grad), view(x), first, second, 4, saved_is_output, *map(bool, flags))
        torch.library.opcheck(ROTATE_BACKWARD, args)


def test_what_is_not_asked_for_comes_back_empty() -> None:
    x, first, second, grad = make((3, 9), 8)
    for input_grad in (False, True):
        for coefficient_grad in (False, True):
            dx, *rest = ROTATE_BACKWARD(
                grad, x, first, second, 4, False, input_grad, coefficient_grad
            )
            assert dx.shape == (grad.shape if input_grad else (0,))
            assert [d.shape for d in rest] == [first.shape if coefficient_grad else (0,)] * 2


@pytest.mark.parametrize(
    ("backend", "recompute"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compiles_without_a_break_for_any_number_of_tokens(backend: str, recompute: bool) -> None:
    def step(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return rotate(x * 2, first, second, 4, recompute=recompute).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 8, 3):
        inputs = make((tokens, 9), 8)
        results = []
        for function in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in inputs[:3]]
            y = function(*leaves)
            results.append((y, *torch.autograd.grad(y, leaves, inputs.grad)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)
    torch._dynamo.reset()


def test_exports_with_a_free_number_of_tokens() -> None:
    class Rotation(torch.nn.Module):
        def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return rotate(x, first, second, 4)

    x, first, second, _ = make((5, 9), 8)
    tokens = torch.export.Dim("tokens", min=2, max=1024)
    program = torch.export.export(
        Rotation(), (x, first, second), dynamic_shapes=({0: tokens}, None, None)
    )
    other = torch.randn(7, 9)
    assert torch.equal(program.module()(other, first, second), rotate(other, first, second, 4))


def test_meta_tensors() -> None:
    x, first, second, _ = (t.to("meta") for t in make((4, 3, 9), 8, torch.bfloat16))
    leaves = [t.requires_grad_() for t in (x.transpose(0, 1), first, second)]
    y = rotate(*leaves, 4)
    assert (y.shape, y.dtype, y.device.type) == ((3, 4, 9), torch.bfloat16, "meta")
    assert y.is_contiguous()
    gradients = torch.autograd.grad(y, leaves, torch.empty_like(y))
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]


def _arguments(**changes: object) -> tuple[object, ...]:
    x, first, second, _ = make((3, 9), 8)
    return tuple({"x": x, "first": first, "second": second, "group_size": 4, **changes}.values())


# What was given, and what the message says of it.
ERRORS: tuple[tuple[dict[str, object], str], ...] = (
    ({"group_size": 3}, "group_size is 3; it must be even and positive"),
    ({"group_size": 0}, "group_size is 0; it must be even and positive"),
    ({"group_size": -2}, "group_size is -2; it must be even and positive"),
    ({"x": torch.ones(3, 9, dtype=torch.int64)}, "dtype torch.int64; it must have"),
    ({"x": torch.tensor(1.0)}, r"shape \(\) and dtype torch.float32; it must have at least one"),
    ({"first": torch.ones(2, 4)}, r"shapes \(2, 4\) and \(8,\); both must be vectors"),
    ({"second": torch.ones(4)}, r"shapes \(8,\) and \(4,\); both must be vectors"),
    ({"group_size": 6}, r"8 coefficients for 9 features; .* a multiple of group_size \(6\)"),
    (
        {"first": torch.ones(12), "second": torch.ones(12)},
        "12 coefficients for 9 features; .* not exceed the features",
    ),
    ({"first": torch.ones(8).half()}, "dtypes torch.float16 and torch.float32; both must be"),
    (
        {"first": torch.ones(8).double(), "second": torch.ones(8).double()},
        "dtypes torch.float64 and torch.float64; both must be float32",
    ),
    ({"first": torch.ones(8, device="meta")}, "are on cpu, meta and cpu; move them to one device"),
)


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=lambda v: str(v)[:40])
def test_errors_are_the_same_in_every_mode(changes: dict[str, object], message: str) -> None:
    arguments = _arguments(**changes)
    with pytest.raises(ValueError, match=message):
        rotate(*arguments)  # type: ignore[arg-type]

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        with pytest.raises(ValueError, match=message):
            rotate(*fakes)  # type: ignore[arg-type]

    torch._dynamo.reset()
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=message):
        compiled(*arguments)
    torch._dynamo.reset()


def _saved_for(
    recompute: bool, wanted: tuple[bool, bool, bool]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Give what the backward saves, x and y, for the leaves among x, first, second wanted."""
    x, first, second, _ = make((6, 5, 9), 8, torch.bfloat16)
    leaves = [t.requires_grad_(w) for t, w in zip((x, first, second), wanted, strict=True)]
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = rotate(*leaves, 4, recompute=recompute)
    return saved, x, y


@pytest.mark.parametrize("wants_input", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_saves_one_tensor_of_the_size_of_the_output(recompute: bool, wants_input: bool) -> None:
    saved, x, y = _saved_for(recompute, (wants_input, True, True))
    large = [t for t in saved if t.numel() >= y.numel()]
    assert [t.data_ptr() for t in large] == [(y if recompute else x).data_ptr()]
    bank = 2 * 8 * 4  # two vectors of eight float32
    assert sum(t.nbytes for t in saved) == y.nbytes + bank


def test_saves_no_activation_for_coefficients_that_are_constant() -> None:
    for recompute in (False, True):
        saved, _, y = _saved_for(recompute, (True, False, False))
        assert sum(t.nbytes for t in saved) < y.nbytes


def test_a_second_derivative_is_refused() -> None:
    x, first, second = (torch.randn(n, requires_grad=True) for n in (8, 8, 8))
    (slope,) = torch.autograd.grad(rotate(x, first, second, 4).sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


def test_backward_refuses_a_saved_tensor_unlike_its_gradient() -> None:
    grad, first = torch.randn(3, 8), torch.randn(8)
    backward = torch.ops.kernels_peft.rotate_backward
    with pytest.raises(ValueError, match="both must be alike"):
        backward(grad, torch.randn(2, 8), first, first, 4, False, True, True)
