"""An adapter goes on the base that it belongs to: another grid, or none, is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from apiq_peft import ApiQConfig, PackedLinear, preset, quantize
from apiq_peft.export import export_lora
from apiq_peft.quantize import quantize_folder
from tests.apiq_peft._models import error, outputs, tiny, tokens

GRID: dict[str, Any] = {"bits": 3, "group_size": 32}


def config(**changes: Any) -> ApiQConfig:
    return ApiQConfig(**{**GRID, "r": 4, "task_type": "CAUSAL_LM", **changes})


def written(folder: Path, calibrated: bool) -> Any:
    """Save a model, its packed base and its adapter; give what it computes."""
    tiny().save_pretrained(folder / "full")
    model = AutoModelForCausalLM.from_pretrained(folder / "full")
    if calibrated:
        low, _ = quantize(model, tokens(), config(), preset("fast"), show_progress=False)
    else:
        low = get_peft_model(model, config(init_lora_weights=False))
    wanted = outputs(low.eval(), tokens())
    low.save_pretrained(folder / "adapter")
    low.unload().save_pretrained(folder / "base")
    return wanted


def settings(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


def test_a_calibrated_adapter_is_refused_without_its_codes(tmp_path: Path) -> None:
    wanted = written(tmp_path, calibrated=True)
    adapter = str(tmp_path / "adapter")
    assert settings(tmp_path / "adapter")["packed_base"] is True
    message = r"codes of a packed base, but model\.layers\.0\..* load the folder of the packed base"
    with pytest.raises(ValueError, match=message):
        AutoPeftModelForCausalLM.from_pretrained(adapter)
    full = tiny()
    before = outputs(full, tokens())
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(full, adapter)
    assert torch.equal(outputs(full, tokens()), before)  # nothing was packed

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    low = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    assert torch.equal(outputs(low.eval(), tokens()), wanted)
    assert any(p.requires_grad for p in low.parameters())
    low.save_pretrained(tmp_path / "again")
    assert settings(tmp_path / "again")["packed_base"] is True


def test_an_adapter_whose_codes_can_be_made_again_goes_on_either_base(tmp_path: Path) -> None:
    wanted = written(tmp_path, calibrated=False)
    adapter = str(tmp_path / "adapter")
    assert settings(tmp_path / "adapter")["packed_base"] is False
    again = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    assert torch.equal(outputs(again, tokens()), wanted)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    given = config()
    second = get_peft_model(base, given)  # what the codes were made of is not known any more
    assert second.peft_config["default"].packed_base  # type: ignore[attr-defined]
    assert not given.packed_base
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(outputs(PeftModel.from_pretrained(base, adapter), tokens()), wanted)


def test_folders_that_say_nothing_of_it_load_as_before(tmp_path: Path) -> None:
    wanted = written(tmp_path, calibrated=True)
    held = settings(tmp_path / "adapter")
    del held["packed_base"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(held))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    low = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(outputs(low, tokens()), wanted)
    packed = PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter"))
    assert any(isinstance(m, PackedLinear) for m in packed.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "is for 4 bits in groups of 32, but .*q_proj is packed in 3 bits in groups"),
        ({"group_size": 64}, "3 bits in groups of 64, but .* 3 bits in groups of 32"),
        ({"bits_pattern": {"up_proj": 2}}, r"for 2 bits .*\.0\.mlp\.up_proj is packed in 3"),
        ({"scheme": "gptq_symmetric"}, "scheme 'gptq_symmetric', but .* packed in 'asymmetric'"),
    ],
)
def test_another_grid_is_refused(changes: dict[str, Any], message: str) -> None:
    model = get_peft_model(tiny(), config())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config(**changes))
    assert list(model.peft_config) == ["default"]
    base = model.unload()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**changes))
    assert base.config.quantization_config.scheme == "asymmetric"


def calibrated(folder: Path, seed: int) -> None:
    """Write the base and adapter of a calibration, whose codes its samples decide."""
    tiny().save_pretrained(folder / "full")
    steps = preset("apiq-bw", epochs=2, clip_lr=0.5)
    quantize_folder(
        *(folder / "full", folder / "low", tokens(seed=seed)),
        *(config(), steps),
        show_progress=False,
    )


def test_an_adapter_of_another_calibration_is_refused(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        calibrated(tmp_path / name, seed)
    one, two = (tmp_path / name / "low" for name in ("one", "two"))
    assert settings(one / "adapter")["base_codes"] != settings(two / "adapter")["base_codes"]
    base = AutoModelForCausalLM.from_pretrained(one / "base", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"other codes than those of this model, in the same grid"):
        PeftModel.from_pretrained(base, str(two / "adapter"))
    model = PeftModel.from_pretrained(base, str(one / "adapter"))
    with pytest.raises(ValueError, match=r"load the base that it was saved with"):
        model.load_adapter(str(two / "adapter"), "second")
    assert list(model.peft_config) == ["default"]
    packed_anew = get_peft_model(tiny(), config())
    with pytest.raises(ValueError, match="other codes"):
        packed_anew.load_adapter(str(two / "adapter"), "second")
    model.add_adapter("new", config(target_modules=["q_proj"]))
    found: Any = model.peft_config
    assert found["new"].base_codes not in (None, found["default"].base_codes)
    model.save_pretrained(tmp_path / "again")
    base = AutoModelForCausalLM.from_pretrained(one / "base")
    PeftModel.from_pretrained(base, str(tmp_path / "again" / "new"))


def test_whole_rows_and_patterns_are_the_grid_they_name() -> None:
    changes = {"group_size": -1, "bits_pattern": {"up_proj": 2, "down_proj": 4}}
    base = get_peft_model(tiny(), config(**changes)).unload()
    get_peft_model(base, config(**changes))


def test_a_plain_lora_takes_the_grid_of_its_base(tmp_path: Path) -> None:
    changes = {"bits_pattern": {r"1\.mlp\.up_proj": 4}, "group_size_pattern": {"down_proj": 64}}
    model = get_peft_model(
        tiny(), config(scheme="apiq_symmetric", init_lora_weights=False, **changes)
    ).eval()
    wanted = outputs(model, tokens())
    export_lora(model, tmp_path / "lora")
    own = ApiQConfig.of(LoraConfig.from_pretrained(str(tmp_path / "lora")))
    again = PeftModel.from_pretrained(model.unload(), str(tmp_path / "lora"), config=own).eval()
    assert error(outputs(again, tokens()), wanted) < 1e-6
    found: Any = again.peft_config["default"]
    assert (found.bits, found.group_size, found.scheme) == (3, 32, "apiq_symmetric")
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        assert found.grid_of(name) == (3 if ".0." in name else 4, 32)
    assert found.grid_of("model.layers.0.mlp.down_proj") == (3, 64)
