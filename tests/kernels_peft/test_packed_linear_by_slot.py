"""The packed linear layer with an adapter for each row, and with its rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels_peft import rotate_by_slot
from kernels_peft.packed_linear import (
    dequantize_reference,
    packed_linear,
    packed_linear_reference,
    packed_linear_rotated,
)
from tests.helpers import assert_close
from tests.kernels_peft.packed_linears import adapters, make_packed, row_by_row
from tests.kernels_peft.rotation_banks import bits as bit_pattern
from tests.kernels_peft.rotation_banks import make_bank

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATORS: Any = torch.ops.kernels_peft
# shape of x, slots: a row each, one for several tokens, one for each token of two dimensions; all
# distinct, repeated and unsorted, one for all, none, no rows.
CASES: dict[str, tuple[tuple[int, ...], Any]] = {
    "distinct": ((3, 64), [2, 0, 1]),
    "unsorted": ((5, 2, 64), [1, -1, 2, 1, -7]),
    "tokens": ((2, 3, 64), [[0, 2, -1], [2, 2, 0]]),
    "one": ((4, 64), [1, 1, 1, 1]),
    "none": ((2, 3, 64), [-1, -1]),
    "no-rows": ((0, 64), []),
}


def _case(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    shape, slots = CASES[name]
    kind = torch.int32 if name == "unsorted" else torch.int64
    return torch.randn(shape).to(dtype), torch.tensor(slots, dtype=kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_row_has_its_adapter(name: str, dtype: torch.dtype) -> None:
    packed, (x, slots) = make_packed(3), _case(name, dtype)
    lora_a, lora_b = adapters(3, 64, 96, 8, dtype)
    weight = dequantize_reference(*packed, 3, dtype)
    exact = row_by_row(x, weight, lora_a, lora_b, 0.5, slots)
    arguments = (x, *packed, None, 3, lora_a, lora_b, 0.5, None, slots)
    if dtype == torch.float64:  # the reference rounds u and both terms
        assert_close(packed_linear_reference(*arguments), exact)
    y = packed_linear(*arguments)
    assert y.dtype == dtype
    assert_close(y, exact)


@pytest.mark.parametrize("apart", [False, True], ids=["x", "lora_x"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype, name: str, apart: bool) -> None:
    packed, (x, slots) = make_packed(2), _case(name, dtype)
    leaves = [x, torch.randn(96).to(dtype), *adapters(3, 64, 96, 8, dtype)]
    leaves += [torch.randn(x.shape).to(dtype)] if apart else []
    results = []
    for function, given in (
        (packed_linear, leaves),
        (packed_linear_reference, [t.double() for t in leaves]),
    ):
        given = [t.clone().requires_grad_() for t in given]
        branch = given[4] if apart else None
        y = function(given[0], *packed, given[1], 2, *given[2:4], 0.5, branch, slots)
        grad = torch.ones(y.shape).cumsum(-1).to(y.dtype) / 50
        results.append(torch.autograd.grad(y, given, grad))
    names = ("x", "bias", "lora_a", "lora_b", "lora_x")
    for one, other, leaf in zip(*results, names[: len(leaves)], strict=True):
        assert one.dtype == dtype
        assert_close(one, other, f"gradient of {leaf}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_adapter_are_bit_equal_whatever_others_hold(dtype: torch.dtype) -> None:
    packed, (x, slots) = make_packed(4), _case("unsorted", dtype)
    lora_a, lora_b = adapters(3, 64, 96, 8, dtype)
    y = packed_linear(x, *packed, None, 4, lora_a, lora_b, 0.5, None, slots)
    lora_a[1], lora_b[1] = float("nan"), float("inf")
    broken = packed_linear(x, *packed, None, 4, lora_a, lora_b, 0.5, None, slots)
    bare = packed_linear(x, *packed, None, 4)
    assert torch.equal(bit_pattern(broken[slots < 0]), bit_pattern(bare[slots < 0]))
    assert torch.equal(broken[slots == 2], y[slots == 2])
    assert broken[slots == 1].isnan().all()


def test_only_what_is_asked_for_is_computed_and_kept() -> None:
    packed, (x, slots) = make_packed(2), _case("unsorted")
    lora_a, lora_b = adapters(3, 64, 96, 8)
    grad = torch.randn(5, 2, 96)
    backward = OPERATORS.low_rank_by_slot_backward.default
    full = backward(grad, x, lora_a, lora_b, 0.5, slots, True)
    dx, *others = backward(grad, None, lora_a, lora_b, 0.5, slots, True)
    assert torch.equal(dx, full[0])
    assert [t.numel() for t in others] == [0, 0]
    assert backward(grad, x, lora_a, lora_b, 0.5, slots, False)[0].numel() == 0
    y = packed_linear(x.requires_grad_(), *packed, None, 2, lora_a, lora_b, 0.5, None, slots)
    assert y.grad_fn is not None
    kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}  # type: ignore[attr-defined] # of the Python node
    assert lora_a.data_ptr() in kept
    assert x.data_ptr() not in kept


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    packed, (x, slots) = make_packed(2), _case(name)
    lora_a, lora_b = (t.requires_grad_() for t in adapters(3, 64, 96, 8))
    layer = OPERATORS.packed_linear.default
    arguments = (*packed, None, 2, lora_a, lora_b, 0.5, None, slots)
    torch.library.opcheck(layer, (x.requires_grad_(), *arguments))
    frozen = (lora_a.detach(), lora_b.detach(), 0.5, slots)
    backward = OPERATORS.low_rank_by_slot_backward.default
    grad = torch.randn(*x.shape[:-1], 96)
    torch.library.opcheck(backward, (grad, x.detach(), *frozen, True))
    torch.library.opcheck(backward, (grad, None, *frozen, False))
    bank = make_bank((*x.shape[:-1], 96), [8, 32, 0], slots)
    rotated = OPERATORS.packed_linear_rotated.default
    branch = (*frozen[:3], None, slots)
    torch.library.opcheck(rotated, (x.detach(), *packed, None, 2, *branch, *bank[1:4]))
    torch.library.opcheck(
        rotated, (x.detach(), *packed, None, 2, None, None, 1.0, None, None, *bank[1:4])
    )


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_compiled_in_one_graph(trained: bool) -> None:
    packed, (x, slots) = make_packed(3), _case("unsorted")
    leaves = (*adapters(3, 64, 96, 8), make_bank((5, 2, 96), [8, 32, 0], slots).table)
    group_sizes = torch.tensor([8, 32, 0])

    def run(x: Tensor, slots: Tensor) -> Tensor:
        rotation = {"table": leaves[2], "group_sizes": group_sizes, "rotation_slots": slots}
        branch = (*leaves[:2], 0.5, None, slots)
        y = packed_linear_rotated(x, *packed, None, 3, *branch, **rotation)
        return packed_linear(x, *packed, None, 3, *branch).relu() + y

    for leaf in leaves:
        leaf.requires_grad_(trained)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 3):
        results = []
        for function in (run, compiled):
            y = function(x[:count], slots[:count])
            gradients = torch.autograd.grad(y, leaves, y.detach()) if trained else ()
            results.append((y, *gradients))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rotation_is_that_of_the_whole_layer(dtype: torch.dtype) -> None:
    packed, (x, slots) = make_packed(2), _case("unsorted", dtype)
    bias, (lora_a, lora_b) = torch.randn(96).to(dtype), adapters(3, 64, 96, 8, dtype)
    turns = torch.tensor([0, 1, -1, 2, 0])
    bank = make_bank((5, 2, 96), [8, 64, 0], turns, dtype)
    rotation = {"table": bank.table, "group_sizes": bank.group_sizes, "rotation_slots": turns}
    layer = (*packed, bias, 2, lora_a, lora_b, 0.5, None, slots)
    with torch.no_grad():
        z = packed_linear_rotated(x, *layer, **rotation)
        y = packed_linear(x, *layer)
    assert torch.equal(z, rotate_by_slot(y, *bank[1:4]))
    assert torch.equal(bit_pattern(z[2:4]), bit_pattern(y[2:4]))
    leaves = [t.requires_grad_() for t in (x, bias, lora_a, lora_b, bank.table)]
    z = packed_linear_rotated(x, *layer, **rotation)
    apart = rotate_by_slot(packed_linear(x, *layer), *bank[1:4])
    grads = [torch.autograd.grad(out, leaves, bank.grad[..., :96]) for out in (z, apart)]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_triton_serves_cuda_where_it_is_installed() -> None:
    for name in ("packed_linear_rotated", "low_rank_by_slot_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kernels_peft::{name}", "CUDA")


_STACKS = {"lora_a": torch.zeros(3, 8, 64), "lora_b": torch.zeros(3, 96, 8)}
_SLOTS = {**_STACKS, "slots": torch.tensor([0, 1, -1])}
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "slots alone": ({"slots": torch.tensor([0, 1, -1])}, "slots is given without lora_a"),
    "a stack without slots": (_STACKS, r"must be \(r, 64\) without slots"),
    "slots without a stack": (
        {**_SLOTS, "lora_a": torch.zeros(8, 64), "lora_b": torch.zeros(96, 8)},
        r"must be \(S, r, 64\) with slots",
    ),
    "a slot past the stack": (
        {**_SLOTS, "slots": torch.tensor([0, 3, -1])},
        "slots holds 3, but there are 3 adapters",
    ),
    "another number of rows": ({**_SLOTS, "slots": torch.tensor([0])}, "leading dimensions of x"),
    "a slot for a feature": (
        {**_SLOTS, "slots": torch.zeros(3, 64, dtype=torch.int64)},
        "at least one and not the last",
    ),
    "floating slots": ({**_SLOTS, "slots": torch.zeros(3)}, "int32 or int64"),
    "another stack": (
        {**_SLOTS, "lora_b": torch.zeros(2, 96, 8)},
        r"lora_b has shape \(2, 96, 8\).* must be \(3, 96, 8\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_refused(case: str) -> None:
    change, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        packed_linear(torch.zeros(3, 64), *make_packed(2), None, 2, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(2, 2, 64)}, "table has shape"),
        ({"rotation_slots": torch.tensor([0, 2, 0])}, "slots holds 2"),
        ({"group_sizes": torch.tensor([3, 8])}, "group_sizes holds 3"),
    ],
    ids=["table", "slot", "group size"],
)
def test_a_rotation_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    bank = make_bank((3, 96), [8, 32], [0, 1, -1])
    rotation = {"table": bank.table, "group_sizes": bank.group_sizes, "rotation_slots": bank.slots}
    rotation |= change
    with pytest.raises(ValueError, match=message):
        packed_linear_rotated(torch.zeros(3, 64), *make_packed(2), None, 2, **rotation)


def test_an_empty_stack_serves_rows_without_an_adapter() -> None:
    packed, x = make_packed(2), torch.randn(3, 64)
    empty = (torch.zeros(0, 8, 64), torch.zeros(0, 96, 8))
    slots = torch.full((3,), -1)
    for function in (packed_linear, packed_linear_reference):
        y = function(x, *packed, None, 2, *empty, 0.5, None, slots)
        assert torch.equal(y, function(x, *packed, None, 2))
