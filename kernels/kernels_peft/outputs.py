"""The results of operators as autograd wants them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_shape(result: Tensor, shape: Sequence[int]) -> Tensor:
    """Give a result that nothing else holds another shape, without making a view of it.

    Autograd refuses to write to a view that an operator returns, as `y += 1` does; torch's own
    matrix products give their results their shapes in this way.
    """
    return torch.ops.aten._unsafe_view.default(result, shape)
