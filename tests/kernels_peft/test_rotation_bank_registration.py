"""The rotation by slot as torch sees it: schema, fake tensors, compile, export, errors, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels_peft import rotate_by_slot
from tests.kernels_peft.rotation_banks import make_bank

ROTATE = torch.ops.kernels_peft.rotate_by_slot.default
ROTATE_BACKWARD = torch.ops.kernels_peft.rotate_by_slot_backward.default
SIZES = [4, 2, 0, 8]
SLOTS = [2, -1, 0, 3]
# Contiguous, transposed, and without a token.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "empty": lambda x: x[:, :0],
}


@pytest.mark.parametrize("view", SHAPES.values(), ids=SHAPES)
def test_opcheck_forward(view: Callable[[Tensor], Tensor]) -> None:
    x, table, group_sizes, slots, _ = make_bank((4, 3, 9), SIZES, SLOTS)
    leaves = [t.requires_grad_() for t in (view(x).detach(), table)]
    torch.library.opcheck(ROTATE, (*leaves, group_sizes, slots))


@pytest.mark.parametrize("flags", [(1, 1), (1, 0), (0, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("view", SHAPES.values(), ids=SHAPES)
def test_opcheck_backward(view: Callable[[Tensor], Tensor], flags: tuple[int, int]) -> None:
    x, table, group_sizes, slots, grad = make_bank((4, 3, 9), SIZES, SLOTS)
    args = (view(grad), view(x), table, group_sizes, slots, *map(bool, flags))
    torch.library.opcheck(ROTATE_BACKWARD, args)


def test_what_is_not_asked_for_comes_back_empty() -> None:
    x, table, group_sizes, slots, grad = make_bank((4, 3, 9), SIZES, SLOTS)
    for input_grad in (False, True):
        for table_grad in (False, True):
            dx, d_table = ROTATE_BACKWARD(
                grad, x, table, group_sizes, slots, input_grad, table_grad
            )
            assert dx.shape == (grad.shape if input_grad else (0,))
            assert d_table.shape == (table.shape if table_grad else (0,))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break_for_any_number_of_rows(backend: str) -> None:
    def step(x: Tensor, table: Tensor, group_sizes: Tensor, slots: Tensor) -> Tensor:
        return rotate_by_slot(x * 2, table, group_sizes, slots).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows in (5, 8, 3):
        inputs = make_bank((rows, 2, 9), SIZES, torch.randint(-1, 4, (rows,)))
        results = []
        for function in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in inputs[:2]]
            y = function(*leaves, *inputs[2:4])
            results.append((y, *torch.autograd.grad(y, leaves, inputs.grad)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)
    torch._dynamo.reset()


def test_a_compiled_step_serves_any_slots() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rotate_by_slot, backend="aot_eager", fullgraph=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    x, table, group_sizes, _, _ = make_bank((4, 3, 9), SIZES, SLOTS)
    for slots in (SLOTS, [-1] * 4, [0, 0, 1, 1]):
        chosen = torch.tensor(slots)
        expected = rotate_by_slot(x, table, group_sizes, chosen)
        assert torch.equal(compiled(x, table, group_sizes, chosen), expected)
    assert counter["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_exports_with_a_free_number_of_rows() -> None:
    class Rotation(torch.nn.Module):
        def forward(self, x: Tensor, table: Tensor, sizes: Tensor, slots: Tensor) -> Tensor:
            return rotate_by_slot(x, table, sizes, slots)

    inputs = make_bank((4, 9), SIZES, SLOTS)[:4]
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(
        Rotation(), inputs, dynamic_shapes=({0: rows}, None, None, {0: rows})
    )
    x, slots = torch.randn(7, 9), torch.randint(-1, 4, (7,))
    expected = rotate_by_slot(x, *inputs[1:3], slots)
    assert torch.equal(program.module()(x, *inputs[1:3], slots), expected)


def test_meta_tensors() -> None:
    inputs = make_bank((3, 4, 9), SIZES, torch.zeros(4, 3, dtype=torch.int64), torch.bfloat16)
    x, table, group_sizes, slots, _ = (t.to("meta") for t in inputs)
    leaves = [t.requires_grad_() for t in (x.transpose(0, 1), table)]
    y = rotate_by_slot(*leaves, group_sizes, slots)
    assert (y.shape, y.dtype, y.device.type) == ((4, 3, 9), torch.bfloat16, "meta")
    assert y.is_contiguous()
    gradients = torch.autograd.grad(y, leaves, torch.empty_like(y))
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]


def _arguments(**changes: object) -> tuple[object, ...]:
    x, table, group_sizes, slots, _ = make_bank((4, 3, 9), SIZES, SLOTS)
    given = {"x": x, "table": table, "group_sizes": group_sizes, "slots": slots}
    return tuple({**given, **changes}.values())


# What was given, and what the message says of it.
ERRORS: tuple[tuple[dict[str, object], str], ...] = (
    ({"x": torch.ones(4, 3, 9, dtype=torch.int64)}, "dtype torch.int64; it must have"),
    ({"x": torch.ones(9)}, r"shape \(9,\) and dtype torch.float32; it must have at least two"),
    ({"table": torch.ones(4, 9)}, r"shape \(4, 9\); for 9 features it must be \(slots, 2, 9\)"),
    ({"table": torch.ones(4, 3, 9)}, r"shape \(4, 3, 9\); for 9 features"),
    ({"table": torch.ones(4, 2, 8)}, r"shape \(4, 2, 8\); for 9 features"),
    ({"table": torch.ones(4, 2, 9).half()}, "dtype torch.float16; it must be float32"),
    ({"table": torch.ones(4, 2, 9).double()}, "dtype torch.float64; it must be float32"),
    ({"group_sizes": torch.tensor([4, 2])}, r"shape \(2,\); it must hold one size for each of"),
    ({"group_sizes": torch.tensor([[4, 2, 0, 8]])}, r"shape \(1, 4\); it must hold one size"),
    ({"group_sizes": torch.ones(4)}, "dtypes torch.float32 and torch.int64; each must be int32 or"),
    ({"slots": torch.ones(4, dtype=torch.bool)}, "torch.int32 and torch.bool; each must be int32"),
    ({"slots": torch.tensor(0)}, r"shape \(\) and x \(4, 3, 9\); slots must have the leading"),
    ({"slots": torch.tensor([0, 1])}, r"shape \(2,\) and x \(4, 3, 9\); slots must have"),
    (
        {"slots": torch.zeros(4, 3, 9, dtype=torch.int64)},
        "at least one and not the last",
    ),
    ({"table": torch.ones(4, 2, 9, device="meta")}, "are on cpu, meta, cpu and cpu; move them to"),
)  # fmt: skip
# Only the values tell, so a fake tensor does not.
VALUE_ERRORS: tuple[tuple[dict[str, object], str], ...] = (
    ({"slots": torch.tensor([0, 4, -1, 1])}, "slots holds 4, but the table has 4 slots; give a"),
    ({"group_sizes": torch.tensor([4, 3, 0, 8])}, "group_sizes holds 3; each must be even and"),
    ({"group_sizes": torch.tensor([4, -2, 0, 8])}, "group_sizes holds -2; each must be even and"),
)


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=lambda v: str(v)[:40])
def test_errors_are_the_same_in_every_mode(changes: dict[str, object], message: str) -> None:
    arguments = _arguments(**changes)
    with pytest.raises(ValueError, match=message):
        rotate_by_slot(*arguments)  # type: ignore[arg-type]

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        with pytest.raises(ValueError, match=message):
            rotate_by_slot(*fakes)  # type: ignore[arg-type]

    torch._dynamo.reset()
    compiled = torch.compile(rotate_by_slot, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=message):
        compiled(*arguments)
    torch._dynamo.reset()


@pytest.mark.parametrize(("changes", "message"), VALUE_ERRORS, ids=lambda v: str(v)[:40])
def test_errors_of_values_are_raised_where_they_are_at_hand(changes, message: str) -> None:
    arguments = _arguments(**changes)
    for function in (rotate_by_slot, ROTATE):
        with pytest.raises(ValueError, match=message):
            function(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(rotate_by_slot, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=message):
        compiled(*arguments)
    torch._dynamo.reset()


def test_an_empty_x_does_not_hide_a_wrong_slot() -> None:
    x, table, group_sizes, _, _ = make_bank((1, 0, 9), SIZES, [0])
    with pytest.raises(ValueError, match="slots holds 9"):
        rotate_by_slot(x, table, group_sizes, torch.tensor([9]))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_saves_x_only_for_the_gradient_of_the_table(wanted: tuple[bool, bool]) -> None:
    inputs = make_bank((4, 50, 9), SIZES, SLOTS, torch.bfloat16)
    leaves = [t.requires_grad_(w) for t, w in zip(inputs[:2], wanted, strict=True)]
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rotate_by_slot(*leaves, *inputs[2:4])
    bank = sum(t.nbytes for t in inputs[1:4])
    assert sum(t.nbytes for t in saved) == bank + (inputs.x.nbytes if wanted[1] else 0)


def test_a_second_derivative_is_refused() -> None:
    x, table, group_sizes, slots, _ = make_bank((4, 8), SIZES, SLOTS)
    table.requires_grad_()
    y = rotate_by_slot(x.requires_grad_(), table, group_sizes, slots)
    (slope,) = torch.autograd.grad(y.sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


def test_backward_refuses_an_input_unlike_its_gradient() -> None:
    x, table, group_sizes, slots, grad = make_bank((4, 3, 8), SIZES, SLOTS)
    with pytest.raises(ValueError, match="both must be alike"):
        ROTATE_BACKWARD(grad, x[:, :2], table, group_sizes, slots, True, True)


def test_without_the_dispatcher_and_with_it_the_bits_are_the_same() -> None:
    inputs = make_bank((4, 3, 9), SIZES, SLOTS)
    results = []
    for function in (rotate_by_slot, ROTATE):
        leaves = [t.clone().requires_grad_() for t in inputs[:2]]
        y = function(*leaves, *inputs[2:4])
        results.append((y, *torch.autograd.grad(y, leaves, inputs.grad)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_triton_serves_cuda_where_it_is_installed() -> None:
    for name in ("rotate_by_slot", "rotate_by_slot_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kernels_peft::{name}", "CUDA")
