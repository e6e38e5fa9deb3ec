"""Replacing an adapter's values in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from road_peft import RoadConfig, hotswap_adapter
from tests.road_peft._models import VOCABULARY, tiny, with_adapters

TOKENS = torch.arange(12).view(2, 6) % VOCABULARY
FILE = "adapter_model.safetensors"


def adapted(**settings: Any) -> Any:
    """Every call gives the same base model with other adapter values."""
    seed = int(torch.randint(0, 1 << 30, ()))
    torch.manual_seed(0)
    base = tiny("llama")
    torch.manual_seed(seed)
    return with_adapters(base, {"default": RoadConfig(**{"group_size": 4, **settings})})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Tensor]:
    """An adapter folder and what the model computes with it."""
    model = adapted()
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"variant": "road_4"}], ids=str)
def test_the_model_computes_what_the_other_adapter_does(tmp_path: Path, settings: Any) -> None:
    other = adapted(**settings)
    other.save_pretrained(tmp_path)
    model = adapted(**settings)
    kept = {name: id(p) for name, p in model.named_parameters()}
    assert not torch.equal(logits(model), logits(other))
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))
    assert {name: id(p) for name, p in model.named_parameters()} == kept


def test_an_adapter_of_an_embedding_is_swapped(tmp_path: Path) -> None:
    targets = {"target_modules": ["embed_tokens", "q_proj"]}  # PEFT saves the embedding along
    other = adapted(**targets)
    other.save_pretrained(tmp_path)
    assert any(name.endswith("base_layer.weight") for name in load_file(tmp_path / FILE))
    model = adapted(**targets)
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


def test_a_compiled_model_is_not_compiled_again(saved: tuple[Path, Tensor]) -> None:
    folder, expected = saved
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = torch.compile(adapted(), backend=counter, fullgraph=True)
    with torch.no_grad():
        before = model(TOKENS).logits
        frames = counter.frame_count
        hotswap_adapter(model, folder)
        after = model(TOKENS).logits
    assert counter.frame_count == frames == 1
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(after, expected)


def damage(folder: Path, change: Any) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors)]


def one_unknown(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.nowhere.road_theta"] = torch.zeros(8)


def one_nan(tensors: dict[str, Tensor]) -> None:
    tensors[max(tensors)][0] = torch.nan


def one_short(tensors: dict[str, Tensor]) -> None:
    tensors[max(tensors)] = torch.zeros(2)


DAMAGED = {
    "missing": (drop_one, r"1 tensor\(s\) are missing"),
    "unknown": (one_unknown, "1 are unknown"),
    "not finite": (one_nan, "not finite"),
    "other shape": (one_short, "has shape"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_changes_nothing(
    saved: tuple[Path, Tensor], change: Any, message: str
) -> None:
    model = adapted()
    before = logits(model)
    damage(saved[0], change)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, saved[0])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"variant": "road_2"}, "variant 'road_2' in the model"), ({"group_size": 8}, "group_size 8")],
)
def test_adapters_that_do_not_match_are_refused(
    saved: tuple[Path, Tensor], settings: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(adapted(**settings), saved[0])


def test_only_safetensors_are_read(saved: tuple[Path, Tensor]) -> None:
    folder, _ = saved
    torch.save(load_file(folder / FILE), folder / "adapter_model.bin")
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match="only the safetensors format"):
        hotswap_adapter(adapted(), folder)
    (folder / FILE).write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="only the safetensors format"):
        hotswap_adapter(adapted(), folder)


def test_what_cannot_be_swapped_says_why(saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, _ = saved
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="is merged; unmerge"):
        hotswap_adapter(merged, folder)
    with pytest.raises(ValueError, match="no RoAd adapter named 'other'"):
        hotswap_adapter(adapted(), folder, "other")
    with pytest.raises(ValueError, match=r"no readable adapter_config\.json"):
        hotswap_adapter(adapted(), tmp_path / "nothing")
