"""A block as it is calibrated: layers whose weights are rounded on the fly, with a LoRA beside."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq_peft.layer import weight_of
from apiq_peft.quantizer import Codes, Quantizer


@dataclass(frozen=True)
class Grid:
    """What a layer is to become: its width, its groups, its LoRA."""

    bits: int
    group_size: int
    scheme: str
    rank: int
    scale: float  # of B A


@dataclass(frozen=True)
class Solution:
    """What calibration found for one layer, on the CPU.

    Shapes:
        lora_A: (r, K). lora_B: (N, r), float32; the layer adds scale * B A.
    """

    codes: Codes
    lora_A: Tensor  # noqa: N815  # PEFT's names
    lora_B: Tensor  # noqa: N815
    high_clip: Tensor
    low_clip: Tensor


class StudentLinear(nn.Module):
    """y = x Q^T + bias + s (x A^T) B^T, where Q is the rounded weight; the weight is never trained.

    After `settle` it has the very weight that the stored codes give.
    """

    def __init__(
        self, module: nn.Module, grid: Grid, clip_init: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        weight = weight_of(module)
        assert weight is not None
        self.grid = grid
        self.weight = weight.detach()
        self.bias: Any = module.bias
        self.settled: Tensor | None = None
        self.codes: Codes | None = None
        self.quantizer = Quantizer(weight, grid.bits, grid.group_size, grid.scheme, clip_init)
        N, K = weight.shape
        bound = K**-0.5  # kaiming_uniform with a = sqrt(5), as PEFT starts A
        start = torch.rand(grid.rank, K, generator=generator) * 2 * bound - bound
        self.lora_A = nn.Parameter(start.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(N, grid.rank, device=weight.device))

    def trained(self) -> tuple[nn.Parameter, ...]:
        """Give A, B and the clipping."""
        return self.lora_A, self.lora_B, self.quantizer.high_clip, self.quantizer.low_clip

    def rounded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give Q (N, K), differentiable in the clipping unless settled."""
        if self.settled is None:
            return self.quantizer(self.weight, dtype)
        return self.settled.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.rounded(x.dtype), bias)
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return y + self.grid.scale * F.linear(F.linear(x, a), b)

    @torch.no_grad()
    def settle(self) -> None:
        """Round for good: from here on the weight is what the stored codes stand for."""
        self.codes = self.quantizer.codes(self.weight)
        self.settled = self.codes.dequantize()

    @torch.no_grad()
    def solution(self) -> Solution:
        """Give what was found, on the CPU, once it is rounded for good."""
        codes = self.codes
        assert codes is not None
        return Solution(
            Codes(codes.codes.cpu(), codes.scales.cpu(), codes.zeros.cpu()),
            *(p.detach().float().cpu().clone() for p in self.trained()),
        )

    @torch.no_grad()
    def take(self, solution: Solution) -> None:
        """Become the layer that a solution describes."""
        values = (solution.lora_A, solution.lora_B, solution.high_clip, solution.low_clip)
        for parameter, value in zip(self.trained(), values, strict=True):
            parameter.copy_(value)
        self.codes = solution.codes
        self.settled = solution.codes.dequantize().to(self.lora_A.device)


def make_student(
    block: nn.Module, grids: dict[str, Grid], clip_init: float, generator: torch.Generator
) -> tuple[nn.Module, dict[str, StudentLinear]]:
    """Give a copy of `block` that shares its tensors, with students in the place of some layers."""
    shared = {id(t): t for t in (*block.parameters(), *block.buffers())}
    student = copy.deepcopy(block, dict(shared))
    layers = {}
    for name, grid in grids.items():
        parent, _, child = name.rpartition(".")
        layers[name] = StudentLinear(block.get_submodule(name), grid, clip_init, generator)
        setattr(student.get_submodule(parent), child, layers[name])
    return student, layers
