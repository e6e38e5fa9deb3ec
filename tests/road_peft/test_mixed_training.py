"""Training several adapters at once, by a batch whose rows belong to different ones.

| property                                  | oracle                                              |
|-------------------------------------------|-----------------------------------------------------|
| loss of a mixed batch                     | the sum over runs of the rows of each adapter alone |
| gradient of every parameter of an adapter | that of the run of its own rows                     |
| adapters outside the batch, frozen ones   | no gradient                                         |
| steps of SGD, Trainer, accelerate         | each adapter trained alone on its own rows          |
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.helpers import TOLERANCES, assert_close
from tests.road_peft._models import VOCABULARY, Mlp, call_silently, no_hooks, tiny, with_adapters
from tests.road_peft._rows import (
    BASE,
    FIELDS,
    assert_gradients_close,
    assert_network_close,
    belongs,
    configs,
    gradients,
    gradients_alone,
    inputs_of,
    loss_of,
    only,
    tokens_for_rows,
    trained_model,
)

ROWS = ["c", BASE, "e", "d", "c", "e"]
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": {"dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bart": {"dropout": 0.0},
}


def _trained(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if p.requires_grad and belongs(n, adapter)]


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_loss_and_gradients_are_those_of_the_rows_alone(name: str) -> None:
    model = trained_model(name, **NO_DROPOUT[name])
    inputs = inputs_of(model, tokens_for_rows(len(ROWS)))
    loss = loss_of(model, inputs, adapter_names=ROWS)
    loss.backward()
    mixed = gradients(model)
    assert no_hooks(model)
    assert not any(belongs(parameter, "a") for parameter in mixed)  # no row is of "a"
    wanted_loss, wanted = gradients_alone(model, inputs, ROWS)
    assert_network_close(loss.detach(), wanted_loss, "loss")
    assert_gradients_close(mixed, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_layer_by_dtype_variant_and_group_size(dtype) -> None:
    names = [*FIELDS, BASE, *reversed(FIELDS)]
    base = nn.Sequential(nn.Linear(6, 16)).to(dtype)
    model = with_adapters(base, configs(*FIELDS, target_modules=["0"])).train()
    model.base_model.set_adapter(list(FIELDS))
    x = torch.randn(len(names), 3, 6).to(dtype)
    weights = torch.randn(3, 16)

    def loss(rows: list[int], **kwargs: Any) -> Tensor:
        return (model(x[rows], **kwargs).float() * weights).sum()

    loss(list(range(len(names))), adapter_names=names).backward()
    mixed = gradients(model)
    wanted: dict[str, Tensor] = {}
    for name in FIELDS:
        rows = [i for i, other in enumerate(names) if other == name]
        only(model, name, lambda rows=rows: loss(rows)).backward()
        wanted |= gradients(model)
    assert mixed.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        assert gradient.any()
        assert_close(mixed[parameter], gradient, parameter, dtype=dtype)


@pytest.mark.parametrize("owners", ["acd", "cd"])
@pytest.mark.parametrize("module", ["lm_head", "up_proj"])
def test_modules_to_save_are_trained_by_their_own_rows(owners: str, module: str) -> None:
    given = configs("a", "c", "d", target_modules=["q_proj", "down_proj"])
    for owner in owners:
        given[owner].modules_to_save = [module]
    base = tiny("llama", dtype=torch.float64, use_cache=False, tie_word_embeddings=False)
    model = with_adapters(base, given).train()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".modules_to_save." in parameter_name:
                parameter.normal_(0, 0.5)
    names = ["d", "a", BASE, "c", "a"]
    inputs = inputs_of(model, tokens_for_rows(len(names)))
    model.set_requires_grad(list(given))  # set_adapter takes one owner of a module only
    loss = loss_of(model, inputs, adapter_names=names)
    loss.backward()
    mixed = gradients(model)
    copies = {n for n in mixed if ".modules_to_save." in n}
    assert len(copies) == len(owners) * (1 if module == "lm_head" else 2)
    wanted_loss, wanted = gradients_alone(model, inputs, names)
    assert_network_close(loss.detach(), wanted_loss, "loss")
    assert_gradients_close(mixed, wanted)


def test_a_frozen_adapter_is_applied_and_gets_no_gradient() -> None:
    model = trained_model()
    model.set_requires_grad("e", requires_grad=False)
    inputs = inputs_of(model, tokens_for_rows(len(ROWS)))
    loss_of(model, inputs, adapter_names=ROWS).backward()
    mixed = gradients(model)
    assert not any(belongs(parameter, "e") for parameter in mixed)
    loss, wanted = gradients_alone(model, inputs, ROWS)
    assert_network_close(loss_of(model, inputs, adapter_names=ROWS).detach(), loss, "loss")
    wanted = {n: g for n, g in wanted.items() if not belongs(n, "e")}
    assert_gradients_close(mixed, wanted)


def test_gradients_of_several_batches_add_up() -> None:
    model, other = trained_model(), ["a", "c", BASE, "a", "d", "c"]
    inputs = inputs_of(model, tokens_for_rows(len(ROWS)))
    parts = []
    for names in (ROWS, other):
        loss_of(model, inputs, adapter_names=names).backward()
        parts.append(gradients(model))
    loss = loss_of(model, inputs, adapter_names=ROWS)
    (loss + loss_of(model, inputs, adapter_names=other)).backward()
    wanted = {
        n: sum(part[n] for part in parts if n in part)
        for n in dict.fromkeys([*parts[0], *parts[1]])
    }
    assert_gradients_close(gradients(model), wanted)


def test_dropout_of_the_lora_acts_in_training_only() -> None:
    base = nn.Sequential(nn.Linear(6, 16))
    model = with_adapters(base, configs("d", "e", target_modules=["0"], lora_dropout=0.5))
    x, names = torch.randn(3, 50, 6), ["d", BASE, "e"]
    still = model(x, adapter_names=names)
    assert torch.equal(model(x, adapter_names=names), still)
    model.train()
    first, second = (model(x, adapter_names=names) for _ in range(2))
    for i in (0, 2):
        assert not torch.equal(first[i], second[i])
    assert torch.equal(first[1], still[1])
    assert torch.equal(model.eval()(x, adapter_names=names), still)


# ---- optimisers ---------------------------------------------------------------------------------


def test_each_adapter_is_trained_to_the_values_of_training_it_alone() -> None:
    inputs_per_step = [tokens_for_rows(len(ROWS)) for _ in range(3)]
    torch.manual_seed(5)
    model = trained_model()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for tokens in inputs_per_step:
        loss_of(model, inputs_of(model, tokens), adapter_names=ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()
    ended = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name in "cde":
        torch.manual_seed(5)
        alone = trained_model()
        alone.set_adapter(name)
        optimizer = torch.optim.SGD(_trained(alone, name), lr=1e-3)
        rows = [i for i, other in enumerate(ROWS) if other == name]
        for tokens in inputs_per_step:
            loss_of(alone, inputs_of(alone, tokens[rows])).backward()
            optimizer.step()
            optimizer.zero_grad()
        for parameter, value in alone.named_parameters():
            if belongs(parameter, name):
                assert not torch.equal(ended[parameter], start[parameter]), parameter
                assert_network_close(ended[parameter], value.detach(), parameter)
    for parameter, value in ended.items():
        if not any(belongs(parameter, name) for name in "cde"):
            assert torch.equal(value, start[parameter]), parameter


class _Rows(torch.utils.data.Dataset):
    """Six texts, each for an adapter."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(3, VOCABULARY, (len(ROWS), 5), generator=generator)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"tokens": self.tokens[ROWS.index(self.names[i])], "name": self.names[i]}


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = torch.stack([row["tokens"] for row in rows])
    names = [row["name"] for row in rows]
    return {"input_ids": tokens, "labels": tokens, "adapter_names": names}


def _train(model: Any, names: list[str], folder: Path, rate: float, **settings: Any) -> float:
    """Train on one batch an epoch, a row for each name, and give the loss at the end."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(names),
        per_device_eval_batch_size=len(names),
        num_train_epochs=3,
        learning_rate=rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model, arguments, data_collator=_collate, train_dataset=_Rows(names))
    call_silently(trainer.train)
    return trainer.evaluate(_Rows(names))["eval_loss"]


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_takes_names_from_a_collator(tmp_path: Path, checkpointing: bool) -> None:
    names = ["c", "e", "d"]
    torch.manual_seed(5)
    model = trained_model()
    # the mean over three rows gives each adapter a third of the gradient
    loss = _train(model, names, tmp_path, 3 * 0.05, gradient_checkpointing=checkpointing)
    ended = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for name in names:
        torch.manual_seed(5)
        alone = trained_model()
        alone.set_adapter(name)
        start = {n: p.detach().clone() for n, p in alone.named_parameters()}
        losses.append(_train(alone, [name], tmp_path / name, 0.05))
        for parameter, value in alone.named_parameters():
            if belongs(parameter, name):
                # transformers computes the loss in float32
                assert_network_close(ended[parameter].float(), value.detach().float(), parameter)
                assert not torch.equal(value, start[parameter]), parameter
    assert loss == pytest.approx(sum(losses) / 3, rel=100 * TOLERANCES[torch.float32])


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_prepared_model_has_the_gradients_of_the_plain_one(mixed_precision: str) -> None:
    model = with_adapters(Mlp(), configs("a", "e", target_modules=["up"])).train()
    model.base_model.set_adapter(["a", "e"])
    x, names = torch.randn(3, 8), ["e", BASE, "a"]
    model(x, adapter_names=names).square().sum().backward()
    wanted = gradients(model)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(x, adapter_names=names).square().sum())
    ours = gradients(accelerator.unwrap_model(prepared))
    assert ours.keys() == wanted.keys()
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[mixed_precision]
    for parameter, gradient in wanted.items():
        # several roundings to half precision lie between the two
        bound = 4 * TOLERANCES[dtype] * gradient.norm()
        assert (ours[parameter] - gradient).norm() <= bound, parameter
