"""The SIFo recipe with a tiny model: mixed batches, controls, runs that go on, lm-eval."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from recipes_peft import errors, tiny
from tests.examples import _recipes

TASKS = ("text_modification", "qa", "math", "security")
SIZES = {"variant": "road_1", "group_size": 32, "target_modules": None}


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("sifo") as modules:
        yield modules


@pytest.fixture(scope="module")
def adapted(recipe: Any) -> Any:
    model = recipe.arms.add_road(tiny.model(), SimpleNamespace(**SIZES), "math")
    for task in ("qa", "security", "text_modification"):
        model.add_adapter(task, model.peft_config["math"])
    with torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".road_theta" in name:
                parameter.normal_()
    return model.eval()


PROMPTS = [list(b"Instruction_1. say a"), list(b"say b"), list(b"Instruction_1."), list(b"ab c")]


def test_a_mixed_batch_answers_as_one_adapter_at_a_time(recipe: Any, adapted: Any) -> None:
    tokenizer = tiny.tokenizer()
    difference, same = recipe.answering.agreement(adapted, tokenizer, PROMPTS, TASKS, 8)
    assert difference < 1e-5
    assert same
    # the adapters differ, so that agreement means something
    alike = ("qa",) * 4
    mixed = recipe.answering.decode(adapted, tokenizer, PROMPTS, 8, TASKS)
    assert mixed != recipe.answering.decode(adapted, tokenizer, PROMPTS, 8, alike)


def test_rows_that_get_the_wrong_adapter_are_noticed(
    recipe: Any, adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = type(adapted).set_adapter

    def wrong(model: Any, name: str, *rest: Any) -> None:
        switch(model, "math" if name == "qa" else name, *rest)

    monkeypatch.setattr(type(adapted), "set_adapter", wrong)
    difference, _ = recipe.answering.agreement(adapted, tiny.tokenizer(), PROMPTS, TASKS, 4)
    assert difference > 1e-3


def sample(recipe: Any, task: str, *golds: str) -> Any:
    return recipe.samples.SifoSample(task, tuple(f"say {gold}" for gold in golds), golds)


def test_every_batch_has_rows_of_each_set(recipe: Any) -> None:
    sets = {
        "qa": [sample(recipe, "qa", x) for x in "abc"],
        "math": [sample(recipe, "math", x) for x in "1"],
        "security": [sample(recipe, "security", x) for x in "xy"],
    }
    rows = [(name, s.golds[0]) for name, s in recipe.answering.interleaved(sets)]
    assert rows == [
        ("qa", "a"), ("math", "1"), ("security", "x"), ("qa", "b"), ("security", "y"), ("qa", "c"),
    ]  # fmt: skip


def test_a_report_has_both_modes_and_the_form(recipe: Any) -> None:
    tests = {"qa": [sample(recipe, "qa", "a1", "b1"), sample(recipe, "qa", "c1", "d1")]}
    swapped = '{"Instruction_2": "b1", "Instruction_1": "a1"}'
    found = recipe.answering.reports(tests, {"qa": [swapped, "nothing"]})["qa"]
    assert found["strict"]["sample_accuracy"] == 0
    assert found["robust"]["sample_accuracy"] == 50
    assert found["well_formed"] == 50


def test_mismatched_chains_keep_their_form(recipe: Any) -> None:
    chains = [
        sample(recipe, "qa", "a", "b"), sample(recipe, "qa", "c", "d"), sample(recipe, "math", "1"),
        sample(recipe, "qa", "e", "f"),
    ]  # fmt: skip
    found = recipe.arms.mismatched(chains)
    assert [s.golds for s in found] == [("c", "d"), ("e", "f"), ("a", "b")]
    assert [s.steps for s in found] == [chains[i].steps for i in (0, 1, 3)]


def held(loss: float, form: float) -> dict[str, float]:
    return {"loss": loss, "well_formed": form}


@pytest.mark.parametrize(
    ("tuned", "kept"),
    [
        ((held(0.8, 0.3), held(0.5, 1.0)), (True, True)),
        ((held(0.81, 0.3), held(0.5, 1.0)), (False, True)),  # every order counts
        ((held(0.8, 0.29), held(0.5, 1.0)), (True, False)),
    ],
)
def test_criterion_5(recipe: Any, tuned: tuple[Any, Any], kept: tuple[bool, bool]) -> None:
    found = {"base": held(1.0, 0.1), "security-0": tuned[0], "security-1": tuned[1]}
    mixed = {"tasks": {"mixed": {"same": True, "logits": 5e-5}}}
    promises = recipe.results.promised(found, mixed, "float32")
    assert tuple(promises.values()) == (*kept, True)
    mixed["tasks"]["mixed"]["logits"] = float("nan")
    assert list(recipe.results.promised(found, mixed, "float32").values())[-1] is False


def test_a_form_of_95_percent_is_enough(recipe: Any) -> None:
    found = {"base": held(1.0, 0.9), "security-0": held(0.5, 0.95)}
    assert list(recipe.results.promised(found, {}, "float32").values()) == [True, True]


# ---- lm-eval --------------------------------------------------------------------------------


@pytest.fixture
def exported(recipe: Any, tmp_path: Path) -> Path:
    tests = {
        "math": [sample(recipe, "math", "1", "2"), sample(recipe, "math", "3", "4")],
        "given qa": [sample(recipe, "qa", "the red house")],
    }
    recipe.lm_eval_tasks.export(tmp_path / "tasks", tests, 64)
    return tmp_path / "tasks"


def test_the_tasks_of_lm_eval_are_written(exported: Path) -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: ("function", node.value))
    task = yaml.load((exported / "sifo_math.yaml").read_text(), Loader)
    assert task["process_results"] == ("function", "verifier.process_results")
    assert [m["metric"] for m in task["metric_list"]] == ["sample_acc", "instr_acc", "depth"]
    assert task["generation_kwargs"] == {"until": [], "do_sample": False, "max_gen_toks": 64}
    group = yaml.safe_load((exported / "sifo.yaml").read_text())
    assert group["task"] == ["sifo_math", "sifo_given_qa"]
    rows = [json.loads(line) for line in (exported / "sifo_math.jsonl").read_text().splitlines()]
    assert rows[0]["golds"] == ["1", "2"]
    # lm-eval loads the file by its path, under no name
    spec = importlib.util.spec_from_file_location("anything", exported / "verifier.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    assert module.process_results(rows[0], [rows[0]["target"]]) == {
        "sample_acc": 1.0, "instr_acc": 1.0, "depth": 2.0,
    }  # fmt: skip
    half = module.process_results(rows[0], ['{"Instruction_1": "1"}'])
    assert half == {"sample_acc": 0.0, "instr_acc": 0.5, "depth": 1.0}


def test_lm_eval_runs_the_group(exported: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Right(LM):
        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            return [request.doc["target"] for request in requests]

        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    manager = TaskManager(include_path=str(exported), include_defaults=False)
    found = lm_eval.simple_evaluate(
        Right(), tasks=["sifo"], task_manager=manager, bootstrap_iters=0
    )["results"]
    assert found["sifo_math"]["sample_acc,none"] == 1.0
    assert found["sifo_math"]["depth,none"] == 2.0
    assert found["sifo_given_qa"]["instr_acc,none"] == 1.0


# ---- runs -----------------------------------------------------------------------------------

SMALL = ("--smoke", "--steps", "1", "--test-chains", "1", "--held-chains", "1")
SMALL += ("--mechanic-chains", "30", "--max-new-tokens", "2", "--seeds", "1")


def run(recipe: Any, monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    return errors.run(recipe.run.main)


def test_a_run_goes_on_where_it_stopped(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    assert run(recipe, monkeypatch, *SMALL, "--arms", "base", "mismatched") == 0
    (work,) = Path("demo-output").glob("work-*")
    pieces = {path.name: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert {"base.json", "mismatched.json", "held-security-0.json"} <= set(pieces)
    rows = [{"prompt": "say a", "answer": "a", "source": "x", "target": "y"}] * 3
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (work / "mismatched.json").unlink()
    kept = work / "adapters" / "mismatched" / "adapter_model.safetensors"
    time = kept.stat().st_mtime_ns
    assert run(recipe, monkeypatch, *SMALL, "--arms", "base", "mismatched") == 0
    assert kept.stat().st_mtime_ns == time  # it was asked again, not trained again
    assert (work / "base.json").stat().st_mtime_ns == pieces["base.json"]
    found = json.loads(Path("demo-output/results.json").read_text())
    assert set(found["arms"]) == {"base", "mismatched"}
    assert set(found["arms"]["base"]["reports"]) == set(TASKS)
    assert found["arms"]["mismatched"]["trained"] > found["arms"]["base"]["trained"] == 0
    for name in ("scores.csv", "positions.csv", "positions.png", "lm_eval/sifo.yaml"):
        assert Path("demo-output", name).stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arms", "best"), "arms is 'best'; choose from base, tasks, joint"),
        (("--test-steps", "7"), "test_steps is 7; a chain has 2 to 6 steps"),
        (("--data", "nowhere.jsonl"), "cannot read"),
        (("--target-modules", "none_such"), "the adapter does not fit"),
        (("--max-prompt", "5"), "no prompt has 5 tokens or fewer"),
        (("--least-words", "50"), "least_words is 50, most_words 20"),
    ],
)
def test_what_is_wrong_is_said(
    recipe: Any,
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    assert run(recipe, monkeypatch, *SMALL, *options) == 2
    assert message in capsys.readouterr().err
