"""The joint calibration: better than rounding, on every kind of model, the same when resumed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apiq_peft import ApiQConfig, ApiQLinear, Calibration, CalibrationError, preset, quantize
from apiq_peft.calibration import block, calibrate, fitting
from apiq_peft.calibration.capture import giving
from apiq_peft.calibration.closed_form import Moments
from tests.apiq_peft._models import KINDS, error, outputs, tiny, tokens


def config(**changes: Any) -> ApiQConfig:
    return ApiQConfig(**{"bits": 2, "group_size": 32, "r": 8, "lora_alpha": 16, **changes})


def run(kind: str, settings: Calibration, samples: Tensor | None = None, **options: Any) -> Any:
    ids = tokens(8) if samples is None else samples
    return quantize(tiny(kind), ids, config(), settings, show_progress=False, **options)


def rounded(kind: str) -> float:
    """Give the error of rounding alone on held-out samples."""
    settings = Calibration(epochs=0)
    model, _ = run(kind, settings)
    return error(outputs(model.eval(), tokens(4, seed=9)), outputs(tiny(kind), tokens(4, seed=9)))


@pytest.mark.parametrize("name", ["fast", "apiq-bw", "apiq-lw", "best"])
def test_every_preset_leaves_less_error_than_rounding(name: str) -> None:
    changes: dict[str, Any] = {} if name == "fast" else {"epochs": 6, "lora_lr": 5e-3}
    model, reports = run("llama", preset(name, **changes))
    held_out = tokens(4, seed=9)
    found = error(outputs(model.eval(), held_out), outputs(tiny("llama"), held_out))
    assert found < 0.95 * rounded("llama")
    for report in reports:
        assert report.error_after < report.error_before
        for losses in report.losses.values():
            assert losses[-1] < losses[0]
        assert {layer.layer for layer in report.layers} >= {f"{report.block}.mlp.up_proj"}


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_calibrated(kind: str, granularity: str) -> None:
    before = tiny(kind)
    trained = {n for n, p in before.named_parameters() if p.requires_grad}
    settings = Calibration(epochs=1, granularity=granularity, closed_form="start", batch_size=2)
    model, reports = quantize(before, tokens(4), config(), settings, show_progress=False)
    assert any(isinstance(m, ApiQLinear) for m in model.modules())
    blocks = 4 if kind in ("t5", "bart") else 2
    assert len(reports) == blocks
    assert all(r.error_after < r.error_before for r in reports)
    found = error(outputs(model.eval(), tokens(4)), outputs(tiny(kind), tokens(4)))
    assert found < 0.5
    assert trained  # the base was trainable before, its norms are again as far as PEFT left them


def test_the_model_computes_what_the_last_block_was_calibrated_to() -> None:
    model, reports = run("llama", preset("fast"))
    full: dict[str, Tensor] = {}
    hooks = []
    for key, held in (("full", tiny()), ("quantised", model.get_base_model())):
        block = held.model.layers[1]
        hooks.append(block.register_forward_hook(lambda m, a, y, key=key: full.__setitem__(key, y)))
        outputs(held, tokens(8)[:1])
    for hook in hooks:
        hook.remove()
    assert error(full["quantised"], full["full"]) == pytest.approx(reports[1].error_after, rel=1e-4)


def test_a_resumed_run_gives_the_same_tensors(tmp_path: Path) -> None:
    settings = preset("best", epochs=2)
    whole, _ = run("llama", settings, folder=tmp_path / "a")
    run("llama", settings, folder=tmp_path / "b")
    (tmp_path / "b" / "model.layers.1.safetensors").unlink()
    resumed, reports = run("llama", settings, folder=tmp_path / "b")
    assert [report.resumed for report in reports] == [True, False]
    wanted = whole.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.state_dict().items())
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = preset("apiq-bw", epochs=1)
    whole, _ = run("llama", settings)
    fit, calls = fitting.fit, []

    def killed(where: str, *rest: Any) -> list[float]:
        calls.append(where)
        if where == "model.layers.1":
            raise KeyboardInterrupt
        return fit(where, *rest)

    monkeypatch.setattr("apiq_peft.calibration.block.fit", killed)
    with pytest.raises(KeyboardInterrupt):
        run("llama", settings, folder=tmp_path)
    monkeypatch.setattr("apiq_peft.calibration.block.fit", fit)
    resumed, reports = run("llama", settings, folder=tmp_path)
    assert [report.resumed for report in reports] == [True, False]
    wanted = whole.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": preset("fast", seed=7)}, "another settings"),
        ({"samples": tokens(8, seed=3)}, "another samples"),
        ({"bits": 3}, "another adapter"),
        ({"model": 5}, "other weights"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run("llama", preset("fast"), folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        quantize(
            tiny(seed=change.get("model", 0)),
            change.get("samples", tokens(8)),
            config(bits=change.get("bits", 2)),
            change.get("settings", preset("fast")),
            folder=tmp_path,
            show_progress=False,
        )


def test_a_broken_block_file_is_refused_by_name(tmp_path: Path) -> None:
    run("llama", preset("fast"), folder=tmp_path)
    (tmp_path / "model.layers.0.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.safetensors cannot be read"):
        run("llama", preset("fast"), folder=tmp_path)


def test_a_loss_that_is_not_finite_is_tried_again_and_then_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = block._distance
    left = [1]

    def once(*args: Any) -> Tensor:
        left[0] -= 1
        return real(*args) * (float("nan") if left[0] == 0 else 1)

    monkeypatch.setattr(block, "_distance", once)
    _, reports = run("llama", preset("apiq-bw", epochs=2, augment_loss=False))
    assert len(reports[0].losses["block"]) == 2
    monkeypatch.setattr(block, "_distance", lambda *args: real(*args) * float("nan"))
    with pytest.raises(CalibrationError, match=r"model\.layers\.0: the loss is nan in epoch 1"):
        run("llama", preset("apiq-bw", epochs=2))


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = (run("llama", preset("best", epochs=1, shuffle=True))[0] for _ in range(2))
    other, _ = run("llama", preset("best", epochs=1, shuffle=True, seed=3))
    wanted = first.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in second.state_dict().items())
    assert any(not torch.equal(t, wanted[n]) for n, t in other.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_arithmetic_stays_finite_with_outliers(dtype: str) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] *= 1e3
    settings = preset("best", epochs=1, compute_dtype=dtype, cache_dtype="float32")
    found, reports = quantize(model, tokens(4), config(), settings, show_progress=False)
    assert all(torch.isfinite(p).all() for p in found.parameters())
    assert all(p.dtype == torch.float32 for n, p in found.named_parameters() if "norm" in n)
    assert all(report.error_after < 1 for report in reports)


def test_the_closed_form_is_the_least_error_of_its_rank() -> None:
    torch.manual_seed(0)
    z = torch.randn(400, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    missing = z @ torch.randn(24, 10, dtype=torch.float64) + torch.randn(400, 10).double()
    moments = Moments(24, {"layer": 10}, torch.device("cpu"))
    for part in range(0, 400, 100):
        moments.add(z[part : part + 100].float(), {"layer": missing[part : part + 100].float()})
    a, b = moments.solve(3, damping=1e-9)["layer"]
    assert a.shape == (3, 24)
    assert b.shape == (10, 3)

    def left(a: Tensor, b: Tensor) -> float:
        return float((missing - z @ a.double().t() @ b.double().t()).norm())

    best = left(a, b)
    free = torch.linalg.lstsq(z, missing).solution
    right = torch.linalg.svd(z @ free, full_matrices=False).Vh[:3]  # reduced-rank regression
    projected = free @ right.t() @ right
    assert best == pytest.approx(float((missing - z @ projected).norm()), rel=1e-4)
    for _ in range(20):
        assert left(a + 0.01 * torch.randn_like(a), b + 0.01 * torch.randn_like(b)) > best


@pytest.mark.parametrize("outputs", [10, 40])
@pytest.mark.parametrize("missing_rank", [0, 2])
def test_a_rank_above_what_is_missing_adds_nothing(missing_rank: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.randn(n, missing_rank, generator=generator, dtype=torch.float64)
        for n in (24, outputs)
    )
    moments = Moments(24, {"layer": outputs}, torch.device("cpu"))
    moments.second += torch.eye(24)
    moments.cross["layer"] += left @ right.t()  # other singular values are 0 up to rounding
    moments.tokens += 1
    a, b = moments.solve(min(24, outputs), damping=0.0)["layer"]
    assert torch.cat((a.flatten(), b.flatten())).abs().max() < 1e3
    torch.testing.assert_close(b @ a, (right @ left.t()).float(), rtol=1e-4, atol=1e-4)


def test_a_rank_above_the_width_of_a_layer_is_filled_up() -> None:
    _, reports = quantize(
        tiny(), tokens(4), config(r=100, lora_alpha=100), preset("fast"), show_progress=False
    )
    assert all(report.error_after < report.error_before for report in reports)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(3), "samples have shape"),
        (torch.zeros(2, 3), "dtype torch.float32"),
        (torch.zeros(0, 3, dtype=torch.int64), "samples have shape"),
        ([], "there are no samples"),
    ],
)
def test_samples_of_no_use_are_refused(samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(tiny(), samples, config(), preset("fast"), show_progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "model"}, "granularity is 'model'; choose from block, layer"),
        ({"epochs": -1}, "epochs is -1"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"compute_dtype": "int8"}, "compute_dtype is 'int8'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration(**changes)
    with pytest.raises(ValueError, match="preset is 'none'"):
        preset("none")


def test_layers_outside_of_blocks_are_refused_and_nothing_is_changed() -> None:
    model = tiny()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="lm_head lies outside of the blocks"):
        quantize(model, tokens(), config(target_modules=["q_proj", "lm_head"]), preset("fast"))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def padded(filler: int) -> dict[str, Tensor]:
    """Give samples of which the second half is padding, but for the first."""
    ids, mask = tokens(4), torch.ones(4, 12, dtype=torch.int64)
    mask[1:, 6:] = 0
    return {"input_ids": torch.where(mask == 1, ids, filler), "attention_mask": mask}


@pytest.mark.parametrize("name", ["apiq-bw", "apiq-lw", "fast"])
def test_padding_counts_for_nothing(name: str) -> None:
    settings = preset(name) if name == "fast" else preset(name, epochs=2)

    def quantised(**batch: Tensor) -> tuple[dict[str, Tensor], list[float]]:
        model, reports = quantize(tiny(), [batch], config(), settings, show_progress=False)
        return model.state_dict(), [report.error_after for report in reports]

    wanted, errors = quantised(**padded(5))
    found, others = quantised(**padded(9))
    for key, tensor in found.items():
        assert torch.allclose(tensor.float(), wanted[key].float(), atol=1e-5), key
    assert others == pytest.approx(errors, rel=1e-4)
    unmasked, _ = quantised(input_ids=padded(5)["input_ids"])
    assert any(not torch.equal(tensor, wanted[n]) for n, tensor in unmasked.items())
    ones = torch.ones(4, 12, dtype=torch.int64)
    same, _ = quantised(input_ids=padded(5)["input_ids"], attention_mask=ones)
    assert all(torch.equal(tensor, unmasked[n]) for n, tensor in same.items())


def test_padding_of_the_encoder_counts_for_nothing_in_the_decoder() -> None:
    def quantised(filler: int) -> dict[str, Tensor]:
        batch = {**padded(filler), "decoder_input_ids": tokens(4, seed=3)}  # of the same length
        model, _ = quantize(tiny("bart"), [batch], config(), preset("fast"), show_progress=False)
        return model.state_dict()

    wanted, found = quantised(5), quantised(9)
    for key, tensor in found.items():
        assert torch.allclose(tensor.float(), wanted[key].float(), atol=1e-4), key


def test_the_final_states_are_those_of_the_full_precision_model() -> None:
    model, batches = tiny(), [{"input_ids": ids} for ids in tokens(4).split(2)]
    states: list[Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda m, a, y: states.append(y))
    for batch in batches:
        outputs(model, batch["input_ids"])
    handle.remove()
    result = calibrate(model, batches, config(), preset("fast"), show_progress=False)
    for number, wanted in enumerate(states):
        assert torch.allclose(result.final.states(number), wanted, atol=1e-6)
        ids = batches[number]["input_ids"]
        with giving([result.final], number):  # norm and head are not quantised
            assert torch.allclose(outputs(model, ids), outputs(tiny(), ids), atol=1e-5)
        assert not torch.allclose(outputs(model, ids), outputs(tiny(), ids), atol=1e-2)


def test_the_bar_shows_what_is_trained_and_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = preset("apiq-lw", epochs=2, batch_size=4)
    quantize(tiny(), tokens(4), config(), settings)
    last = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line]
    assert "30/30" in last[-1]  # two epochs of 14 layers, and the end of two blocks
    text = "\n".join(last)
    assert "model.layers.1" in text
    assert "epoch 2/2 loss" in text
    assert "<" in last[len(last) // 2]  # tqdm: time taken < time left


def test_a_cache_without_room_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"layers-full-00000\.bin: no room for .*cache_dir"):
        run("llama", preset("fast", cache_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_relative_loss_keeps_one_token_from_outweighing_the_others() -> None:
    wanted = torch.ones(1, 3, 4)
    wanted[0, 0] = 1e3
    y = wanted * 1.1
    assert float(block._distance(y, wanted, None, "relative")) == pytest.approx(0.01, rel=1e-3)
    shares = torch.tensor([[0.0, 1.0, 1.0]])
    assert float(block._distance(y, wanted, shares, "mse")) == pytest.approx(0.01, rel=1e-3)
    assert float(block._distance(y, wanted, None, "mse")) > 1e3
