"""Linear layers whose rows have adapters of their own: what PEFT has no fast mixed batch for.

Each is the best plain form of its method. What depends on which adapters the rows have is gathered
by `select`, once for a batch; a step then does no more than the method itself asks for. They are
for inference and change the output of the linear layer in place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._providers import LORA_SCALE, Parameters, draw


class RowLayer(nn.Module):
    """A linear layer, and the parameters of all adapters, stacked."""

    def __init__(self, linear: nn.Linear, stacks: Parameters) -> None:
        super().__init__()
        self.linear = linear

    @classmethod
    def shapes(cls, linear: nn.Linear, rank: int) -> dict[str, tuple[int, ...]]:
        """Give the shape of each parameter of one adapter by its kind."""
        raise NotImplementedError

    def select(self, slots: Tensor) -> None:
        """Take one slot, the place in the stacks, for every row of what comes."""
        raise NotImplementedError

    def parameters_of(self, slot: int) -> dict[str, Tensor]:
        """Give the parameters of one adapter by their kinds, as PEFT lays them out."""
        raise NotImplementedError


class _Lora(RowLayer):
    def __init__(self, linear: nn.Linear, stacks: Parameters) -> None:
        super().__init__(linear, stacks)
        # memory layouts with which the products are fastest, on a CPU too
        self.down = stacks["lora_A"]
        self.up = (LORA_SCALE * stacks["lora_B"]).transpose(1, 2).contiguous()

    @classmethod
    def shapes(cls, linear: nn.Linear, rank: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (rank, linear.in_features), "lora_B": (linear.out_features, rank)}

    def parameters_of(self, slot: int) -> dict[str, Tensor]:
        return {"lora_A": self.down[slot], "lora_B": self.up[slot].T / LORA_SCALE}

    def _gathered(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self.down[slots].transpose(1, 2), self.up[slots]


class BmmLora(_Lora):
    """LoRA as a batched product: Z = X W + bmm(bmm(X, B), A), with matrices of every row.

    Source:
        RoAd (arXiv:2409.00119), section 2.2: the baseline of figure 4. There the matrices are
        gathered in every layer call; here once for a batch.
    """

    def select(self, slots: Tensor) -> None:
        pair = self._gathered(slots)
        self.of_tokens, self.of_one = pair, _wide_on_cpu(pair)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        down, up = self.of_one if x.shape[1] == 1 else self.of_tokens
        if down.dtype == x.dtype:
            return torch.baddbmm(y, torch.bmm(x, down), up)
        return y.add_(torch.bmm(torch.bmm(x.to(down.dtype), down), up))


class GroupedLora(_Lora):
    """LoRA as a grouped product: rows of one adapter lie together and share its matrices."""

    def select(self, slots: Tensor) -> None:
        """Take the slots, rows of one adapter together."""
        groups, counts = slots.unique_consecutive(return_counts=True)
        self.picked = _wide_on_cpu(self._gathered(groups))
        self.ends_of = {1: counts.cumsum(0).to(torch.int32)}  # by tokens of a row

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if tokens not in self.ends_of:
            self.ends_of[tokens] = self.ends_of[1] * tokens
        ends, (down, up) = self.ends_of[tokens], self.picked
        hidden = F.grouped_mm(x.flatten(0, 1).to(down.dtype), down, offs=ends)
        y = self.linear(x)
        return y.add_(F.grouped_mm(hidden, up, offs=ends).view_as(y))


def _wide_on_cpu(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Give the matrices in float32 on a CPU, where a few rows in bfloat16 take far longer."""
    down, up = pair
    return pair if down.device.type == "cuda" else (down.float(), up.float())


class ScaledRows(RowLayer):
    """(IA)3 at the outputs: every row scaled by the vector of its adapter."""

    def __init__(self, linear: nn.Linear, stacks: Parameters) -> None:
        super().__init__(linear, stacks)
        self.scales = stacks["ia3_l"]

    @classmethod
    def shapes(cls, linear: nn.Linear, rank: int) -> dict[str, tuple[int, ...]]:
        return {"ia3_l": (linear.out_features,)}

    def select(self, slots: Tensor) -> None:
        self.picked = self.scales[slots].unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mul_(self.picked)

    def parameters_of(self, slot: int) -> dict[str, Tensor]:
        return {"ia3_l": self.scales[slot]}


def row_layer(cls: type[RowLayer], linear: nn.Linear, adapters: int, rank: int) -> RowLayer:
    """Give a layer of a class with random adapters, of the dtype and on the device of `linear`."""
    generator = torch.Generator().manual_seed(0)
    stacks = {
        kind: draw(kind, (adapters, *shape), generator).to(linear.weight)
        for kind, shape in cls.shapes(linear, rank).items()
    }
    return cls(linear, stacks)
