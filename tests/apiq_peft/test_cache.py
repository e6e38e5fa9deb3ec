"""What waits between blocks: off the device, once, and in files that leave nothing behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apiq_peft import ApiQConfig, preset, quantize
from apiq_peft.calibration import activations, calibrate
from apiq_peft.calibration.activations import Activations, Cache
from apiq_peft.calibration.capture import Call, capture
from apiq_peft.calibration.stacks import find_stacks
from tests.apiq_peft._models import tiny, tokens

CONFIG = ApiQConfig(bits=2, group_size=32, r=4)


def test_files_of_one_folder_do_not_meet_and_leave_nothing(tmp_path: Path) -> None:
    first, second = (Activations(Cache(tmp_path / "new"), torch.float16, "x") for _ in range(2))
    first.append(torch.ones(2, 3))
    second.append(torch.zeros(2, 3))
    cpu = torch.device("cpu")
    assert torch.equal(first.get(0, cpu, torch.float32), torch.ones(2, 3))
    assert torch.equal(second.get(0, cpu, torch.float32), torch.zeros(2, 3))
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_all_that_waits_is_in_files_if_asked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantised(**more: Any) -> dict[str, Tensor]:
        settings = preset("apiq-lw", epochs=1, batch_size=2, **more)
        found, _ = quantize(tiny(kind), tokens(4), CONFIG, settings, show_progress=False)
        return dict(found.state_dict())

    wanted, real, names = quantised(), activations._mapped, set()

    def mapped(path: Path, *rest: Any) -> Tensor:
        names.add(path.stem.split("layers-")[-1])
        return real(path, *rest)

    monkeypatch.setattr(activations, "_mapped", mapped)
    found = quantised(cache_dir=str(tmp_path))
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in found.items())
    for name in ("full", "target", "quantized", "x", "z"):
        assert {f"{name}-00000", f"{name}-00001"} <= names
    assert "argument-00000" in names
    assert not list(tmp_path.iterdir())


def test_states_of_a_batch_are_gone_before_the_next() -> None:
    model = tiny()
    (stack,) = find_stacks(model, ["model.layers.0.mlp.up_proj"])
    seen: list[weakref.ref[Tensor]] = []

    def enter(states: Tensor) -> None:
        gc.collect()
        assert all(before() is None for before in seen)
        seen.append(weakref.ref(states))

    batches = [{"input_ids": ids} for ids in tokens(3).split(1)]
    found = capture(model, stack, batches, [], torch.device("cpu"), Cache(), enter)
    assert len(seen) == 3
    masks = [call.kwargs["position_embeddings"][0] for calls in found.calls for call in calls]
    assert len({id(mask) for mask in masks}) == 1  # equal ones are kept once


def test_arguments_go_to_the_device_of_the_states() -> None:
    class Block(nn.Module):
        def forward(self, states: Tensor, mask: Tensor, where: tuple[Tensor, ...]) -> Tensor:
            return states + mask + where[0]

    call = Call((torch.zeros(3),), {"where": (torch.zeros(3, dtype=torch.int64),)})
    states = torch.zeros(3, dtype=torch.bfloat16, device="meta")
    assert call.run(Block(), states).device.type == "meta"
    assert call.run(Block(), states).dtype == torch.bfloat16


def test_codes_are_packed_as_soon_as_their_block_is_done() -> None:
    gc.collect()
    gc.freeze()
    try:
        batches = [{"input_ids": tokens(2)}]
        result = calibrate(tiny(), batches, CONFIG, preset("fast"), show_progress=False)
        gc.collect()
        held = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.dtype == torch.uint8]
    finally:
        gc.unfreeze()
    assert len(result.factors) == 14
    assert not held
