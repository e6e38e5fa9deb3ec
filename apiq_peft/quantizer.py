"""The uniform quantiser: from a weight and how far its groups are clipped to codes on a grid.

A scheme is one row of `SCHEMES`; configuration, calibration and tests read the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels_peft import fake_quantize
from kernels_peft.packing import FORMATS

CLIP_INIT = 4.0  # of a clip parameter; its sigmoid, 0.98201, is the share of the range that is kept
SMALLEST_SCALE, LARGEST_SCALE = 1e-5, 1e4
SCALE_DTYPE = torch.float16  # in which scales are stored


@dataclass(frozen=True)
class Scheme:
    """How a clipped range (low <= 0 <= high) becomes a scale and a zero point."""

    name: str
    symmetric: bool  # one zero point for all, which GPTQ's readers may assume
    grid: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _asymmetric(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale = _limit((high - low) / (2**bits - 1))
    return scale, (-low / scale).round().detach()


def _gptq_symmetric(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale = _limit(2 * torch.maximum(high, -low) / (2**bits - 1))
    return scale, torch.full_like(scale, 2 ** (bits - 1))


def _apiq_symmetric(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale = _limit(torch.maximum(high, -low) / (2 ** (bits - 1) - 1))
    return scale, torch.full_like(scale, 2 ** (bits - 1) - 1)


def _limit(scale: Tensor) -> Tensor:
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE)


SCHEMES = {
    s.name: s
    for s in (
        Scheme("asymmetric", False, _asymmetric),
        Scheme("gptq_symmetric", True, _gptq_symmetric),
        Scheme("apiq_symmetric", False, _apiq_symmetric),
    )
}


@dataclass(frozen=True)
class Codes:
    """A quantised weight: what is stored of it, before packing.

    Shapes:
        codes: (N, K), uint8. scales: (N, K / g), float16. zeros: (N, K / g), uint8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give (codes - zeros) * scales, computed in float32 and rounded once."""
        groups = self.codes.to(torch.float32).unflatten(-1, (self.scales.shape[-1], -1))
        zeros, scales = self.zeros.to(torch.float32), self.scales.to(torch.float32)
        return ((groups - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(-2).to(dtype)


class Quantizer(nn.Module):
    """Quantises one weight, each group clipped as two trained parameters say.

    The range of a group always holds 0, unlike in the published code, so that the zero point is a
    code: a group of one sign would otherwise have one that no code can hold.

    Shapes:
        high_clip, low_clip: (N, K / g), float32; the sigmoid of each is the share of the largest
        and the smallest weight of the group that the grid spans.
    Source:
        ApiQ (arXiv:2402.05147); OmniQuant (arXiv:2308.13137), learnable weight clipping.
    """

    highest: Tensor
    lowest: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        group_size: int,
        scheme: str = "asymmetric",
        clip_init: float = CLIP_INIT,
    ) -> None:
        """Measure the groups of `weight` (N, K); `group_size` -1 makes a row one group.

        Raises:
            ValueError: an unknown width or scheme, or a group size that does not divide K.
        """
        super().__init__()
        check(bits, group_size, scheme, weight.shape[-1])
        self.bits, self.scheme = bits, scheme
        self.group_size = weight.shape[-1] if group_size == -1 else group_size
        groups = weight.detach().float().unflatten(-1, (-1, self.group_size))
        self.register_buffer("highest", groups.amax(-1).clamp(min=0), persistent=False)
        self.register_buffer("lowest", groups.amin(-1).clamp(max=0), persistent=False)
        self.high_clip = nn.Parameter(torch.full_like(self.highest, clip_init))
        self.low_clip = nn.Parameter(torch.full_like(self.lowest, clip_init))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Give the scale and the zero point of every group, (N, K / g) both, differentiable."""
        high = torch.sigmoid(self.high_clip) * self.highest
        low = torch.sigmoid(self.low_clip) * self.lowest
        return SCHEMES[self.scheme].grid(low, high, self.bits)

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Give the weight as it will be, differentiable in the clip parameters."""
        return fake_quantize(weight, *self.grid(), self.bits, dtype)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes:
        """Quantise for good: scales are rounded to what is stored, codes derived from that."""
        scale, zero = self.grid()
        return encode(weight, scale, zero, self.bits)


@torch.no_grad()
def encode(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Codes:
    """Give the codes of `weight` (N, K) on a grid (N, K / g), whose scales are rounded first."""
    stored = scale.to(SCALE_DTYPE)
    groups = weight.float().unflatten(-1, (scale.shape[-1], -1))
    codes = (groups / stored.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)
    codes = codes.clamp(0, 2**bits - 1).flatten(-2).to(torch.uint8)
    return Codes(codes, stored, zero.to(torch.uint8))


def check(bits: int, group_size: int, scheme: str, in_features: int | None = None) -> None:
    """Refuse what the quantiser cannot do, for a layer of `in_features` if given.

    Raises:
        ValueError: says what was given, what is allowed and what to do.
    """
    if bits not in FORMATS:
        raise ValueError(f"bits is {bits}; choose from {', '.join(map(str, FORMATS))}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; choose from {', '.join(SCHEMES)}")
    if group_size != -1 and group_size < 2:
        raise ValueError(f"group_size is {group_size}; give 32, 64 or 128, or -1 for a whole row")
    if in_features is not None and group_size != -1 and in_features % group_size:
        raise ValueError(
            f"group_size {group_size} does not divide the {in_features} inputs of this layer;"
            " choose one that does, -1 for a whole row, or leave the layer out of target_modules"
        )
