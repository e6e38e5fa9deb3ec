"""Batches whose adapters lie in the slots of a bank: by name, or by slots that are at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from road_peft.mixed_batch import Rows


class Tables(Protocol):
    """What has the coefficients of all slots: a bank."""

    def table(self, layer: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the coefficients (slots, 2, d) and the group sizes (slots,) of a layer."""
        ...


class BankRows(Rows):
    """Rows by name, whose slots and tables are those of a bank; `places` is each name's slot."""

    def __init__(
        self, bank: Tables, names: Sequence[str], repeats: int, places: Mapping[str, int]
    ) -> None:
        super().__init__(names, repeats)
        self._place(places)
        self.names, self._bank = (), bank

    def _table(self, layer: Any, like: Tensor, one_each: bool) -> tuple[Tensor, Tensor]:
        table, group_sizes = self._bank.table(layer, like)
        if not one_each:
            return table, group_sizes
        index = torch.tensor(self._slots, device=table.device)
        picked = index.clamp(min=0)
        return table.index_select(0, picked), torch.where(index < 0, 0, group_sizes[picked])


class SlotRoute:
    """Slots that somebody else has resolved, one for each row or token."""

    names: Sequence[str] = ()

    def __init__(self, bank: Tables, slots: Tensor) -> None:
        self._bank, self._slots = bank, slots

    def slots(self, layer: Any, x: Tensor) -> Tensor:
        """Give the slots, which must be those of the rows of `x`.

        Raises:
            ValueError: the slots have another shape than the leading dimensions of `x`.
        """
        if x.shape[: self._slots.dim()] != self._slots.shape:
            raise ValueError(
                f"the slots have shape {tuple(self._slots.shape)}, the input of"
                f" {layer.module_name} {tuple(x.shape)}; give one slot for each row"
            )
        return self._slots

    def table(self, layer: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the table of the layer in the bank."""
        return self._bank.table(layer, like)

    def rows_of(self, slot: int, layer: Any, x: Tensor) -> Tensor:
        """Never asked for: a bank has no LoRA."""
        raise NotImplementedError
