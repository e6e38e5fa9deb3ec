"""Quantised folders against the formula of their sizes, and folders that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from apiq_peft import ApiQConfig
from apiq_peft.evaluation import size_of
from apiq_peft.folder import read_folder
from tests.apiq_peft._models import tiny

WIDTH, INNER, VOCABULARY, RANK = 512, 1024, 64, 16


def save(folder: Path, model: object, config: ApiQConfig) -> None:
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    adapted.save_pretrained(folder / "adapter")
    adapted.unload().save_pretrained(folder / "base")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_disk_holds_what_the_formula_says(tmp_path: Path, bits: int) -> None:
    shape = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
        dtype="float16",
    )
    model = LlamaForCausalLM(shape).half()
    save(tmp_path, model, ApiQConfig(bits=bits, group_size=64, r=RANK))
    stored = read_folder(tmp_path)
    weights = 4 * WIDTH**2 + 3 * WIDTH * INNER
    packed = bits + 16 / 64 + bits / 64
    lora = RANK * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    beside = 16 * (2 * VOCABULARY * WIDTH + 3 * WIDTH)  # embeddings, head, norms
    assert stored.bits_per_weight == pytest.approx(packed)
    assert stored.bits_with_adapters == pytest.approx(packed + 16 * lora / weights)
    assert 8 * stored.base_disk_bytes == pytest.approx(weights * packed + beside, rel=0.02)
    assert 8 * stored.adapter_disk_bytes == pytest.approx(32 * lora, rel=0.02)  # PEFT's float32


def test_layers_are_described_as_the_model_has_them(tmp_path: Path) -> None:
    config = ApiQConfig(
        bits=2,
        group_size=32,
        r=4,
        bits_pattern={"down_proj": 4},
        group_size_pattern={"up_proj": -1},
        rank_pattern={"q_proj": 8},
        scheme="gptq_symmetric",
    )
    save(tmp_path, tiny(), config)
    stored = read_folder(tmp_path)
    found = {layer.layer.removeprefix("model.layers.1."): layer for layer in stored.layers}
    down, up, q = (found[n] for n in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"))
    assert (down.in_features, down.out_features, down.bits, down.group_size) == (128, 64, 4, 32)
    assert (up.in_features, up.out_features, up.bits, up.group_size) == (64, 128, 2, 64)
    assert (down.rank, q.rank) == (4, 8)
    assert stored.scheme == "gptq_symmetric"
    size = size_of(get_peft_model(tiny(), config))
    assert stored.bits_per_weight == pytest.approx(size.bits_per_weight)
    assert stored.bits_with_adapters == pytest.approx(size.bits_with_adapters)


def test_shards_are_one_model(tmp_path: Path) -> None:
    adapted = get_peft_model(tiny(), ApiQConfig(bits=2, group_size=32, r=4))
    bare = adapted.unload()
    bare.save_pretrained(tmp_path / "whole")
    bare.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert read_folder(tmp_path / "parts").layers == read_folder(tmp_path / "whole").layers


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    save(tmp_path, tiny(), ApiQConfig(bits=2, group_size=32, r=4))
    base = tmp_path / "base"
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.qzeros"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"no model\.layers\.0\.mlp\.up_proj\.qzeros"):
        read_folder(tmp_path)
    tensors["model.layers.0.mlp.up_proj.qzeros"] = torch.zeros(2, 2, dtype=torch.int64)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.qzeros is I64"):
        read_folder(tmp_path)

    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format 99"):
        read_folder(tmp_path)
    for text in ("{", "[]", "\udcff"):
        (base / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match="is no configuration of a model"):
            read_folder(tmp_path)
    (base / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        read_folder(tmp_path)
