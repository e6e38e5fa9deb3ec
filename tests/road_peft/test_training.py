"""Training loops: plain, accelerate, transformers.Trainer, two processes, and half precision."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from road_peft import RoadConfig
from tests.helpers import TOLERANCES
from tests.road_peft._models import VOCABULARY, Mlp, adapted, randomize, tiny

ROOT = Path(__file__).parents[2]
VARIANTS = ("road_1", "road_2", "road_4")


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in _trained(model)]


def _mlp(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    config = RoadConfig(target_modules=["up", "down"], **{"group_size": 4, **settings})
    return get_peft_model(Mlp(), config)


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 8), torch.randn(16, 4)


def _losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    x, target = _data()
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


# ---- a plain loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_adapter_is_trained_and_the_loss_goes_down(variant: str) -> None:
    model = _mlp(variant=variant)
    trained = {id(p) for p in _trained(model)}
    frozen = {n: p.clone() for n, p in model.named_parameters() if id(p) not in trained}
    before = _values(model)
    losses = _losses(model, torch.optim.Adam(_trained(model), lr=0.05), 8)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(_values(model), before, strict=True))
    assert len(frozen) == 4
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())


def test_training_goes_on_after_the_state_of_the_optimizer_is_loaded(tmp_path: Path) -> None:
    model = _mlp(variant="road_2")
    optimizer = torch.optim.AdamW(_trained(model), lr=0.05, weight_decay=0)
    _losses(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    wanted = _losses(model, optimizer, 3)

    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mlp(), tmp_path, is_trainable=True)
    resumed = torch.optim.AdamW(_trained(again), lr=0.05, weight_decay=0)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert _losses(again, resumed, 3) == wanted
    fresh = torch.optim.AdamW(_trained(again), lr=0.05, weight_decay=0)
    assert _losses(again, fresh, 3) != wanted


def test_an_adapter_loaded_for_inference_is_frozen(tmp_path: Path) -> None:
    _mlp().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Mlp(), tmp_path)
    assert not _trained(model)


# ---- precision ----------------------------------------------------------------------------------

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_base_keeps_adapters_in_float32(dtype: torch.dtype) -> None:
    config = RoadConfig(group_size=8, variant="road_2")
    model = randomize(get_peft_model(tiny("llama", dtype=dtype), config))
    assert {p.dtype for p in _trained(model)} == {torch.float32}
    ids = torch.arange(12).view(2, 6) % VOCABULARY
    output = model(input_ids=ids, labels=ids)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in _trained(model))


def test_small_steps_are_not_lost_in_a_bfloat16_model() -> None:
    model = _mlp().to(torch.bfloat16)
    for p in _trained(model):
        p.data = p.data.float()
    optimizer = torch.optim.SGD(_trained(model), lr=1e-5)
    before = _values(model)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    (model(x).float() - 1).square().sum().backward()
    optimizer.step()
    moved = [(a - b).abs().max() for a, b in zip(_values(model), before, strict=True)]
    assert all(0 < m < 2**-8 for m in moved)  # bfloat16 would round 1 + m back to 1


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_gives_the_gradients_of_full_precision(dtype: torch.dtype) -> None:
    model = randomize(_mlp(variant="road_2"))
    x, _ = _data()
    model(x).square().mean().backward()
    wanted = [p.grad.clone() for p in _trained(model)]
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
        assert y.dtype == dtype
        loss = y.float().square().mean()
    loss.backward()
    assert {p.grad.dtype for p in _trained(model)} == {torch.float32}
    ours, reference = (
        torch.cat([g.flatten() for g in gradients])
        for gradients in ([p.grad for p in _trained(model)], wanted)
    )
    # Several roundings to half precision lie between the two.
    assert (ours - reference).norm() < 4 * TOLERANCES[dtype] * reference.norm()


# ---- accelerate ---------------------------------------------------------------------------------


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_with_accumulation(mixed_precision: str) -> None:
    x, target = _data()
    reference = _mlp(variant="road_2")
    optimizer = torch.optim.SGD(_trained(reference), lr=0.1)
    (reference(x) - target).square().mean().backward()
    optimizer.step()

    accelerator = Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=4
    )
    model = _mlp(variant="road_2")
    before = _values(model)
    optimizer = torch.optim.SGD(_trained(model), lr=0.1)
    loader = torch.utils.data.DataLoader(list(zip(x, target, strict=True)), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for rows, wanted in loader:
        with accelerator.accumulate(model):
            loss = (model(rows) - wanted).float().square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    bound = {"no": 1e-6, "bf16": 0.01}[mixed_precision]
    unwrapped = accelerator.unwrap_model(model)
    for a, b, start in zip(_values(unwrapped), _values(reference), before, strict=True):
        assert not torch.equal(a, start)
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


# ---- two processes ------------------------------------------------------------------------------

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from tests.road_peft.test_training import _data, _mlp, _trained, _values

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", world_size=2, rank=rank)
model = _mlp(variant="road_2")
run = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.Adam(_trained(model), lr=0.05)
x, target = _data()
losses = []
for _ in range(4):
    loss = (run(x[rank::2]) - target[rank::2]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / 2
    dist.all_reduce(mean)
    losses.append(mean.item())
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({"losses": losses, "values": [p.tolist() for p in _values(model)]}, file)
dist.destroy_process_group()
"""


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    model = _mlp(variant="road_2")
    wanted = _losses(model, torch.optim.Adam(_trained(model), lr=0.05), 4)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["losses"] == pytest.approx(wanted, rel=1e-5)
    for values, reference in zip(first["values"], _values(model), strict=True):
        assert values == pytest.approx(reference.tolist(), rel=1e-4, abs=1e-5)


# ---- transformers.Trainer -----------------------------------------------------------------------


def _llama() -> PeftModel:
    torch.manual_seed(0)
    base = tiny("llama", num_hidden_layers=1)
    return get_peft_model(base, RoadConfig(group_size=8, variant="road_2", task_type="CAUSAL_LM"))


_TRAINER = {
    "per_device_train_batch_size": 4,
    "learning_rate": 0.02,
    "max_steps": 6,
    "save_strategy": "no",
}


def _trainer(model: nn.Module, folder: Path, **settings: Any) -> Trainer:
    rows = [torch.arange(start, start + 6) % VOCABULARY for start in range(8)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **{**_TRAINER, **settings},
    )
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def _logged(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_trainer_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    trainer = _trainer(_llama(), tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    losses, values = _logged(trainer), _values(trainer.model)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()

    resumed = _trainer(_llama(), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert _logged(resumed)[-3:] == losses[-3:]
    for ours, wanted in zip(_values(resumed.model), values, strict=True):
        assert torch.equal(ours, wanted)


def test_trainer_loads_the_best_model_at_the_end(tmp_path: Path) -> None:
    trainer = _trainer(
        _llama(),
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=1.0,  # so large that the last step is not the best
        max_steps=4,
    )
    trainer.train()
    losses = _logged(trainer, "eval_loss")
    assert min(losses) != losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    trainer = _trainer(_llama(), tmp_path_factory.mktemp("plain"), max_steps=3)
    trainer.train()
    return _logged(trainer)


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_trainer_with(settings: dict[str, Any], plain_losses, tmp_path: Path) -> None:
    trainer = _trainer(_llama(), tmp_path, **{"max_steps": 3, **settings})
    trainer.train()
    assert _logged(trainer)[-1] < _logged(trainer)[0]
    assert _logged(trainer) == pytest.approx(plain_losses, rel=1e-2)
    assert {p.dtype for p in _trained(trainer.model)} == {torch.float32}


def test_trainer_takes_a_model_with_an_adapter_of_its_own(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.add_adapter(RoadConfig(group_size=8))
    trainer = _trainer(model, tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    assert _logged(trainer)[-1] < _logged(trainer)[0]
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()
    assert len(list(adapted(model))) == 7
