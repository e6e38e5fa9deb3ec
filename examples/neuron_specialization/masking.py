"""Count and gate the neurons of a model from outside: hooks on its feed-forward blocks.

Whatever adapts the first linear layer (RoAd, LoRA, packed weights) stays inside: the gate sees the
output of the whole layer. That is needed with RoAd, which mixes pairs of outputs, so that a mask
below its rotation would let a masked neuron come back through its partner.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from selection import derangement, gate, random_like, select_cumulative
from torch import Tensor, nn

__all__ = ["ActivationCounter", "Ffn", "NeuronGates", "Table", "find_ffns", "load", "save"]

# names of the first linear layers (with two, the first one is the gate), and of the second
LAYOUTS = (
    (("fc1",), "fc2"),
    (("wi",), "wo"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
)


@dataclass(frozen=True)
class Ffn:
    """A feed-forward block: its name, its side (encoder or decoder), and its linear layers."""

    name: str
    side: str
    first: tuple[nn.Module, ...]
    second: Any


def find_ffns(model: nn.Module) -> list[Ffn]:
    """Give the feed-forward blocks of a model, adapted or not, in the order they are registered.

    Names are those of the model without adapters, so they are the same for all tuners. Blocks with
    a gated activation count as firing where the gate is above zero; the paper has none of them.

    Raises:
        ValueError: the model has no block with linear layers of these names.
    """
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for first, second in LAYOUTS:
            if {*first, second} <= set(children):
                own = name.removeprefix("base_model.model.")
                side = "encoder" if "encoder" in own.split(".") else "decoder"
                layers = tuple(children[word] for word in first)
                found.append(Ffn(own, side, layers, children[second]))
                break
    if not found:
        known = " or ".join("/".join((*first, second)) for first, second in LAYOUTS)
        raise ValueError(f"{type(model).__name__} has no feed-forward block of {known}")
    return found


@dataclass(frozen=True)
class Table:
    """A value per task, block and neuron: counts (int64) or what is kept (bool).

    Shapes:
        layers: name of a block to (tasks, d_ff).
    """

    tasks: tuple[str, ...]
    layers: Mapping[str, Tensor]

    def select(self, percent: Callable[[str, str], float]) -> Table:
        """Give what is kept of these counts; `percent` gives k for a task and a block's name."""
        rows = {
            name: torch.stack(
                [
                    select_cumulative(row, percent(t, name))
                    for t, row in zip(self.tasks, counts, strict=True)
                ]
            )
            for name, counts in self.layers.items()
        }
        return Table(self.tasks, rows)

    def random(self, seed: int) -> Table:
        """Give random masks that keep as many neurons in each block for each task."""
        draw = torch.Generator().manual_seed(seed)
        return Table(self.tasks, {n: random_like(keep, draw) for n, keep in self.layers.items()})

    def shuffled(self, seed: int) -> Table:
        """Give every task the masks of another."""
        order = derangement(len(self.tasks), seed)
        return Table(self.tasks, {name: rows[order] for name, rows in self.layers.items()})

    def __add__(self, other: Table) -> Table:
        """Add counts of the same tasks and blocks."""
        return Table(self.tasks, {n: rows + other.layers[n] for n, rows in self.layers.items()})


def save(table: Table, path: Path) -> None:
    """Write a table as safetensors; masks are packed, eight neurons to a byte."""
    masks = all(rows.dtype == torch.bool for rows in table.layers.values())
    about = {
        "tasks": json.dumps(table.tasks),
        "packed": json.dumps(
            {n: rows.shape[-1] for n, rows in table.layers.items()} if masks else {}
        ),
    }
    arrays = {name: rows.cpu().numpy() for name, rows in table.layers.items()}
    part = path.with_name(f"{path.name}.part")
    if masks:
        arrays = {name: np.packbits(rows, axis=-1) for name, rows in arrays.items()}
    save_file(arrays, part, about)
    os.replace(part, path)


def load(path: Path) -> Table:
    """Read what `save` wrote."""
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
        rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, width in json.loads(about["packed"]).items():
        rows[name] = np.unpackbits(rows[name], axis=-1, count=width).astype(bool)
    return Table(
        tuple(json.loads(about["tasks"])), {n: torch.from_numpy(r) for n, r in rows.items()}
    )


@dataclass
class ActivationCounter:
    """Counts how often each neuron fires; a context manager, for a model in evaluation mode.

    `count_padding` counts every position of a padded batch, as the released code does.

        with ActivationCounter(model) as counter:
            with counter.over(attention_mask, decoder_attention_mask):
                model(...)
        counter.counts  # name of a block to (d_ff,), int64
    """

    model: nn.Module
    count_padding: bool = False
    counts: dict[str, Tensor] = field(default_factory=dict)

    def __enter__(self) -> ActivationCounter:
        if self.model.training:
            raise ValueError(
                "the model is in training mode, where dropout makes zeros; call eval()"
            )
        self._real: dict[str, Tensor] = {}
        self._hooks = []
        for ffn in find_ffns(self.model):
            width, place = ffn.second.in_features, next(self.model.parameters()).device
            self.counts.setdefault(ffn.name, torch.zeros(width, dtype=torch.long, device=place))
            if len(ffn.first) == 1:
                hook = ffn.second.register_forward_pre_hook(self._before(ffn))
            else:
                hook = ffn.first[0].register_forward_hook(self._after(ffn))
            self._hooks.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def over(self, encoder: Tensor | None, decoder: Tensor | None) -> Iterator[None]:
        """Count while the body runs the model once on a batch with these masks of real tokens."""
        given = {"encoder": encoder, "decoder": decoder}
        self._real = {side: mask.bool() for side, mask in given.items() if mask is not None}
        try:
            yield
        finally:
            self._real = {}

    def _before(self, ffn: Ffn) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._add(ffn, inputs[0])

        return hook

    def _after(self, ffn: Ffn) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self._add(ffn, output)

        return hook

    def _add(self, ffn: Ffn, values: Tensor) -> None:
        fired = (values.detach() > 0).flatten(0, -2)
        real = self._real.get(ffn.side)
        if real is not None and not self.count_padding:
            fired = fired[real.flatten().to(fired.device)]
        self.counts[ffn.name] += fired.sum(0)


class NeuronGates:
    """Masks a model's neurons by task, per row of a batch; a context manager.

    `bias` is "kept", the paper's, or "masked"; see `selection.gate`. Outside of `active` nothing is
    masked. Hooks read which tasks are active when they run and change no weight, so checkpointed
    blocks that run once more in the backward pass are masked too, if that is inside of `active`.

        with NeuronGates(model, masks) as gates:
            with gates.active("en-fr"):            # or a task for each row: ["en-fr", "fr-en"]
                model(...).loss.backward()
    """

    def __init__(self, model: nn.Module, masks: Table, bias: str = "kept") -> None:
        if bias not in ("kept", "masked"):
            raise ValueError(f"bias is {bias!r}; choose 'kept' or 'masked'")
        self._model, self._masks, self._bias = model, masks, bias
        self._index = {task: i for i, task in enumerate(masks.tasks)}
        self._rows: Tensor | None = None

    def __enter__(self) -> NeuronGates:
        self._hooks = []
        for ffn in find_ffns(self._model):
            if ffn.name not in self._masks.layers:
                self.__exit__()
                raise ValueError(
                    f"there is no mask for {ffn.name}; the masks are of another model, count again"
                )
            for layer in ffn.first:
                hook = self._hook(self._masks.layers[ffn.name])
                self._hooks.append(layer.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def active(self, tasks: str | Sequence[str]) -> Iterator[None]:
        """Mask for one task, or for a task for each row of the batch.

        Raises:
            ValueError: a task has no masks.
        """
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        if unknown := sorted(set(names) - set(self._index)):
            raise ValueError(
                f"there are no masks for {unknown[0]!r}; there are for {', '.join(self._index)}"
            )
        before = self._rows
        self._rows = torch.tensor([self._index[name] for name in names])
        try:
            yield
        finally:
            self._rows = before

    def _hook(self, masks: Tensor) -> Callable[..., Tensor | None]:
        def hook(layer: Any, _: Any, z: Tensor) -> Tensor | None:
            if self._rows is None:
                return None
            keep = masks[self._rows].to(z.device)
            # a decoder sees a row once for every beam; some blocks see one row per token
            keep = keep.repeat_interleave(z.shape[0] // len(keep), 0) if len(keep) > 1 else keep
            keep = keep.view(len(keep), *[1] * (z.dim() - 2), keep.shape[-1])
            inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            return gate(z, keep, inner.bias if self._bias == "kept" else None)

        return hook
