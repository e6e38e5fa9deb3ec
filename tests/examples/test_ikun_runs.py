"""The recipe of IKUN: its stages, health, promises, and whole runs on a tiny model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from recipes_peft import data, errors, loop, tiny
from recipes_peft.data import Encoded
from tests.examples import _recipes

RUSSIAN = ["мама мыла раму", "мама мыла окно", "папа мыл раму"] * 4


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """The modules of the recipe, which stand beside its script, as that imports them."""
    _recipes.elsewhere(tmp_path, monkeypatch)
    with _recipes.beside("ikun") as modules:
        yield modules


# ---- stages -------------------------------------------------------------------------------------

HOW = SimpleNamespace(variant="road_1", group_size=32, target_modules=None)


def learner(recipe: Any, method: str, tied: bool) -> tuple[Any, Any]:
    """Give a tiny model of one layer with new rows, ready to be trained, and the extension."""
    extension = recipe.vocabulary.extend(tiny.tokenizer(), RUSSIAN, [], 20)
    model = tiny.model(layers=1)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    recipe.vocabulary.extend_model(model, extension)
    rows = recipe.vocabulary.new_rows(model, extension)
    return recipe.experiment.ADDED[method](model, rows, HOW), extension


def trained(recipe: Any, model: Any, tokenizer: Any, rate: float, row_rate: float) -> list[float]:
    rows = [recipe.corpus.text_row(text, tokenizer, 40) for text in RUSSIAN[:4]]
    how = loop.Training(2, 2, 1, rate, 2, warmup=0.0, schedule="constant")

    def join(some: Any) -> dict[str, Any]:
        return data.collate(some, 256)

    return recipe.stages.train(Accelerator(), model, rows, join, how, row_rate, "test")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["road", "full"])
def test_a_stage_trains_merges_and_comes_back(
    recipe: Any, method: str, tied: bool, tmp_path: Path
) -> None:
    model, extension = learner(recipe, method, tied)
    old = {n: p.detach().clone() for n, p in model.get_base_model().named_parameters()}
    losses = trained(recipe, model, extension.tokenizer, 1e-2, 1e-2)
    assert losses[0] > losses[-1]
    recipe.stages.keep(model.eval(), tmp_path / "kept", {"steps": 2})
    probe = {"input_ids": torch.tensor([[1, 2, *extension.ids]])}
    logits = model(**probe).logits
    plain, moved = recipe.stages.merged(model, probe)
    assert moved < 1e-5
    tables = [plain.get_input_embeddings().weight, plain.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == tied
    for table in tables:
        before = next(p for n, p in old.items() if p.shape == table.shape and "embed" in n)
        if table is tables[1] and not tied:
            before = next(p for n, p in old.items() if "lm_head" in n)
        changed = (table[extension.ids] != before[extension.ids]).any(1)
        # of what goes in, only the pieces of the texts have a gradient
        assert changed.all() if tied or table is tables[1] else changed.any()
        assert torch.equal(table[:256], before[:256]) == (method == "road")

    base = tiny.model(layers=1)
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    recipe.vocabulary.extend_model(base, extension)
    again = recipe.stages.restore(base, tmp_path / "kept", "float32").eval()
    torch.testing.assert_close(again(**probe).logits, logits)
    # the adapter can go on learning, and a whole model can be trained by other means
    assert any(p.requires_grad for p in again.parameters())
    assert (tmp_path / "kept" / "adapter").exists() == (method == "road")


def test_new_rows_have_a_rate_of_their_own(recipe: Any) -> None:
    model, extension = learner(recipe, "road", True)
    deltas = [p for n, p in model.named_parameters() if recipe.stages.ROWS in n]
    assert len(deltas) == 1
    rotations = [p for p in model.parameters() if p.requires_grad and p is not deltas[0]]
    before = [p.detach().clone() for p in (deltas[0], *rotations)]
    trained(recipe, model, extension.tokenizer, 1e-9, 1e-2)
    assert (deltas[0] - before[0]).abs().max() > 5e-3
    assert max((p - b).abs().max() for p, b in zip(rotations, before[1:], strict=True)) < 1e-6


def test_rows_are_read_again_until_the_steps_are_done(recipe: Any) -> None:
    seen: list[int] = []
    model = torch.nn.Linear(1, 1)

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> Any:
            return SimpleNamespace(loss=self.inner(x).mean())

    def join(rows: list[int]) -> dict[str, Any]:
        seen.extend(rows)
        return {"x": torch.tensor([[float(i)] for i in rows])}

    how = loop.Training(2, 4, 2, 1e-3, 2)
    losses = recipe.stages.train(Accelerator(), Module(), [1, 2, 3], join, how, 1e-3, "test")
    assert seen == [1, 2, 3, 1, 2, 3, 1, 2]
    assert len(losses) == 2


# ---- health -------------------------------------------------------------------------------------


def test_omissions_show_in_the_bucket_of_long_sources(recipe: Any) -> None:
    sources, references = ["a" * 10, "b" * 10, "c" * 200], ["x" * 20, "y" * 10, "z" * 100]
    outputs = ["x" * 16, "y" * 14, "z" * 52]
    short, long = recipe.health.length_health(sources, outputs, references)
    assert (short.longest, short.count, short.output, short.reference) == (60, 2, 1.5, 1.5)
    assert (long.longest, long.count) == (math.inf, 1)
    assert long.off == pytest.approx(-0.48)
    assert short.off == 0


def test_ends_of_sentences_and_caps(recipe: Any) -> None:
    assert recipe.health.unfinished(["Ja.", "好。", "und dann ", "„Ja!“"[:3]]) == 0.5
    # 10 tokens of a language at 2 per English token: 5 in English, 15 at 3; twice that and 8
    assert recipe.health.token_cap(10, 2.0, 3.0, 2.0) == 38


def test_languages_are_told_apart(recipe: Any) -> None:
    guess = recipe.health.Guess(
        {
            "en": ["the man and the woman went to the house", "they saw that it was the end"],
            "tr": ["adam ve çocuk eve gitti", "onlar bunun son olduğunu gördüler"],
            "ru": ["мужчина и женщина пошли домой"],
        }
    )
    texts = ["the end of the house", "çocuk evde gördü", "женщина дома", " "]
    assert [guess(text) for text in texts[:3]] == ["en", "tr", "ru"]
    assert guess.off_target(texts, "tr") == 0.75


def test_bits_per_character_need_no_common_tokens(recipe: Any) -> None:
    assert recipe.health.bits_per_character(8 * math.log(2), 4) == pytest.approx(2.0)
    model = tiny.model(layers=1)
    rows = [(Encoded([1], [2, 3, 4]), "ab"), (Encoded([1], [5]), "c")]
    found = recipe.health.measured(model, {"x": rows}, 2, 256)
    logits = model(input_ids=torch.tensor([[1, 2, 3, 4], [1, 5, 0, 0]])).logits.log_softmax(-1)
    wanted = -sum(logits[i, j, t] for i, j, t in ((0, 0, 2), (0, 1, 3), (0, 2, 4), (1, 0, 5)))
    assert found["x"] == pytest.approx(wanted.item() / math.log(2) / 3, rel=1e-5)


class Scripted:
    """A model that answers with what it is told: rows of token ids, one list for each call."""

    device = torch.device("cpu")

    def __init__(self, *calls: list[str]) -> None:
        self.calls, self.beams = list(calls), []

    def eval(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, num_beams: int, **_: Any) -> torch.Tensor:
        self.beams.append(num_beams)
        ids = [tiny.tokenizer()(text).input_ids for text in self.calls.pop(0)]
        width = max(map(len, ids))
        rows = [row + [256] * (width - len(row)) for row in ids]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


def test_an_answer_is_a_line_and_the_cap_is_noted(recipe: Any) -> None:
    model = Scripted([" abc<end>", " ab\ncdefgh", "abcdefghi", "abcd<end>"])
    answers, cut = recipe.health.translate(model, tiny.tokenizer(), ["p"] * 4, [4, 4, 4, 4], 4)
    assert answers == ["abc", "ab", "abcd", "abcd"]
    assert cut == [False, False, True, False]


def test_an_empty_answer_of_beams_is_asked_for_again(recipe: Any) -> None:
    model = Scripted(["ok<end>", "<end>"], ["so<end>"])
    answers, cut = recipe.health.translate(model, tiny.tokenizer(), ["p", "q"], [5, 5], 2, beams=5)
    assert (answers, cut) == (["ok", "so"], [False, False])
    assert model.beams == [5, 1]


# ---- promises -----------------------------------------------------------------------------------


def found_of(bits: float, chrf: float = 1.0, output: str = "x" * 10, **texts: float) -> Any:
    translation = {"chrf": chrf, "off_target": 0.0, "sources": ["a" * 10], "outputs": [output]}
    return {
        "bits": {"en-ru": bits},
        "merge_difference": 1e-6,
        "first": {"texts": texts},
        "translations": {"en-ru": {**translation, "references": ["y" * 10]}},
    }


def test_what_was_promised_of_the_vocabulary(recipe: Any) -> None:
    checks = {
        "ratios": {"en": 1.0, "ru": 3.0, "tr": 2.0},
        "new_ratios": {"en": 1.0, "ru": 2.0, "tr": 1.75},
        "english_tokens": 1000,
        "new_english_tokens": 991,
        "lossless": True,
        "logit_change": 1e-6,
    }
    assert list(recipe.promises.vocabulary(checks).values()) == [True] * 4
    worse = {"ru": 2.1, "tr": 1.75, "en": 0.1}
    bad = checks | {"new_ratios": worse, "new_english_tokens": 989, "lossless": False}
    bad["logit_change"] = math.nan
    assert list(recipe.promises.vocabulary(bad).values()) == [False] * 4


def test_what_was_promised_of_the_first_stage(recipe: Any) -> None:
    base = {"en": 1.0, "ru": 2.0, "tr": 2.0}
    good, bad = ({0: found_of(1, **t)} for t in ({"en": 1.02, "ru": 1.8, "tr": 1.89},) * 2)
    bad[0]["first"]["texts"] |= {"en": 1.04, "tr": 1.95}
    kept = recipe.promises.texts(base, {"C": good, "CV": bad})
    assert list(kept.values()) == [True, True, False, False]


def test_what_was_promised_of_two_stages(recipe: Any) -> None:
    def decided(first: float, second: float, third: float, chrf: float = 2.0) -> list[bool]:
        runs = {
            "S": {seed: found_of(3.0) for seed in range(3)},
            "S+": {seed: found_of(2.0, chrf=1.5) for seed in range(3)},
            "C": {s: found_of(b, chrf) for s, b in enumerate((first, second, third))},
        }
        return list(recipe.promises.two_stages(runs).values())

    assert decided(1.95, 1.9, 2.5) == [True, True, True]
    assert decided(1.97, 1.9, 2.5) == [True, False, True]
    assert decided(1.9, 1.9, 1.9, 1.0) == [True, True, False]
    assert recipe.promises.two_stages({"C": {0: found_of(1)}}) == {}


def test_what_was_promised_of_health(recipe: Any) -> None:
    for length, kept in ((9, True), (11, True), (8, False), (12, False)):
        runs = {"C": {0: found_of(1, output="x" * length)}}
        assert list(recipe.promises.healthy(runs, True).values()) == [kept, True]
    assert len(recipe.promises.healthy(runs, False)) == 1
    runs["C"][0]["merge_difference"] = 1e-3
    assert list(recipe.promises.merges(runs, "float32").values()) == [False]
    assert list(recipe.promises.merges(runs, "bfloat16").values()) == [True]


# ---- runs ---------------------------------------------------------------------------------------


def run(recipe: Any, monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    return errors.run(recipe.run.main)


def results() -> dict[str, Any]:
    return json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))


def test_runs_are_compared_and_not_done_twice(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--smoke", "--runs", "S", "S+", "C", "CV", "--once", "C-apiq", "--seeds", "2")
    assert run(recipe, monkeypatch, *argv) == 0
    found = results()
    assert {n: sorted(r) for n, r in found["runs"].items()} == {
        **{name: ["0", "1"] for name in ("S", "S+", "C", "CV")},
        "C-apiq": ["0"],
    }
    one = {name: seeds["0"] for name, seeds in found["runs"].items()}
    assert one["S+"]["steps"] == one["S"]["steps"] + one["C"]["first"]["steps"]
    # the same text in fewer tokens
    assert one["CV"]["first"]["steps"] < one["C"]["first"]["steps"]
    assert one["CV"]["trained_parameters"] == one["C"]["trained_parameters"]
    assert set(one["C"]["first"]["texts"]) == {"en", "ru", "tr"} == set(found["base"]["texts"])
    assert set(one["S"]["bits"]) == {"en-ru", "ru-tr"} == set(one["S"]["translations"])
    assert one["S"]["bits"] != found["runs"]["S"]["1"]["bits"]
    for promise in ("A1 all text comes back", "A1 English takes", "A1 logits", "merging"):
        assert [met for name, met in found["promises"].items() if name.startswith(promise)] == [
            True
        ]
    assert sum(name.startswith("A3") for name in found["promises"]) == 3
    assert found["vocabulary"]["expands_to_base"]
    for name in ("runs.csv", "bits.png"):
        assert Path("demo-output", name).exists()
    assert "yes  A1" in capsys.readouterr().out

    def untouched(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(recipe.stages, "train", untouched)
    assert run(recipe, monkeypatch, *argv) == 0
    assert results()["runs"] == found["runs"]
    (kept,) = Path("demo-output").glob("runs-*")
    (kept / "CV-1.json").unlink()  # its first stage is there, the second is not
    with pytest.raises(AssertionError, match="trained again"):
        run(recipe, monkeypatch, *argv)


def test_the_settings_of_the_paper_run(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = recipe.experiment.parallel.tiny_pairs
    Path("text").mkdir()
    for code in ("en", "ru", "uk", "cs"):
        lines = [pair.target for pair in pairs("en", code, 60, seed=1)]
        Path("text", f"{code}.txt").write_text("\n".join(lines), encoding="utf-8")
    for name in ("en-ru", "cs-uk"):
        rows = [f"{p.source}\t{p.target}" for p in pairs(*name.split("-"), 4, seed=2)]
        rows = ["canary 123\tcanary 123", *rows]
        Path(f"{name}.tsv").write_text("\n".join(rows), encoding="utf-8")
    row = "\t".join(["dům", "дім"])
    Path("more-cs-uk.tsv").write_text(row, encoding="utf-8")  # and none of en-ru
    less = ("--directions", "en-ru", "cs-uk", "--monolingual", "text", "--first-steps", "1")
    less += ("--vocabulary-characters", "2000", "--new-pieces", "40", "--multiple", "8")
    less += ("--block-length", "64", "--batch-size", "4", "--max-length", "128")
    less += ("--group-size", "32", "--tuning-pairs", "8", "--translated", "2", "--rank", "4")
    less += ("--calibration-samples", "2", "--calibration-length", "16", "--bits-group-size", "32")
    argv = ("--paper", "--model", "tiny", "--data", "tiny", "more-{direction}.tsv")
    argv += ("--test-data", "{direction}.tsv", "--runs", "CV-full", "CV")
    assert run(recipe, monkeypatch, *argv, *less) == 0
    found = results()
    assert (found["settings"]["dtype"], found["settings"]["beams"]) == ("bfloat16", 5)
    assert len(found["runs"]["CV"]["0"]["translations"]["cs-uk"]["outputs"]) == 2
    assert set(found["base"]["texts"]) == {"en", "ru", "uk", "cs"}


BAD = {
    "run": (["--runs", "X"], "runs is 'X'; choose from S, S+, C, CV"),
    "direction": (["--directions", "enru"], "directions has 'enru'; write two codes"),
    "no English": (["--directions", "ru-tr"], "length ratios need English"),
    "attention": (["--attention", "both"], "attention is 'both'; choose from across, within"),
    "no data": (["--data", "nowhere.tsv"], "cannot read"),
    "no pairs": (["--data", "a-{direction}", "b-{direction}"], "b-{direction} has pairs of en-ru"),
    "short lines": (["--max-characters", "1"], "the data has 0 documents"),
    "pieces": (["--multiple", "512"], "too few for a vocabulary"),
    "blocks": (["--block-length", "9999"], "fill no row"),
    "samples": (["--calibration-samples", "999"], "999 are wanted; give more"),
    "out": (["--out", "empty.txt"], "cannot write the results"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(
    recipe: Any,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("empty.txt").write_text("")
    one = () if "--runs" in argv else ("--runs", "C-apiq" if "samples" in argv[0] else "CV")
    assert (
        run(recipe, monkeypatch, "--smoke", *one, "--once", "S", "--first-steps", "1", *argv) == 2
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
