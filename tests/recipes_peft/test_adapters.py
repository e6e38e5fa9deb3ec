"""Adapters reload and merge; one of another model is refused in a sentence; logits compare."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from recipes_peft import tiny
from recipes_peft.adapters import load_adapter, merge, record, recorded_difference
from recipes_peft.data import collate, encode
from recipes_peft.errors import UserError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny.model(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_reloads_and_merges(saved: Path) -> None:
    batch = collate([encode(e, tiny.tokenizer(), 64) for e in tiny.examples(3)], 256)
    adapted = load_adapter(tiny.model(), saved)
    with torch.no_grad():
        before = adapted(**batch).logits
    merged, difference = merge(adapted, [batch])
    assert difference < 1e-5
    assert not any("lora" in name for name, _ in merged.named_parameters())
    plain = tiny.model()(**batch).logits
    assert (before - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("layers", "hidden"), [(1, 64), (3, 64), (2, 128)])
def test_an_adapter_of_another_model_is_refused(saved: Path, layers: int, hidden: int) -> None:
    with pytest.raises(UserError, match=r"^cannot load the adapter: .* needs the model it was"):
        load_adapter(tiny.model(layers, hidden), saved)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(tiny.model(), tmp_path)
    (saved / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot load the adapter: "):
        load_adapter(tiny.model(), saved)


def test_recorded_logits_tell_one_model_from_another(tmp_path: Path, saved: Path) -> None:
    file = tmp_path / "logits.safetensors"
    record(tiny.model(), [5, 6, 7], file)
    assert recorded_difference(tiny.model(), file) == 0.0
    assert recorded_difference(load_adapter(tiny.model(), saved), file) > 1e-3
    other = tiny.model()
    other.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(UserError, match=r"shape \(1, 3, 257\), the model gives \(1, 3, 300\)"):
        recorded_difference(other, file)
    with pytest.raises(UserError, match="cannot read the logits"):
        recorded_difference(tiny.model(), tmp_path / "nothing.safetensors")
