"""The recipe of the finetuning paradox: scorers by hand, streams, judging, and a run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes_peft import tiny
from recipes_peft.data import Encoded
from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair
from tests.examples import _recipes


@pytest.fixture
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("finetuning_paradox") as modules:
        yield modules


def contrast(recipe: Any, formal: str = "Kommen Sie", informal: str = "Komm du") -> Any:
    return recipe.formality.Contrast(
        "Come", formal, informal, tuple(formal.split()), tuple(informal.split()), "all"
    )


def test_a_register_is_told_by_its_phrases(recipe: Any) -> None:
    row = contrast(recipe)
    texts = ["Bitte kommen Sie", "du bist", "Sie und du", "nichts", "Siezen"]
    found = recipe.formality.labels(texts, [row] * 5, "de")
    assert found == ["formal", "informal", "other", "neutral", "neutral"]
    assert recipe.formality.matched_accuracy(found, "formal") == (0.5, 0.4)
    assert recipe.formality.matched_accuracy(["neutral"], "formal") == (None, 0.0)


def test_all_words_of_a_phrase_count_and_japanese_needs_none(recipe: Any) -> None:
    row = recipe.formality.Contrast("x", "a", "b", ("haben Sie",), ("です",), "all")
    assert recipe.formality.labels(["Sie haben", "haben"], [row] * 2, "de") == ["formal", "neutral"]
    assert recipe.formality.labels(["本です。"], [row], "ja") == ["informal"]


@pytest.mark.parametrize("ending", ["", ".de"])
def test_cocoa_is_read_in_both_layouts(recipe: Any, tmp_path: Path, ending: str) -> None:
    stem = "formality-control.test.telephony.en-de"
    source = stem + (".en" if ending else "")
    texts = {
        source: "Come\nGo",
        f"{stem}.formal{ending}": "Kommen Sie\nGeh",
        f"{stem}.informal{ending}": "Komm\nGeh",
        f"{stem}.formal.annotated{ending}": "[F]Kommen Sie[/F]\nGeh",
        f"{stem}.informal.annotated{ending}": "[F]Komm[/F]\nGeh",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    rows = recipe.formality.read(tmp_path, "de")
    assert [(r.source, r.domain) for r in rows] == [("Come", "telephony"), ("Go", "telephony")]
    assert (rows[0].formal_phrases, rows[0].informal_phrases) == (("Kommen Sie",), ("Komm",))
    assert recipe.formality.contrasting(rows) == rows[:1]  # the second has one register only
    assert recipe.formality.contrasting(rows, without=rows[:1]) == []
    (tmp_path / source).write_text("Come\n", encoding="utf-8")
    with pytest.raises(UserError, match="differ in length"):
        recipe.formality.read(tmp_path, "de")


def test_literalness_by_hand(recipe: Any) -> None:
    lit = recipe.literalness
    assert lit.unaligned_share({(0, 0), (0, 1), (2, 3)}, 4) == 0.5
    assert lit.crossing_rate({(0, 2), (1, 0), (2, 1)}) == pytest.approx(2 / 3)
    assert lit.crossing_rate({(0, 0)}) == 0.0
    words = {"cat": ["Katze"], "bucket": ["Eimer", "Kübel"], "kick": ["treten"]}
    links = lit.dictionary_links(["The", "cat,", "Anna"], ["Anna", "die", "Katze!"], words)
    assert links == {(1, 2), (2, 0)}
    idiom = ["kick", "bucket"]
    assert lit.literal_error(idiom, "Er starb.", "Er trat den Eimer.", words)
    assert not lit.literal_error(idiom, "Er starb im Eimer.", "Er nahm den Eimer.", words)


def test_the_pronoun_counts_in_the_last_sentence_alone(recipe: Any) -> None:
    hit = recipe.literalness.contextual_hit
    assert hit("He came. Then she left!", "she")
    assert not hit("She came. Then he left.", "she")
    assert not hit("It was the sheriff.", "she")
    assert not hit("", "she")


def rows(count: int, tokens: int, first: int) -> list[Encoded]:
    return [Encoded([first], [first] * tokens) for _ in range(count)]


def test_streams_keep_their_budgets(recipe: Any) -> None:
    mix, pairs, text = recipe.stream.mix, rows(12, 2, 1), rows(5, 6, 2)
    both = mix(pairs, text, 0.25, "equal_parallel", 0)
    assert (sum(both.parallel), len(both.rows)) == (12, 16)
    assert both.token_share == pytest.approx(24 / 48)
    total = mix(pairs, text, 0.25, "equal_total", 0)
    assert (sum(total.parallel), len(total.rows)) == (9, 12)
    control = mix(pairs, text, 0.25, "equal_parallel", 0, instead=rows(3, 5, 3))
    assert sum(len(r.answer) for r in control.rows if r.prompt == [3]) == 25  # 24, to whole rows
    assert mix(pairs, text, 0.25, "equal_total", 0).rows == total.rows
    assert mix(pairs, text, 0.25, "equal_total", 1).rows != total.rows
    assert mix(pairs, [], 0.0, "equal_total", 0).token_share == 0
    with pytest.raises(UserError, match="no running text"):
        mix(pairs, [], 0.5, "equal_total", 0)
    with pytest.raises(UserError, match="choose a share"):
        mix(pairs, text, 1.0, "equal_total", 0)


def test_figures_are_ratios_and_intervals_are_over_groups(recipe: Any) -> None:
    figure = recipe.retention.Figure([1.0, 2.0, 3.0], [1.0, 1.0, 2.0], ["a", "a", "b"])
    assert figure.value == 1.5
    assert figure.interval() == (1.5, 1.5)  # either document has this ratio
    chance = random.Random(0)
    wide = recipe.retention.Figure(
        [chance.gauss(1, 1) for _ in range(100)], [1.0] * 100, list(map(str, range(100)))
    )
    low, high = wide.interval()
    assert high - low == pytest.approx(2 * 1.96 / 10, rel=0.25)
    assert math.isnan(recipe.retention.Figure([], [], []).value)
    assert recipe.retention.usable({"steer": wide, "lm": wide}) == {"steer": True}


BASE = {"translation": 1.0, "steer": 1.0, "few-shot": 0.5, "lm": 1.0}
PAR = {"translation": 0.9, "steer": 0.8, "few-shot": 0.4, "lm": 1.1}
MIX = {"translation": 0.905, "steer": 0.95, "few-shot": 0.5, "lm": 1.02}


def test_promises_are_judged(recipe: Any) -> None:
    judge, names = recipe.retention.judge, ["steer", "few-shot"]
    found = judge(BASE, [PAR] * 3, [MIX] * 3, names)
    assert (found.gain, found.paradox, found.remedy) == (True, True, True)
    assert found.recovered["steer"] == pytest.approx([0.75] * 3)
    assert found.recovered["lm"] == pytest.approx([0.8] * 3)
    kept = {**PAR, "lm": 1.0}
    assert judge(BASE, [PAR, kept, kept], [MIX] * 3, names).paradox is False
    assert judge(BASE, [PAR, PAR, kept], [MIX] * 3, names).paradox is True
    assert judge(BASE, [PAR], [{**MIX, "translation": 0.95}], names).remedy is False
    assert judge(BASE, [PAR], [{**MIX, "steer": 0.85}], names).remedy is False
    assert judge(BASE, [PAR], [MIX], names, control=[MIX]).remedy is False
    assert judge(BASE, [PAR], [MIX], names, control=[PAR]).remedy is True
    assert judge(BASE, [PAR], [MIX], ["steer"]).paradox is None
    assert judge(BASE, [{**PAR, "translation": 0.96}], [MIX], names).gain is False


def test_likelihood_probes_are_those_of_one_row_at_a_time(recipe: Any) -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    maker = recipe.probes.Maker(tokenizer, 3, 512)

    def alone(prompt: str, answer: str) -> float:
        ids = torch.tensor([tokenizer(prompt).input_ids + tokenizer(answer).input_ids])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        picked = logits.gather(1, ids[0, 1:, None])[-len(tokenizer(answer).input_ids) :]
        return -picked.sum().item()

    pairs = [Pair(f"s{i}" * (i + 1), f"t{i}" * (3 - i), "en", "de", "d") for i in range(3)]
    bare = [alone(f"English: {p.source}\nGerman:", f" {p.target}") for p in pairs]
    figure = maker.translation(pairs)(model)
    assert figure.numerators == pytest.approx(bare, rel=1e-4)
    assert figure.denominators == [len(p.target) for p in pairs]

    shown = f"English: {pairs[0].source}\nGerman: {pairs[0].target}\n\n"
    gain = maker.few_shot(pairs[1:], pairs[:1])(model)
    wanted = [
        b - alone(f"{shown}English: {p.source}\nGerman:", f" {p.target}")
        for b, p in zip(bare[1:], pairs[1:], strict=True)
    ]
    assert gain.numerators == pytest.approx(wanted, rel=1e-2, abs=1e-3)

    context = maker.context(pairs, 1, 5)(model)
    assert len(context.numerators) == 2  # the first has nothing before it
    prompt = f"English: {pairs[0].source} {pairs[1].source}\nGerman: {pairs[0].target}"
    wanted_first = bare[1] - alone(prompt, f" {pairs[1].target}")
    assert context.numerators[0] == pytest.approx(wanted_first, rel=1e-2, abs=1e-3)

    row, example = contrast(recipe), contrast(recipe, "Sie da", "du da")
    steer = maker.steerability([row], [example], ("en", "de"))(model)

    def preference(register: str) -> float:
        shot = f"English: Come\nGerman: {example.reference(register)}\n\nEnglish: Come\nGerman:"
        return alone(shot, f" {row.informal}") - alone(shot, f" {row.formal}")

    wanted_steer = preference("formal") - preference("informal")
    assert steer.value == pytest.approx(wanted_steer, rel=1e-2, abs=1e-3)


def test_what_prompts_share_is_run_once(recipe: Any) -> None:
    model = tiny.model().double().eval()
    draw = random.Random(0)

    def some(count: int) -> list[int]:
        return [draw.randrange(256) for _ in range(count)]

    examples = some(70), some(40)
    examples = examples[0], examples[0][:9] + examples[1]  # they begin alike
    rows = [Encoded(examples[i % 2] + some(1 + i % 5), some(1 + i % 3)) for i in range(11)]
    rows += [Encoded(some(50), some(2)), Encoded(some(3), some(4)), Encoded(examples[0], some(2))]
    columns: list[int] = []
    forward = model.forward

    def counted(**batch: Any) -> Any:
        columns.append(batch["input_ids"].numel())
        return forward(**batch)

    model.forward = counted  # type: ignore[method-assign]
    found = recipe.likelihood.row_losses(model, rows, 4, 256)
    together = sum(columns)
    alone = [recipe.likelihood.row_losses(model, [row], 4, 256)[0] for row in rows]
    assert found == pytest.approx(alone, rel=1e-9)
    assert together < sum(columns[len(columns) - len(rows) :]) / 2


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    _recipes.elsewhere(tmp_path, monkeypatch)
    return tmp_path


def run(*argv: str) -> int:
    return _recipes.run("finetuning_paradox", "--smoke", *argv)


def test_a_run_with_all_probes_and_its_resumption(
    recipe: Any, elsewhere: Path, capsys: Any
) -> None:
    for part in ("train", "test"):
        folder = elsewhere / "cocoa" / part / "en-es"
        folder.mkdir(parents=True)
        stem = f"formality-control.{part}.all.en-es"
        for ending, text in (
            ("", f"Come {part}"),
            (".formal", "Venga"),
            (".informal", "Ven"),
            (".formal.annotated", "[F]Venga[/F]"),
            (".informal.annotated", "[F]Ven[/F]"),
        ):
            (folder / (stem + ending)).write_text(text + "\n", encoding="utf-8")
    line = {"source": "It ran.", "context": ["A cat."], "expected": "ella", "document": 1}
    (elsewhere / "pronouns.jsonl").write_text(json.dumps(line), encoding="utf-8")
    (elsewhere / "words.tsv").write_text("cat\tgato\n", encoding="utf-8")
    options = ["--formality", "cocoa", "--pronouns", "pronouns.jsonl", "--dictionary", "words.tsv"]
    arms = ["--arms", "full-par", "full-control", "--once", "full-mix", "road-total", "apiq-par"]
    arms += ["--seeds", "0", "1"]
    assert run(*options, *arms) == 0
    out = elsewhere / "demo-output"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["able"].keys() == {"few-shot", "context", "steer"}
    assert results["judged"].keys() == {"full"}  # the others lack an arm
    header, *table = (out / "abilities.csv").read_text(encoding="utf-8").splitlines()
    assert header.split(",")[2:] == list(recipe.retained.SHOWN)
    assert len(table) == 1 + 6 * 2 + 3  # the base; two checkpoints; of apiq, before them as well
    assert (out / "abilities.png").read_bytes().startswith(b"\x89PNG")
    mixed = json.loads((out / "runs" / "full-mix-0.json").read_text(encoding="utf-8"))
    assert [point["parallel"] for point in mixed["checkpoints"]] == [8, 16]
    assert 0.4 < mixed["token_share"] < 0.9
    capsys.readouterr()
    assert run(*options, *arms) == 0
    assert capsys.readouterr().out.count("found in") == 8


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--arms", "half-par"), "choose from full-par"),
        (("--seeds", "a"), "whole numbers"),
        (("--pairs", "500"), "lower --pairs"),
        (("--formality", "nowhere"), "folder of CoCoA-MT"),
        (("--share", "1.5"), "choose a share"),
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
