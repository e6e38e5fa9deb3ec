"""Random packed weights for the tests of the packed linear layer, and what they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels_peft.packing import pack


class Packed(NamedTuple):
    """The three tensors of a packed weight, in the order of the operator's arguments."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def draw_codes(bits: int, K: int, N: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw codes (K, N), zero points and scales (G, N)."""
    scales = (torch.rand(groups, N) + 0.1).half()
    return torch.randint(2**bits, (K, N)), torch.randint(2**bits, (groups, N)), scales


def make_packed(bits: int, K: int = 64, N: int = 96, groups: int = 2) -> Packed:
    """Draw a packed weight."""
    codes, zeros, scales = draw_codes(bits, K, N, groups)
    return Packed(pack(codes, bits), pack(zeros, bits, dim=1), scales)


def adapter(K: int, N: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Draw A (r, K) and B (N, r)."""
    return torch.randn(rank, K).to(dtype), torch.randn(N, rank).to(dtype)


def adapters(
    count: int, K: int, N: int, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Draw stacks of A (S, r, K) and B (S, N, r)."""
    return torch.randn(count, rank, K).to(dtype), torch.randn(count, N, rank).to(dtype)


def row_by_row(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, slots: Tensor
) -> Tensor:
    """Multiply by a weight (K, N) and add the adapter of each row, one at a time, in float64."""
    x, weight, lora_a, lora_b = (t.double() for t in (x, weight, lora_a, lora_b))
    y = x @ weight
    for place in torch.cartesian_prod(*(torch.arange(n) for n in slots.shape)).tolist():
        at = tuple(place) if isinstance(place, list) else (place,)
        slot = int(slots[at])
        if slot >= 0:
            y[at] += scale * (x[at] @ lora_a[slot].t()) @ lora_b[slot].t()
    return y


def written_out(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """Give (code - zero) * scale, entry by entry of a group, in float64: (K, N)."""
    each = codes.shape[0] // scales.shape[0]
    rows = [
        (codes[k] - zeros[k // each]).double() * scales[k // each].double()
        for k in range(codes.shape[0])
    ]
    return torch.stack(rows)
