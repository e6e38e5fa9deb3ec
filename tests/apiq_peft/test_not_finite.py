"""Values that are not finite: tried again, then named, and never in a model or a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apiq_peft import ApiQConfig, CalibrationError, preset, quantize
from apiq_peft.calibration import block, end_to_end
from tests.apiq_peft._models import tiny, tokens

TWO = preset("apiq-bw", epochs=2, batch_size=2)  # two steps in each of two epochs


def run(settings: Any, model: Any = None, samples: Any = None, **options: Any) -> Any:
    return quantize(
        tiny() if model is None else model,
        tokens(4) if samples is None else samples,
        ApiQConfig(bits=2, group_size=32, r=4),
        settings,
        show_progress=False,
        **options,
    )


def spoiled(spoil: Callable[[Tensor], Tensor], *calls: int) -> Callable[..., Tensor]:
    """Give the distance of an output, `spoil`ed in the calls of those numbers, or in all."""
    real, count = block._distance, [0]

    def distance(*args: Any) -> Tensor:
        count[0] += 1
        found = real(*args)
        return spoil(found) if count[0] in calls or not calls else found

    return distance


def without_gradient(loss: Tensor) -> Tensor:
    """Give a loss that is finite, with a gradient that is not."""
    loss.register_hook(lambda gradient: gradient * torch.nan)
    return loss


def test_a_gradient_that_is_not_finite_in_the_last_step_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = preset("apiq-bw", epochs=2, batch_size=2, augment_loss=False)
    monkeypatch.setattr(block, "_distance", spoiled(without_gradient, 8))  # of 2 x 2 x 2
    found, reports = run(settings)
    assert all(torch.isfinite(p).all() for p in found.state_dict().values())
    assert len(reports[1].losses["block"]) == 2
    (told,) = (r.getMessage() for r in caplog.records if "tenth" in r.getMessage())
    assert re.match(
        r"model\.layers\.1: A, B or the clipping is not finite in epoch 2, step 2", told
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TWO, r"layers\.0: A, B .* is not finite in epoch 1, step 1, in layer self_attn\.q_proj,"),
        (
            preset("apiq-lw", epochs=1),
            r"layers\.0\.self_attn\.q_proj: A, B .* epoch 1, step 1, also",
        ),
    ],
)
def test_a_gradient_that_stays_so_is_named(
    monkeypatch: pytest.MonkeyPatch, settings: Any, message: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(block, "_distance", spoiled(without_gradient))
    with pytest.raises(CalibrationError, match=message):
        run(settings, folder=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_layer_whose_output_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, fit, trained = block.StudentLinear.forward, block.fit, []

    def overflowing(layer: Any, x: Tensor) -> Tensor:
        down = layer.weight.shape[1] == 128
        return forward(layer, x) * (torch.inf if down and trained else 1)

    def fitting(where: str, *args: Any) -> Any:
        trained.append(where)
        return fit(where, *args)

    monkeypatch.setattr(block.StudentLinear, "forward", overflowing)
    monkeypatch.setattr(block, "fit", fitting)
    with pytest.raises(CalibrationError, match=r"loss is (nan|inf) in .*, in layer mlp\.down_proj"):
        run(TWO)


def test_activations_that_overflow_are_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    real = block._inputs_of

    def overflowing(work: Any, name: str, batch: int) -> tuple[Tensor, Tensor]:
        x, z = real(work, name, batch)
        return x, z * (torch.inf if name == "mlp.gate_proj" else 1)

    monkeypatch.setattr(block, "_inputs_of", overflowing)
    with pytest.raises(CalibrationError, match=r"layers\.0: .* layer mlp\.gate_proj are not"):
        run(preset("fast"))


def test_a_block_that_overflows_in_a_narrow_dtype_is_named(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2e5)
    settings = preset("fast", compute_dtype="float16", cache_dtype="float16")
    with pytest.raises(CalibrationError, match=r"layers\.1 gives .* for batch 1, in layer mlp\."):
        run(settings, model, folder=tmp_path)
    assert [path.stem for path in tmp_path.glob("*.safetensors")] == ["model.layers.0"]


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(CalibrationError, match=r"layers\.0 gives .* in layer mlp\.up_proj"):
        run(preset("fast"), model)


@pytest.mark.parametrize("spoil", [without_gradient, lambda loss: loss * torch.nan])
def test_the_last_pass_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]
) -> None:
    real, count = end_to_end._divergences, [0]

    def spoiled_at(*calls: int) -> None:
        count[0] = 0

        def divergences(*args: Any) -> Tensor:
            count[0] += 1
            found = real(*args)
            return spoil(found) if count[0] in calls or not calls else found

        monkeypatch.setattr(end_to_end, "_divergences", divergences)

    settings = preset("fast", final_epochs=2, batch_size=2)
    spoiled_at(4)
    found, reports = run(settings)
    assert len(reports[-1].losses["end to end"]) == 2
    assert all(torch.isfinite(p).all() for p in found.state_dict().values())
    assert all(p.grad is None for p in found.parameters())
    spoiled_at()
    with pytest.raises(CalibrationError, match=r"last pass is n.*epoch 1, step 1.* a tenth"):
        run(settings)


def test_a_batch_of_padding_alone_counts_for_nothing_in_the_last_pass() -> None:
    ids, mask = tokens(4), torch.ones(4, 12, dtype=torch.int64)
    mask[2:] = 0
    parts = zip(ids.split(2), mask.split(2), strict=True)
    batches = [{"input_ids": i, "attention_mask": m} for i, m in parts]
    found, _ = run(preset("fast", final_epochs=1), samples=batches)
    assert all(torch.isfinite(p).all() for p in found.state_dict().values())
