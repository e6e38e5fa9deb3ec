"""The composition recipe: its measures, its baselines, its cached prompts, and a small run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes_peft import tiny
from recipes_peft.data import Example
from road_peft import Interventions, RoadInterventionConfig, RoadInterventionModel
from tests.examples import _recipes

SCRIPT = _recipes.EXAMPLES / "road_composition" / "run.py"
HALVES = {"a": (0.0, 0.5), "b": (0.5, 1.0)}
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
SUBSPACES = [["a"], [], ["a", "b"]]


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("road_composition") as modules:
        yield modules


def _wrapped(**settings: Any) -> RoadInterventionModel:
    fields: dict[str, Any] = {"layers": [0], "subspaces": HALVES, **settings}
    model = RoadInterventionModel(tiny.model().eval(), RoadInterventionConfig(**fields))
    with torch.no_grad():
        for site in model.sites:
            for theta, alpha in zip(site.theta, site.alpha, strict=True):
                theta.uniform_(-2, 2)
                alpha.uniform_(0.5, 4)
    return model


# ---- measures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("HOT SAUCE", True),
        ("HOT SAUCE, ALSO KNOWN AS ...", True),
        ("Hot Sauce", False),
        ("HOT SAUCE is", False),
        ("ABCDEFGHI j", True),
        ("12 AB", False),
        ("", False),
    ],
)
def test_capitals(recipe: Any, text: str, shows: bool) -> None:
    assert recipe.skills.in_capitals(text) is shows


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("Hot sauce", True),
        ("HOT SAUCE.", True),
        ('"Hot sauce"', True),
        ("HOT SAUSE", True),  # a slip
        ("Hot soup", False),
        ("Hot sauce ...", False),  # cut off: the model had not ended
        ("Hot sauce is hot", False),
        ("", False),
    ],
)
def test_a_title(recipe: Any, text: str, shows: bool) -> None:
    assert recipe.skills.is_title(text, "Hot sauce") is shows


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("Der Hund ist nicht auf dem Dach.", True),
        ("The dog is not on the roof.", False),
        ("Hund", False),
        ("to kill der Prozess, you can use the tool and die", False),
    ],
)
def test_german(recipe: Any, text: str, shows: bool) -> None:
    assert recipe.skills.in_german(text) is shows


def test_rates_count_each_skill_and_both(recipe: Any) -> None:
    examples = [Example("", title, "") for title in ("Sauce", "Sauce", "Sauce", "Sauce")]
    texts = ["SAUCE", "Sauce", "HOT SAUCE IS", "sausages"]
    found = recipe.scores.rates(recipe.skills.TASKS["titles"], examples, texts)
    assert found == {"capitals": 0.5, "title": 0.5, "both": 0.25}


def test_an_interval_is_students(recipe: Any) -> None:
    found = recipe.scores.interval([0.1, 0.2, 0.3, 0.4, 0.5])
    # standard deviation .158114, over the root of 5 .070711, times 2.776
    assert found.mean == pytest.approx(0.3)
    assert found.half == pytest.approx(0.19629, abs=1e-5)
    assert found.positive
    assert not recipe.scores.interval([0.1, -0.1, 0.1]).positive
    assert recipe.scores.interval([0.5]) == (0.5, None)
    assert not recipe.scores.interval([0.5]).positive


def _seeds(*both: float, first: float = 0.0, second: float = 0.0) -> list[dict[str, float]]:
    return [{"capitals": first, "title": second, "both": value} for value in both]


def test_the_questions_are_answered_by_paired_differences(recipe: Any) -> None:
    found = {
        "halves": {
            "none": _seeds(0, 0, 0),
            "capitals": _seeds(0, 0, 0, first=0.9, second=0.3),
            "title": _seeds(0.1, 0.2, 0.3, second=0.6),
            "both": _seeds(0.3, 0.4, 0.5),
        },
        "loreft": {"both": _seeds(0.2, 0.4, 0.6)},
        "joint": {"both": _seeds(0.9, 0.9, 0.9)},
    }
    answers = recipe.scores.questions(found, "capitals", "title")
    assert [holds for holds, _ in answers.values()] == [
        True,  # capitals by its half
        False,  # which also gives titles
        True,  # titles by theirs
        True,  # and no capitals
        True,  # both: .2 more in each seed
        False,  # .4 in the mean, half of joint is .45
        False,  # against LoReFT: 0 in the mean
    ]
    assert recipe.scores.questions({}, "capitals", "title") == {}


# ---- methods --------------------------------------------------------------------------------


def test_loreft_is_its_equation_and_its_subspaces_add_up(recipe: Any) -> None:
    torch.manual_seed(0)
    r = torch.linalg.qr(torch.randn(6, 4).double())[0].T
    w, c, h = torch.randn(4, 6).double(), torch.randn(4).double(), torch.randn(3, 6).double()
    ones = torch.ones(4).double()
    whole = recipe.loreft.loreft(h, r, w, c, ones)
    torch.testing.assert_close(whole, h + (h @ w.T + c - h @ r.T) @ r)
    # inside the subspace the state becomes W h + c, outside it stays
    torch.testing.assert_close(whole @ r.T, h @ w.T + c)
    first = torch.tensor([1, 1, 0, 0]).double()
    parts = [recipe.loreft.loreft(h, r, w, c, rows) - h for rows in (first, ones - first)]
    torch.testing.assert_close(whole - h, sum(parts))
    assert torch.equal(recipe.loreft.loreft(h, r, w, c, 0 * ones), h)


def test_loreft_begins_at_the_identity_and_trains_what_is_switched_on(recipe: Any) -> None:
    torch.manual_seed(0)
    base = tiny.model().eval()
    prefixes = recipe.prefixes.Prefixes(base, 256, 1, 10)
    rows = [{"prompt": p, "answer": [3, 4]} for p in PROMPTS]
    model = recipe.loreft.LoReFTModel(base, 0, 1, 4, {"a": range(2), "b": range(2, 4)})
    turned = model.rotate.weight
    torch.testing.assert_close(turned @ turned.T, torch.eye(4))
    with torch.no_grad():
        losses = [
            recipe.prefixes.answer_loss(model, {**prefixes.collate(rows), "subspaces": [s] * 3})
            for s in ([], ["a", "b"])
        ]
    assert losses[0] == pytest.approx(losses[1].item(), abs=1e-5)
    batch = {**prefixes.collate(rows), "subspaces": [["a"]] * 3}
    recipe.prefixes.answer_loss(model, batch).backward()
    gradient = model.source.weight.grad
    assert gradient[:2].abs().max() > 0
    assert not gradient[2:].any()
    assert all(p.grad is None for p in base.parameters())
    assert model.detach() is base


def test_a_product_of_two_rotations_is_one_after_the_other(recipe: Any) -> None:
    torch.manual_seed(0)
    first, second = (_wrapped(subspaces={"all": (0.0, 1.0)}) for _ in range(2))
    found = recipe.composing.product(first.interventions(), second.interventions())
    vectors = []
    for what in (first.interventions(), second.interventions(), found):
        theta, alpha = (what.tensors[f"0.block_output.{v}.all"] for v in ("theta", "alpha"))
        vectors.append(torch.polar(alpha.abs(), theta))
    torch.testing.assert_close(vectors[2], vectors[0] * vectors[1])
    assert isinstance(found, Interventions)


# ---- cached prompts -------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "room"), [(1, 10), (2, 0)])
def test_cached_prompts_change_nothing(recipe: Any, last: int, room: int) -> None:
    torch.manual_seed(0)
    model = _wrapped(positions=f"l{last}")
    base: Any = model.base_model
    prompts = [[3, *prompt] for prompt in PROMPTS]
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, ([3], [4, 5, 6], [7]), strict=True)]
    prefixes = recipe.prefixes.Prefixes(base, 256, last, room)
    for _ in range(2):  # computed, then perhaps kept
        batch = {**prefixes.collate(rows), "subspaces": SUBSPACES}
        found = recipe.prefixes.answer_loss(model, batch)
        written = prefixes.generate(model, prompts, SUBSPACES, max_new_tokens=5, eos_token_id=256)
    total, count = torch.zeros(()), 0
    for row, names, tokens in zip(rows, SUBSPACES, written, strict=True):
        ids = torch.tensor([row["prompt"] + row["answer"]])
        labels = ids.clone()
        labels[:, : len(row["prompt"])] = -100
        loss = model(input_ids=ids, labels=labels, subspaces=[names]).loss
        total, count = total + loss * len(row["answer"]), count + len(row["answer"])
        alone = model.generate(
            torch.tensor([row["prompt"]]),
            subspaces=[names],
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=256,
            pad_token_id=256,
        )[0, len(row["prompt"]) :]
        assert tokens[: len(alone)].tolist() == alone.tolist()
    torch.testing.assert_close(found, total / count)
    assert len(prefixes._kept) == min(room, 3)
    loss_of_none = recipe.prefixes.answer_loss(model, {**batch, **_without(prefixes, rows)})
    assert loss_of_none != found


def _without(prefixes: Any, rows: Any) -> dict[str, Any]:
    return {**prefixes.collate(rows), "subspaces": [[]] * len(rows)}


# ---- the run --------------------------------------------------------------------------------


def _run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ROAD_APIQ_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_trains_measures_and_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = _run(tmp_path, "--smoke", "--seeds", "1", "--arms", "halves", "multiplied")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "demo-output"
    found = json.loads((out / "results.json").read_text())
    assert len(found["promises"]) == 5
    assert all(found["promises"].values())
    assert set(found["rates"]["halves"]) == {"none", "capitals", "title", "both"}
    assert Interventions.load(out / "halves-0").isolate("title").tensors
    for name in ("results.csv", "results.png"):
        assert (out / name).exists()

    kept = json.loads((out / "halves-0.json").read_text())
    kept["result"]["rates"]["both"]["both"] = 0.75
    (out / "halves-0.json").write_text(json.dumps(kept))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path / "cache"))
    assert _call("--smoke", "--seeds", "1", "--arms", "halves") == 0
    found = json.loads((out / "results.json").read_text())
    assert found["rates"]["halves"]["both"][0]["both"] == 0.75  # kept, not run again
    assert _call("--smoke", "--seeds", "1", "--arms", "halves", "--epochs", "2") == 0
    found = json.loads((out / "results.json").read_text())
    assert found["rates"]["halves"]["both"][0]["both"] == 0

    # the paper's settings, and data of the two forms it takes
    german = {"ctx": "A man", "endings_de": ["a", "b", "c", "geht nach Hause"], "label": 3}
    Path("de.jsonl").write_text(f"{json.dumps(german)}\n" * 4)
    asked = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}"} for i in range(12)]
    Path("feedback.json").write_text(json.dumps(asked))
    argv = ("--paper", "--model", "tiny", "--layer", "1", "--data", "de.jsonl")
    argv += ("--data-b", "feedback.json", "--seeds", "1", "--examples", "4", "--epochs", "1")
    assert _call(*argv, "--max-new-tokens", "4", "--out", "paper") == 0
    found = json.loads(Path("paper/results.json").read_text())
    assert set(found["rates"]) == {"halves", "loreft", "multiplied"}
    assert all(found["promises"].values())

    capsys.readouterr()
    assert _call("--smoke", "--layer", "2") == 2
    assert "layer is 2; the model's are 0 to 1" in capsys.readouterr().err
    assert _call("--smoke", "--examples", "500") == 2
    assert "1000 are needed" in capsys.readouterr().err


def _call(*argv: str) -> int:
    with _recipes.beside("road_composition"):
        return _recipes.run("road_composition", *argv)
