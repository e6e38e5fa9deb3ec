"""Two processes find what one finds with batches twice as large, and fail together."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apiq_peft import ApiQConfig, Calibration, CalibrationError, preset, quantize
from apiq_peft.calibration import block
from apiq_peft.calibration.processes import Processes
from apiq_peft.quantize import quantize_folder
from tests.apiq_peft._models import tiny, tokens

CONFIG = ApiQConfig(bits=2, group_size=32, r=4, lora_alpha=8)
STEPS = preset("best", epochs=2, shuffle=True, step_batches=4)
RUNS: dict[str, Calibration] = {
    "block": preset("best", epochs=2, shuffle=True),
    "layer": preset("apiq-lw", epochs=2, lora_lr=5e-3),
    "refit": preset("fast", closed_form="refit"),
    "steps": STEPS,
}
LAYERS = preset("apiq-lw", epochs=2, shuffle=True, closed_form="start", shared="layers")


def padded(size: int) -> list[Mapping[str, Tensor]]:
    """Give batches of some samples each, every other sample half padding."""
    ids, mask = tokens(8), torch.ones(8, 12, dtype=torch.int64)
    mask[1::2, 6:] = 0
    parts = zip(ids.split(size), mask.split(size), strict=True)
    return [{"input_ids": i, "attention_mask": m} for i, m in parts]


def solved(settings: Calibration, size: int, **options: Any) -> dict[str, Tensor]:
    """Give all tensors of the quantised model, and the errors and losses that were reported."""
    model, reports = quantize(
        tiny(), padded(size), CONFIG, settings, show_progress=False, **options
    )
    found = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}
    found["errors"] = torch.tensor([[r.error_before, r.error_after] for r in reports])
    found["losses"] = torch.tensor([v for r in reports for loss in r.losses.values() for v in loss])
    return found


def assert_alike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare all tensors of `wanted`, to rounding."""
    for key, tensor in wanted.items():
        if tensor.is_floating_point():
            assert torch.allclose(found[key].float(), tensor.float(), rtol=1e-3, atol=1e-4), key
        else:  # a weight on the edge between two codes may fall to either side
            assert (found[key] != tensor).float().mean() < 0.02, key


def one_of_two(rank: int, port: int, out: Path) -> None:
    """Do what one of two processes does in the tests below; what it saw lies in files of it."""
    os.environ |= {  # as a launcher sets them
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for name, settings in RUNS.items():
        save_file(solved(settings, 1), out / f"{name}-{rank}.safetensors")
    torch.set_num_threads(1)
    save_file(solved(LAYERS, 1), out / f"layers-{rank}.safetensors")
    messages = []

    def failing(action: Callable[[], Any]) -> None:
        try:
            action()
        except (ValueError, RuntimeError, OSError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    failing(lambda: quantize(tiny(), tokens(3), CONFIG, RUNS["block"], show_progress=False))

    real, left = block._distance, [3 if rank else -1]  # the second fails at first

    def once(*args: Any) -> Tensor:
        left[0] -= 1
        return real(*args) * (float("nan") if left[0] == 0 else 1)

    block._distance = once
    _, reports = quantize(
        tiny(), tokens(4), CONFIG, preset("apiq-bw", epochs=2), show_progress=False
    )
    block._distance = real
    save_file({"losses": torch.tensor(reports[0].losses["block"])}, out / f"nan-{rank}.safetensors")

    run = (out / "source", out / "out", tokens(4), CONFIG, preset("fast"))
    quantize_folder(*run, show_progress=False)
    failing(lambda: quantize_folder(*run, show_progress=False))
    (out / "broken").mkdir(exist_ok=True)
    (out / "broken" / "calibration.json").write_text("nonsense")
    failing(lambda: solved(preset("fast"), 1, folder=out / "broken"))
    failing(lambda: solved(preset("fast", step_batches=3), 1))
    failing(lambda: quantize(tiny(), tokens(6), CONFIG, STEPS, show_progress=False))
    # interrupted in the second block, for one process to go on
    real_fit, failed = block.fit, RuntimeError("interrupted")

    def interrupted(where: str, *args: Any) -> list[float]:
        if "1" in where:
            raise failed
        return real_fit(where, *args)

    block.fit = interrupted
    failing(lambda: solved(STEPS, 1, folder=out / "interrupted"))

    def diverged(where: str, *args: Any) -> list[float]:
        if "1.self_attn.k_proj" in where:
            raise CalibrationError(f"{where} diverged")
        return real_fit(where, *args)

    block.fit = diverged
    failing(lambda: solved(LAYERS, 1, folder=out / "layers"))
    block.fit = real_fit
    (out / f"messages-{rank}").write_text("\n".join(messages))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    tiny().save_pretrained(out / "source")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # which imports the libraries once
    context.set_forkserver_preload([__name__])
    started = [context.Process(target=one_of_two, args=(rank, port, out)) for rank in range(2)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(timeout=120)
    finally:
        for process in started:
            process.kill()
    assert [process.exitcode for process in started] == [0, 0]
    return out


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_find_what_one_finds_with_batches_of_two(name: str, both: Path) -> None:
    first, second = (load_file(both / f"{name}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(tensor, second[n]) for n, tensor in first.items())
    alone = solved(RUNS[name], 1 if name == "steps" else 2)
    assert first.keys() == alone.keys()
    if name == "steps":  # errors are of the first batches: another one for each process
        alone.pop("errors")
    assert_alike(first, alone)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sum in the order of the two processes, which bits may depend on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_that_share_layers_find_what_one_finds(both: Path) -> None:
    first, second = (load_file(both / f"layers-{rank}.safetensors") for rank in range(2))
    alone = solved(LAYERS, 1)
    assert first.keys() == alone.keys()
    assert all(torch.equal(tensor, second[n]) for n, tensor in first.items())
    assert all(torch.equal(tensor, first[n]) for n, tensor in alone.items())


@pytest.mark.usefixtures("one_thread")
def test_a_layer_that_diverges_on_one_process_stops_both(both: Path) -> None:
    first, second = ((both / f"messages-{rank}").read_text().splitlines() for rank in range(2))
    wanted = "CalibrationError: model.layers.1.self_attn.k_proj diverged"
    assert first[6] == second[6] == wanted
    assert [p.name for p in (both / "layers").glob("*.safetensors")] == [
        "model.layers.0.safetensors"
    ]
    # either way of sharing goes on from what the other left
    found = solved(replace(LAYERS, shared="samples"), 1, folder=both / "layers")
    alone = solved(LAYERS, 1)
    losses = found.pop("losses")
    assert torch.equal(losses, alone.pop("losses")[-len(losses) :])
    assert all(torch.equal(tensor, found[n]) for n, tensor in alone.items())


def test_layers_that_learn_together_cannot_be_shared() -> None:
    for settings in ({"granularity": "block"}, {"granularity": "layer", "final_epochs": 1}):
        with pytest.raises(ValueError, match="share 'samples', or set granularity to 'layer'"):
            Calibration(shared="layers", **settings)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_on_one_makes_both_try_again(both: Path) -> None:
    first, second = (load_file(both / f"nan-{rank}.safetensors")["losses"] for rank in range(2))
    assert torch.equal(first, second)
    settings = preset("apiq-bw", epochs=2, batch_size=2)
    _, reports = quantize(tiny(), tokens(4), CONFIG, settings, show_progress=False)
    assert len(first) == 2
    assert float(first[1]) > reports[0].losses["block"][1]  # it went on at a tenth of the rates


def test_a_folder_is_written_by_the_first(both: Path) -> None:
    assert sorted(p.name for p in (both / "out").iterdir()) == ["adapter", "base"]
    found = load_file(both / "out" / "adapter" / "adapter_model.safetensors")
    alone, _ = quantize(
        tiny(), tokens(4), CONFIG, preset("fast", batch_size=2), show_progress=False
    )
    for name, tensor in found.items():
        wanted = alone.get_parameter(name.replace(".weight", ".default.weight"))
        assert torch.allclose(tensor, wanted, atol=1e-4)


def test_both_fail_with_a_reason(both: Path) -> None:
    first, second = ((both / f"messages-{rank}").read_text().splitlines() for rank in range(2))
    assert first[0] == second[0]
    assert "3 batches cannot be shared evenly by 2 processes" in first[0]
    assert "exists; choose a new folder" in first[1]
    assert "exists; choose a new folder" in second[1]
    assert "calibration.json cannot be read" in first[2]
    assert second[2].startswith("RuntimeError: the first process failed")
    assert "the 3 batches of a step cannot be shared evenly by 2 processes" in first[3]
    assert "6 batches cannot be shared evenly in steps of 4 by 2 processes" in first[4]


def test_another_number_of_processes_goes_on(both: Path) -> None:
    folder = both / "interrupted"
    assert "interrupted" in (both / "messages-1").read_text().splitlines()[5]
    done = sorted(p.name for p in folder.glob("*.safetensors"))
    assert done == ["model.layers.0.safetensors"]
    settings = replace(STEPS, step_batches=None)  # the folder knows
    found, wanted = solved(settings, 1, folder=folder), solved(STEPS, 1)
    losses = len(wanted["losses"]) - STEPS.epochs  # those of the first block are gone
    assert torch.allclose(found.pop("losses"), wanted.pop("losses")[-losses:], rtol=1e-3)
    assert_alike(found, wanted)


def test_a_program_alone_is_one_process() -> None:
    alone = Processes.running()
    assert (alone.rank, alone.count) == (0, 1)
    assert alone.share([1, 2, 3]) == [1, 2, 3]
    assert alone.relative([3.0, 5.0], torch.device("cpu")) == [1.0, 1.0]
    by_two = alone.stepping(2)
    assert by_two.steps(4) == [[0, 1], [2, 3]]
    assert by_two.relative([3.0, 5.0], torch.device("cpu")) == [0.75, 1.25]
