"""RoAd on quantised layers: bitsandbytes everywhere, HQQ and torchao where they are installed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

from road_peft import RoadConfig, RoadLinear
from tests.helpers import assert_close, dense_rotation
from tests.road_peft._models import VOCABULARY, adapted, randomize, tiny

IN, MIDDLE, OUT = 64, 128, 64


def _four_bit(compute_dtype: torch.dtype, **kwargs: Any) -> Callable[[int, int], nn.Module]:
    return lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=compute_dtype, **kwargs).to("cpu")


def _eight_bit(threshold: float) -> Callable[[int, int], nn.Module]:
    return lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False, threshold=threshold).to(
        "cpu"
    )


def _hqq(i: int, o: int) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    layer = nn.Linear(i, o).requires_grad_(False)  # else HQQ's copy of the bias is no leaf
    return quantize.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Format:
    """A quantised layer and the dtypes it takes: of its inputs, and the least precise inside."""

    make: Callable[[int, int], nn.Module]
    dtype: torch.dtype
    inside: torch.dtype


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMATS = {
    "nf4": Format(_four_bit(F32, quant_type="nf4"), F32, F32),
    "nf4-single": Format(_four_bit(F32, quant_type="nf4", compress_statistics=False), F32, F32),
    "nf4-bf16": Format(_four_bit(BF16, quant_type="nf4"), BF16, BF16),
    "nf4-mixed": Format(_four_bit(BF16, quant_type="nf4"), F32, BF16),
    "fp4": Format(_four_bit(F32, quant_type="fp4"), F32, F32),
    "int8": Format(_eight_bit(0.0), F32, F16),
    "int8-threshold": Format(_eight_bit(6.0), F32, F16),
    "int8-bf16": Format(_eight_bit(0.0), BF16, BF16),
    "hqq": Format(_hqq, F32, F32),
}
REPACKED = ("nf4", "nf4-single", "nf4-bf16")


class Net(nn.Module):
    """Two quantised layers with a non-linearity between them, and a plain head."""

    def __init__(self, form: Format) -> None:
        super().__init__()
        self.first = form.make(IN, MIDDLE)
        self.second = form.make(MIDDLE, OUT)
        self.head = nn.Linear(OUT, 3, dtype=form.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


class Twin(nn.Module):
    """A dense layer that gives the values of a quantised one and its own gradients."""

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.weight = weight.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        dense = x.float() @ self.weight.T
        with torch.no_grad():
            rounding = self.layer(x) - dense
        return (dense + rounding).to(x.dtype)


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


def _adapted(form: Format, **kwargs: Any) -> PeftModel:
    config = {"target_modules": ["first", "second"], "variant": "road_2", "group_size": 16}
    return randomize(get_peft_model(Net(form), RoadConfig(**config | kwargs)))


def _inputs(form: Format) -> Tensor:
    return torch.randn(5, IN).to(form.dtype)


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).float().square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _layers(model: nn.Module) -> list[RoadLinear]:
    return list(adapted(model))


def _contents(value: Any, path: str = "", inside: tuple[int, ...] = ()) -> dict[str, Any]:
    """Give every tensor and number under the attributes of a layer, by path."""
    if isinstance(value, Tensor):
        found: dict[str, Any] = {f"{path}:data": value.detach().clone()}
    elif isinstance(value, bool | int | float | str | torch.dtype) or value is None:
        return {path: value}
    else:
        found = {}
    if id(value) in inside:
        return {}
    if isinstance(value, list | tuple):
        children = {str(i): v for i, v in enumerate(value)}
    elif isinstance(value, dict):
        children = {str(k): v for k, v in value.items()}
    else:
        children = getattr(value, "__dict__", {})
    for key, child in children.items():
        if not callable(child) and not key.startswith("_forward") and "hook" not in key:
            found |= _contents(child, f"{path}.{key}", (*inside, id(value)))
    return found


def _assert_same_contents(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert actual.keys() >= wanted.keys()
    for path, value in wanted.items():
        if isinstance(value, Tensor):
            assert value.dtype == actual[path].dtype, path
            assert torch.equal(value, actual[path]), path
        else:
            assert value == actual[path], path


# ---- forward and backward -----------------------------------------------------------------------


def test_the_backend_is_found_and_shown(form: Format) -> None:
    for layer in _layers(_adapted(form)):
        assert layer.quantization_backend.supports_merge
        assert f"quantization_backend='{layer.quantization_backend.backend_name}'" in repr(layer)


def test_outputs_have_the_dtype_of_the_base_layer(form: Format) -> None:
    model = _adapted(form)
    x = _inputs(form)
    for layer in _layers(model):
        inputs = x if layer.in_features == IN else x.repeat(1, MIDDLE // IN)
        assert all(p.dtype == torch.float32 for p in layer.road_theta.parameters())
        assert layer(inputs).dtype == layer.base_layer(inputs).dtype == form.dtype


def test_a_new_adapter_changes_nothing(form: Format) -> None:
    base, x = Net(form), _inputs(form)
    wanted = base(x)
    model = get_peft_model(base, RoadConfig(target_modules=["first", "second"], group_size=16))
    assert torch.equal(model(x), wanted)


def test_gradients_are_those_of_the_dequantised_layer(form: Format) -> None:
    model = _adapted(form)
    twin = copy.deepcopy(model)
    for layer in _layers(twin):
        layer.base_layer = Twin(layer.base_layer, layer.get_base_weight())
        layer.quantization_backend = None
    x = _inputs(form)
    ours, wanted = _gradients(model, x), _gradients(twin, x)
    assert len(ours) == len(wanted) == 4
    for (name, gradient), reference in zip(ours.items(), wanted.values(), strict=True):
        assert gradient.dtype == torch.float32
        assert_close(gradient, reference, name, dtype=form.inside)


def test_training_goes_on_after_an_evaluation(form: Format) -> None:
    model, x = _adapted(form), _inputs(form)
    before = _gradients(model.train(), x)
    with torch.no_grad():
        model.eval()(x)
    after = _gradients(model.train(), x)
    assert len(before) == 4
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


@pytest.fixture
def repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes do what it does on CPUs with AVX-512 BF16.

    There the first evaluation repacks a 4-bit weight, and the product with such a weight is an
    operator without a backward. The product is computed here from the weight unpacked again.
    """

    def gemv(x: Tensor, codes: Tensor, out: Tensor | None = None, state: Any = None) -> Tensor:
        unpacked = bnb.functional._convert_weight_packed_for_cpu_inverse(
            codes.clone(), copy.deepcopy(state)
        )
        with torch.no_grad():
            return x @ bnb.functional.dequantize_4bit(*unpacked).T.to(x.dtype)

    monkeypatch.setattr(bnb.functional, "gemv_4bit", gemv)
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


@pytest.mark.parametrize("targets", [["first", "second"], ["first"]], ids=len)
@pytest.mark.parametrize("name", REPACKED)
@pytest.mark.usefixtures("repacking")
def test_training_goes_on_where_evaluation_repacks_the_weight(name: str, targets) -> None:
    form = FORMATS[name]
    base, x = Net(form), _inputs(form)
    with torch.no_grad():
        base.eval()(x)  # also before there are adapters
    config = RoadConfig(target_modules=targets, group_size=16)
    model = randomize(get_peft_model(base, config)).train()
    before = _gradients(model, x)
    assert len(before) == 2 * len(targets)
    with torch.no_grad():
        model.eval()(x)
    after = _gradients(model.train(), x)
    for parameter, gradient in before.items():
        assert parameter in after, f"{parameter} has lost its gradient"
        assert_close(after[parameter], gradient, parameter, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", REPACKED)
@pytest.mark.usefixtures("repacking")
def test_merging_reads_the_weight_where_evaluation_repacks_it(name: str) -> None:
    form = FORMATS[name]
    model, x = _adapted(form).eval(), _inputs(form)
    with torch.no_grad():
        products = [_product(layer) for layer in _layers(model)]
        wanted = model(x)
        model.merge_adapter()
        for layer, product in zip(_layers(model), products, strict=True):
            assert _distance(layer.get_base_weight(), product) < 0.15
        model(x)
        model.unmerge_adapter()
        assert torch.equal(model(x), wanted)


# ---- merging ------------------------------------------------------------------------------------


def _matrix(layer: RoadLinear, adapter: str = "default") -> Tensor:
    first, second = (v.detach() for v in layer.coefficients(adapter))
    return dense_rotation(first, second, layer.group_size[adapter], layer.out_features)


def _product(layer: RoadLinear) -> Tensor:
    return _matrix(layer).double() @ layer.get_base_weight().double()


def _distance(actual: Tensor, wanted: Tensor) -> float:
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_merging_quantises_the_rotated_weight(form: Format) -> None:
    model, x = _adapted(form).eval(), _inputs(form)
    with torch.no_grad():
        model(x)
        products = [_product(layer) for layer in _layers(model)]
        biases = [_matrix(m) @ m.base_layer.bias.float() for m in _layers(model)]
        directly = copy.deepcopy(model)
        model.merge_adapter()
        model(x)
    for layer, other, product, bias in zip(
        _layers(model), _layers(directly), products, biases, strict=True
    ):
        other.set_base_weight(product.to(other.get_base_weight().dtype))
        floor = _distance(other.get_base_weight(), product)
        merged = layer.get_base_weight()
        assert 0 < floor < 0.15
        assert _distance(merged, product) <= 1.02 * floor
        assert_close(layer.base_layer.bias, bias, "bias", dtype=form.inside)


def test_unmerging_restores_every_bit(form: Format) -> None:
    model, x = _adapted(form).eval(), _inputs(form)
    with torch.no_grad():
        before = model(x)
        contents = [_contents(layer.base_layer) for layer in _layers(model)]
        model.merge_adapter()
        assert not torch.equal(model(x), before)
        assert any(
            not torch.equal(value, contents[0][path])
            for path, value in _contents(_layers(model)[0].base_layer).items()
            if isinstance(value, Tensor) and path in contents[0]
        )
        model.unmerge_adapter()
        after = model(x)
    assert torch.equal(after, before)
    for layer, wanted in zip(_layers(model), contents, strict=True):
        _assert_same_contents(_contents(layer.base_layer), wanted)


def test_a_broken_adapter_is_not_merged_safely(form: Format) -> None:
    model, x = _adapted(form).eval(), _inputs(form)
    with torch.no_grad():
        _layers(model)[1].road_alpha["default"][3] = torch.nan
        model(x)
        contents = [_contents(layer.base_layer) for layer in _layers(model)]
        with pytest.raises(ValueError, match=r"second: NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)
    for layer, wanted in zip(_layers(model), contents, strict=True):
        assert not layer.merged
        _assert_same_contents(_contents(layer.base_layer), wanted)


def test_disabling_while_merged_gives_the_base_model_and_stays_merged(form: Format) -> None:
    model, x = _adapted(form).eval(), _inputs(form)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with torch.no_grad():
        unmerged = model(x)
        model.merge_adapter()
        merged = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), merged)
        assert all(layer.merged for layer in _layers(model))
        model.unmerge_adapter()
        assert torch.equal(model(x), unmerged)


def test_merge_and_unload_leaves_a_model_of_the_same_layers(form: Format) -> None:
    model, x = _adapted(form).eval(), _inputs(form)
    classes = [type(layer.base_layer) for layer in _layers(model)]
    with torch.no_grad():
        merged = copy.deepcopy(model)
        merged.merge_adapter()
        wanted = merged(x)
        unloaded = model.merge_and_unload()
        assert [type(unloaded.first), type(unloaded.second)] == classes
        assert torch.equal(unloaded(x), wanted)


# ---- what cannot be merged ----------------------------------------------------------------------


class Packed(nn.Module):
    """A quantised layer as GPTQ and AWQ have them: no weight to read, no weight to write."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.register_buffer("qweight", torch.randint(0, 16, (8, 8), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scales).T


def test_a_layer_without_a_way_back_is_trained_but_not_merged(monkeypatch) -> None:
    def resolve(layer: nn.Module, **kwargs: Any) -> ForwardOnlyQuantizationBackend | None:
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, Packed) else None

    for name, module in list(sys.modules.items()):
        if name.startswith("road_peft") and hasattr(module, "resolve_quantization_backend"):
            monkeypatch.setattr(module, "resolve_quantization_backend", resolve)
    base = nn.ModuleDict({"dense": nn.Linear(8, 8), "packed": Packed()})
    base.forward = lambda x: base["packed"](base["dense"](x))  # type: ignore[method-assign]
    config = RoadConfig(target_modules=["dense", "packed"], group_size=4)
    model = randomize(get_peft_model(base, config))
    x = torch.randn(3, 8)
    assert len(_gradients(model, x)) == 4
    before = model(x)
    for refused in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"packed: a gptq layer cannot be merged into; load"):
            refused()
    assert not any(layer.merged for layer in _layers(model))
    assert torch.equal(model(x), before)
    assert isinstance(model.unload()["packed"], Packed)


# ---- whole models -------------------------------------------------------------------------------

MODELS = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    tiny("llama", num_hidden_layers=1, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(params=MODELS)
def llama(request: pytest.FixtureRequest, llama_folder: Path) -> Callable[[], LlamaForCausalLM]:
    config = MODELS[request.param]
    return lambda: LlamaForCausalLM.from_pretrained(
        llama_folder, quantization_config=copy.deepcopy(config), device_map="cpu"
    )


def _ids(rows: int = 3) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, 7))


def _config(**kwargs: Any) -> RoadConfig:
    return RoadConfig(group_size=16, task_type="CAUSAL_LM", **kwargs)


def test_adapters_of_a_quantised_model_are_saved_and_loaded(llama, tmp_path: Path) -> None:
    model = randomize(get_peft_model(llama(), _config(variant="road_4"))).eval()
    assert len(_layers(model)) == 7
    ids = _ids()
    wanted = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, wanted)
    restored = copy.deepcopy(loaded)
    for a, b in zip(_layers(restored), _layers(loaded), strict=True):
        assert a.road_theta["default"] is not b.road_theta["default"]
    assert torch.equal(restored(input_ids=ids).logits, wanted)


def test_rows_of_a_quantised_model_take_their_own_adapters(llama) -> None:
    model = get_peft_model(llama(), _config(), adapter_name="a")
    model.add_adapter("b", _config(variant="road_2", target_modules=["v_proj", "down_proj"]))
    randomize(model).eval()
    ids = _ids()
    names = ["a", "__base__", "b"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids).logits
            assert_close(mixed[row], alone[row], name, dtype=torch.bfloat16)
            for other in {0, 1, 2} - {row}:
                assert _distance(mixed[other], alone[other]) > 0.05


def test_a_quantised_model_learns(llama) -> None:
    model = get_peft_model(llama(), _config())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ids, losses = _ids(4), []
    for _ in range(4):
        with torch.no_grad():
            losses.append(model.eval()(input_ids=ids, labels=ids).loss.item())
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.03


def test_a_model_of_torchao_is_merged_and_restored(llama_folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    base = LlamaForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    model = randomize(get_peft_model(base, _config(variant="road_2"))).eval()
    assert {layer.quantization_backend.backend_name for layer in _layers(model)} == {"torchao"}
    ids = _ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        products = [_product(layer) for layer in _layers(model)]
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
        model.merge_adapter()
        for layer, product in zip(_layers(model), products, strict=True):
            assert 0 < _distance(layer.get_base_weight(), product) < 0.02
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=ids).logits, wanted)
