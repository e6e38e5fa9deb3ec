"""One adapter per row of a batch: telling every layer which row takes which adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from road_peft.layer import RoadLayer


@contextmanager
def route_rows(
    model: nn.Module, adapter_names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Make row i of every layer inside `model` use the adapter `adapter_names[i]`.

    `"__base__"` stands for no adapter. `args` and `kwargs` are those of the call: where `generate`
    repeats each row for beams or return sequences, its name is repeated as well. Modules to save
    are switched by row too. Nothing stays on the model afterwards, whatever the body raises.

    Raises:
        ValueError: a name that no layer knows.
    """
    _check_names(model, adapter_names)
    batch = _Batch(adapter_names, _repeats(model, args, kwargs))
    handles = []
    try:
        for module in model.modules():
            hook = None
            if isinstance(module, RoadLayer | AuxiliaryTrainingWrapper):
                hook = batch.add_names
            elif isinstance(module, PreTrainedModel):
                hook = batch.note_shape
            if hook is not None:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Batch:
    """Which adapter each row of an input takes, however `generate` or a block lays rows out.

    A decoder sees a row as often as it is repeated, an encoder once. Some blocks (OPT's) flatten
    (rows, tokens) before a linear layer; then a row stands for its tokens.
    """

    def __init__(self, names: list[str], repeats: int) -> None:
        self.names, self.repeats = names, repeats
        self.tokens_per_row = 1

    def note_shape(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Pre-hook of a model: remember how many tokens a row has."""
        for value in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1]):
            if isinstance(value, Tensor) and value.dim() > 1:
                self.tokens_per_row = value.shape[1]
                break
        return args, kwargs

    def add_names(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Pre-hook of a layer: hand it one name per row of its input."""
        copies = 1
        if args:
            copies, left = divmod(len(args[0]), len(self.names))
            allowed = {1, self.repeats}
            if args[0].dim() == 2:
                allowed |= {n * self.tokens_per_row for n in allowed}
            if left or copies not in allowed:
                copies = 1  # the layer reports the mismatch
        names = [name for name in self.names for _ in range(copies)]
        if isinstance(module, AuxiliaryTrainingWrapper):  # not every adapter has its own copy
            names = [name if name in module._adapters else "__base__" for name in names]
        return args, {**kwargs, "adapter_names": names}


def _check_names(model: nn.Module, adapter_names: list[str]) -> None:
    known = {"__base__"}
    for module in model.modules():
        if isinstance(module, RoadLayer):
            known.update(module.road_theta)
    unknown = set(adapter_names) - known
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
        )


def _repeats(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Give how often `generate` repeats each row, by its arguments or the model's defaults."""
    configs = [value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)]
    configs.append(getattr(model, "generation_config", None))
    counts = [1]
    for name in ("num_beams", "num_return_sequences"):
        values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        counts.append(next((value for value in values if value is not None), 1))
    return max(counts)
