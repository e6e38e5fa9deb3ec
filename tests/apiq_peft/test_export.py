"""Exports: a full-precision pair for plain PEFT, and a GPTQ pair; what they refuse and leave."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from apiq_peft import ApiQConfig, preset, quantize
from apiq_peft.checkpoint import packed_layers
from apiq_peft.export import export_gptq, export_plain
from apiq_peft.gptq import load_gptq
from apiq_peft.quantizer import SCHEMES
from kernels_peft.packing import FORMATS, unpack
from tests.apiq_peft._models import error, outputs, tiny, tokens

BITS = list(FORMATS)

# reads an exported pair as anyone would, and writes its logits; for a process of its own
ANYONE = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
pair, ids, found = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(pair + "/base")
model = PeftModel.from_pretrained(model, pair + "/adapter").eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=load_file(ids)["ids"]).logits}, found)
assert not {"apiq_peft", "kernels_peft"} & set(sys.modules)
"""


def adapted(kind: str = "llama", **changes: Any) -> Any:
    """Give a model of packed layers whose LoRA is not the identity."""
    settings = {"bits": 2, "group_size": 32, "r": 4, "lora_alpha": 8, **changes}
    model = get_peft_model(tiny(kind), ApiQConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def read_by_anyone(pair: Path, folder: Path) -> Tensor:
    from safetensors.torch import save_file

    save_file({"ids": tokens()}, folder / "ids.safetensors")
    arguments = (str(pair), str(folder / "ids.safetensors"), str(folder / "logits.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", ANYONE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "logits.safetensors")["logits"]


def settings_of(pair: Path) -> dict[str, Any]:
    return json.loads((pair / "base" / "config.json").read_text())["quantization_config"]


# ---- plain --------------------------------------------------------------------------------------


def test_the_plain_pair_gives_the_same_logits_without_this_library(tmp_path: Path) -> None:
    model = adapted()
    wanted = outputs(model, tokens())
    export_plain(model, tmp_path / "pair", torch.float32)
    assert error(read_by_anyone(tmp_path / "pair", tmp_path), wanted) < 1e-6


@pytest.mark.parametrize("way", ["in memory", "loaded", "calibrated"])
def test_layers_that_were_conv1d_are_again(tmp_path: Path, way: str) -> None:
    if way == "calibrated":
        config = ApiQConfig(bits=4, group_size=32, r=4)
        model = quantize(tiny("gpt2"), tokens(), config, preset("fast"), show_progress=False)[0]
        model.eval()
    else:
        model = adapted("gpt2", bits=4)
    wanted = outputs(model, tokens())
    if way == "loaded":
        model.save_pretrained(tmp_path / "adapter")
        model.unload().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    export_plain(model, tmp_path / "pair", torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fan_in_fan_out")  # if it does not fit the base
        plain = PeftModel.from_pretrained(base, str(tmp_path / "pair" / "adapter")).eval()
    assert error(outputs(plain, tokens()), wanted) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "t5"])
@pytest.mark.parametrize("export", [export_plain, export_gptq])
def test_exporting_leaves_the_model_as_it_is(tmp_path: Path, kind: str, export: Any) -> None:
    model = adapted(kind)
    before = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    wanted = outputs(model, tokens())
    quantization = model.config.quantization_config
    export(model, tmp_path / "pair")
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name] is tensor  # not even a copy
        assert torch.equal(after[name], value)
    assert model.config.quantization_config is quantization
    assert model.get_base_model().is_quantized
    assert torch.equal(outputs(model, tokens()), wanted)


def test_the_dtype_is_that_of_the_base(tmp_path: Path) -> None:
    export_plain(adapted(), tmp_path / "pair", torch.bfloat16)
    state = load_file(tmp_path / "pair" / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert not any("lora_" in name or "base_layer" in name for name in state)
    config = json.loads((tmp_path / "pair" / "base" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, **heads, tie_word_embeddings=True))
    packed = get_peft_model(model, ApiQConfig(bits=4, group_size=32, r=4)).unload().eval()
    wanted = outputs(packed, tokens())
    export_plain(packed, tmp_path / "plain", torch.float32)
    export_gptq(packed, tmp_path / "gptq", dtype=torch.float32)
    for pair in ("plain", "gptq"):
        assert not (tmp_path / pair / "adapter").exists()  # the model had none
        state = load_file(tmp_path / pair / "base" / "model.safetensors")
        assert ("lm_head.weight" in state) + ("model.embed_tokens.weight" in state) == 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain" / "base")
    assert error(outputs(plain, tokens()), wanted) < 1e-6
    assert torch.equal(outputs(load_gptq(tmp_path / "gptq" / "base"), tokens()), wanted)


# ---- GPTQ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("scheme", "name"),
    [(scheme, "gptq_v2") for scheme in SCHEMES] + [("gptq_symmetric", "gptq")],
)
def test_what_is_written_is_read_to_the_code(
    tmp_path: Path, bits: int, scheme: str, name: str
) -> None:
    model = adapted(bits=bits, scheme=scheme)
    with model.disable_adapter():
        wanted = outputs(model, tokens())
    layers = packed_layers(model.get_base_model())
    export_gptq(model, tmp_path / "pair", name, torch.float32)
    settings = settings_of(tmp_path / "pair")
    assert settings["sym"] == (scheme == "gptq_symmetric")  # readers of sym ignore zero points
    assert (settings["quant_method"], settings["checkpoint_format"]) == ("gptq", name)
    assert (settings["bits"], settings["group_size"], settings["desc_act"]) == (bits, 32, False)
    state = load_file(tmp_path / "pair" / "base" / "model.safetensors")
    for key, layer in layers.items():
        K, N = layer.in_features, layer.out_features
        assert f"{key}.weight" not in state
        assert torch.equal(state[f"{key}.qweight"], layer.qweight)
        assert torch.equal(state[f"{key}.g_idx"], (torch.arange(K) // 32).to(torch.int32))
        assert state[f"{key}.scales"].dtype == torch.float16
        stored = unpack(state[f"{key}.qzeros"], bits, dim=1).long() + (name == "gptq")
        assert torch.equal(stored, layer.codes().zeros.t().long())
        assert stored.shape == (K // 32, N)
    loaded = load_gptq(tmp_path / "pair" / "base")
    assert torch.equal(outputs(loaded, tokens()), wanted)
    assert loaded.config.quantization_config.scheme == scheme


def test_the_adapter_belongs_to_the_gptq_base(tmp_path: Path) -> None:
    model = adapted("qwen2", bits=3)
    wanted = outputs(model, tokens())
    export_gptq(model, tmp_path / "pair", dtype=torch.float32)
    base, place = load_gptq(tmp_path / "pair" / "base"), str(tmp_path / "pair" / "adapter")
    own = ApiQConfig.of(LoraConfig.from_pretrained(place))
    again = PeftModel.from_pretrained(base, place, config=own)
    config = json.loads((tmp_path / "pair" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "pair" / "base")
    assert error(outputs(again.eval(), tokens()), wanted) < 1e-6


def test_layers_that_differ_or_are_not_packed_are_exceptions(tmp_path: Path) -> None:
    model = adapted(
        target_modules=["q_proj", "up_proj", "down_proj"],
        bits_pattern={r"1\.mlp.down_proj": 4},
        group_size_pattern={"up_proj": 64},
    )
    with model.disable_adapter():
        wanted = outputs(model, tokens())
    export_gptq(model, tmp_path / "pair", dtype=torch.float32)
    settings = settings_of(tmp_path / "pair")
    rules = settings["dynamic"]
    wide = r"+:^model\.layers\.1\.mlp\.down_proj$"
    assert rules[wide] == {"bits": 4, "group_size": 32}
    left_out = {key for key in rules if key.startswith("-:")}
    assert {key.rpartition(".")[2] for key in left_out} == {
        "k_proj$",
        "v_proj$",
        "o_proj$",
        "gate_proj$",
    }
    assert settings["block_name_to_quantize"] == "model.layers"
    (names,) = settings["modules_in_block_to_quantize"]
    assert set(names) == set(packed_layers(model.get_base_model()))
    assert torch.equal(outputs(load_gptq(tmp_path / "pair" / "base"), tokens()), wanted)


def test_a_whole_row_is_one_group_in_every_layer(tmp_path: Path) -> None:
    model = adapted(group_size=-1)
    with model.disable_adapter():
        wanted = outputs(model, tokens())
    export_gptq(model, tmp_path / "pair", dtype=torch.float32)
    settings = settings_of(tmp_path / "pair")
    assert (settings["group_size"], settings["dynamic"]) == (-1, None)
    assert torch.equal(outputs(load_gptq(tmp_path / "pair" / "base"), tokens()), wanted)


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["asymmetric", "apiq_symmetric"])
def test_format_1_is_refused_where_readers_would_get_it_wrong(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(ValueError, match=r"is for the scheme 'gptq_symmetric'.*'gptq_v2'"):
        export_gptq(adapted(scheme=scheme), tmp_path / "pair", "gptq")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ValueError, match="is 'odd'; choose from gptq, gptq_v2"):
        export_gptq(model, tmp_path / "pair", "odd")
    with pytest.raises(ValueError, match="no packed layers"):
        export_gptq(tiny(), tmp_path / "pair")
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] = 1e6
    for export in (export_plain, export_gptq):
        with pytest.raises(ValueError, match=r"model\.norm\.weight has values that torch\.float16"):
            export(model, tmp_path / "pair")
        with pytest.raises(ValueError, match="'second' is no ApiQ adapter"):
            export(model, tmp_path / "pair", adapter_name="second")
    assert not list(tmp_path.iterdir())
    (tmp_path / "pair").mkdir()
    with pytest.raises(ValueError, match="exists; choose a new folder"):
        export_plain(model, tmp_path / "pair")


# ---- GPTQModel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("scheme", "name"),
    [(scheme, "gptq_v2") for scheme in SCHEMES] + [("gptq_symmetric", "gptq")],
)
def test_gptqmodel_reads_what_is_written(tmp_path: Path, bits: int, scheme: str, name: str) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    model = adapted(bits=bits, scheme=scheme)
    export_gptq(model, tmp_path / "pair", name)
    settings = QuantizeConfig.from_pretrained(str(tmp_path / "pair" / "base"))
    state = load_file(tmp_path / "pair" / "base" / "model.safetensors")
    for key, layer in packed_layers(model.get_base_model()).items():
        theirs = TorchLinear(
            bits=settings.bits,
            group_size=settings.group_size,
            sym=settings.sym,
            desc_act=settings.desc_act,
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=False,
        )
        own = {n.rpartition(".")[2]: t for n, t in state.items() if n.startswith(f"{key}.")}
        theirs.load_state_dict(own)
        if settings.format == "gptq":
            convert_gptq_v1_to_v2_format_module(theirs, bits, torch.int32)
        theirs.post_init()
        assert torch.equal(theirs.dequantize_weight(), layer.dequantize(torch.float16).t())


def test_transformers_reads_the_gptq_pair_without_this_library(tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    model = adapted(target_modules=["q_proj", "v_proj", "up_proj"])
    wanted = outputs(model, tokens())
    export_gptq(model, tmp_path / "pair", dtype=torch.float32)
    assert error(read_by_anyone(tmp_path / "pair", tmp_path), wanted) < 1e-3
