"""LoReFT with subspaces, for comparison: h + R^T (W h + c - R h) on chosen rows of R, W and c.

The form is that of ReFT (Wu et al., 2024); a subspace is a set of rows. R has orthonormal rows. It
begins at the identity, W = R and c = 0, as RoAd does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal


def loreft(h: Tensor, r: Tensor, w: Tensor, c: Tensor, rows: Tensor) -> Tensor:
    """Give h + R_S^T (W_S h + c_S - R_S h), where S is the set of `rows` that are not zero.

    Shapes:
        h: (..., d). r, w: (rank, d). c: (rank,). rows: (..., rank), 0 or 1.
    """
    change = (h @ w.T + c - h @ r.T) * rows
    return h + change @ r


class LoReFTModel(nn.Module):
    """A model whose block `layer` gives other states for the last tokens of the prompt.

    It takes batches of `Prefixes`: the first `last` columns of a call are those tokens.
    """

    def __init__(
        self, model: Any, layer: int, last: int, rank: int, subspaces: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__()
        self.base_model = model.requires_grad_(False)
        self.last, self.rank, self.subspaces = last, rank, subspaces
        width, device = model.config.get_text_config().hidden_size, model.device
        self.rotate = orthogonal(nn.Linear(width, rank, bias=False, device=device))
        self.source = nn.Linear(width, rank, device=device)
        with torch.no_grad():
            self.source.weight.copy_(self.rotate.weight)
            self.source.bias.zero_()
        self._rows: Tensor | None = None
        self._handle = model.get_decoder().layers[layer].register_forward_hook(self._hook)

    def forward(self, *, subspaces: list[list[str]], prompt_mask: Any, **inputs: Any) -> Any:
        """Call the base model with the named subspaces of each row."""
        with self._on(subspaces):
            return self.base_model(**inputs)

    def generate(self, *, subspaces: list[list[str]], **inputs: Any) -> Any:
        """Generate with them; generated tokens are left alone."""
        with self._on(subspaces):
            return self.base_model.generate(**inputs)

    def trained(self) -> list[nn.Parameter]:
        """Give what is trained."""
        return [p for p in self.parameters() if p.requires_grad]

    def detach(self) -> Any:
        """Remove the hook and give the base model back."""
        self._handle.remove()
        return self.base_model

    @contextmanager
    def _on(self, subspaces: list[list[str]]) -> Iterator[None]:
        rows = torch.zeros(len(subspaces), 1, self.rank, device=self.source.weight.device)
        for line, names in zip(rows, subspaces, strict=True):
            for name in names:
                line[:, list(self.subspaces[name])] = 1
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        rows, self._rows = self._rows, None  # of the first call: the prefill
        if rows is None:
            return None
        state = output[0] if isinstance(output, tuple) else output
        chosen = state[:, : self.last].float()
        r, w, c = self.rotate.weight, self.source.weight, self.source.bias
        changed = loreft(chosen, r, w, c, rows).to(state.dtype)
        state = torch.cat((changed, state[:, self.last :]), 1)
        return (state, *output[1:]) if isinstance(output, tuple) else state
