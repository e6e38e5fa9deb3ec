"""Quantising a folder block by block: the same files as in memory, with one block in memory."""

from __future__ import annotations

import errno
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from apiq_peft import ApiQConfig, assembly, preset, quantize
from apiq_peft.calibration import block, progress_files, streaming
from apiq_peft.quantize import quantize_folder
from tests.apiq_peft._models import outputs, tiny, tokens

SETTINGS = preset("best", epochs=1, batch_size=2)


def config(**changes: Any) -> ApiQConfig:
    return ApiQConfig(**{"bits": 2, "group_size": 32, "r": 4, "lora_alpha": 8, **changes})


def saved(kind: str, folder: Path) -> Path:
    """Save a tiny model in several files; a mixture of experts is saved under other names."""
    if kind == "mixtral":
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
        torch.manual_seed(0)
        model: Any = MixtralForCausalLM(MixtralConfig(vocab_size=96, **sizes, **heads))
    else:
        model = tiny(kind)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def held(folder: Path) -> dict[str, Tensor]:
    """Give all tensors of a folder."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def in_memory(
    source: Path, out: Path, auto_class: Any, dtype: Any = "auto", **changes: Any
) -> None:
    model = auto_class.from_pretrained(source, dtype=dtype)
    found, _ = quantize(model, tokens(4), config(**changes), SETTINGS, show_progress=False)
    found.save_pretrained(str(out / "adapter"))
    found.unload().save_pretrained(out / "base")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mixtral", "t5"])
def test_the_files_are_those_of_a_model_in_memory(kind: str, tmp_path: Path) -> None:
    auto_class = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    source, out = saved(kind, tmp_path / "source"), tmp_path / "out"
    assert len(list(source.glob("*.safetensors"))) > 1
    changes = {"target_modules": ["q_proj", "o_proj"]} if kind == "mixtral" else {}
    in_memory(source, tmp_path / "memory", auto_class, **changes)
    run = (source, out, tokens(4), config(**changes), SETTINGS)
    reports = quantize_folder(*run, auto_class=auto_class, show_progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "base"]
    assert all(report.error_after < report.error_before for report in reports)
    for part in ("base", "adapter"):
        wanted, found = held(tmp_path / "memory" / part), held(out / part)
        assert found.keys() == wanted.keys()
        assert all(
            torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in wanted.items()
        )
        name = "config.json" if part == "base" else "adapter_config.json"
        texts = (json.loads((f / part / name).read_text()) for f in (tmp_path / "memory", out))
        first, second = ({**t, "base_model_name_or_path": ""} for t in texts)
        for t in (first, second):
            t["target_modules"] = sorted(t.get("target_modules", []))
        assert first == second
    index = json.loads((out / "base" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == held(out / "base").keys()

    def load(folder: Path) -> Tensor:
        base = auto_class.from_pretrained(folder / "base")
        return outputs(PeftModel.from_pretrained(base, str(folder / "adapter")).eval(), tokens(2))

    assert torch.equal(load(out), load(tmp_path / "memory"))


def run(source: Path, out: Path, **options: Any) -> Any:
    settings, changes = options.pop("settings", SETTINGS), options.pop("adapter", {})
    return quantize_folder(
        source, out, tokens(4), config(**changes), settings, show_progress=False, **options
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"], "lora_bias": True},
        {"modules_to_save": ["input_layernorm"], "bias": "all"},
        {"task_type": "SEQ_CLS"},
    ],
)
def test_what_an_adapter_holds_beside_its_factors_is_written(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto_class = AutoModelForCausalLM
    if "task_type" in changes:
        auto_class = AutoModelForSequenceClassification
    torch.manual_seed(0)
    source = tmp_path / "source"
    auto_class.from_config(tiny("qwen2").config).save_pretrained(source)
    monkeypatch.setitem(globals(), "SETTINGS", preset("fast"))
    in_memory(source, tmp_path / "memory", auto_class, torch.bfloat16, **changes)
    run(source, tmp_path / "out", adapter=changes, auto_class=auto_class, dtype=torch.bfloat16)
    wanted, found = (held(tmp_path / part / "adapter") for part in ("memory", "out"))
    assert found.keys() == wanted.keys()
    assert len(found) > 28  # A and B of two blocks
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


def test_an_adapter_that_needs_the_whole_model_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainable_token_indices is \[1\].*quantize"):
        run(tmp_path, tmp_path / "out", adapter={"trainable_token_indices": [1]})
    assert not (tmp_path / "out").exists()


def killed_at(where: str) -> Any:
    fit = block.fit

    def killed(name: str, *rest: Any) -> list[float]:
        if name == where:
            raise KeyboardInterrupt
        return fit(name, *rest)

    return killed


def test_a_dtype_can_be_chosen_and_is_that_of_the_folder_if_not(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    for dtype, chosen in ((torch.bfloat16, True), (torch.float32, False)):
        memory, out = tmp_path / f"memory-{dtype}", tmp_path / f"{dtype}"
        in_memory(source, memory, AutoModelForCausalLM, dtype)
        run(source, out, dtype=dtype if chosen else None)
        for part in ("base", "adapter"):
            wanted, found = held(memory / part), held(out / part)
            assert all(torch.equal(found[n], t) for n, t in wanted.items())
        assert json.loads((out / "base" / "config.json").read_text())["dtype"] in str(dtype)
        floats = {t.dtype for n, t in held(out / "base").items() if "norm" in n}
        assert floats == {dtype}


def test_a_run_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = saved("gpt2", tmp_path / "source"), tmp_path / "out"
    run(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(block, "fit", killed_at("transformer.h.1"))
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert [path.name for path in out.iterdir()] == ["blocks"]
    real = os.replace

    def killed(first: Any, second: Any) -> None:
        if Path(second).name == "base":
            raise KeyboardInterrupt
        real(first, second)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "blocks"]
    assert [report.resumed for report in run(source, out)] == [True, True]
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "base"]
    for part in ("base", "adapter"):
        wanted, found = held(tmp_path / "whole" / part), held(out / part)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[n], t) for n, t in wanted.items())
    with pytest.raises(ValueError, match="base exists; choose a new folder"):
        run(source, out)


def live_bytes() -> int:
    """Give the bytes of the tensors in memory that are younger than the last `gc.freeze`."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_of(depth: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Give the most bytes of tensors while a model of some depth is quantised and written."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=depth, **sizes))
    model.save_pretrained(folder / "source", max_shard_size="100KB")
    del model
    seen = []

    def watched(patch: pytest.MonkeyPatch, module: Any, name: str, every: int) -> None:
        real, calls = getattr(module, name), [0]

        def watch(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] % every == 0:
                seen.append(live_bytes())
            return real(*args)

        patch.setattr(module, name, watch)

    with monkeypatch.context() as patch:
        watched(patch, block, "groups_of", 1)
        watched(patch, streaming, "write_whole", 4)
        watched(patch, assembly, "read_part", 2 * depth)
        gc.collect()
        gc.freeze()
        try:
            run(folder / "source", folder / "out", settings=preset("fast"))
        finally:
            gc.unfreeze()
    assert len(seen) > depth
    return max(seen)


def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {n: peak_of(n, tmp_path / f"{n}", monkeypatch) for n in (4, 8, 16)}
    of_a_block = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    assert peaks[4] > of_a_block  # it sees them
    assert peaks[16] - peaks[4] < of_a_block / 10


def test_tokenizer_and_generation_settings_are_kept(tmp_path: Path) -> None:
    source, out = saved("llama", tmp_path / "source"), tmp_path / "out"
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "notes.txt").write_text("not of the model")
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "max_length": 77}))
    run(source, out, settings=preset("fast"))
    names = {path.name for path in (out / "base").iterdir()}
    assert {"tokenizer.json", "tokenizer.model", "config.json"} < names
    assert "notes.txt" not in names
    assert json.loads((out / "base" / "generation_config.json").read_text())["max_length"] == 77


def damaged(folder: Path, damage: str) -> None:
    settings = json.loads((folder / "config.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    held_by = {n: path for path in shards for n in load_file(path)}
    norm = "model.layers.1.input_layernorm.weight"
    if damage == "renamed":
        path = held_by[norm]
        tensors = load_file(path)
        tensors["model.layers.1.some_norm.weight"] = tensors.pop(norm)
        save_file(tensors, path, {"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.layers.1.some_norm.weight"] = index["weight_map"].pop(norm)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "shape":
        settings["intermediate_size"] = 64
    elif damage == "shard":
        held_by[norm].unlink()
    elif damage == "head":
        settings["tie_word_embeddings"] = False
        path = held_by["lm_head.weight"]
        save_file({n: t for n, t in load_file(path).items() if n != "lm_head.weight"}, path)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"]["lm_head.weight"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "quantised":
        settings["quantization_config"] = {"quant_method": "apiq"}
    else:
        for path in (*shards, folder / "model.safetensors.index.json"):
            path.unlink()
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("renamed", r"no model\.layers\.1\.input_layernorm\.weight .* has .*some_norm.*lacks"),
        ("head", r"no lm_head\.weight for the model"),
        ("shape", r"does not fit its config\.json: model\.layers\.0\.mlp.* has shape"),
        ("shard", "cannot be read"),
        ("quantised", "is quantised already"),
        ("empty", r"no model\.safetensors or model\.safetensors\.index\.json"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(damage: str, message: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    damaged(source, damage)
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", settings=preset("fast"))
    assert not (tmp_path / "out" / "base").exists()


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = saved("llama", tmp_path / "source"), tmp_path / "out"
    real = progress_files.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if "layers.1" in path.name:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(progress_files, "save_file", full)
    with pytest.raises(
        OSError, match=r"layers\.1\.safetensors cannot be written.*make room"
    ) as held_up:
        run(source, out)
    assert held_up.value.errno == errno.ENOSPC
    assert (out / "blocks" / "model.layers.0.safetensors").exists()
    assert not list(out.rglob("*.part"))
    assert not list(out.rglob("*layers.1*"))
    monkeypatch.setattr(progress_files, "save_file", real)
    assert [report.resumed for report in run(source, out)] == [True, False]
