"""What `torch.autocast` means for an operator: its inputs are cast, and nothing inside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def in_autocast_dtype(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Give inputs as torch's own linear layers take them: under autocast in its dtype.

    The others are on the device of `x`. As there, float64 stays what it is.
    """
    if not _enabled(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function compute in the dtypes it is given, which its own torch calls would not do."""

    def call(*args: Any) -> Any:
        tensor = next(a for a in args if isinstance(a, Tensor))
        if not _enabled(tensor):
            return run(*args)
        with torch.autocast(tensor.device.type, enabled=False):
            return run(*args)

    return call


def _enabled(tensor: Tensor) -> bool:
    # torch knows no autocast of meta tensors, and refuses the question
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
