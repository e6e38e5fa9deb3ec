"""The self-correction recipe: long, interrupted, shared and low-precision runs of the script."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed import _two
from tests.examples import _recipes

FEW = ("--smoke", "--steps", "6", "--checks", "3", "--test-pairs", "2", "--warm-steps", "0")
FEW += ("--train-pairs", "24", "--check-pairs", "8", "--side-seeds", "0", "--rates", "0.5")


def results(out: str = "demo-output") -> dict[str, Any]:
    return json.loads(Path(out, "results.json").read_text(encoding="utf-8"))


def numbers(out: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in run.items() if k != "seconds"} for run in results(out)["runs"]]


def run(*argv: str, change: Callable[[Any], None] = lambda modules: None) -> int:
    """Run the script; `change` is given its modules first."""
    with _recipes.beside("self_correction") as modules:
        change(modules)
        return _recipes.run("self_correction", *argv)


class Interruptedly:
    """Stop training before the check at its end, if asked to; note the steps that were made."""

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self.steps: list[int] = []

    def __call__(self, modules: Any) -> None:
        inner = modules.correcting.Watch.on_step_end

        def on_step_end(watch: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps.append(state.global_step)
            if self.stop and state.global_step == state.max_steps:
                raise KeyboardInterrupt
            inner(watch, args, state, control, **kwargs)

        modules.correcting.Watch.on_step_end = on_step_end


@pytest.mark.parametrize(
    ("tuner", "arm"), [("road", "self"), ("road", "distilled"), ("apiq", "self"), ("full", "self")]
)
def test_an_interrupted_run_goes_on_and_ends_the_same(
    tuner: str, arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    argv = (*FEW, "--tuners", tuner, "--arms", arm, "--side-seeds", "1", "--keep", "best")
    whole, first, second = Interruptedly(False), Interruptedly(True), Interruptedly(False)
    assert run(*argv, "--out", "whole", change=whole) == 0
    assert whole.steps == [1, 2, 3, 4, 5, 6]
    assert not Path("whole/trainer").exists()
    argv += ("--out", "parts", "--save-steps", "2")
    with pytest.raises(KeyboardInterrupt):
        run(*argv, change=first)
    kept = [path.name for path in Path("parts/trainer").glob("*/checkpoint-*")]
    assert kept == ["checkpoint-4"]
    assert run(*argv, change=second) == 0
    assert second.steps == [5, 6]
    assert not Path("parts/trainer").exists()
    assert numbers("parts") == numbers("whole")
    if tuner == "road":
        file = f"adapters/road-0.5-{arm}-0/adapter_model.safetensors"
        ours, theirs = load_file(f"parts/{file}"), load_file(f"whole/{file}")
        assert all((tensor == theirs[name]).all() for name, tensor in ours.items())


def test_a_run_of_other_settings_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    argv = (*FEW, "--tuners", "road", "--arms", "self", "--save-steps", "2")
    with pytest.raises(KeyboardInterrupt):
        run(*argv, change=Interruptedly(True))
    # a checkpoint that was not written to its end is passed over
    (last,) = Path("demo-output/trainer").glob("*/checkpoint-4")
    (last.parent / "checkpoint-5").mkdir()
    again = Interruptedly(True)
    with pytest.raises(KeyboardInterrupt):
        run(*argv, change=again)
    assert again.steps == [5, 6]
    other = Interruptedly(False)
    assert run(*argv, "--road-learning-rate", "0.1", change=other) == 0
    assert other.steps == [1, 2, 3, 4, 5, 6]


def test_the_first_lesson_goes_on_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    argv = (*FEW, "--steps", "1", "--checks", "1", "--tuners", "road", "--arms", "ce")
    argv += ("--warm-steps", "4", "--save-steps", "3")
    with pytest.raises(KeyboardInterrupt):
        run(*argv, change=Interruptedly(True))
    second = Interruptedly(False)
    assert run(*argv, change=second) == 0
    assert second.steps == [4, 1]


def test_all_weights_learn_where_the_model_is_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    moved: dict[str, float] = {}
    computed: dict[str, str] = {}

    def look(modules: Any) -> None:
        fit = modules.one_run.fit

        def spy(model: Any, *args: Any, **kwargs: Any) -> None:
            before = {n: p.detach().clone() for n, p in model.named_parameters() if ".layers." in n}
            kind = "full" if all(p.requires_grad for p in model.parameters()) else "road"
            layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.up_proj"))

            def note(_: Any, __: Any, output: Any) -> None:
                computed[kind] = str(output.dtype)

            hook = layer.register_forward_hook(note)
            fit(model, *args, **kwargs)
            hook.remove()
            after = dict(model.named_parameters())
            changed = sum((after[n] != p).sum().item() for n, p in before.items())
            moved[kind] = changed / sum(p.numel() for p in before.values())

        modules.one_run.fit = spy

    argv = (*FEW, "--steps", "2", "--checks", "1", "--dtype", "bfloat16", "--side-seeds", "1")
    argv += ("--arms", "ce", "--tuners", "road", "full", "--full-learning-rate", "2e-5")
    assert run(*argv, change=look) == 0
    assert moved["full"] > 0.95
    assert computed == {"full": "torch.bfloat16", "road": "torch.bfloat16"}


def test_data_with_noise_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    sizes: list[int] = []

    def look(modules: Any) -> None:
        fit = modules.one_run.fit

        def spy(model: Any, rows: Any, *args: Any, **kwargs: Any) -> None:
            sizes.append(len(rows))
            fit(model, rows, *args, **kwargs)

        modules.one_run.fit = spy

    argv = (*FEW, "--steps", "1", "--checks", "1", "--tuners", "road", "--side-seeds", "1")
    argv += ("--rates", "0", "--arms", "ce", "self", "filtered")
    assert run(*argv) == 2
    assert "give --filtered-share, or leave it out of --arms" in capsys.readouterr().err
    assert run(*argv, "--filtered-share", "0.25", change=look) == 0
    assert sizes == [24, 24, 18]
    assert "S1 to S4 need simulated noise" in capsys.readouterr().out
    assert set(results()["promises"]) == {"S0 the loss is exact"}


def test_little_noise_is_reported_as_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    argv = (*FEW, "--steps", "2", "--checks", "2", "--tuners", "road", "--arms", "ce", "self")
    argv += ("--rates", "0.05", "--check-pairs", "1")
    assert run(*argv) == 0
    assert results()["runs"][1]["checks"][0]["loss_auroc"] is None
    shown = capsys.readouterr().out
    assert "---  S4 -log p tells noisy tokens" in shown
    assert "certainty" in shown
    assert "95 %" in shown


# ---- two processes ------------------------------------------------------------------------------

SHARED = (*FEW, "--model", "scratch", "--layers", "1", "--steps", "2", "--checks", "1")
SHARED += ("--warm-steps", "2", "--tuners", "road", "--arms", "ce", "self", "--save-steps", "1")
SHARED += ("--seeds", "1", "--max-new-tokens", "1")


def shared(rank: int, out: Path) -> None:
    os.chdir(out)
    os.environ |= {"ROAD_APIQ_CACHE": str(out / "cache"), "PIP_NO_INDEX": "1"}
    _two.say(out, rank, {"status": run(*SHARED)})


def test_two_processes_write_once_and_do_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two").mkdir()
    _two.start(shared, tmp_path / "two")
    assert _two.facts(tmp_path / "two") == {"status": 0}
    _recipes.elsewhere(tmp_path, monkeypatch)
    assert run(*SHARED) == 0
    for ours, theirs in zip(results("two/demo-output")["runs"], results()["runs"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert len(ours["checks"]) == len(theirs["checks"])
