"""Batches whose rows take different adapters: the models, adapters and inputs of their tests."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor

from road_peft import RoadConfig
from tests.helpers import TOLERANCES
from tests.road_peft._models import (
    VOCABULARY,
    tiny,
    with_adapters,
)

BASE = "__base__"
# adapters that may meet in a batch, by their fields
FIELDS: dict[str, dict[str, Any]] = {
    "a": {"group_size": 4},
    "b": {"group_size": 4, "variant": "road_2"},
    "c": {"group_size": 8, "variant": "road_4"},
    "d": {"group_size": 2, "lora_rank": 2},
    "e": {"group_size": 4, "variant": "road_4", "lora_rank": 3, "lora_alpha": 5},
    "f": {"group_size": 6, "remainder": "identity"},
}


def configs(*names: str, **common: Any) -> dict[str, RoadConfig]:
    return {n: RoadConfig(**{**FIELDS[n], **common}) for n in names}


LENGTH = 5
NAMES = ["c", BASE, "e", "c"]
DECODERS = ("llama", "opt", "gpt2")
SEQ2SEQ = ("t5", "bart")


def mixed_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> peft.PeftModel:
    base = tiny(name, dtype=dtype, **settings)
    return with_adapters(base, configs("c", "e"))


def tokens_for_rows(rows: int = len(NAMES), length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def inputs_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": tokens}
    if model.get_base_model().config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :3].contiguous()
    return inputs


def only(model: Any, name: str, function: Any) -> Any:
    """Call with one adapter, or none, for the whole model."""
    if name == BASE:
        with model.disable_adapter():
            return function()
    model.set_adapter(name)
    return function()


def trained_model(name: str = "llama", **settings: Any) -> peft.PeftModel:
    """Give a model in double precision that trains "a", "c", "d" and "e" at once."""
    base = tiny(name, dtype=torch.float64, **{"use_cache": False, **settings})
    model = with_adapters(base, configs("a", "c", "d", "e"))
    model.base_model.set_adapter(["a", "c", "d", "e"])
    return model.train()


def loss_of(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Give a loss that is a sum over rows: that of the first output, element by element."""
    output = model(**inputs, **kwargs)[0]
    weights = torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype).view_as(output[0])
    return (output.square() * weights + output * weights.flip(-1)).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    """Give the gradients there are, and forget them."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def belongs(parameter: str, adapter: str) -> bool:
    return adapter in parameter.split(".")


def gradients_alone(
    model: Any, inputs: dict[str, Tensor], names: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the rows of each adapter without the others: the sum of losses, and the gradients."""
    loss: Any = 0
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        mine = {key: value[rows] for key, value in inputs.items()}
        part = only(model, name, lambda mine=mine: loss_of(model, mine))
        if name != BASE:
            part.backward()
        loss = loss + part.detach()
        found |= gradients(model)
    return loss, found


def assert_network_close(actual: Tensor, wanted: Tensor, name: str = "result") -> None:
    """Compare what passed through a network, which adds up the roundings of its layers."""
    error = (actual.double() - wanted.double()).abs().max().item()
    bound = 100 * TOLERANCES[wanted.dtype] * wanted.double().abs().max().item()
    assert error <= bound, f"{name} is off by {error:.3g}, more than {bound:.3g}"


def assert_gradients_close(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    assert wanted
    for name, gradient in wanted.items():
        assert gradient.any(), name
        assert_network_close(actual[name], gradient, name)
