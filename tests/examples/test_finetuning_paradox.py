"""The recipe of the finetuning paradox: scorers by hand, streams, probes and judging."""

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


def test_pronouns_are_read_with_their_alternatives(recipe: Any, tmp_path: Path) -> None:
    file, row = tmp_path / "p.jsonl", {"source": "It ran.", "context": ["A cat."]}
    row |= {"expected": "sie", "document": 1}
    choice = {"target": "Sie lief.", "others": ["Er lief."], "before": ["Eine Katze."]}
    file.write_text(f"{json.dumps(row)}\n{json.dumps(row | choice)}\n", encoding="utf-8")
    plain, chosen = recipe.pronouns.read(file, "en", "de", 9)
    assert (plain.pair.source, plain.pair.target, plain.others) == ("A cat. It ran.", "", ())
    assert (chosen.pair.target, chosen.others) == ("Sie lief.", ("Er lief.",))
    assert chosen.before == ("Eine Katze.",)
    file.write_text(json.dumps(row | {"others": ["Er lief."]}), encoding="utf-8")
    with pytest.raises(UserError, match="KeyError: 'target'"):
        recipe.pronouns.read(file, "en", "de", 9)


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
    part = figure.part([False, True, True])
    assert (part.numerators, part.denominators, part.groups) == ([2.0, 3.0], [1.0, 2.0], ["a", "b"])


def test_figures_are_compared_on_the_same_draws(recipe: Any) -> None:
    chance, names = random.Random(0), list(map(str, range(50)))
    values = [chance.gauss(5, 3) for _ in range(50)]
    before = recipe.retention.Figure(values, [1.0] * 50, names)
    after = recipe.retention.Figure([v + 1 for v in values], [1.0] * 50, names)
    found = recipe.retention.compare(after, before)
    assert found.difference_interval == pytest.approx((1, 1))  # though either interval is wide
    assert before.interval()[1] - before.interval()[0] > 1
    assert found.ratio == pytest.approx(after.value / before.value)
    assert found.ratio_interval[0] < found.ratio < found.ratio_interval[1]
    nothing = recipe.retention.Figure([0.0], [1.0], ["a"])
    assert math.isnan(recipe.retention.compare(nothing, nothing).ratio)


BASE = {"translation": 1.0, "steer": 1.0, "few-shot": 0.5, "lm": 1.0}
PAR = {"translation": 0.9, "steer": 0.8, "few-shot": 0.4, "lm": 1.1}
MIX = {"translation": 0.905, "steer": 0.95, "few-shot": 0.5, "lm": 1.02}


NAMES = ["steer", "few-shot"]


def each(*runs: dict[str, float]) -> dict[int, dict[str, float]]:
    return dict(enumerate(runs))


def test_promises_are_judged(recipe: Any) -> None:
    judge, names = recipe.retention.judge, NAMES
    three, kept = each(MIX, MIX, MIX), {**PAR, "lm": 1.0}
    found = judge(BASE, each(PAR, PAR, PAR), three, names, each(PAR, PAR, PAR))
    assert (found.gain, found.paradox, found.remedy) == (True, True, True)
    assert found.recovered["steer"] == pytest.approx([0.75] * 3)
    assert found.recovered["lm"] == pytest.approx([0.8] * 3)
    assert judge(BASE, each(PAR, kept, kept), three, names, {}).paradox is False
    assert judge(BASE, each(PAR, PAR, kept), three, names, {}).paradox is True
    one, control = each(PAR), each(PAR)
    assert judge(BASE, one, each({**MIX, "translation": 0.95}), names, control).remedy is False
    assert judge(BASE, one, each({**MIX, "steer": 0.85}), names, control).remedy is False
    assert judge(BASE, one, each(MIX), names, each(MIX)).remedy is False
    assert judge(BASE, one, each(MIX), names, control).remedy is True
    assert judge(BASE, one, each(MIX), ["steer"], control).paradox is None
    assert judge(BASE, each({**PAR, "translation": 0.96}), each(MIX), names, {}).gain is False


def test_runs_are_judged_by_the_seeds_they_share(recipe: Any) -> None:
    judge, par = recipe.retention.judge, each(PAR, PAR, PAR)
    alone = judge(BASE, par, {1: MIX}, NAMES, {1: PAR, 7: MIX})
    assert (alone.seeds, alone.remedy) == ([1], True)
    assert alone.recovered["lm"] == pytest.approx([0.8])
    # a control with one seed is compared with the mix of that seed
    better, worse = {**MIX, "lm": 1.0}, {**MIX, "lm": 1.04}
    mixed = each(better, worse, better)
    assert judge(BASE, par, mixed, NAMES, {1: {**PAR, "lm": 1.05}}).remedy is True
    assert judge(BASE, par, mixed, NAMES, {1: {**PAR, "lm": 1.03}}).remedy is False


def test_the_remedy_is_not_told_without_a_control(recipe: Any) -> None:
    judge = recipe.retention.judge
    assert judge(BASE, each(PAR), each(MIX), NAMES, {}).remedy is None
    assert judge(BASE, each(PAR), each(MIX), NAMES, {5: PAR}).remedy is None
    assert judge(BASE, each(PAR), each(PAR), NAMES, {}).remedy is False  # whatever a control does


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
    figure = maker.translation(pairs)(model)["translation"]
    assert figure.numerators == pytest.approx(bare, rel=1e-4)
    assert figure.denominators == [len(p.target) for p in pairs]

    shown = f"English: {pairs[0].source}\nGerman: {pairs[0].target}\n\n"
    gain = maker.few_shot(pairs[1:], pairs[:1])(model)["few-shot"]
    wanted = [
        b - alone(f"{shown}English: {p.source}\nGerman:", f" {p.target}")
        for b, p in zip(bare[1:], pairs[1:], strict=True)
    ]
    assert gain.numerators == pytest.approx(wanted, rel=1e-2, abs=1e-3)

    context = maker.context([pairs], 1, 5, 100)(model)["context"]
    assert len(context.numerators) == 2  # the first has nothing before it
    prompt = f"English: {pairs[0].source} {pairs[1].source}\nGerman: {pairs[0].target}"
    wanted_first = bare[1] - alone(prompt, f" {pairs[1].target}")
    assert context.numerators[0] == pytest.approx(wanted_first, rel=1e-2, abs=1e-3)

    row, example = contrast(recipe), contrast(recipe, "Sie da", "du da")
    found = maker.steerability([row], [example], ("en", "de"))(model)

    def preference(register: str) -> float:
        shot = f"English: Come\nGerman: {example.reference(register)}\n\nEnglish: Come\nGerman:"
        return alone(shot, f" {row.informal}") - alone(shot, f" {row.formal}")

    wanted_steer = preference("formal") - preference("informal")
    assert found["steer"].value == pytest.approx(wanted_steer, rel=1e-2, abs=1e-3)
    right = ((preference("formal") > 0) + (preference("informal") < 0)) / 2
    assert found["steer-accuracy"].value == right

    texts = {"source": ["ab cd", "efg"], "target": ["hij klm nop"]}
    language = maker.language(texts)(model)
    bits = [alone(text[0], text[1:]) / math.log(2) for side in texts.values() for text in side]
    assert language["lm"].value == pytest.approx(sum(bits) / 16, rel=1e-4)
    assert language["lm-source"].value == pytest.approx(sum(bits[:2]) / 6, rel=1e-4)
    assert language["lm-target"].value == pytest.approx(bits[2] / 10, rel=1e-4)

    items = [
        recipe.pronouns.Pronoun(Pair("A cat. It ran.", right, "en", "de", "d"), "sie", (wrong,))
        for right, wrong in (("Sie lief.", "Er lief."), ("Er lief.", "Sie lief."))
    ]
    chosen = maker.contrastive(items)(model)["contrastive"]
    shot = "English: A cat. It ran.\nGerman:"
    hit = alone(shot, " Sie lief.") < alone(shot, " Er lief.")
    assert chosen.numerators == [float(hit), float(not hit)]


def test_registers_are_told_apart_in_what_is_written(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, rows = recipe.probes.Maker(None, 1, 9), [contrast(recipe)] * 2
    written = ["Kommen Sie", "Komm du", "Komm du", "nichts"]
    monkeypatch.setattr(maker, "row", lambda *_: None)
    monkeypatch.setattr(maker, "_written", lambda *_: written)
    found = maker.register(rows, rows, ("en", "de"), 4)(None)
    assert {name: figure.value for name, figure in found.items()} == {
        "register": pytest.approx(2 / 3),
        "register-formal": 0.5,
        "register-informal": 1.0,
        "register-matched": 0.75,
    }


def test_a_gap_is_no_context(recipe: Any) -> None:
    maker = recipe.probes.Maker(tiny.tokenizer(), 3, 200)
    long = "l" * 30

    def asked(document: list[str]) -> list[str]:
        seen: list[Encoded] = []
        maker.losses = lambda _, rows: seen.extend(rows) or [0.0] * len(rows)
        pairs = [Pair(text, text.upper(), "en", "de", "d") for text in document]
        maker.context([pairs], 2, 9, 20)(None)
        return [maker.tokenizer.decode(row.prompt) for row in seen[len(seen) // 2 :]]

    # a long sentence is context for others, and is not scored itself
    shown = [f"a {long} b", f"{long} b c"]
    wanted = [f"English: {texts}\nGerman: {texts[:-2].upper()}" for texts in shown]
    assert asked(["a", long, "b", "c"]) == wanted
    assert asked(["a", "l" * 150, "b", "c"]) == []  # no prompt fits, and none leaves it out


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
