"""Adapters for a bank, and the model with all of them loaded by PEFT, which is the oracle."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from road_peft import RoadBank, RoadConfig
from tests.road_peft._models import VOCABULARY, with_adapters
from tests.road_peft._rows import FIELDS

ROTATIONS = ("a", "b", "c", "f")  # of FIELDS, without those that have a LoRA
Sources = dict[str, tuple[Any, dict[str, Tensor]]]


def configs_of(names: str | tuple[str, ...] = ROTATIONS, **common: Any) -> dict[str, RoadConfig]:
    return {name: RoadConfig(**{**FIELDS[name], **common}) for name in names}


def loaded(base: nn.Module, configs: Mapping[str, Any]) -> peft.PeftModel:
    """Put random adapters on a copy of `base`."""
    return with_adapters(copy.deepcopy(base), dict(configs))


def sources_of(model: peft.PeftModel, *names: str) -> Sources:
    """Give adapters of a model as a bank takes them from memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells that it saves embeddings along
        return {
            name: (
                model.peft_config[name],
                {
                    key: value.clone()
                    for key, value in peft.get_peft_model_state_dict(
                        model, adapter_name=name
                    ).items()
                },
            )
            for name in names or tuple(model.peft_config)
        }


def bank_of(base: nn.Module, sources: Sources, slots: int = 8, **kwargs: Any) -> RoadBank:
    bank = RoadBank(base, slots, **kwargs)
    for name, source in sources.items():
        bank.add(name, source)
    return bank


def saved(model: peft.PeftModel, folder: Path) -> Path:
    """Save every adapter of a model to a folder of its name inside `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def vector_bytes(source: tuple[Any, Mapping[str, Tensor]]) -> int:
    """Count the bytes of the angles and scales of an adapter."""
    return sum(4 * t.numel() for key, t in source[1].items() if ".road_" in key)


class Loudly(nn.Module):
    """Layers whose outputs tell which adapter rotated them: each scales by its own power of two.

    Fed with ones, every layer gives `scale` for an adapter that holds alpha = scale everywhere.
    """

    def __init__(self, layers: int = 3, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        for layer in self.layers:
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Give what each layer makes of x, (rows, layers, width)."""
        return torch.stack([layer(x) for layer in self.layers], 1)


def scaling(scale: float, layers: int = 3, width: int = 4) -> tuple[RoadConfig, dict[str, Tensor]]:
    """Give an adapter of `Loudly` that multiplies by `scale`."""
    vectors: dict[str, Tensor] = {}
    for i in range(layers):
        vectors[f"layers.{i}.road_theta"] = torch.zeros(width // 2)
        vectors[f"layers.{i}.road_alpha"] = torch.full((width // 2,), float(scale))
    return RoadConfig(group_size=2, target_modules=[str(i) for i in range(layers)]), vectors


def loud_bank(slots: int = 4, count: int = 0, **kwargs: Any) -> RoadBank:
    """Give a bank of `Loudly` with adapters 1 .. count that scale by their number plus one."""
    bank = RoadBank(Loudly(), slots, target_modules=["0", "1", "2"], **kwargs)
    for i in range(1, count + 1):
        bank.add(f"n{i}", scaling(i + 1))
    return bank


def heard(bank: RoadBank, *names: str | None, **kwargs: Any) -> list[float]:
    """Run a batch of these names through a bank of `Loudly`, and give the scale of each row."""
    with torch.no_grad(), bank.rows(list(names), **kwargs):
        out = bank.model(torch.ones(len(names), 4))
    assert torch.equal(out, out[:, :1, :1].expand_as(out))  # one version in all layers
    return out[:, 0, 0].tolist()


def prompts(rows: int, length: int = 5) -> list[list[int]]:
    return torch.randint(3, VOCABULARY, (rows, length)).tolist()


def in_threads(*functions: Callable[[], None], timeout: float = 30) -> None:
    """Run functions at the same time, and raise what one of them raised."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def no_lease(bank: RoadBank) -> bool:
    return all(slot.uses == 0 for slot in bank._slots)
