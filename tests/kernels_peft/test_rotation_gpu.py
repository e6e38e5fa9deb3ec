"""The Triton kernels of the rotation where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels_peft import rotate, rotate_reference
from tests.helpers import assert_close
from tests.kernels_peft.rotations import Inputs, double_gradients, make

pytestmark = pytest.mark.gpu


def _on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(*(t.cuda() for t in inputs))


def _run(inputs: Inputs, group: int, recompute: bool) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    y = rotate(*leaves, group, recompute=recompute)
    return y.detach(), *torch.autograd.grad(y, leaves, inputs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "d", "n", "group"),
    [
        (1, 64, 64, 64),
        (33, 4097, 4096, 64),
        (700, 1024, 1024, 2),
        (2100, 600, 576, 6),
        (0, 8, 8, 2),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_agrees_with_double_precision(tokens, d, n, group, dtype, recompute: bool) -> None:
    inputs = make((tokens, d), n, dtype)
    y, *gradients = (t.cpu() for t in _run(_on_gpu(inputs), group, recompute))
    wide = (t.double() for t in inputs[:3])
    assert_close(y, rotate_reference(*wide, group), "y")
    reference = double_gradients(inputs, group, y if recompute else None)
    for gradient, (name, wanted) in zip(gradients, reference.items(), strict=True):
        assert_close(gradient, wanted, f"gradient of {name}")


def test_runs_are_bit_equal() -> None:
    inputs = _on_gpu(make((3000, 1024), 1024, torch.bfloat16))
    for one, other in zip(_run(inputs, 64, False), _run(inputs, 64, False), strict=True):
        assert torch.equal(one, other)


def test_replays_in_a_graph() -> None:
    static, fresh = (_on_gpu(make((64, 512), 512, torch.bfloat16)) for _ in range(2))
    arguments = (static.grad, static.x, static.first, static.second, 64, False, True, True)

    def step() -> tuple[Tensor, ...]:
        y = torch.ops.kernels_peft.rotate.default(*static[:3], 64, False)
        return y, *torch.ops.kernels_peft.rotate_backward.default(*arguments)

    # Compilation has to be over before the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for target, source in zip(static, fresh, strict=True):
        target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    for replayed, eager in zip(captured, _run(fresh, 64, False), strict=True):
        assert torch.equal(replayed, eager)
