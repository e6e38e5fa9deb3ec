"""The dtype of a block's arithmetic, which need not be that of its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apiq_peft.calibration.student import StudentLinear


class in_dtype:  # noqa: N801  # a context manager, used as one
    """Run blocks in a dtype and give them their own tensors back."""

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.blocks, self.dtype = blocks, dtype
        self.held: list[tuple[nn.Parameter, Tensor]] = []

    def __enter__(self) -> None:
        trained = {  # a student's bias is the block's own
            id(p)
            for block in self.blocks
            for m in block.modules()
            if isinstance(m, StudentLinear)
            for p in m.trained()
        }
        for block in self.blocks:
            for parameter in block.parameters():
                other = parameter.is_floating_point() and parameter.dtype != self.dtype
                if other and id(parameter) not in trained:
                    self.held.append((parameter, parameter.data))
                    parameter.data = parameter.data.to(self.dtype)

    def __exit__(self, *exception: object) -> None:
        for parameter, data in reversed(self.held):
            parameter.data = data
