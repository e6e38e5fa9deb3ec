"""Training: gradients, idle subspaces, Trainer; and values saved, taken apart and put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

from road_peft import (
    Interventions,
    RoadConfig,
    RoadInterventionConfig,
    RoadInterventionModel,
    SubspaceCollator,
    road_parameter_groups,
)
from tests.helpers import assert_close
from tests.road_peft._interventions import HALVES, ROWS, dense, randomized, wrapped
from tests.road_peft._models import bytes_of, randomize, tiny

IDS = torch.arange(3, 27).view(4, 6)
LABELS = torch.where(torch.arange(6) < 3, -100, IDS)


def _gradients(model: RoadInterventionModel, **given: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(input_ids=IDS, labels=LABELS, **given).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_gradients_are_those_of_finite_differences(variant: str) -> None:
    model = wrapped("gpt2", dtype=torch.float64, variant=variant).double()

    def value() -> Tensor:  # transformers rounds its own losses to float32
        return model(input_ids=IDS, subspaces=ROWS).logits.square().sum()

    value().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"sites.0.{v}.{i}" for v in ("theta", "alpha") for i in (0, 1)}
    for name, parameter in trained.items():
        for i in (0, len(parameter) - 1):
            ends = []
            with torch.no_grad():
                for step in (1e-5, -2e-5):
                    parameter[i] += step
                    ends.append(value())
                parameter[i] += 1e-5
            slope = (ends[0] - ends[1]) / 2e-5
            assert slope != 0
            assert abs(slope - parameter.grad[i]) < 1e-5 * max(1, abs(slope)), (name, i)


def test_a_subspace_learns_from_its_own_rows_only() -> None:
    model = wrapped(dtype=torch.float64).double()
    rows = [["lower"], [], ["upper"], ["upper"]]
    together = _gradients(model, subspaces=rows)
    model.zero_grad()
    logits = model(input_ids=IDS[:1], labels=LABELS[:1], subspaces=rows[:1])
    (logits.loss / 4).backward()  # every row has as many labels
    assert_close(together["sites.0.theta.0"], model.sites[0].theta[0].grad)
    assert model.sites[0].theta[1].grad is None


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_idle_subspace_does_not_move(optimizer: type[torch.optim.Optimizer]) -> None:
    model = wrapped()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = optimizer(model.sites.parameters(), lr=1e-2, weight_decay=0.0, **options)

    def step(names: list[str]) -> dict[str, Tensor]:
        _gradients(model, subspaces=[names] * 4)
        steps.step()
        return {n: t.clone() for n, t in model.interventions().tensors.items()}

    first = step(["lower", "upper"])  # both have momentum now
    second = step(["lower"])
    for name, held in second.items():
        assert torch.equal(held, first[name]) == name.endswith("upper"), name
    third = step(["lower", "upper"])
    assert not any(torch.equal(third[name], second[name]) for name in third)


def test_decay_is_kept_from_the_scales_or_warned_of() -> None:
    model = wrapped()
    (group,) = road_parameter_groups(model, weight_decay=0.1, lr=1e-3)
    assert group["weight_decay"] == 0
    assert len(group["params"]) == 4
    decaying = torch.optim.AdamW(model.sites.parameters(), weight_decay=0.1)
    _gradients(model)
    with pytest.warns(UserWarning, match="alpha of an intervention"):
        decaying.step()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters by row"])
def test_gradient_checkpointing_recomputes_the_same_rows(
    use_reentrant: bool, adapters: bool
) -> None:
    base: Any = tiny("llama", dtype=torch.float64)
    given: dict[str, Any] = {"subspaces": ROWS}
    if adapters:
        base = randomize(get_peft_model(base, RoadConfig(group_size=4)))
        given["adapter_names"] = ["default", "__base__", "default", "__base__"]
    model = wrapped(base, layers=[0, 1], positions="f2+l1").double().train()
    if use_reentrant:
        base.enable_input_require_grads()  # as Trainer's users of that variant must
    wanted = _gradients(model, **given)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = _gradients(model, **given)
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, name)
    assert any((gradient != 0).any() for gradient in wanted.values())


# ---- Trainer ------------------------------------------------------------------------------------


def _examples(count: int = 8) -> list[dict[str, Any]]:
    names = [["lower"], ["upper"], ["lower", "upper"], []]
    return [
        {
            "input_ids": IDS[i % 4].tolist(),
            "labels": LABELS[i % 4].tolist(),
            "attention_mask": [1] * 6,
            "subspaces": names[i % 4],
        }
        for i in range(count)
    ]


def _train(model: RoadInterventionModel, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
        **{"max_steps": 4, **settings},
    )
    collator = SubspaceCollator(default_data_collator)
    return Trainer(model, arguments, data_collator=collator, train_dataset=_examples())


def test_trainer_trains_and_its_checkpoints_hold_the_interventions(tmp_path: Path) -> None:
    model = RoadInterventionModel(
        tiny("llama"), RoadInterventionConfig(layers=[0], subspaces=HALVES)
    )
    before = bytes_of(model.base_model)
    _train(model, tmp_path).train()
    assert bytes_of(model.base_model) == before
    assert all(t.std() > 0 for t in model.interventions().tensors.values())
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert (
        set(saved)
        == set(model.state_dict())
        == {f"sites.0.{vector}.{i}" for vector in ("theta", "alpha") for i in (0, 1)}
    )
    other = RoadInterventionModel(tiny("llama"), model.interventions_config)
    other.base_model.load_state_dict(model.base_model.state_dict())
    _train(other, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in model.interventions().tensors.items():
        assert_close(other.interventions().tensors[name], value, name)


def test_trainer_checkpoints_gradients_too(tmp_path: Path) -> None:
    base = tiny("llama")
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = RoadInterventionModel(base, RoadInterventionConfig(layers=[0], subspaces=HALVES))
        trainer = _train(
            model, tmp_path / str(checkpointing), max_steps=2, gradient_checkpointing=checkpointing
        )
        trainer.train()
        results.append(model.interventions().tensors)
        model.detach()
    for name, value in results[0].items():
        assert_close(results[1][name], value, name)


# ---- values -------------------------------------------------------------------------------------


def _on(model: RoadInterventionModel, values: Interventions) -> RoadInterventionModel:
    return RoadInterventionModel(model.base_model, values).eval()


def test_saving_and_loading_gives_the_same_model(tmp_path: Path) -> None:
    model = wrapped(layers=[1, 0], variant="road_4", subspaces={"a": [5, 0, 3], "b": (0.75, 1)})
    model.save_pretrained(tmp_path / "it")
    assert sorted(p.name for p in (tmp_path / "it").iterdir()) == [
        "intervention_config.json",
        "interventions.safetensors",
    ]
    loaded = Interventions.load(tmp_path / "it")
    assert loaded.config == model.interventions_config
    rows = [["a"], ["b"], [], ["a", "b"]]
    again = _on(model, loaded)(input_ids=IDS, subspaces=rows).logits
    assert torch.equal(again, model(input_ids=IDS, subspaces=rows).logits)
    randomized(model).interventions().save(tmp_path / "it")  # replaces both files
    assert not torch.equal(
        Interventions.load(tmp_path / "it").tensors["1.block_output.theta.a"],
        loaded.tensors["1.block_output.theta.a"],
    )


def test_a_function_of_positions_is_given_again(tmp_path: Path) -> None:
    model = wrapped(positions=lambda mask: mask.cumsum(1) == 2)
    model.interventions().save(tmp_path)
    with pytest.raises(ValueError, match=r"positions=\.\.\."):
        _on(model, Interventions.load(tmp_path))
    again = _on(model, Interventions.load(tmp_path, positions=lambda mask: mask.cumsum(1) == 2))
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = wrapped()
    with pytest.raises(ValueError, match=r"no readable intervention_config\.json"):
        Interventions.load(tmp_path)
    model.interventions().save(tmp_path)
    path = tmp_path / "intervention_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "subspaces": {"lower": [0.0, 0.5]}}))
    with pytest.raises(ValueError, match="the tensors are of the subspaces"):
        Interventions.load(tmp_path)
    path.write_text(json.dumps({**values, "layers": [1]}))
    with pytest.raises(ValueError, match="missing or unknown"):
        _on(model, Interventions.load(tmp_path))
    path.write_text(json.dumps({**values, "variant": "road_2"}))
    with pytest.raises(ValueError, match="it must hold 8 finite values"):
        _on(model, Interventions.load(tmp_path))
    path.write_text("{")
    with pytest.raises(ValueError, match="no readable"):
        Interventions.load(tmp_path)


def test_isolating_a_subspace_and_composing_two_trained_apart() -> None:
    model = wrapped()
    both = model.interventions()
    lower, upper = both.isolate("lower"), both.isolate("upper")
    alone = _on(model, lower)
    wanted = model(input_ids=IDS, subspaces=[["lower"]] * 4).logits
    assert torch.equal(alone(input_ids=IDS).logits, wanted)
    with pytest.raises(ValueError, match=r"\['upper'\] do not exist"):
        alone(input_ids=IDS, subspaces=ROWS)
    composed = _on(model, upper.compose(lower))
    assert torch.equal(
        composed(input_ids=IDS, subspaces=ROWS).logits, model(input_ids=IDS, subspaces=ROWS).logits
    )
    with pytest.raises(ValueError, match="lower"):
        lower.compose(lower)
    with pytest.raises(ValueError, match=r"\['none'\] do not exist"):
        both.isolate("none")
    other = wrapped(model.base_model, positions="f1", subspaces={"else": [7]}).interventions()
    with pytest.raises(ValueError, match="different configurations"):
        lower.compose(other)
    clash = wrapped(model.base_model, subspaces={"else": [0]}).interventions()
    with pytest.raises(ValueError, match="'lower' and 'else' share block 0"):
        _on(model, lower.compose(clash))


def test_shared_blocks_are_one_parameter() -> None:
    model = wrapped(subspaces={"a": [0, 2, 3], "b": [1, 2]}, allow_overlap=True)
    values = model.interventions()
    assert len(model.sites[0].theta) == 3
    a, b = (values.tensors[f"0.block_output.theta.{name}"] for name in "ab")
    assert a[1] == b[1]  # block 2
    turn = dense(model, ["a"])
    assert_close(turn[6, 7] / turn[7, 7], -a[2].tan(), dtype=torch.float32)  # block 3
    rows = [["a"], ["b"], ["a", "b"], []]
    again = _on(model, values)(input_ids=IDS, subspaces=rows).logits
    assert torch.equal(again, model(input_ids=IDS, subspaces=rows).logits)
    torn = {**values.tensors, "0.block_output.theta.b": torch.zeros(2)}
    with pytest.raises(ValueError, match="differs from another subspace"):
        _on(model, Interventions(values.config, torn))


# ---- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "group_size"), [("road_1", 2), ("road_2", 4), ("road_4", 8)])
def test_a_subspace_on_every_token_of_linear_layers_is_an_adapter(
    variant: str, group_size: int, tmp_path: Path
) -> None:
    model = wrapped(
        layers=[0, 1],
        component="mlp.down_proj",
        positions="all",
        prefill_only=False,
        variant=variant,
        group_size=group_size,
    )
    wanted = model(input_ids=IDS, subspaces=[["lower"]] * 4).logits
    model.extract(["lower"], tmp_path / "adapter")
    base = model.detach()
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(adapted(input_ids=IDS).logits, wanted)
    assert_close(adapted.merge_and_unload()(input_ids=IDS).logits, wanted, dtype=torch.float16)
    with pytest.raises(ValueError, match="exists; choose a new folder"):
        model.extract(["lower"], tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "cannot be merged into weights"),
        ({"positions": "all"}, "prefill_only True.*cannot be merged"),
        ({"positions": "all", "prefill_only": False}, "0.block_output is a LlamaDecoderLayer"),
    ],
)
def test_what_is_not_the_same_for_every_token_is_no_adapter(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = wrapped(**{"component": "block_output", **settings})
    with pytest.raises(ValueError, match=message):
        model.extract(["lower"], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_matrix_of_a_subspace_is_the_identity_elsewhere() -> None:
    model = wrapped(subspaces={"a": [1, 6]})
    matrix = dense(model, ["a"])
    pair = model.sites[0].coefficients(["a"], torch.float64)
    assert_close(pair[0], matrix.diagonal(), dtype=torch.float32)
    assert (pair[0][[0, 1, 4, 5]] == 1).all()
    assert (pair[1][[0, 1, 4, 5]] == 0).all()
