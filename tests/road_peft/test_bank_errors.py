"""What a bank refuses, by its message, and that nothing has changed then.

| given                                        | oracle                                    |
|----------------------------------------------|-------------------------------------------|
| adapters that cannot be served, each by how  | the message; names, memory, outputs       |
| files that are no adapter                    | the message                               |
| repositories of the hub, also from its cache | the files, without a network              |
| models and arguments of a bank               | the message; the model's own modules      |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import road_peft.adapter_files
from road_peft import RoadBank, RoadConfig, UnknownAdapterError
from tests.road_peft._banks import (
    Loudly,
    bank_of,
    heard,
    loaded,
    loud_bank,
    saved,
    scaling,
    sources_of,
)
from tests.road_peft._models import Mlp, call_silently, registered, tiny
from tests.road_peft._rows import configs

Vectors = dict[str, Tensor]


def _config(**fields: Any) -> RoadConfig:
    config = RoadConfig(**{"group_size": 2, "target_modules": ["0", "1", "2"], **fields})
    return config


def _of_base(name: str) -> RoadConfig:
    config = _config()
    config.base_model_name_or_path = name
    return config


def _changed(**changes: Any) -> Vectors:
    """Give the vectors of a good adapter with some exchanged, None for one that is left out."""
    vectors = scaling(2)[1] | {
        f"layers.1.{key}" if "__" not in key else key.replace("__", "."): value
        for key, value in changes.items()
    }
    return {key: value for key, value in vectors.items() if value is not None}


def _without_layer() -> Vectors:
    return {k: v for k, v in scaling(2)[1].items() if not k.startswith("layers.1.")}


# what is given: the adapter, and what the message must say
BAD: dict[str, tuple[Callable[[], tuple[Any, Vectors]], str]] = {
    "another base": (
        lambda: (_of_base("somebody/another-model"), _changed()),
        r"'x' was trained on 'somebody/another-model', but this model is 'org/This-Model'; choose"
        r" .* set base_model .*\('' accepts any\)",
    ),
    "a LoRA": (
        lambda: (_config(lora_rank=2), _changed()),
        r"'x' has lora_rank, but a bank serves rotations only; use PEFT's load_adapter",
    ),
    "modules to save": (
        lambda: (_config(modules_to_save=["head"]), _changed()),
        "'x' has modules_to_save, but a bank serves rotations only",
    ),
    "trained tokens": (
        lambda: (_config(trainable_token_indices=[1]), _changed()),
        "'x' has trainable_token_indices, but",
    ),
    "parameters": (
        lambda: (_config(target_parameters=["experts.up"]), _changed()),
        "'x' has target_parameters, but",
    ),
    "an adapter of type LoRA": (
        lambda: (
            peft.LoraConfig(target_modules=["0"]),
            {
                "layers.0.lora_A.weight": torch.zeros(8, 4),
                "layers.0.lora_B.weight": torch.ones(4, 8),
            },
        ),
        r"'x' holds 'layers\.0\.lora_A\.weight', which is no part of a RoAd",
    ),
    "an unknown tensor": (
        lambda: (_config(), _changed(road_gamma=torch.ones(2))),
        r"'x' holds 'layers\.1\.road_gamma', which is no part of a RoAd",
    ),
    "a layer that the model has not": (
        lambda: (_config(), _changed(layers__9__road_theta=torch.ones(2))),
        r"'x' adapts 1 layer\(s\) that are not served \(layers\.9\): it belongs to another base",
    ),
    "a layer missing": (
        lambda: (_config(), _without_layer()),
        r"'x' holds nothing for 1 layer\(s\) that its configuration names \(layers\.1\); the file",
    ),
    "nothing": (lambda: (_config(), {}), r"'x' holds nothing for 3 layer\(s\)"),
    "nothing, and no targets": (lambda: (_config(target_modules=None), {}), "'x' holds nothing"),
    "a tensor missing": (
        lambda: (_config(), _changed(road_alpha=None)),
        r"'x' holds nothing for layers\.1\.road_alpha, but road_1 on 4 outputs needs \(2,\)",
    ),
    "a wrong length": (
        lambda: (_config(), _changed(road_theta=torch.ones(3))),
        r"'x' holds \(3,\) for layers\.1\.road_theta, but road_1 on 4 outputs needs \(2,\); was",
    ),
    "a matrix": (
        lambda: (_config(), _changed(road_theta=torch.ones(2, 1))),
        r"'x' holds \(2, 1\) for layers\.1\.road_theta",
    ),
    "another variant": (
        lambda: (_config(variant="road_4"), _changed()),
        r"'x' holds \(2,\) for layers\.0\.road_theta, but road_4 on 4 outputs needs \(8,\)",
    ),
    "a group size that does not divide": (
        lambda: (_config(group_size=6), _changed()),
        r"'x': its group size 6 does not divide the 4 outputs of layers\.0; was it trained",
    ),
    "a group larger than the layer": (
        lambda: (_config(group_size=6, remainder="identity"), _changed()),
        "'x': its group size 6 does not divide the 4 outputs",
    ),
    "a NaN": (
        lambda: (_config(), _changed(road_alpha=torch.tensor([1.0, float("nan")]))),
        r"'x': layers\.1\.road_alpha has values that are not finite",
    ),
    "an infinity": (
        lambda: (_config(), _changed(road_theta=torch.tensor([float("inf"), 0]))),
        r"'x': layers\.1\.road_theta has values that are not finite",
    ),
    "a scale that overflows": (
        lambda: (_config(), _changed(road_alpha=torch.tensor([1.0, -2e3]))),
        r"'x': layers\.1\.road_alpha has a scale of 2e\+03; above 1000 outputs overflow",
    ),
    "a base weight of another shape": (
        lambda: (_config(), {**_changed(), "layers.0.base_layer.weight": torch.ones(5, 4)}),
        r"'x' was trained beside layers\.0\.base_layer\.weight of shape \(5, 4\), but this model's"
        r" has \(4, 4\); resize the embeddings",
    ),
}


@pytest.mark.parametrize("how", ["add", "replace"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_and_changes_nothing(case: str, how: str) -> None:
    make, message = BAD[case]
    bank = loud_bank(2, count=1, base_model="org/This-Model")
    bank.add("old", scaling(4))
    if how == "replace":
        bank.add("x", scaling(8))
        bank.pin("x")
    before = bank.names, bank.memory()
    with pytest.raises(ValueError, match=message):
        getattr(bank, how)("x", make())
    assert (bank.names, bank.memory()) == before
    if how == "replace":
        assert heard(bank, "x", "old") == [8, 4]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("org/This-Model", "/models/this-model/"),
        ("/srv/models/This-Model", "org/this-model"),
        ("this-model", "org/This-Model"),
        ("", "org/This-Model"),
        ("anything/else", ""),
    ],
)
def test_only_the_last_part_of_the_name_of_the_base_counts(theirs: str, ours: str) -> None:
    bank = loud_bank(1, base_model=ours)
    bank.add("x", (_of_base(theirs), _changed()))
    assert heard(bank, "x") == [2]


def test_the_name_of_the_base_is_that_of_the_model_if_not_given() -> None:
    model = tiny("llama", name_or_path="org/one")
    adapted = loaded(model, configs("a", "b"))
    adapted.peft_config["b"].base_model_name_or_path = "org/two"
    sources = sources_of(adapted)
    bank = RoadBank(model)
    assert bank.base_model == "org/one"
    bank.add("a", sources["a"])
    with pytest.raises(ValueError, match="trained on 'org/two', but this model is 'org/one'"):
        bank.add("b", sources["b"])


# ---- names ------------------------------------------------------------------------------------


def test_names_that_are_taken_or_stand_for_none() -> None:
    bank = loud_bank(1, count=1)
    before = bank.memory()
    with pytest.raises(ValueError, match="there is an adapter 'n1' already; replace or remove it"):
        bank.add("n1", scaling(3))
    for method in (bank.add, bank.replace):
        for name in ("", "__base__"):
            with pytest.raises(ValueError, match=f"'{name}' cannot name an adapter"):
                method(name, scaling(3))
    assert bank.memory() == before


def test_unknown_names() -> None:
    bank = loud_bank(1, count=2)
    message = "there is no adapter 'x' among the 2 registered; add it first"
    calls: list[Callable[[], Any]] = [
        lambda: bank.acquire("x"),
        lambda: bank.remove("x"),
        lambda: bank.pin("x"),
        lambda: bank.unpin("x"),
        lambda: bank.replace("x", scaling(3)),
        lambda: heard(bank, "n1", "x"),
    ]
    before = bank.memory()
    for call in calls:
        with pytest.raises(UnknownAdapterError, match=message):
            call()
    assert bank.memory() == before
    assert "x" not in bank


def test_a_number_of_names_that_the_rows_do_not_explain() -> None:
    bank = loud_bank(2, count=2)
    with (
        pytest.raises(ValueError, match="but got 2 and 3 respectively"),
        bank.rows(["n1", "n2"]),
    ):
        bank.model(torch.ones(3, 4))
    assert heard(bank, "n1") == [2]


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 2), ()])
def test_slots_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    bank = loud_bank(2, count=2)
    slots = torch.zeros(shape, dtype=torch.int32)
    with (
        pytest.raises(ValueError, match=r"slots ha.* shape .*give one slot|slots has shape"),
        bank.routed(slots),
    ):
        bank.model(torch.ones(3, 4))
    assert bank.routing.current is None


# ---- files ------------------------------------------------------------------------------------


def _good(folder: Path) -> Path:
    config, vectors = scaling(2)
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{key}": vector for key, vector in vectors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def _as_bin(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


def _write_config(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)


def _edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncate, r"no readable adapter_model\.safetensors; only the safetensors"),
    "pickled": (_as_bin, "only the safetensors format is loaded"),
    "empty": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
        r"no readable adapter_model\.safetensors",
    ),
    "no configuration": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        r"no readable adapter_config\.json; give the folder",
    ),
    "no JSON": (lambda f: _write_config(f, "{"), r"no readable adapter_config\.json"),
    "a list": (lambda f: _write_config(f, "[1]"), r"no readable adapter_config\.json"),
    "a number": (lambda f: _write_config(f, "1"), r"no readable adapter_config\.json"),
    "no type": (lambda f: _edit_config(f, peft_type=None), r"no readable adapter_config\.json"),
    "an unknown type": (
        lambda f: _edit_config(f, peft_type="ROTARY"),
        r"no readable adapter_config\.json",
    ),
    "another type": (
        lambda f: _write_config(f, json.dumps({"peft_type": "LORA", "r": 8})),
        "holds a .*LORA adapter; a ROAD adapter is needed",
    ),
    "an unknown variant": (
        lambda f: _edit_config(f, variant="road_3"),
        r"no readable adapter_config\.json.*road_3",
    ),
    "a group size in words": (
        lambda f: _edit_config(f, group_size="two"),
        r"no readable adapter_config\.json",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_folder_that_is_no_adapter(case: str, tmp_path: Path) -> None:
    spoil, message = SPOILT[case]
    good, bad = _good(tmp_path / "good"), _good(tmp_path / "bad")
    spoil(bad)
    bank = loud_bank(1)
    bank.add("x", good)
    before = bank.names, bank.memory()
    for call in (lambda: bank.add("y", bad), lambda: bank.replace("x", bad)):
        with pytest.raises(ValueError, match=f"bad holds .*{message}|{message}"):
            call()
    assert (bank.names, bank.memory()) == before
    assert heard(bank, "x") == [2]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing holds no readable adapter_config\.json"):
        loud_bank(1).add("x", tmp_path / "missing")


@pytest.mark.parametrize("library", ["stock", "ours"])
def test_files_of_either_library_are_served(library: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = Mlp()
    with registered(library) as config_class:
        config = config_class(group_size=4, variant="road_2", target_modules=["up", "down"])
        model = loaded(base, {"default": config})
        folder = saved(model, tmp_path)
        x = torch.randn(3, 8)
        wanted = model(x)
    bank = RoadBank(base, 1, target_modules=["up", "down"])
    bank.add("x", folder)
    with bank.rows(["x"] * 3):
        torch.testing.assert_close(base(x), wanted)


# ---- the hub ----------------------------------------------------------------------------------


def test_a_repository_is_read_from_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--adapter"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    _good(repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    bank = loud_bank(1, host_bytes=0)
    bank.add("x", "org/adapter")
    assert heard(bank, "x") == [2]
    with pytest.raises(ValueError, match="org/other holds no readable"):
        bank.add("y", "org/other")
    assert bank.names == ["x"]


def test_a_repository_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _good(tmp_path / "x")

    def download(repository: str, filename: str, **kwargs: Any) -> str:
        assert repository == "org/adapter"
        if filename.endswith(".safetensors"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("404")
        return str(folder / filename)

    monkeypatch.setattr(peft.config, "hf_hub_download", download)
    monkeypatch.setattr(road_peft.adapter_files, "hf_hub_download", download)
    with pytest.raises(ValueError, match=r"org/adapter holds no readable adapter_model\.safe"):
        loud_bank(1).add("x", "org/adapter")


# ---- models and arguments ---------------------------------------------------------------------


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nothing"], r"target_modules \['nothing'\] match no module of the model"),
        (["layers"], r"layers: Target module ModuleList\(\s*\(0-2\)"),
        ("layers.*", "is not supported"),
    ],
)
def test_targets_that_cannot_be_adapted(targets: Any, message: str) -> None:
    model = Loudly()
    before = _modules(model)
    with pytest.raises(ValueError, match=message):
        RoadBank(model, target_modules=targets)
    assert _modules(model) == before


def test_modules_whose_layers_are_bypassed() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    before = _modules(model)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj cannot be adapted: torch's Multi"):
        RoadBank(model, target_modules=["linear1", "out_proj"])
    assert _modules(model) == before


def test_a_model_with_adapters_is_refused() -> None:
    message = "the model has adapters of its own; give the base model"
    adapted = loaded(Mlp(), configs("a", target_modules=["up"]))
    for model in (adapted, adapted.get_base_model(), loud_bank(1).model):
        with pytest.raises(ValueError, match=message):
            RoadBank(model, target_modules=["up", "0"])
    lora = peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match=message):
        RoadBank(lora, target_modules=["down"])
    RoadBank(adapted.unload(), target_modules=["up"])


@pytest.mark.parametrize("slots", [0, -1])
def test_a_bank_has_a_slot(slots: int) -> None:
    with pytest.raises(ValueError, match=f"slots is {slots}; it must be at least 1"):
        RoadBank(Loudly(), slots, target_modules=["0"])


def test_targets_that_the_bank_leaves_out_are_named() -> None:
    base = tiny("llama")
    model = loaded(base, configs("a"))
    with pytest.raises(ValueError, match=r"adapts 12 layer\(s\) that are not served .*leave them"):
        call_silently(bank_of, base, sources_of(model), target_modules=["q_proj"])
