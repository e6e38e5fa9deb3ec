"""GPTQ checkpoints: the words of zero points, reading what others wrote, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from apiq_peft import ApiQConfig, PackedLinear
from apiq_peft.checkpoint import packed_layers
from apiq_peft.gptq import load_gptq, shift_zeros
from kernels_peft.packing import FORMATS, pack, unpack
from road_peft import RoadConfig
from tests.apiq_peft._models import outputs, tiny, tokens

BITS = list(FORMATS)


def words(*values: int) -> Tensor:
    """Give 32-bit words as GPTQ has them, signed."""
    return torch.tensor([v - (1 << 32) if v >> 31 else v for v in values], dtype=torch.int32)


def written(folder: Path, kind: str = "llama", **changes: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Write a checkpoint with plain arithmetic, as another program would.

    Gives the codes (K, N) and zero points (G, N) of every layer. `changes` go to config.json.
    """
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
        **changes,
    }
    model, bits = tiny(kind), settings["bits"]
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    held = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        K, N = module.in_features, module.out_features
        g = K if settings["group_size"] == -1 else settings["group_size"]
        codes = torch.randint(0, 2**bits, (K, N))
        low = 1 if settings["checkpoint_format"] == "gptq" else 0
        zeros = torch.randint(low, 2**bits, (K // g, N))
        if settings["sym"]:
            zeros.fill_(2 ** (bits - 1))
        del state[f"{name}.weight"]
        state[f"{name}.qweight"] = stream(codes, bits)
        state[f"{name}.qzeros"] = stream((zeros - low).t(), bits).t().contiguous()
        state[f"{name}.scales"] = (torch.rand(K // g, N) / 16 + 0.01).half()
        state[f"{name}.g_idx"] = (torch.arange(K) // g).to(torch.int32)
        held[name] = (codes, zeros)
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = settings
    model.config.save_pretrained(folder)
    return held


def stream(codes: Tensor, bits: int) -> Tensor:
    """Pack along the first dimension with whole numbers of Python, one column after the other."""
    columns = []
    for column in codes.t().tolist():
        number = sum(code << (bits * k) for k, code in enumerate(column))
        count = len(column) * bits // 32
        columns.append(words(*(number >> (32 * w) & 0xFFFFFFFF for w in range(count))))
    return torch.stack(columns, 1)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(state)
    save_file(state, file, {"format": "pt"})


# ---- words --------------------------------------------------------------------------------------

GOLDEN = {
    2: (0xE4E4E4E4, 0xE4E4E4E4),
    3: (0x88FAC688, 0xC688FAC6, 0xFAC688FA),
    4: (0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98),
}
CONSTANT = {
    2: (0xAAAAAAAA,) * 2,
    3: (0x24924924, 0x49249249, 0x92492492),
    4: (0x88888888,) * 4,
}


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_in_words_as_gptq_has_them(bits: int) -> None:
    codes = torch.arange(32).view(32, 1) % 2**bits
    assert torch.equal(pack(codes, bits)[:, 0], words(*GOLDEN[bits]))
    assert torch.equal(stream(codes, bits)[:, 0], words(*GOLDEN[bits]))  # the tests' own
    middle = torch.full((1, 32), 2 ** (bits - 1))
    assert torch.equal(pack(middle, bits, dim=1)[0], words(*CONSTANT[bits]))


def test_a_zero_point_of_0_borrows_from_its_neighbours_where_words_are_added_to() -> None:
    second = words(0xE4E4E4E4).view(1, 1)  # 0, 1, 2, 3 again and again
    first = shift_zeros(second, 2, -1)
    assert torch.equal(first, words(0x8F8F8F8F).view(1, 1))
    assert torch.equal(shift_zeros(first, 2, 1), second)


@pytest.mark.parametrize("bits", BITS)
def test_formats_convert_into_each_other(bits: int) -> None:
    zeros = torch.randint(0, 2**bits, (7, 96))
    second = pack(zeros, bits, dim=1)
    first = shift_zeros(second, bits, -1)
    assert torch.equal(shift_zeros(first, bits, 1), second)
    larger = pack(zeros.clamp(min=1), bits, dim=1)
    less_one = unpack(shift_zeros(larger, bits, -1), bits, dim=1)
    assert torch.equal(less_one.long(), zeros.clamp(min=1) - 1)


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("name", "symmetric", "group_size"),
    [("gptq_v2", False, 32), ("gptq_v2", True, -1), ("gptq", True, 64), ("gptq", False, 32)],
)
def test_what_another_program_wrote_is_read_to_the_code(
    tmp_path: Path, bits: int, name: str, symmetric: bool, group_size: int
) -> None:
    place = tmp_path / "model"
    held = written(place, bits=bits, checkpoint_format=name, sym=symmetric, group_size=group_size)
    model = load_gptq(place)
    layers = packed_layers(model)
    assert layers.keys() == held.keys()
    state = load_file(place / "model.safetensors")
    for key, (codes, zeros) in held.items():
        found, layer = layers[key].codes(), layers[key]
        assert torch.equal(found.codes.long(), codes.t())
        assert torch.equal(found.zeros.long(), zeros.t())
        assert torch.equal(layer.scales, state[f"{key}.scales"])
        wide = state[f"{key}.scales"].float().repeat_interleave(layer.group_size, 0)
        offset = zeros.repeat_interleave(layer.group_size, 0)
        assert torch.equal(layer.weight, ((codes - offset) * wide).t())
    scheme = "gptq_symmetric" if symmetric else "asymmetric"
    assert model.config.quantization_config.scheme == scheme
    # every other tensor is the file's
    kept = {n: t for n, t in model.state_dict().items() if n in state and "qzeros" not in n}
    assert all(torch.equal(tensor, state[key]) for key, tensor in kept.items())
    assert any("norm" in key for key in kept)


def test_a_model_of_biases_and_shards_is_read(tmp_path: Path) -> None:
    written(tmp_path / "a", "qwen2")
    whole = load_gptq(tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    assert whole.model.layers[0].self_attn.q_proj.bias is not None
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    (tmp_path / "a" / "model.safetensors").unlink()
    place: dict[str, str] = {}
    for i, part in enumerate(parts):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        save_file(part, tmp_path / "a" / name, {"format": "pt"})
        place |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": place}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(outputs(load_gptq(tmp_path / "a"), tokens()), outputs(whole, tokens()))


def test_exceptions_by_pattern_are_read(tmp_path: Path) -> None:
    place = tmp_path / "model"
    written(place, bits=2)
    name = "model.layers.1.mlp.up_proj"
    codes, zeros = torch.randint(0, 16, (64, 128)), torch.randint(0, 16, (1, 128))

    def wider(state: dict[str, Tensor]) -> None:
        state[f"{name}.qweight"] = stream(codes, 4)
        state[f"{name}.qzeros"] = stream(zeros.t(), 4).t().contiguous()
        state[f"{name}.scales"] = torch.rand(1, 128).half()
        state[f"{name}.g_idx"] = torch.zeros(64, dtype=torch.int32)

    change(place, wider)
    settings = json.loads((place / "config.json").read_text())
    rule = {r"+:.*\.1\..*up_proj$": {"bits": 4, "group_size": -1}}
    settings["quantization_config"]["dynamic"] = rule
    (place / "config.json").write_text(json.dumps(settings))
    layers = packed_layers(load_gptq(place))
    assert torch.equal(layers[name].codes().codes.long(), codes.t())
    assert {layer.bits for key, layer in layers.items() if key != name} == {2}


def test_zero_points_of_0_in_format_1_are_read_from_gptqmodel_alone(tmp_path: Path) -> None:
    place = tmp_path / "model"
    held = written(place, bits=2)  # with zero points of 0, in format 2

    def to_first(state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            if key.endswith("qzeros"):
                state[key] = shift_zeros(tensor, 2, -1)

    change(place, to_first)
    text = (place / "config.json").read_text().replace('"gptq_v2"', '"gptq"')
    (place / "config.json").write_text(text)
    with pytest.raises(ValueError, match="zero points of 0 in format 1"):
        load_gptq(place)
    settings = json.loads(text)
    settings["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:0.8.9"]}
    (place / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"does not name GPTQModel 0\.9 or later"):
        load_gptq(place)
    settings["quantization_config"]["meta"] = {"quantizer": ["optimum:2.0", "gptqmodel:5.6.12"]}
    (place / "config.json").write_text(json.dumps(settings))
    layers = packed_layers(load_gptq(place))
    for key, (_, zeros) in held.items():
        assert torch.equal(layers[key].codes().zeros.long(), zeros.t())


def test_zero_points_below_the_middle_are_the_published_codes_scheme(tmp_path: Path) -> None:
    written(tmp_path / "model", bits=3)

    def lower(state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            if key.endswith("qzeros"):
                G, N = tensor.shape[0], tensor.shape[1] * 32 // 3
                state[key] = pack(torch.full((G, N), 3), 3, dim=1)

    change(tmp_path / "model", lower)
    model = load_gptq(tmp_path / "model")
    assert model.config.quantization_config.scheme == "apiq_symmetric"


def test_a_model_that_was_read_is_trained_and_saved_as_ours(tmp_path: Path) -> None:
    written(tmp_path / "theirs", bits=3)
    model = load_gptq(tmp_path / "theirs", dtype=torch.float32)
    assert model.is_quantized
    bare = outputs(model, tokens())
    grid: Any = {"bits": 3, "group_size": 32, "scheme": model.config.quantization_config.scheme}
    adapted = get_peft_model(model, ApiQConfig(**grid, r=4, target_modules=["q_proj", "up_proj"]))
    adapted.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    moved = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert moved
    assert all("lora_" in name for name in moved)
    layers = packed_layers(adapted.get_base_model())
    assert {layer.bits for layer in layers.values()} == {3}  # not quantised again
    again = adapted.unload().eval()
    again.save_pretrained(tmp_path / "ours")
    assert not any(n.endswith("g_idx") for n in load_file(tmp_path / "ours/model.safetensors"))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(outputs(ours, tokens()), bare)


def test_road_adapts_a_model_that_was_read(tmp_path: Path) -> None:
    written(tmp_path / "model")
    model = load_gptq(tmp_path / "model")
    before = outputs(model, tokens())
    adapted = get_peft_model(model, RoadConfig(target_modules=["q_proj", "down_proj"]))
    assert torch.equal(outputs(adapted.eval(), tokens()), before)
    adapted.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert any(p.grad is not None for n, p in adapted.named_parameters() if "road_" in n)


def test_biases_of_zeros_where_the_model_has_none_are_dropped(tmp_path: Path) -> None:
    place = tmp_path / "model"
    written(place)
    name = "model.layers.0.self_attn.q_proj.bias"
    change(place, lambda state: state.update({name: torch.zeros(64)}))
    assert load_gptq(place).model.layers[0].self_attn.q_proj.bias is None
    change(place, lambda state: state.update({name: torch.ones(64)}))
    with pytest.raises(ValueError, match=r"too many \['model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_gptq(place)


# ---- refused ------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq'; only 'gptq'"),
        ({"checkpoint_format": "gptq_p"}, "format 'gptq_p'"),
        ({"checkpoint_format": "gptq", "is_marlin_format": True}, "for Marlin"),
        ({"bits": 8}, "bits is 8; choose from 2, 3, 4"),
        ({"bits": "4"}, "gives it '4' bits"),
        ({"bits": 2}, r"qweight is for 64 outputs, but .* qzeros \(4, 8\)"),
        ({"group_size": 64}, "4 groups of 32 inputs, but config.json says that groups have 64"),
        ({"dynamic": {"-:.*up_proj": {}}}, "leaves it out"),
        ({"dynamic": {"+:(": {}}}, "no pattern"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    place = tmp_path / "model"
    written(place)
    settings = json.loads((place / "config.json").read_text())
    settings["quantization_config"] |= changes
    (place / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        load_gptq(place)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a tensor is missing": (
        lambda s: s.pop(f"{LAYER}.scales"),
        f"{LAYER}: the file lacks .*scales",
    ),
    "a norm is missing": (lambda s: s.pop("model.norm.weight"), r"missing are \['model\.norm"),
    "a tensor too many": (
        lambda s: s.update(extra=torch.ones(1)),
        r"missing are none, too many \['extra'\]",
    ),
    "fewer rows": (lambda s: cut(s, "qweight"), "qweight is|must be"),
    "fewer groups": (lambda s: cut(s, "scales"), "scales is"),
    "another dtype": (lambda s: cast(s, "qweight", torch.int64), "matrix of int32"),
    "scales not finite": (lambda s: s[f"{LAYER}.scales"].fill_(float("nan")), "not finite"),
    "scales too wide": (
        lambda s: s.update({f"{LAYER}.scales": torch.full((2, 128), 0.1)}),
        "float32 and has values that torch.float16 cannot hold",
    ),
    "order of activations": (
        lambda s: s.update({f"{LAYER}.g_idx": s[f"{LAYER}.g_idx"].flip(0).contiguous()}),
        "desc_act",
    ),
    "another layer's width": (
        lambda s: [s.update({f"{LAYER}.{k}": t}) for k, t in narrow(s).items()],
        f"{LAYER}.* has shape .* they must be",
    ),
    "no such module": (
        lambda s: [s.update({f"other.{k}": t}) for k, t in narrow(s).items()],
        "no module other",
    ),
}


def cut(state: dict[str, Tensor], kind: str) -> None:
    state[f"{LAYER}.{kind}"] = state[f"{LAYER}.{kind}"][:1].clone()


def cast(state: dict[str, Tensor], kind: str, dtype: torch.dtype) -> None:
    state[f"{LAYER}.{kind}"] = state[f"{LAYER}.{kind}"].to(dtype)


def narrow(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a layer of 64 outputs, whole in themselves."""
    source = "model.layers.1.self_attn.q_proj"
    kinds = ("qweight", "qzeros", "scales", "g_idx")
    return {kind: state[f"{source}.{kind}"].clone() for kind in kinds}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_tensors_are_refused(tmp_path: Path, damage: str) -> None:
    edit, message = DAMAGES[damage]
    written(tmp_path / "model")
    change(tmp_path / "model", edit)
    with pytest.raises(ValueError, match=message):
        load_gptq(tmp_path / "model")


@pytest.mark.parametrize("size", [0, 7, -100])
def test_a_file_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    written(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_gptq(tmp_path / "model")


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_gptq(tmp_path)
    tiny().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="quant_method None"):
        load_gptq(tmp_path / "plain")
    written(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_gptq(tmp_path / "old")
    index = {"weight_map": {"x": "../model.safetensors"}}
    (tmp_path / "old" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside of its folder"):
        load_gptq(tmp_path / "old")


# ---- GPTQModel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptqmodel_packs_what_we_read(bits: int, symmetric: bool) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    linear = nn.Linear(96, 64)
    zeros = torch.randint(0, 2**bits, (64, 3))
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    scales = (torch.rand(64, 3) / 8 + 0.01).half().float()
    theirs = TorchLinear(
        bits=bits,
        group_size=32,
        sym=symmetric,
        desc_act=False,
        in_features=96,
        out_features=64,
        bias=True,
    )
    theirs.pack(linear, scales, zeros.float(), torch.arange(96, dtype=torch.int32) // 32)
    theirs.post_init()
    ours = PackedLinear(96, 64, bits, 32, bias=True)
    ours.load_state_dict({n: t for n, t in theirs.state_dict().items() if n != "g_idx"})
    assert torch.equal(ours.codes().zeros.long(), zeros)
    assert torch.equal(ours.dequantize(torch.float16).t(), theirs.dequantize_weight())
