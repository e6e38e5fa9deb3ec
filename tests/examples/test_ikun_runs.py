"""The recipe of IKUN: its stages, health, and whole runs on a tiny model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from recipes_peft import data, errors, loop, tiny
from recipes_peft.data import Encoded
from tests.examples import _recipes

RUSSIAN = ["мама мыла раму", "мама мыла окно", "папа мыл раму"] * 4


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """The modules of the recipe, which stand beside its script, as that imports them."""
    _recipes.elsewhere(tmp_path, monkeypatch)
    AcceleratorState._reset_state(True)  # or no test could choose another precision
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
    rows = [recipe.corpus.text_row(text, tokenizer) for text in RUSSIAN[:4]]
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


@pytest.mark.parametrize("method", ["road", "full"])
def test_an_interrupted_stage_ends_with_the_same_numbers(
    recipe: Any, method: str, tmp_path: Path
) -> None:
    file, how = tmp_path / "stage.safetensors", loop.Training(7, 4, 2, 1e-2, 7, warmup=0.3)

    def run(stop: int = 99, **changes: Any) -> Any:
        model, extension = learner(recipe, method, True)
        layer = model.get_base_model().model.layers[0].mlp.down_proj
        layer.register_forward_pre_hook(
            lambda module, args: (torch.nn.functional.dropout(args[0], 0.2, module.training),)
        )
        rows = [recipe.corpus.text_row(text, extension.tokenizer) for text in RUSSIAN[:5]]
        seen: list[Any] = []

        def join(some: Any) -> dict[str, Any]:
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(some)
            return data.collate(some, 256)

        torch.manual_seed(1)
        train = partial(recipe.stages.train, Accelerator(), model, rows, join, how)
        losses = train(changes.pop("row_rate", 2e-2), "test", **changes)
        return losses, [p.detach() for p in model.parameters() if p.requires_grad], seen

    losses, weights, seen = run()
    with pytest.raises(KeyboardInterrupt):
        run(stop=9, saved=file, save_every=0)  # in the middle of the fifth step
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    again, same, rest = run(saved=file)
    assert again == losses
    assert rest == seen[8:]
    assert all(torch.equal(a, b) for a, b in zip(same, weights, strict=True))
    assert len(run(saved=file, row_rate=1e-2)[2]) == 14  # of other settings: from the beginning


def test_mixed_precision_trains_what_sixteen_bits_would_not_hold(recipe: Any) -> None:
    model, extension = learner(recipe, "full", True)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.copy_(weight.bfloat16())  # as it comes from a file of 16 bits
    before, kinds = weight.detach().clone(), set()
    model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _, __, out: kinds.add(out.dtype)
    )
    rows = [recipe.corpus.text_row(text, extension.tokenizer) for text in RUSSIAN[:4]]
    how = loop.Training(2, 2, 1, 1e-6, 2, warmup=0.0, schedule="constant")
    accelerator, join = Accelerator(mixed_precision="bf16"), partial(data.collate, pad=256)
    recipe.stages.train(accelerator, model, rows, join, how, 1e-6, "test")
    assert kinds == {torch.bfloat16}
    assert (weight != before).float().mean() > 0.9
    assert (weight.bfloat16() != before).float().mean() < 0.1
    model(**join(rows[:1]))
    assert kinds == {torch.bfloat16, torch.float32}  # what is measured is not mixed


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
    assert found["left_out"] == {"test": 0, "pairs": 0, "texts": 0}
    for name in ("runs.csv", "bits.png"):
        assert Path("demo-output", name).exists()
    said = capsys.readouterr().out
    assert "yes  A1" in said
    assert "left out" not in said
    assert "COMET" not in said

    def untouched(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(recipe.stages, "train", untouched)
    assert run(recipe, monkeypatch, *argv) == 0
    assert results()["runs"] == found["runs"]
    (kept,) = Path("demo-output").glob("runs-*")
    (kept / "CV-1.json").unlink()  # its first stage is there, the second is not
    with pytest.raises(AssertionError, match="trained again"):
        run(recipe, monkeypatch, *argv)


def test_a_run_goes_on_from_where_a_stage_was(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("--smoke", "--runs", "C", "--once", "S")
    assert run(recipe, monkeypatch, *argv, "--out", "whole") == 0
    train = recipe.stages.train
    for name, stop, left in (("first, road 0", 5, "first-road-0"), ("C 0", 1, "C-0")):

        def stopped(*given: Any, name: str = name, stop: int = stop) -> list[float]:
            if given[6] == name:
                batches = iter(range(stop))

                def join(rows: Any) -> Any:
                    if next(batches, None) is None:
                        raise KeyboardInterrupt
                    return given[3](rows)

                return train(*given[:3], join, *given[4:], save_every=0)
            return train(*given)

        monkeypatch.setattr(recipe.stages, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, monkeypatch, *argv)
        (file,) = Path("demo-output").glob("runs-*/*unfinished*")
        assert file.name == f"{left}-unfinished.safetensors"
    monkeypatch.setattr(recipe.stages, "train", train)
    assert run(recipe, monkeypatch, *argv) == 0
    assert not file.exists()
    whole = json.loads(Path("whole/results.json").read_text(encoding="utf-8"))
    assert results()["runs"] == whole["runs"]


def test_translations_are_scored_with_comet_if_asked(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def comet(checkpoint: Path, *sides: Any) -> float:
        asked.append((checkpoint, *map(len, sides)))
        return 0.25 * len(asked)

    monkeypatch.setattr(recipe.measure.translation, "comet", comet)
    argv = ("--smoke", "--runs", "S", "--once", "S", "--second-steps", "1", "--comet", "a.ckpt")
    assert run(recipe, monkeypatch, *argv) == 0
    assert asked == [(Path("a.ckpt"), 2, 2, 2)] * 2
    found = results()["runs"]["S"]["0"]["translations"]
    assert [t["comet"] for t in found.values()] == [0.25, 0.5]
    assert "COMET" in capsys.readouterr().out
    assert "0.3750" in Path("demo-output/runs.csv").read_text(encoding="utf-8")


def test_the_settings_of_the_paper_run(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = recipe.experiment.parallel.tiny_pairs
    Path("text").mkdir()
    for code in ("en", "ru", "uk", "cs"):
        lines = [pair.target for pair in pairs("en", code, 60, seed=1)]
        Path("text", f"{code}.txt").write_text("\n".join(lines), encoding="utf-8")
    with Path("text", "ru.txt").open("a", encoding="utf-8") as file:
        file.write(f"\n {pairs('en', 'ru', 4, seed=2)[0].target.upper()}")
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
    (kept,) = Path("demo-output").glob("runs-*")
    weights = load_file(kept / "first-full-vocabulary-0" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    said = capsys.readouterr().out
    assert "---  A3 CV-full below S-full" in said
    assert "A4 CV-full: lengths within 15 %" in said
    assert found["left_out"]["pairs"] > 0  # three lines, too long together
    assert found["left_out"]["texts"] > 0
    assert f"\n{found['left_out']['texts']} lines are left out of the texts" in said
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
