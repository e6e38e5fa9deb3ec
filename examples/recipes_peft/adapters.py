"""Load a saved adapter, or say in a sentence why it does not fit; merge it; compare logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from recipes_peft.errors import UserError, explained

__all__ = ["load_adapter", "merge", "record", "recorded_difference"]


def load_adapter(model: Any, folder: Path) -> Any:
    """Give `model` with the adapter that `save_pretrained` wrote to `folder`.

    Raises:
        UserError: there is no adapter, or it belongs to a model of other layers or sizes.
    """
    weights = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file() or not weights.is_file():
        raise UserError(
            f"{folder} holds no adapter (adapter_config.json and {weights.name}); give the folder"
            " that a training run wrote, such as demo-output/road"
        )
    hint = f"; the adapter {folder} needs the model it was trained on: name that with --model"
    before = "cannot load the adapter: "
    with explained(RuntimeError, ValueError, OSError, SafetensorError, before=before, after=hint):
        adapted = PeftModel.from_pretrained(model, str(folder))
        with safe_open(weights, framework="pt") as file:
            saved = set(file.keys())
    # PEFT only warns of layers that the file lacks or that the model does not have.
    if odd := sorted(saved ^ set(get_peft_model_state_dict(adapted))):
        raise UserError(f"{before}{odd[0]} is not in both the file and the model{hint}")
    return adapted


@torch.no_grad()
def merge(adapted: Any, batches: Sequence[dict[str, Any]]) -> tuple[Any, float]:
    """Merge an adapter; give the plain model and how far its logits are from those before.

    The second value is the largest difference over all batches, relative to the largest logit.
    """
    before = [adapted(**batch).logits.float() for batch in batches]
    merged = adapted.merge_and_unload(safe_merge=True)
    after = [merged(**batch).logits.float() for batch in batches]
    scale = max(logits.abs().max().item() for logits in before)
    worst = max((a - b).abs().max().item() for a, b in zip(before, after, strict=True))
    return merged, worst / scale


@torch.no_grad()
def record(model: Any, ids: list[int], file: Path) -> None:
    """Write a few token ids and the model's logits for them, for `recorded_difference`."""
    inputs = torch.tensor([ids])
    logits = model.eval()(input_ids=inputs.to(model.device)).logits
    save_file({"ids": inputs, "logits": logits.float().cpu().contiguous()}, file)


@torch.no_grad()
def recorded_difference(model: Any, file: Path) -> float:
    """Give how far the model's logits are from those recorded, relative to the largest of them.

    Raises:
        UserError: the file cannot be read, or its logits are of another vocabulary.
    """
    with explained(OSError, SafetensorError, before=f"cannot read the logits {file}: "):
        found = load_file(file)
    logits = model.eval()(input_ids=found["ids"].to(model.device)).logits.float().cpu()
    if logits.shape != found["logits"].shape:
        raise UserError(
            f"{file} holds logits of shape {tuple(found['logits'].shape)}, the model gives"
            f" {tuple(logits.shape)}; give the model that they were recorded from"
        )
    return ((logits - found["logits"]).abs().max() / found["logits"].abs().max()).item()
