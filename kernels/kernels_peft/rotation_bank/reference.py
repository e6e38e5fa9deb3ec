"""A rotation chosen by row, in plain torch: the definition of correct, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_peft.rotation.reference import rotate_reference


def rotate_by_slot_reference(
    x: Tensor, table: Tensor, group_sizes: Tensor, slots: Tensor
) -> Tensor:
    """Rotate every row of `x` by the coefficients of its slot.

    Row r takes `table[slots[r]]`, two vectors (first, second) for groups of `group_sizes[slots[r]]`
    features; `rotate_reference` says what they do. Rows of a negative slot, and of a slot whose
    group size is 0, come back bit for bit, as do the features past the last whole group.

    Shapes:
        x: (*rows, ..., d), any float dtype. table: (S, 2, d), float32 (float64 if x is).
        group_sizes: (S,), integer. slots: (*rows), integer, below S: one for each row, or for each
        token, or for whatever leading dimensions it has. Returns the shape and dtype of x.
    Source:
        RoAd (arXiv:2409.00119), section 2.2 and eq. 4.
    """
    if table.shape[0] == 0:
        return x.clone()
    index = slots.clamp(min=0).long()
    between = (1,) * (x.dim() - 1 - slots.dim())
    first, second = (
        v.reshape(*slots.shape, *between, x.shape[-1]) for v in table[index].unbind(-2)
    )
    sizes = torch.where(slots < 0, 0, group_sizes[index]).view(*slots.shape, *between, 1)
    out = x
    for size in sorted(set(sizes.flatten().tolist()) - {0}):
        n = x.shape[-1] // size * size
        turned = rotate_reference(x, first[..., :n], second[..., :n], size)
        out = torch.where(sizes == size, turned, out)
    return out if out is not x else x.clone()
