"""The recipe of the finetuning paradox: its data, its runs, and how they go on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from recipes_peft import config, loop, parallel, tiny, translation
from recipes_peft.data import Encoded, collate
from tests.examples import _recipes


@pytest.fixture
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("finetuning_paradox") as modules:
        yield modules


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    _recipes.elsewhere(tmp_path, monkeypatch)
    AcceleratorState._reset_state(True)  # or no test could choose another precision
    yield tmp_path
    AcceleratorState._reset_state(True)


def run(*argv: str) -> int:
    return _recipes.run("finetuning_paradox", "--smoke", *argv)


def settings(recipe: Any, *argv: str) -> Any:
    file = _recipes.EXAMPLES / "finetuning_paradox" / "config.yaml"
    return config.load(recipe.settings.Settings, file, ["--smoke", *argv], "")


def cocoa(folder: Path) -> None:
    for part in ("train", "test"):
        place = folder / part / "en-es"
        place.mkdir(parents=True)
        stem = f"formality-control.{part}.all.en-es"
        for ending, text in (
            ("", f"Come {part}"),
            (".formal", "Venga"),
            (".informal", "Ven"),
            (".formal.annotated", "[F]Venga[/F]"),
            (".informal.annotated", "[F]Ven[/F]"),
        ):
            (place / (stem + ending)).write_text(text + "\n", encoding="utf-8")


def table(file: str, folder: str = "demo-output") -> list[dict[str, str]]:
    return list(csv.DictReader(Path(folder, file).read_text(encoding="utf-8").splitlines()))


def write_pairs(file: str, rows: list[tuple[str, str, str]]) -> None:
    Path(file).write_text("\n".join("\t".join(row) for row in rows), encoding="utf-8")


def documents(name: str, count: int, size: int = 4) -> list[tuple[str, str, str]]:
    return [
        (f"{name} {i} {j}.", f"{name} target {i} {j}.", f"{name} {i}")
        for i in range(count)
        for j in range(size)
    ]


# ---- data -----------------------------------------------------------------------------------


def test_a_long_pair_in_a_document_is_a_gap_in_nothing(recipe: Any, elsewhere: Path) -> None:
    rows = documents("doc", 12)
    rows = [(a + " x" * 40, b, c) if a.endswith(" 2.") else (a, b, c) for a, b, c in rows]
    write_pairs("pairs.tsv", rows)
    given = settings(recipe, "--data", "pairs.tsv", "--longest", "40", "--pairs", "6")
    found = recipe.corpus.read_corpus(given)
    order = [row[:2] for row in rows]
    for stretch in found.in_order:
        first = order.index((stretch[0].source, stretch[0].target))
        assert [(p.source, p.target) for p in stretch] == order[first : first + 4]
    assert all(len(pair.source) <= 40 for pair in (*found.train, *found.held_out, *found.more))
    held = {pair.document for pair in found.held_out}
    # passages follow the file: of a document all four, cut to their length
    texts = [text for text in found.running if "target" in text]
    whole = [" ".join(b for _, b, c in rows if c == f"doc {i}") for i in range(12)]
    assert texts
    assert all(any(text in document for document in whole) for text in texts)
    texts = found.held_out_text["target"]
    assert all(any(t in whole[int(d.split()[1])] for d in held) for t in texts)


def test_a_document_that_comes_again_has_a_gap(recipe: Any) -> None:
    corpus = recipe.corpus
    pairs = [
        parallel.Pair(text, text.upper(), "en", "de", document)
        for text, document in (("a", "d"), ("b", "d"), ("c", "e"), ("f", "d"), ("g", "d"))
    ]

    def passages(without: set[str] | None = None) -> list[str]:
        return corpus._passages(corpus._stretches(pairs, {"d"}, without), 100)

    assert passages() == ["A B", "F G"]
    assert passages({"a", "f"}) == ["B", "G"]
    assert corpus._passages(corpus._stretches(pairs, {"d"}), 3) == ["A B", "F G"]


def test_what_is_tested_on_is_not_trained_on(recipe: Any, elsewhere: Path) -> None:
    tests, rows = documents("test", 3), documents("doc", 12)
    rows[5] = ("TEST  0 1.", "something else", "doc 1")  # a source, but for case and spaces
    rows[9] = ("something", "test target 2 3.", "doc 2")
    write_pairs("pairs.tsv", rows)
    write_pairs("test.tsv", tests)
    text = "\n\n".join(f"Paragraph {i} says {i}." for i in range(30))
    Path("text.txt").write_text(f"{text}\n\nBefore. Test 0 0. After.", encoding="utf-8")
    Path("target.txt").write_text(f"{text}\n\ntest target 1 1.", encoding="utf-8")
    given = settings(
        recipe,
        *("--data", "pairs.tsv", "--test-data", "test.tsv", "--text", "text.txt"),
        *("--target-text", "target.txt", "--pairs", "100", "--items", "12"),
    )
    found = recipe.corpus.read_corpus(given)
    assert found.dropped == (2, 2)
    assert len(found.train) == 46
    assert not {p.source for p in found.train} & {"TEST  0 1.", "something"}
    assert not any("test" in text.lower() for text in found.running)
    assert {p.source for p in found.held_out} == {source for source, _, _ in tests}
    assert found.more == []


# ---- runs -----------------------------------------------------------------------------------


def test_a_run_with_all_probes_and_its_resumption(
    recipe: Any, elsewhere: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cocoa(elsewhere / "cocoa")
    line = {"source": "It ran.", "context": ["A cat."], "expected": "ella", "document": 1}
    line |= {"target": "Ella.", "others": ["El."]}
    (elsewhere / "pronouns.jsonl").write_text(json.dumps(line), encoding="utf-8")
    (elsewhere / "words.tsv").write_text("cat\tgato\n", encoding="utf-8")
    monkeypatch.setattr(translation, "comet", lambda file, *_: float(file == Path("c.ckpt")))
    options = ["--formality", "cocoa", "--pronouns", "pronouns.jsonl", "--dictionary", "words.tsv"]
    options += ["--comet", "c.ckpt"]
    arms = ["--arms", "full-par", "full-control", "--once", "full-mix", "road-total", "apiq-par"]
    arms += ["apiq-mix", "--seeds", "0", "1"]
    assert run(*options, *arms) == 0
    out = elsewhere / "demo-output"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["able"].keys() == {"few-shot", "context", "steer"}
    assert results["judged"].keys() == {"full", "apiq"}  # road lacks an arm
    assert results["able_quantized"]["apiq"].keys() == results["able"].keys()
    assert results["judged"]["full"]["seeds"] == [0]  # the mix ran once
    scores = results["scores"]["full-par 0"][-1]
    assert (scores["comet"], scores["bleu_signature"][:6]) == (1.0, "nrefs:")
    points = table("abilities.csv")
    names = [*recipe.retained.SHOWN, *recipe.retained.MORE]
    assert list(points[0]) == ["run", "parallel", *names]
    assert len(points) == 1 + 6 * 2 + 2 * 3  # the base; two checkpoints; of apiq, before them too
    ends = {(row["run"], row["ability"]): row for row in table("retention.csv")}
    assert len(ends) == 9 * len(names)
    par = ends["full-par 0", "translation"]
    assert float(par["low"]) < float(par["value"]) < float(par["high"])
    assert float(par["ratio"]) == pytest.approx(float(par["value"]) / float(par["reference"]))
    assert (par["of"], ends["apiq-par 0", "lm"]["of"]) == ("base", "quantised")
    assert (out / "abilities.png").read_bytes().startswith(b"\x89PNG")
    mixed = json.loads((out / "runs" / "full-mix-0.json").read_text(encoding="utf-8"))
    assert [point["parallel"] for point in mixed["checkpoints"]] == [8, 16]
    assert 0.4 < mixed["token_share"] < 0.9
    assert len(list((out / "runs").iterdir())) == 9  # and nothing of what was unfinished
    capsys.readouterr()
    assert run(*options, *arms) == 0
    assert capsys.readouterr().out.count("found in") == 9


@pytest.mark.parametrize("stopped_at", [2, 3])
def test_an_interrupted_training_goes_on(
    recipe: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    argv = ("--checkpoints", "4", "--arms", "full-mix", "--once", "apiq-par", "--batch-size", "2")
    assert run(*argv, "--out", "whole") == 0
    fit, measurements = loop.fit, []

    def stops(*given: Any) -> Any:
        *first, measured, name, saved = given

        def counted() -> Any:
            measurements.append(name)
            if measurements.count(name) == stopped_at:
                raise RuntimeError("the power is out")
            return measured()

        return fit(*first, counted, name, saved, save_every=0.0)

    monkeypatch.setattr(loop, "fit", stops)
    for _ in range(2):  # either arm
        with pytest.raises(RuntimeError, match="power"):
            run(*argv, "--out", "torn")
    measurements.clear()
    monkeypatch.setattr(loop, "fit", lambda *a: fit(*a, save_every=0.0))
    assert run(*argv, "--out", "torn") == 0
    for name in ("full-mix-0", "apiq-par-0"):
        whole, torn = (
            json.loads(Path(folder, "runs", f"{name}.json").read_text(encoding="utf-8"))
            for folder in ("whole", "torn")
        )
        del whole["seconds"], torn["seconds"]
        assert torn == whole
    assert not list(Path("torn", "runs").glob("*.safetensors"))
    assert len(list(Path("torn", "runs").iterdir())) == 3


def test_rows_have_weights_in_the_loss(recipe: Any, elsewhere: Path) -> None:
    model, rows = tiny.model(), [Encoded([1, 2], [3, 4]), Encoded([5], [6, 7, 8])]
    weighted = recipe.weighted.Weighted(model)

    def loss(*weights: float) -> float:
        return weighted(**recipe.weighted.join(list(zip(rows, weights, strict=True)), 256)).loss

    torch.testing.assert_close(loss(1, 1), model(**collate(rows, 256)).loss)

    def summed(row: Encoded) -> torch.Tensor:
        logits = model(torch.tensor([row.prompt + row.answer])).logits[0, len(row.prompt) - 1 : -1]
        return F.cross_entropy(logits, torch.tensor(row.answer), reduction="sum")

    torch.testing.assert_close(loss(2, 0.5), (2 * summed(rows[0]) + 0.5 * summed(rows[1])) / 5)
    argv = ("--arms", "full-mix", "--once", "full-par", "--checkpoints", "1")
    assert run(*argv) == 0
    assert run(*argv, "--text-weight", "0.1", "--out", "light") == 0
    same, other = (
        {row["run"]: row["lm"] for row in table("abilities.csv", folder)}
        for folder in ("demo-output", "light")
    )
    assert same["full-par 0"] == other["full-par 0"]
    assert float(same["full-mix 0"]) < float(other["full-mix 0"])


def test_the_settings_of_the_paper_run(
    recipe: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cocoa(elsewhere / "cocoa")
    for part in ("train", "test"):
        (elsewhere / "cocoa" / part / "en-es").rename(elsewhere / "cocoa" / part / "en-de")
        for file in (elsewhere / "cocoa" / part / "en-de").iterdir():
            file.rename(file.with_name(file.name.replace("en-es", "en-de")))
    for name, seed, count in (("train", 0, 24), ("test", 3, 8), ("domain", 4, 8)):
        pairs = parallel.tiny_pairs("en", "de", count, seed)
        write_pairs(f"{name}.tsv", [(p.source, p.target, p.document) for p in pairs])
        for side in ("source", "target"):
            lines = "\n\n".join(f"{getattr(p, side)} {name} {side}" for p in pairs)
            Path(f"{side}.txt").write_text(lines, encoding="utf-8")
    argv = ("--paper", "--data", "train.tsv", "--test-data", "test.tsv", "--domain", "domain.tsv")
    argv += ("--text", "source.txt", "--target-text", "target.txt", "--formality", "cocoa")
    argv += ("--model", "tiny", "--seeds", "0", "--batch-size", "8", "--checkpoints", "2")
    argv += ("--max-new-tokens", "3", "--calibration-samples", "1", "--calibration-length", "8")
    argv += ("--rank", "4", "--group-size", "32", "--shots", "2", "--sentences", "1")
    loads = []
    load = recipe.run.models.load
    monkeypatch.setattr(recipe.run.models, "load", lambda *a: loads.append(a[1]) or load(*a))
    assert _recipes.run("finetuning_paradox", *argv) == 0
    found = json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))
    assert (found["settings"]["dtype"], found["settings"]["pairs"]) == ("bfloat16", 89000)
    assert found["judged"].keys() == {"full", "road", "apiq"}
    # all weights are trained in float32, where steps of 2e-5 count
    assert loads == ["bfloat16", "float32", "float32", *["bfloat16"] * 4]
    assert AcceleratorState().mixed_precision == "bf16"
    assert _recipes.run("finetuning_paradox", *argv, "--arms", "full-control") == 2


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--arms", "half-par"), "choose from full-par"),
        (("--seeds", "a"), "whole numbers"),
        (("--pairs", "500"), "lower --pairs"),
        (("--formality", "nowhere"), "folder of CoCoA-MT"),
        (("--share", "1.5"), "choose a share"),
        (("--dtype", "float16"), "choose from float32, bfloat16"),
        (("--text-weight", "-1"), "zero or above"),
        (("--test-data", "nowhere.tsv"), "cannot read"),
        (("--target-text", "tiny", "--pairs", "500", "--once", "full-control"), "for the control"),
    ],
)
def test_bad_input_is_one_sentence(
    recipe: Any,
    elsewhere: Path,
    capsys: Any,
    argv: tuple[str, ...],
    told: str,
) -> None:
    assert run(*argv) == 2
    assert told in capsys.readouterr().err
