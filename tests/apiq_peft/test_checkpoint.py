"""Packed checkpoints of our own: what a broken one is refused with, and what memory holds."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from apiq_peft import ApiQConfig, PackedLinear
from apiq_peft.checkpoint import packed_layers
from tests.apiq_peft._models import outputs, tiny, tokens

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = ApiQConfig(bits=4, group_size=32, r=4)
    get_peft_model(tiny(), config).unload().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(state)
    save_file(state, file, {"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (
        lambda s: s.pop(f"{LAYER}.scales"),
        rf"14 packed layers, but the files hold scales of 13: missing are \['{LAYER}'\]",
    ),
    "no zero points": (lambda s: s.pop(f"{LAYER}.qzeros"), "the files hold qzeros of 13"),
    "no codes": (lambda s: s.pop(f"{LAYER}.qweight"), "the files hold qweight of 13"),
    "a layer too many": (
        lambda s: s.update({"odd.scales": torch.ones(2, 32).half()}),
        r"scales of 15: missing are none, too many \['odd'\]",
    ),
    "shape": (
        lambda s: s.update({f"{LAYER}.scales": torch.ones(4, 64).half()}),
        rf"{LAYER}\.scales has shape \[4, 64\] .* must be \[2, 128\]",
    ),
    "dtype": (
        lambda s: s.update({f"{LAYER}.qweight": s[f"{LAYER}.qweight"].float()}),
        rf"{LAYER}\.qweight .* dtype F32 in the file; .* I32",
    ),
    "scales not finite": (
        lambda s: s[f"{LAYER}.scales"].fill_(float("inf")),
        f"{LAYER}: scales has values that are not finite",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_tensors_are_refused(saved: Path, damage: str) -> None:
    edit, message = DAMAGES[damage]
    change(saved, edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("size", [0, 7, -100])
def test_a_file_cut_short_is_refused(saved: Path, size: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*get the file again"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_pickles_are_not_read(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 9}, "format 9 of ApiQ, this library reads format 1"),
        ({"scheme": "odd"}, "scheme 'odd'"),
        ({"more": 1}, r"unknown keys \['more'\]"),
        ({"layers": {"model.layers.7.mlp.up_proj": [4, 32]}}, "no module model.layers.7"),
        ({"layers": {"model.norm": [4, 32]}}, "model.norm is a LlamaRMSNorm"),
        ({"layers": {}}, "0 packed layers, but the files hold qweight of 14"),
        ({"layers": {LAYER: [3, 32]}}, rf"{LAYER}\.q\w+ has shape"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    settings = json.loads((saved / "config.json").read_text())
    settings["quantization_config"] |= changes
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_missing_shard_is_refused(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(saved.parent / "shards", max_shard_size="40KB")
    shards = sorted((saved.parent / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    again = AutoModelForCausalLM.from_pretrained(saved.parent / "shards")
    assert torch.equal(outputs(again, tokens()), outputs(model, tokens()))
    shards[1].write_bytes(b"")
    with pytest.raises(ValueError, match=f"{shards[1].name} cannot be read"):
        AutoModelForCausalLM.from_pretrained(saved.parent / "shards")


def test_another_head_finds_the_layers(saved: Path) -> None:
    causal = AutoModelForCausalLM.from_pretrained(saved)
    head = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3)
    theirs = packed_layers(causal)
    for name, layer in packed_layers(head).items():
        assert torch.equal(layer.qweight, theirs[name].qweight)


def test_no_weight_of_a_packed_layer_is_on_disk_or_in_memory(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: set[str] = set()
    start = PackedLinear.__init__

    def spy(self: PackedLinear, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        devices.update(t.device.type for t in self.state_dict().values())

    monkeypatch.setattr(PackedLinear, "__init__", spy)
    gc.collect()
    before = {id(o) for o in gc.get_objects() if issubclass(type(o), Tensor)}
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert devices == {"meta"}  # nothing is allocated before the file is read
    layers = packed_layers(model)
    assert len(layers) == 14
    held = set(load_file(saved / "model.safetensors")) | set(model.state_dict())
    assert not {f"{name}.weight" for name in layers} & held
    shapes = {layer.weight.shape for layer in layers.values()}
    gc.collect()
    alive = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and id(o) not in before]
    wide = [t for t in alive if t.is_floating_point() and t.shape in shapes and not t.is_meta]
    assert not wide
    packed = sum(t.nbytes for layer in layers.values() for t in layer.state_dict().values())
    full = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
    assert packed < full / 6  # 4.625 of 32 bits
