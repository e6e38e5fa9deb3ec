"""Other ways to quantise a weight, on the grid of this library wherever theirs is uniform.

Each takes a weight (N, K), and what it needs to know of the inputs, and gives what is stored of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from apiq_peft.calibration.closed_form import Moments
from apiq_peft.quantizer import Codes, Quantizer

WHOLE_RANGE = 20.0  # a clip parameter whose sigmoid is 1 in float32
LOFTQ_ROUNDS = 5
GPTQ_DAMPING = 0.01  # share of the mean diagonal, as in the published code


@dataclass(frozen=True)
class Found:
    """What is stored of a layer: codes, and a correction B A beside them if there is one.

    Shapes:
        lora_A: (r, K). lora_B: (N, r), float32.
    """

    codes: Codes
    lora_A: Tensor | None = None  # noqa: N815  # PEFT's names
    lora_B: Tensor | None = None  # noqa: N815

    def weight(self) -> Tensor:
        """Give Q + B A in float32."""
        weight = self.codes.dequantize()
        if self.lora_A is None or self.lora_B is None:
            return weight
        return weight + self.lora_B @ self.lora_A


def missing(package: str) -> bool:
    """Say whether a peer's package is not installed."""
    return bool(package) and find_spec(package) is None


def rtn(weight: Tensor, bits: int, group_size: int) -> Codes:
    """Round to nearest between the smallest and the largest weight of each group."""
    return Quantizer(weight, bits, group_size, clip_init=WHOLE_RANGE).codes(weight)


def loftq(weight: Tensor, bits: int, group_size: int, rank: int) -> Found:
    """Round what a product of rank r leaves and refit it to what rounding leaves, in turns.

    Source:
        LoftQ (arXiv:2310.08659), algorithm 1, on a uniform grid in place of its normal floats.
    """
    weight, product = weight.float(), torch.zeros((), device=weight.device)
    for _ in range(LOFTQ_ROUNDS):
        codes = rtn(weight - product, bits, group_size)
        a, b = _low_rank(weight - codes.dequantize(), rank)
        product = b @ a
    return Found(codes, a, b)


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Give A (r, K) and B (N, r) whose product is nearest to `matrix`, of a rank that it can have.

    From the eigenvectors of the smaller Gram matrix, which takes a fraction of a full SVD.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = (matrix.t() if wide else matrix).double()
    values, vectors = torch.linalg.eigh(tall.t() @ tall)
    top, roots = vectors[:, -rank:], values[-rank:].clamp(min=1e-20) ** 0.25
    left, right = (tall @ (top / roots)).float(), (roots * top).float()
    return (left.t(), right) if wide else (right.t(), left)


def gptq(weight: Tensor, second_moment: Tensor, bits: int, group_size: int) -> Codes:
    """Round column after column, each error passed on to the columns that are still to come.

    Columns go in their order, and a group's range is that of its weights when its turn comes.

    Shapes:
        weight: (N, K). second_moment: (K, K), the sum of z z^T over the inputs of the layer.
    Source:
        GPTQ (arXiv:2210.17323), algorithm 1.
    """
    weight, H = weight.float().clone(), second_moment.float().clone()
    unused = H.diagonal() == 0
    H.diagonal()[unused] = 1
    weight[:, unused] = 0
    H.diagonal().add_(GPTQ_DAMPING * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    factor = torch.linalg.cholesky(inverse, upper=True)
    parts = []
    for start in range(0, weight.shape[1], group_size):
        end = start + group_size
        group, triangle = weight[:, start:end], factor[start:end, start:end]
        grid = rtn(group, bits, group_size)
        scale, zero = grid.scales[:, 0].float(), grid.zeros[:, 0].float()
        codes, errors = torch.empty_like(grid.codes), torch.empty_like(group)
        for k in range(group_size):
            code = ((group[:, k] / scale).round() + zero).clamp(0, 2**bits - 1)
            codes[:, k] = code.to(torch.uint8)
            errors[:, k] = (group[:, k] - (code - zero) * scale) / triangle[k, k]
            group[:, k + 1 :] -= errors[:, k, None] * triangle[k, k + 1 :]
        weight[:, end:] -= errors @ factor[start:end, end:]
        parts.append(Codes(codes, grid.scales, grid.zeros))
    return Codes(*(torch.cat([getattr(p, name) for p in parts], 1) for name in vars(parts[0])))


def gptqmodel(weight: Tensor, inputs: list[Tensor], bits: int, group_size: int) -> Codes:
    """Quantise by the package GPTQModel, with its own defaults but for the grid.

    Raises:
        ValueError: what it gives is not on the grid that it says.
    """
    package = import_module("gptqmodel.quantization")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.detach().clone()
    how = package.QuantizeConfig(bits=bits, group_size=group_size, sym=False)
    solver = package.gptq.GPTQ(layer, how)
    solver.quantizer.configure(perchannel=True)
    for z in inputs:
        solver.add_batch(z, None)
    rounded, scale, zero, *_ = solver.quantize()
    scale, zero = scale.float(), zero.round()
    groups = rounded.float().unflatten(-1, (scale.shape[1], -1))
    codes = (groups / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)
    found = Codes(codes.flatten(-2).to(torch.uint8), scale.half(), zero.to(torch.uint8))
    error = (found.dequantize() - rounded.float()).norm() / rounded.float().norm()
    if not error < 1e-3:  # of rounding the scales to what is stored
        raise ValueError(f"the weight is off its grid by {error:.3g} (relative); look at g_idx")
    return found


def hqq(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Quantise by the package hqq and give the weight that its codes stand for.

    Its zero points are no codes but numbers, so that it cannot be packed on this library's grid.
    """
    codes, grid = import_module("hqq.core.quantize").Quantizer.quantize(
        weight.detach(),
        nbits=bits,
        group_size=group_size,
        axis=1,  # groups of inputs, as everywhere here
        bitpack=False,
        compute_dtype=torch.float32,
        device=str(weight.device),
    )
    stored: dict[str, Any] = {name: grid[name].half().float() for name in ("scale", "zero")}
    groups = codes.float().reshape(-1, group_size)
    return ((groups - stored["zero"]) * stored["scale"]).reshape(weight.shape)


def hqq_bits(bits: int, group_size: int) -> float:
    """Give the bits per weight of hqq: a scale and a zero point of 16 bits for each group."""
    return bits + 32 / group_size


def closed_form(
    weights: dict[str, Tensor],
    codes: dict[str, Codes],
    full: list[Tensor],
    quantized: list[Tensor],
    rank: int,
) -> dict[str, Found]:
    """Add the best correction of a given rank to layers of one input.

    Shapes:
        full, quantized: (..., K) each, the inputs in the full-precision model and in the quantised.
    """
    names, some = list(weights), next(iter(weights.values()))
    moments = Moments(some.shape[1], {n: weights[n].shape[0] for n in names}, some.device)
    rounded = {name: codes[name].dequantize() for name in names}
    for x, z in zip(full, quantized, strict=True):
        moments.add(z, {n: x.float() @ weights[n].float().t() - z @ rounded[n].t() for n in names})
    return {name: Found(codes[name], *factors) for name, factors in moments.solve(rank).items()}
