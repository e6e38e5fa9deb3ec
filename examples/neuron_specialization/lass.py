"""The baseline LaSS: a sub-network of weights for each task, found by pruning.

The model is trained a little on one task alone; the weights that are then the smallest are masked
for it. All tasks go on training one model, each through the weights that it kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from masking import Table, load, save
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WeightGates", "block_linears", "find", "largest"]

# name of a task to name of a layer to the weights that it keeps
WeightMasks = Mapping[str, Mapping[str, Tensor]]


def largest(weight: Tensor, pruned: float) -> Tensor:
    """Keep the weights of the largest magnitude, but for a share `pruned` of all.

    Shapes:
        weight: any. Returns the same shape, bool.
    """
    count = weight.numel() - round(pruned * weight.numel())
    order = weight.detach().abs().flatten().argsort(descending=True, stable=True)
    keep = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[order[:count]] = True
    return keep.view_as(weight)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Give the linear layers of the repeated blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def find(
    model: Any,
    tasks: Iterable[str],
    pruned: float,
    adapt: Callable[[str], None],
    folder: Path,
    main: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """Give the masks of every task; `adapt` trains the model on one of them.

    The masks of a task are kept in the folder, and not searched again where they are there; of
    several processes the `main` one writes them. The model is as before at the end.
    """
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    layers = block_linears(model)
    masks = {}
    for task in tasks:
        file = folder / f"{task}.safetensors"
        if file.exists():
            kept = load(file).layers
            masks[task] = {n: kept[n].view_as(layer.weight) for n, layer in layers.items()}
            continue
        adapt(task)
        masks[task] = {name: largest(layer.weight, pruned) for name, layer in layers.items()}
        model.load_state_dict(before)
        if main:
            save(Table((task,), {n: keep.flatten()[None] for n, keep in masks[task].items()}), file)
    return masks


class WeightGates:
    """Masks the weights of a model for one task at a time."""

    def __init__(self, model: nn.Module, masks: WeightMasks) -> None:
        self._layers, self._masks = block_linears(model), masks

    @contextmanager
    def active(self, task: str) -> Iterator[None]:
        """Let the layers use only what the task keeps; nothing is written to the weights."""
        for name, keep in self._masks[task].items():
            layer: Any = self._layers[name]
            layer.forward = partial(_masked, layer, keep)
        try:
            yield
        finally:
            for name in self._masks[task]:
                del self._layers[name].forward


def _masked(layer: nn.Linear, keep: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight * keep.to(x.device), layer.bias)
