"""Rounding a weight to a grid and back, as every step of a calibration does.

`floor` copies the weight forward and sums it backward. x is the width of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from apiq_peft.quantizer import Quantizer
from benchmarks._cases import GROUP_SIZE, TOLERANCE
from benchmarks._command import Point, Subject
from benchmarks._kernel_layers import Weight
from benchmarks._measure import relative_error
from kernels_peft import fake_quantize, fake_quantize_reference

FLOOR, OP = "floor", "op"
TOTALS = {"step": ("forward", "backward")}


def grid_points(name: str, layer: Weight, bits: Sequence[int]) -> Iterator[Point]:
    """Yield the forward, and the gradient of the scale, at each width."""
    weight = layer.plain.weight.detach()
    cotangent = torch.randn_like(weight)
    for width in bits:
        quantizer = Quantizer(layer.linear.weight, width, GROUP_SIZE).to(layer.device)
        scale, zero = (t.detach() for t in quantizer.grid())
        subjects = {FLOOR: Subject({"forward": weight.clone, "backward": weight.sum}, 0.0)}
        for provider, run in ((OP, fake_quantize), ("reference", fake_quantize_reference)):
            subjects[provider] = _grid_subject(run, weight, scale, zero, width, cotangent)
        yield Point(name, width, TOLERANCE[layer.dtype], FLOOR, subjects, TOTALS)


def _grid_subject(
    run: Callable[..., Tensor],
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    cotangent: Tensor,
) -> Subject:
    scale = scale.detach().requires_grad_()
    held: dict[str, Tensor] = {}

    def forward() -> None:
        scale.grad = None
        held["q"] = run(weight, scale, zero, bits)

    def backward() -> None:
        held.pop("q").backward(cotangent)

    q = run(weight, scale, zero, bits)
    actual = [q, *torch.autograd.grad(q, scale, cotangent)]
    # float32 decides what a weight rounds to, so the reference has the codes of float32
    exact_q = fake_quantize_reference(weight.float(), scale, zero, bits)
    expected = [exact_q, *torch.autograd.grad(exact_q, scale, cotangent.float())]
    return Subject({"forward": forward, "backward": backward}, relative_error(actual, expected))
