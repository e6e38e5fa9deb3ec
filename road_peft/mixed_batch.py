"""One adapter per row of a batch: telling every layer which row takes which adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from road_peft.layer import RoadLayer


@contextmanager
def route_rows(
    model: nn.Module, adapter_names: list[str], arguments: dict[str, Any]
) -> Iterator[None]:
    """Make row i of every layer inside `model` use the adapter `adapter_names[i]`.

    `"__base__"` stands for no adapter. `arguments` are those of the call: where `generate` repeats
    each row for beams or return sequences, its name is repeated as well. Modules to save are
    switched by row too. Nothing stays on the model afterwards, whatever the body raises.

    Raises:
        ValueError: a name that no layer knows.
    """
    _check_names(model, adapter_names)
    repeats = _repeats(model, arguments)

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = adapter_names
        # an encoder sees each row once, a decoder as often as it is repeated
        if args and len(args[0]) == repeats * len(names):
            names = [name for name in names for _ in range(repeats)]
        return args, {**kwargs, "adapter_names": names}

    handles = []
    try:
        for module in model.modules():
            if isinstance(module, RoadLayer | AuxiliaryTrainingWrapper):
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _repeats(model: nn.Module, arguments: dict[str, Any]) -> int:
    """Give how often `generate` repeats each row, by its arguments or the model's defaults."""
    configs = [arguments.get("generation_config"), getattr(model, "generation_config", None)]
    counts = [1]
    for name in ("num_beams", "num_return_sequences"):
        values = [arguments.get(name), *(getattr(config, name, None) for config in configs)]
        counts.append(next((value for value in values if value is not None), 1))
    return max(counts)
