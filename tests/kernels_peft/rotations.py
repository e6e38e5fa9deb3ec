"""Inputs of the rotation for its test files, and its gradients by autograd in double precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels_peft import invert, rotate_reference


class Inputs(NamedTuple):
    x: Tensor
    first: Tensor
    second: Tensor
    grad: Tensor


def make(shape: tuple[int, ...], n: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Draw x and a gradient of `shape`, and coefficients of blocks that are far from singular."""
    wide = torch.promote_types(dtype, torch.float32)
    return Inputs(
        torch.randn(shape, dtype=wide).to(dtype),
        1 + 0.2 * torch.randn(n, dtype=wide),
        0.3 * torch.randn(n, dtype=wide),
        torch.randn(shape, dtype=wide).to(dtype),
    )


def double_gradients(
    inputs: Inputs, group_size: int, output: Tensor | None = None
) -> dict[str, Tensor]:
    """Differentiate `rotate_reference` in float64, at the x that was given.

    With `output`, at the x that this output comes from: what an operator that keeps its output,
    rounded to its dtype, can know.
    """
    x, first, second = (t.detach().double() for t in inputs[:3])
    if output is not None:
        inverse = invert(first, second, group_size)
        x = rotate_reference(output.detach().double(), *inverse, group_size)
    leaves = {"x": x, "first": first, "second": second}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    y = rotate_reference(leaves["x"], leaves["first"], leaves["second"], group_size)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad.double())
    return dict(zip(leaves, gradients, strict=True))
