"""The pilot study: its equations in numbers, heads that see their part, tasks, and the run."""

from __future__ import annotations

import importlib
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes_peft import data, encoders
from recipes_peft.errors import UserError
from tests.examples import _recipes


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _recipes.elsewhere(tmp_path, monkeypatch)
    with _recipes.beside("road_study"):
        yield


def module(name: str) -> Any:
    return importlib.import_module(f"study_{name}")


# ---- equations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "magnitude", "direction", "share"),
    [
        ((0.0, 10.0), 1.0, 0.8, 25 / 45),
        ((-4.0, 3.0), 0.0, 0.0, 0.0),  # a quarter turn
        ((-3.0, -4.0), 0.0, -1.0, 0.0),
        ((1.5, 2.0), 0.5, 1.0, 1.0),  # shorter: the change is not negative
        ((3.0, 4.0), 0.0, 1.0, 0.0),
    ],
)
def test_changes_in_numbers(
    after: tuple[float, float], magnitude: float, direction: float, share: float
) -> None:
    equations = module("equations")
    before, now = torch.tensor([3.0, 4.0]), torch.tensor(after)
    assert equations.change_of_magnitude(before, now).item() == pytest.approx(magnitude, abs=1e-12)
    assert equations.change_of_direction(before, now).item() == pytest.approx(direction, abs=1e-12)
    assert equations.radial_share(before, now).item() == pytest.approx(share, abs=1e-12)


def test_length_and_rotation_make_up_the_whole_move() -> None:
    equations = module("equations")
    before, after = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    radial = (after.norm(dim=-1) - before.norm(dim=-1)) ** 2
    share = equations.radial_share(before, after)
    torch.testing.assert_close(share, radial / (after - before).square().sum(-1))
    assert share.shape == (5, 7)


def test_a_small_turn_is_seen_in_narrow_numbers() -> None:
    equations = module("equations")
    before = torch.ones(64, dtype=torch.bfloat16)
    assert equations.change_of_direction(before, before).item() == pytest.approx(1, abs=1e-12)
    after = before.clone()
    after[0] = 1.0078125  # the next number
    assert 1e-7 < 1 - equations.change_of_direction(before, after).item() < 1e-6


def test_rank_correlation() -> None:
    correlation = module("equations").rank_correlation
    a = torch.tensor([1.0, 2, 3, 4])
    assert correlation(a, a**3) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)
    assert correlation(a, torch.tensor([1.0, 3, 2, 4])) == pytest.approx(0.8)
    assert correlation(a, torch.ones(4)) == 0


def test_first_layers_in_numbers() -> None:
    layers = module("equations").FIRST_LAYERS
    weight = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    x = torch.tensor([[1.0, 0.0], [6.0, 8.0]])
    found = {kind: layer(weight, x) for kind, layer in layers.items()}
    torch.testing.assert_close(found["standard"], torch.tensor([[3.0, 0.0], [50.0, -16.0]]))
    torch.testing.assert_close(found["magnitude"], torch.tensor([[5.0, 2.0], [50.0, 20.0]]))
    torch.testing.assert_close(found["angle"], torch.tensor([[0.6, 0.0], [1.0, -0.8]]))
    torch.testing.assert_close(found["standard"], found["magnitude"] * found["angle"])


def test_a_head_sees_only_its_part() -> None:
    equations = module("equations")
    x = torch.randn(5, 8)
    turned = x.roll(1, dims=1)
    magnitude, angle, standard = (
        equations.Head(k, 8, 3) for k in ("magnitude", "angle", "standard")
    )
    torch.testing.assert_close(magnitude(turned), magnitude(x))
    torch.testing.assert_close(angle(3 * x), angle(x))
    assert not torch.allclose(magnitude(3 * x), magnitude(x))
    assert not torch.allclose(angle(turned), angle(x))
    assert standard(x).shape == (5, 3)
    assert {name: p.requires_grad for name, p in standard.named_parameters()} == {
        "weight": True,
        "second.weight": True,
        "second.bias": True,
    }


@pytest.mark.parametrize("seen", ["angle", "magnitude"])
def test_a_head_learns_what_it_sees_and_not_the_other(seen: str) -> None:
    tasks, learning = module("tasks"), module("learning")
    direction = torch.nn.functional.normalize(torch.randn(500, 64), dim=-1)
    length = 7.5 + 0.3 * torch.randn(500, 1)  # as narrow as those of encoders are
    x = direction * length
    label = direction[:, 0] > 0 if seen == "angle" else length[:, 0] > 7.5
    rows = [tasks.Row("", None, float(value)) for value in label]
    task = tasks.Task("toy", rows[:400], rows[400:], 2)
    scores = {
        kind: learning.train_head(kind, task, (x[:400], x[400:]), 40, 0)["test"]
        for kind in ("magnitude", "angle")
    }
    other = "angle" if seen == "magnitude" else "magnitude"
    assert scores[seen] > 0.8
    assert scores[other] < 0.7


def test_a_head_may_be_a_regression() -> None:
    tasks, learning = module("tasks"), module("learning")
    x = torch.randn(80, 8)
    rows = [tasks.Row("", None, value) for value in (x[:, 0] + x[:, 1]).tolist()]
    task = tasks.Task("toy", rows[:60], rows[60:], 1, "pearson")
    assert learning.train_head("standard", task, (x[:60], x[60:]), 20, 0)["test"] > 0.7


# ---- tasks --------------------------------------------------------------------------------------


def test_scores_in_numbers() -> None:
    tasks = module("tasks")
    outputs = torch.eye(2)[[1, 1, 0, 0, 1]]
    labels = torch.tensor([1.0, 0, 0, 0, 1])
    assert tasks.score("accuracy", outputs, labels) == pytest.approx(0.8)
    assert tasks.score("matthews", outputs, labels) == pytest.approx(4 / 6)
    assert tasks.score("matthews", torch.eye(2)[[1] * 5], labels) == 0
    line = torch.tensor([[1.0], [2.0], [3.0]])
    assert tasks.score("pearson", line, torch.tensor([3.0, 5.0, 4.0])) == pytest.approx(0.5)
    assert tasks.score("pearson", torch.ones(3, 1), line[:, 0]) == 0


def test_a_constant_answer_scores_what_the_largest_class_has() -> None:
    tasks = module("tasks")
    rows = [tasks.Row("x", None, label) for label in (0, 1, 1, 1)]
    assert tasks.constant(tasks.Task("t", rows, rows, 2)) == 0.75
    assert tasks.constant(tasks.Task("t", rows, rows, 2, "matthews")) == 0
    assert tasks.constant(tasks.Task("t", rows, rows, 1, "pearson")) == 0


def test_every_other_question_gets_the_paragraph_of_another_article() -> None:
    examples = [
        data.Example(f"passage {k} of {k // 2}\n\nQuestion: q{k}?", "yes", group=str(k // 2))
        for k in range(6)
    ]
    rows = list(module("tasks").matches(examples))
    assert [row.label for row in rows] == [0, 1, 0, 1, 0, 1]
    assert [row.first for row in rows] == [f"q{k}?" for k in range(6)]
    for k, row in enumerate(rows):
        assert (row.second == f"passage {k} of {k // 2}") == bool(row.label)
        assert row.label or not row.second.endswith(f"of {k // 2}")


def test_neighbouring_words_are_swapped_in_every_other_text() -> None:
    examples = [data.Example("", f"Title {k} -- a b c d e", "g", raw=True) for k in range(2)]
    rows = module("tasks").orders(examples, words=5)
    assert [(row.first, row.label) for row in rows] == [("b a d c e", 0), ("a b c d e", 1)]


def boolq(folder: Path) -> None:
    """Put a small BoolQ where the fetched one would be."""
    (folder / "cache").mkdir()
    rows = [
        {"passage": f"T{k} -- one two {k} four.", "question": f"q{k}", "label": k % 2 == 0}
        for k in range(80)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "cache" / "boolq.jsonl").write_text(text)


def test_no_article_stands_on_both_sides(tmp_path: Path) -> None:
    boolq(tmp_path)
    tasks = module("tasks")
    for name in tasks.MADE:
        first, again = (tasks.load("boolq", name, 24, 16, seed) for seed in (0, 1))
        assert len(first.train) == 24
        assert first.held_out == again.held_out
        assert first.train != again.train
        assert tasks.digest(first) != tasks.digest(again)

        def numbers(rows: Any) -> set[str]:
            words = " ".join(f"{row.first} {row.second or ''}" for row in rows).split()
            return {w for w in words if w.isdigit()}

        assert not numbers(first.train) & numbers(first.held_out)


LINES = {
    "SST-2": "sentence\tlabel\n" + "a film \t1\n" * 8,
    "RTE": "index\tsentence1\tsentence2\tlabel\n" + "0\tone\ttwo\tnot_entailment\r\n" * 8,
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "1\t7\t8\tone\ttwo\n" * 8,
    "STS-B": "index\tgenre\tf\ty\to\ts1\ts2\tsentence1\tsentence2\tscore\n"
    + "0\tg\tf\ty\to\ts\ts\tone\ttwo\t3.8\n" * 8,
    "CoLA": "gj04\t1\t\tone\n" * 8,
}
WANTED = {
    "sst2": ("a film ", None, 1.0, 2, "accuracy"),
    "rte": ("one", "two", 1.0, 2, "accuracy"),
    "mrpc": ("one", "two", 1.0, 2, "accuracy"),
    "stsb": ("one", "two", 3.8, 1, "pearson"),
    "cola": ("one", None, 1.0, 2, "matthews"),
}


def glue(folder: Path) -> str:
    for name, text in LINES.items():
        (folder / "glue_files" / name).mkdir(parents=True)
        for part in ("train", "dev"):
            (folder / "glue_files" / name / f"{part}.tsv").write_text(text, newline="")
    return "glue_files"


def test_the_files_of_glue_are_read(tmp_path: Path) -> None:
    tasks, source = module("tasks"), glue(tmp_path)
    assert set(WANTED) == set(tasks.GLUE)
    for name, wanted in WANTED.items():
        task = tasks.load(source, name, None, None, 0)
        assert (*task.train[0], task.outputs, task.metric) == wanted
        assert (len(task.train), len(task.held_out)) == (8, 8)


def test_glue_on_the_hub_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str, split: str) -> list[dict[str, Any]]:
        asked.append((*names, split))
        return [{"sentence1": "one", "sentence2": "two", "label": k % 2} for k in range(8)]

    stand_in = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)  # type: ignore[arg-type]
    task = module("tasks").load("glue", "rte", None, 4, 0)
    assert asked == [("nyu-mll/glue", "rte", "train"), ("nyu-mll/glue", "rte", "validation")]
    assert task.held_out[1] == ("one", "two", 1.0)
    assert len(task.held_out) == 4
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="give --data a folder"):
        module("tasks").load("glue", "rte", None, 4, 0)


def test_a_file_may_hold_pairs() -> None:
    rows = [
        {"instruction": f"q{k}", "input": f"text {k}", "output": "ab"[k % 2]} for k in range(20)
    ]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = module("tasks").load("own.jsonl", "any", None, 5, 0)
    assert (task.name, task.outputs, len(task.held_out)) == ("own", 2, 5)
    for row in task.train:
        k = int(row.first.split()[1])
        assert row == (f"text {k}", f"q{k}", k % 2)


# ---- models -------------------------------------------------------------------------------------


def test_the_first_token_of_every_layer_in_the_order_of_the_rows() -> None:
    tasks, learning = module("tasks"), module("learning")
    model, tokenizer = encoders.load_classifier("tiny", 2)
    rows = [tasks.Row(text, "pair", 0) for text in ("a longer text", "b", "some text")]
    states, outputs = learning.observe(model, tokenizer, rows, 24)
    assert states.shape == (4, 3, 64)
    for k, row in enumerate(rows):
        inputs = tokenizer(row.first, row.second, return_tensors="pt")
        alone = model(**inputs, output_hidden_states=True)
        for layer, hidden in enumerate(alone.hidden_states):
            torch.testing.assert_close(states[layer, k], hidden[0, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[k], alone.logits[0], rtol=1e-4, atol=1e-5)


def test_every_linear_layer_of_the_blocks_is_adapted_and_the_head_trained() -> None:
    learning = module("learning")
    model, _ = encoders.load_classifier("tiny", 2)
    linears = learning.block_linears(model)
    assert len(linears) == 3 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in linears)
    assert learning.head_modules(model) == ["classifier", "pooler"]


def test_a_randomised_model_has_the_shape_and_none_of_the_weights() -> None:
    model, _ = encoders.load_classifier("tiny", 2)
    made = module("learning").randomised(model, 1)
    pairs = list(zip(model.parameters(), made.parameters(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    assert all(not torch.equal(a, b) for a, b in pairs if a.dim() > 1)
    assert not made.training


# ---- promises -----------------------------------------------------------------------------------


def means(rotation: list[float], magnitude: list[float], share: float) -> Any:
    layers = [[m, r, share] for m, r in zip(magnitude, rotation, strict=True)]
    return np.array([layers, layers])


def test_promises_are_kept_by_what_the_paper_reports_and_broken_by_its_opposite() -> None:
    promises = module("promises")
    full = means([0, 0.01, 0.02, 0.3, 0.4], [0, 0.01, 0.01, 0.1, 0.2], 0.1)
    lora = means([0, 0.01, 0.01, 0.1, 0.2], [0, 0.01, 0.01, 0.05, 0.1], 0.1)
    as_reported = promises.about_changes(
        {"full": full, "lora": lora, "road_1": lora},
        {"full": [0.5, 0.1], "lora": [0.5, 0.1], "road_1": [-0.5, 0.1]},
        {"full": 0.2, "lora": 0.2, "road_1": 0.2},
    )
    assert all(as_reported.values())
    assert not any(promise.startswith("road_1: ") for promise in as_reported)

    opposite = means([0.1, 0.4, 0.3, 0.02, 0.01], [0.1, 0.4, 0.3, 0.1, 0.1], 0.9)
    other = promises.about_changes(
        {"full": opposite, "lora": opposite * 2}, {"full": [-0.5], "lora": [-0.1]}, {"full": 0.05}
    )
    assert not any(other.values())
    assert set(other) < set(as_reported)


def test_promises_about_heads() -> None:
    about_heads = module("promises").about_heads
    reported = {"standard": [0.8], "magnitude": [0.5], "angle": [0.76, 0.78], "random": [0.6]}
    assert all(about_heads({"t": reported}).values())
    opposite = {"standard": [0.8], "magnitude": [0.72], "angle": [0.74], "random": [0.6]}
    assert not any(about_heads({"t": opposite}).values())


# ---- the run ------------------------------------------------------------------------------------


def run(*argv: str) -> int:
    return _recipes.run("road_study", *argv)


def test_it_compares_keeps_and_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--smoke", "--steps", "2", "--seeds", "2", "--head-epochs", "1")
    assert run(*small, "--methods", "full", "road_2") == 0
    found = json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))
    full, road = (found["methods"][name] for name in ("full", "road_2"))
    layers = np.array(full["layers"])
    assert layers.shape == (2, 4, 3)
    assert not np.array_equal(layers[0], layers[1])
    assert layers[:, 1:, 1].min() > 0
    assert np.array(road["layers"])[:, 0].max() < 1e-12  # the embeddings
    # two values for each output, of all linear layers of three blocks, beside pooler and classifier
    assert road["trained_parameters"] == 3 * 2 * (5 * 64 + 128) + 64 * 65 + 8 * 65
    assert found["promises"]["adapters leave the embeddings as they were"]
    assert set(found["heads"]["tiny"]) == {"standard", "magnitude", "angle", "random"}
    points = Path("demo-output/points.csv").read_text().splitlines()
    assert len(points) == 1 + 2 * 2 * 4 * 16
    assert points[1].startswith("full,0,0,0,")
    for name in ("points", "points_every_layer", "layers", "heads"):
        assert Path(f"demo-output/{name}.png").read_bytes().startswith(b"\x89PNG")

    before = Path("demo-output/layers.csv").read_text()
    capsys.readouterr()
    assert run(*small, "--methods", "full", "road_2") == 0
    shown = capsys.readouterr()
    assert shown.out.count("kept from the run before") == 5
    assert "full, seed" not in shown.err
    assert Path("demo-output/layers.csv").read_text() == before
    assert run(*small, "--methods", "full", "--full-learning-rate", "1e-3") == 0
    assert Path("demo-output/layers.csv").read_text() != before


def test_the_settings_of_the_paper_run(tmp_path: Path) -> None:
    source = glue(tmp_path)
    given = ("--paper", "--model", "tiny", "--data", source, "--epochs", "2", "--head-epochs", "1")
    assert run(*given, "--seeds", "1") == 0
    found = json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))
    assert set(found["heads"]) == {"rte", "mrpc", "stsb", "cola"}
    assert set(found["methods"]) == {"full", "lora", "road_1"}
    assert all(math.isfinite(x) for x in np.ravel(found["methods"]["full"]["layers"]))


BAD = {
    "unknown model": (["--model", "nobody/nothing"], "cannot load the encoder 'nobody/nothing'"),
    "no data": (["--data", "nowhere.jsonl"], "cannot read the data nowhere.jsonl"),
    "one class": (["--data", "same.jsonl"], "same.jsonl has one answer only"),
    "little data": (["--data", "little.jsonl"], "little holds out 2 rows"),
    "made task": (["--data", "boolq", "--rotation-task", "sst2"], "choose from match, order"),
    "glue task": (["--data", ".", "--rotation-task", "match"], "choose from sst2, rte"),
    "glue folder": (["--data", ".", "--rotation-task", "rte"], "that has RTE/train.tsv"),
    "method": (["--methods", "oft"], "methods is 'oft'; choose from full, lora, road_1"),
    "group": (["--methods", "road_1", "--group-size", "48"], "RoAd does not fit: "),
    "no seeds": (["--seeds", "0"], "seeds is 0; it must be above zero"),
    "out": (["--out", "same.jsonl"], "cannot write the results"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("same.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 20)
    Path("little.jsonl").write_text(
        "".join(f'{{"prompt": "a{k}", "answer": "{k}"}}\n' for k in range(8))
    )
    assert run("--smoke", *argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
