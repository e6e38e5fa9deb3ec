"""ApiQ as a tuner of PEFT: packing, training, saving, loading, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import apiq_peft
from apiq_peft import ApiQConfig, ApiQLinear, PackedLinear
from apiq_peft.export import export_lora
from tests.apiq_peft._models import error, outputs, tiny, tokens


def config(**changes: Any) -> ApiQConfig:
    return ApiQConfig(**{"bits": 4, "group_size": 32, "r": 4, "lora_alpha": 8, **changes})


def adapted(kind: str = "llama", **changes: Any) -> Any:
    """Give a model of packed layers whose LoRA is not the identity."""
    model = get_peft_model(tiny(kind), config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_the_type_is_known_to_peft() -> None:
    assert PeftType.APIQ in list(PeftType)
    assert PeftType("APIQ").value == "APIQ"
    assert isinstance(peft.get_peft_config({"peft_type": "APIQ"}), ApiQConfig)
    apiq_peft.register()  # a second time changes nothing
    assert list(PeftType).count(PeftType.APIQ) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_every_linear_layer_is_packed_in_place(kind: str) -> None:
    model = tiny(kind)
    before = outputs(model, tokens())
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    adapted_model = get_peft_model(model, config()).eval()
    layers = [m for m in adapted_model.modules() if isinstance(m, ApiQLinear)]
    assert layers
    for layer in layers:
        assert isinstance(layer.base_layer, PackedLinear)
        floats = [t for t in layer.base_layer.state_dict().values() if t.is_floating_point()]
        full = layer.in_features * layer.out_features
        assert all(t.numel() < full for t in floats)  # no copy of the weight is left
    assert 0 < error(outputs(adapted_model.get_base_model(), tokens()), before) < 1
    assert weights or kind == "gpt2"


def test_patterns_choose_widths_and_ranks() -> None:
    model = get_peft_model(
        tiny(),
        config(
            bits_pattern={"down_proj": 2},
            group_size_pattern={"o_proj": 64},
            rank_pattern={"v_proj": 2},
        ),
    )
    found = {
        n.rpartition(".")[2]: (m.base_layer.bits, m.base_layer.group_size, m.r["default"])
        for n, m in model.named_modules()
        if isinstance(m, ApiQLinear)
    }
    assert found["down_proj"] == (2, 32, 4)
    assert found["o_proj"] == (4, 64, 4)
    assert found["v_proj"] == (4, 32, 2)
    assert found["q_proj"] == (4, 32, 4)


def test_a_saved_model_comes_back_in_two_steps(tmp_path: Path) -> None:
    model = adapted()
    wanted = outputs(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    bare = model.unload()
    bare.save_pretrained(tmp_path / "base")
    held = load_file(tmp_path / "base" / "model.safetensors")
    assert not any(name.endswith("q_proj.weight") for name in held)
    settings = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "apiq"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base.is_quantized
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(outputs(loaded, tokens()), wanted)
    assert loaded.peft_config["default"].peft_type == PeftType.APIQ


@pytest.mark.parametrize("damage", ["truncated", "shape", "scales", "format"])
def test_a_broken_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    get_peft_model(tiny(), config()).unload().save_pretrained(tmp_path)
    file, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "format":
        settings.write_text(
            settings.read_text().replace('"format_version": 1', '"format_version": 9')
        )
    else:
        held = load_file(file)
        name = next(n for n in held if n.endswith(".scales"))
        held[name] = held[name][:1] if damage == "shape" else held[name] * float("nan")
        save_file(held, file, {"format": "pt"})
    with pytest.raises(
        Exception, match=r"(?i)incomplete|invalid|mismatch|size|finite|must be|format 9"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_merging_is_refused_with_the_way_out() -> None:
    model = adapted()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"apiq_peft\.dequantize"):
            call()
    layer = next(m for m in model.modules() if isinstance(m, ApiQLinear))
    with pytest.raises(ValueError, match="not on the grid"):
        layer.merge()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_dequantising_gives_a_plain_model_that_merges() -> None:
    model = adapted()
    wanted = outputs(model, tokens())
    plain = apiq_peft.dequantize(copy.deepcopy(model).get_base_model(), torch.float32)
    assert not any(isinstance(m, PackedLinear) for m in plain.modules())
    assert not getattr(plain, "is_quantized", False)
    assert not hasattr(plain.config, "quantization_config")
    assert error(outputs(plain, tokens()), wanted) < 1e-6


def test_the_exported_adapter_is_a_plain_lora(tmp_path: Path) -> None:
    model = adapted()
    wanted = outputs(model, tokens())
    export_lora(model, tmp_path / "lora", base_model="somewhere")
    loaded = LoraConfig.from_pretrained(str(tmp_path / "lora"))
    assert loaded.peft_type == PeftType.LORA
    assert "bits" not in json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    plain = apiq_peft.dequantize(model.unload(), torch.float32)
    again = PeftModel.from_pretrained(plain, str(tmp_path / "lora")).eval()
    assert error(outputs(again, tokens()), wanted) < 1e-6
    again.merge_and_unload()
    with pytest.raises(ValueError, match="exists; choose a new folder"):
        export_lora(adapted(), tmp_path / "lora")


def test_several_adapters_share_the_codes(tmp_path: Path) -> None:
    model = adapted()
    first = outputs(model, tokens())
    model.add_adapter("second", config(r=2))
    model.set_adapter("second")
    second = outputs(model, tokens())
    with model.disable_adapter():
        bare = outputs(model, tokens())
    assert torch.equal(second, bare)  # a new LoRA starts at the bare codes
    assert not torch.equal(first, bare)
    mixed = outputs(model, tokens(2))
    with torch.no_grad():
        rows = model(input_ids=tokens(2), adapter_names=["default", "second"]).logits
    assert torch.equal(rows[1], mixed[1])
    learnt = model(input_ids=tokens(2), adapter_names=["default", "second"]).logits
    torch.testing.assert_close(learnt, rows)
    learnt.sum().backward()
    model.set_adapter("default")
    assert torch.equal(outputs(model, tokens()), first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_with_gradient_checkpointing_moves_the_lora_only(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found
        assert all("lora_" in name for name in found)
        return found

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[n], checkpointed[n], atol=1e-6) for n in plain)


def test_the_trainer_takes_the_loss_down(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
    with torch.no_grad():
        before = model(input_ids=tokens(16), labels=tokens(16)).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    with torch.no_grad():
        assert model(input_ids=tokens(16), labels=tokens(16)).loss.item() < 0.9 * before


def test_generation_and_compilation() -> None:
    model = adapted()
    ids = tokens(2)
    found = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(
            compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5
        )


def test_road_rotates_the_outputs_of_packed_layers() -> None:
    from road_peft import RoadConfig

    base = get_peft_model(tiny(), config()).unload()
    before = outputs(base, tokens())
    model = get_peft_model(base, RoadConfig(group_size=32, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(outputs(model.eval(), tokens()), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "road_theta" in name:
                parameter.normal_(0, 0.5)
    assert not torch.equal(outputs(model, tokens()), before)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "road_" in n)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits is 5; choose from 2, 3, 4"),
        ({"scheme": "odd"}, "scheme is 'odd'"),
        ({"group_size": 1}, "group_size is 1"),
        ({"bits_pattern": {"q_proj": 7}}, "bits is 7"),
        ({"use_dora": True}, "use_dora is True; ApiQ trains a plain LoRA"),
        ({"kasa_config": KasaConfig()}, "kasa_config is .*; ApiQ trains a plain LoRA"),
        *(
            ({"init_lora_weights": start}, f"init_lora_weights is '{start}', which needs a base in")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "eva", "lora_ga")
        ),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal"])
def test_a_start_that_leaves_the_base_alone_is_plain_lora(start: Any) -> None:
    model = get_peft_model(tiny(), config(init_lora_weights=start)).eval()
    with model.disable_adapter():
        bare = outputs(model, tokens())
    assert torch.allclose(outputs(model, tokens()), bare, atol=1e-4) == (start is not False)


def test_layers_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"q_proj: group_size 48 does not divide the 64 inputs"):
        get_peft_model(tiny(), config(group_size=48))
    with pytest.raises(ValueError, match=r"embed_tokens: a Embedding cannot be quantised"):
        get_peft_model(tiny(), config(target_modules=["embed_tokens"]))
