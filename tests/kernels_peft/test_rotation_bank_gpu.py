"""The Triton kernels of the rotation by slot where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels_peft import rotate_by_slot, rotate_by_slot_reference
from tests.helpers import assert_close
from tests.kernels_peft.rotation_banks import (
    BankInputs,
    bank_gradients,
    bits,
    make_bank,
    odd_numbers,
)

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _on_gpu(inputs: BankInputs) -> BankInputs:
    return BankInputs(*(t.cuda() for t in inputs))


def _run(inputs: BankInputs) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.x, inputs.table)]
    y = rotate_by_slot(*leaves, inputs.group_sizes, inputs.slots)
    return y.detach(), *torch.autograd.grad(y, leaves, inputs.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 64), [64]),
        ((32, 1, 600), [64, 32, 2, 0, 6, 600, 1024]),
        ((64, 96), [16] * 64),
        ((33, 70, 130), [64, 128, 2]),
        ((700, 257), [16, 2, 64]),
        ((0, 8), [2]),
    ],
    ids=str,
)
def test_agrees_with_double_precision_and_with_the_cpu(shape, sizes, dtype) -> None:
    slots = torch.randint(-1, len(sizes), shape[:1])
    inputs = make_bank(shape, sizes, slots, dtype)
    results = [t.cpu() for t in _run(_on_gpu(inputs))]
    for name, one, other in zip(("y", "dx", "d_table"), results, _run(inputs), strict=True):
        assert_close(one, other, name)
    wide = (inputs.x.double(), inputs.table.double(), *inputs[2:4])
    assert_close(results[0], rotate_by_slot_reference(*wide), "y")
    for gradient, (name, wanted) in zip(results[1:], bank_gradients(inputs).items(), strict=True):
        assert_close(gradient, wanted, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_rotated_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    x = odd_numbers(dtype, 64 * 600).view(64, 600)
    slots = torch.arange(64) % 3 - 1
    inputs = _on_gpu(make_bank((64, 600), [64, 0], slots, dtype)._replace(x=x))
    y = rotate_by_slot(*inputs[:4]).cpu()
    kept = slots != 0
    assert torch.equal(bits(y[kept]), bits(x[kept]))
    assert torch.equal(bits(y[:, 576:]), bits(x[:, 576:]))


def test_runs_are_bit_equal() -> None:
    inputs = make_bank((64, 50, 1024), [64] * 8, torch.randint(-1, 8, (64,)), torch.bfloat16)
    inputs = _on_gpu(inputs)
    for one, other in zip(_run(inputs), _run(inputs), strict=True):
        assert torch.equal(one, other)


def test_nothing_waits_for_the_device() -> None:
    inputs = _on_gpu(make_bank((32, 1, 512), [64, 2, 0], torch.arange(32) % 4 - 1, torch.bfloat16))
    _run(inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_with_other_slots_sizes_and_coefficients() -> None:
    static = _on_gpu(make_bank((32, 4, 512), [64] * 8, torch.randint(-1, 8, (32,)), torch.bfloat16))
    # Other numbers of adapters and other group sizes: all distinct, one for all, none.
    others = [
        make_bank((32, 4, 512), sizes, slots, torch.bfloat16)
        for sizes, slots in (
            ([64, 32, 2, 0, 128, 512, 6, 16], torch.randint(-1, 8, (32,))),
            ([16] * 8, torch.full((32,), 5)),
            ([2] * 8, torch.full((32,), -1)),
        )
    ]

    def step() -> tuple[Tensor, ...]:
        y = torch.ops.kernels_peft.rotate_by_slot.default(*static[:4])
        backward = torch.ops.kernels_peft.rotate_by_slot_backward.default
        return y, *backward(static.grad, *static[:4], True, True)

    # Compilation has to be over before the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in map(_on_gpu, others):
        for target, source in zip(static, other, strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        for replayed, eager in zip(captured, _run(other), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.parametrize(("tokens", "adapters"), [(64, 64), (8192, 64), (8192, 1)])
def test_report_of_the_throughput(tokens: int, adapters: int) -> None:
    """Print the bandwidth beside that of a copy; a number that depends on the device is no test."""
    shape = (tokens, 4096)
    slots = torch.arange(tokens) * adapters // tokens
    inputs = _on_gpu(make_bank(shape, [64] * adapters, slots, torch.bfloat16))
    backward = torch.ops.kernels_peft.rotate_by_slot_backward.default
    target = torch.empty_like(inputs.x)
    steps = {
        "copy": lambda: target.copy_(inputs.x),
        "forward": lambda: rotate_by_slot(*inputs[:4]),
        "backward": lambda: backward(inputs.grad, *inputs[:4], True, True),
    }
    for name, step in steps.items():
        graph = torch.cuda.CUDAGraph()
        step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(20):
                step()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        microseconds = start.elapsed_time(stop) / 20 * 1000
        print(f"{tokens} tokens, {adapters} adapters, {name}: {microseconds:.1f} us")
