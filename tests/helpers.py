"""What several test files share: one table of tolerances, and a rotation written out in full."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Relative to the largest value of the reference. The same everywhere.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def assert_close(
    actual: Tensor, reference: Tensor, name: str = "result", *, dtype: torch.dtype | None = None
) -> None:
    """Compare with the reference, which may be in a wider dtype.

    `dtype` is the least precise dtype that the computation passed through, if not that of `actual`.
    """
    assert actual.shape == reference.shape, (
        f"{name} has shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    )
    if actual.numel() == 0:
        return
    dtype = dtype or actual.dtype
    actual, reference = actual.detach().double(), reference.detach().double()
    error = (actual - reference).abs().max().item()
    bound = TOLERANCES[dtype] * reference.abs().max().item()
    # Written so that NaN fails.
    assert error <= bound, f"{name} is off by {error:.3g}; {dtype} allows {bound:.3g}"


def dense_rotation(first: Tensor, second: Tensor, group_size: int, features: int) -> Tensor:
    """Write the rotation as a matrix R: it sends h to R h. Differentiable in both vectors.

    Entry by entry, from RoAd (arXiv:2409.00119), eq. 3: an oracle that shares no code with ours.
    """
    half = group_size // 2
    rows = []
    for c in range(features):
        row = [first.new_zeros(())] * features
        if c >= first.shape[0]:
            row[c] = first.new_ones(())
        elif c % group_size < half:
            row[c], row[c + half] = first[c], -second[c]
        else:
            row[c], row[c - half] = first[c], second[c]
        rows.append(torch.stack(row))
    return torch.stack(rows)


class Golden(NamedTuple):
    """A rotation computed by hand: parameters as PEFT stores them, h and z = R h."""

    variant: str
    group_size: int
    theta: tuple[float, ...]
    alpha: tuple[float, ...]
    h: tuple[float, ...]
    z: tuple[float, ...]


_FOUR = ((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 0.5, 1.5))
_EIGHT = (
    (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    (1.0, 1.1, 1.2, 1.3, 0.9, 0.8, 0.7, 0.6),
)
_H4 = (1.0, 2.0, 3.0, 4.0)
_H8 = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
# fmt: off
GOLDEN = (
    Golden("road_1", 2, *_FOUR, _H8,
           (.795337, 2.089842, 4.291045, 9.032549, 1.501781, 3.604810, 4.998119, 15.141624)),
    Golden("road_1", 4, *_FOUR, _H8,
           (.695504, 2.330912, 3.084846, 8.635210, 1.354020, 3.616529, 4.082479, 14.557497)),
    Golden("road_1", 8, *_FOUR, _H8,
           (.495837, 1.536234, .398684, .853345, 5.074854, 12.555477, 3.786958, 13.389242)),
    Golden("road_2", 2, *_FOUR, _H4, (.795337, 4.317605, .841964, 7.278749)),
    Golden("road_2", 4, *_FOUR, _H4, (.695504, 2.330912, 1.580765, 6.694621)),
    Golden("road_4", 2, *_EIGHT, _H4, (.285756, 2.662390, .565663, 3.932315)),
    Golden("road_4", 4, *_EIGHT, _H4, (-.299445, .349290, 3.890164, 5.650344)),
)
# fmt: on
