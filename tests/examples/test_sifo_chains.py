"""The SIFo recipe's chains: generators, what makes them chains, files, and the official figures."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes_peft.errors import UserError
from tests.examples import _recipes
from tests.examples.test_sifo import chained, edits

TASKS = ("text_modification", "qa", "math", "security")


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("sifo") as modules:
        yield modules


def settings(**changes: Any) -> SimpleNamespace:
    given = {
        "seed": 0, "text": "toy", "math": "made", "qa": "made", "least_words": 25,
        "most_words": 45, "most_passage_words": 45, "train_steps": 2, "test_steps": 5,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


# ---- generators -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(recipe: Any) -> dict[str, dict[str, list[Any]]]:
    return {
        half: {t: recipe.chains.Chains(half, settings()).make(t, 60, 5) for t in TASKS}
        for half in ("train", "test")
    }


def test_chains_are_the_same_again_and_none_comes_twice(recipe: Any, made: Any) -> None:
    again = recipe.chains.Chains("test", settings())
    for task in TASKS:
        assert again.make(task, 60, 5) == made["test"][task]
        assert len({(s.context, s.steps) for s in made["test"][task]}) == 60
        other = recipe.chains.Chains("test", settings(seed=1)).make(task, 60, 5)
        assert other != made["test"][task]
        lengths = {len(sample.steps) for sample in made["test"][task]}
        assert lengths == ({2, 4, 6} if task == "qa" else {2, 3, 4, 5})


def test_the_halves_share_no_word_and_no_text(recipe: Any, made: Any) -> None:
    words = [recipe.lexicons.lexicon(half).words() for half in ("train", "test")]
    lower = [{word.lower() for word in half} for half in words]
    assert min(map(len, lower)) > 150
    assert not lower[0] & lower[1]
    texts = [{s.context for s in made[half]["text_modification"]} for half in ("train", "test")]
    assert not texts[0] & texts[1]
    for half, other in ((0, 1), (1, 0)):
        passwords_and_items = " ".join(
            text
            for s in made[("train", "test")[half]]["security"]
            for text in (s.context, *s.steps)
        )
        for scene in recipe.lexicons.lexicon(("train", "test")[other]).scenes:
            assert scene.place not in passwords_and_items


def test_words_that_are_tested_are_not_trained_on(recipe: Any) -> None:
    plain = recipe.lexicons.lexicon("train")
    gone = [plain.foreign[0], plain.names[0], plain.scenes[0].items[0]]
    left = recipe.lexicons.lexicon("train", avoid=[f"See {gone[0].upper()}, {gone[1]}", gone[2]])
    assert not set(gone) & left.words()
    assert len(left.foreign) == len(plain.foreign) - 1
    with pytest.raises(UserError, match=r"the lexicon has 0 foreign left, 8 are needed"):
        recipe.lexicons.lexicon("train", avoid=plain.foreign)
    with pytest.raises(ValueError, match="half is 'third'"):
        recipe.lexicons.lexicon("third")


@pytest.mark.parametrize("half", ["train", "test"])
def test_simulators_give_the_golds_of_generated_chains(recipe: Any, made: Any, half: str) -> None:
    for task in ("text_modification", "security"):
        same, count = recipe.mechanics.replayed(task, made[half][task])
        assert same == count > 150
        for sample in made[half][task]:
            assert recipe.mechanics.REPLAYS[task](sample) == list(sample.golds)


def test_security_has_both_families_and_steps_that_do_not_count(made: Any) -> None:
    samples = made["test"]["security"]
    assert {s.meta["family"] for s in samples} == {"by_password", "by_person"}
    refused = [
        before == after
        for s in samples
        for before, after in zip(s.golds, s.golds[1:], strict=False)
    ]
    assert 0.2 < sum(refused) / len(refused) < 0.8


def test_questions_and_revisions_take_turns(made: Any) -> None:
    linked = 0
    for sample in made["test"]["qa"]:
        passage = sample.context
        for k in range(0, len(sample.steps), 2):
            answer, revised = sample.golds[k : k + 2]
            new = sample.steps[k + 1].split('"')[1]
            assert passage.count(answer) == 1
            assert revised == passage.replace(answer, new) != passage
            passage = revised
        linked += sample.meta["linked"]
    assert linked > 20


def test_each_number_comes_of_the_one_before(made: Any) -> None:
    for sample in made["test"]["math"]:
        numbers = [int(gold) for gold in sample.golds]
        for step, before, now in zip(sample.steps[1:], numbers, numbers[1:], strict=False):
            n = next(int(word) for word in step.replace("?", " ").split() if word.isdigit())
            assert now in (before + n, before - n, before * n, before // n)
            assert 0 < now <= 5300


def test_real_problems_are_cut_into_linked_steps(recipe: Any, tmp_path: Path) -> None:
    answer = "He has 3*4=<<3*4=12>>12 pens.\nHe keeps 12-5=<<12-5=7>>7 pens.\n#### 7"
    sample = recipe.math_chains.from_problem("How many pens are left?", answer)
    assert sample.steps == (
        "How many pens are left? Work out 3*4.",
        "Work out (the result of Instruction_1)-5.",
    )
    assert sample.golds == ("12", "7")
    for wrong in (
        "a <<3*4=13>>13\nb <<13-5=8>>8",  # does not add up
        "a <<3*4=12>>12\nb <<6-5=1>>1",  # not linked
        "a <<3*4=12>>12",  # one step
        "a 12\nb 7",
    ):
        assert recipe.math_chains.from_problem("q", wrong) is None
    assert recipe.math_chains.calculate("__import__('os')") is None
    assert recipe.math_chains.calculate("(2+3)*-.5") == -2.5
    file = tmp_path / "train.jsonl.xz"
    rows = [{"question": f"How many are {i}?", "answer": answer} for i in range(12)]
    file.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))
    given = settings(math=str(file))
    halves = [recipe.chains.Chains(h, given).make("math", 20, 3) for h in ("train", "test")]
    texts = [{s.steps[0] for s in half} for half in halves]
    assert texts[0]
    assert texts[1]
    assert not texts[0] & texts[1]
    file.write_bytes(lzma.compress(b'{"question": "q"}'))
    with pytest.raises(UserError, match="lacks a question or an answer"):
        recipe.math_chains.from_answers(file, 2, 3)


def test_real_passages_become_chains(recipe: Any, tmp_path: Path) -> None:
    def paragraph(i: int) -> dict[str, Any]:
        text = f"Town {i} was built in {1800 + i}. Its mayor was Anna{i} Berg{i}."
        asked = {"When?": f"{1800 + i}.", "Who?": f"Anna{i} Berg{i}"}
        qas = [
            {"question": q, "answers": [{"text": a, "answer_start": text.index(a)}]}
            for q, a in asked.items()
        ]
        return {"context": text, "qas": qas}

    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [paragraph(i) for i in range(8)]}]}))
    for sample in recipe.chains.Chains("train", settings(qa=str(file))).make("qa", 12, 4):
        for k in range(0, len(sample.golds), 2):
            before = sample.golds[k - 1] if k else sample.context
            assert sample.golds[k] in before
            assert sample.golds[k + 1] != before
    with pytest.raises(UserError, match="no passage of at most 3 words"):
        recipe.qa_chains.passages(file, 3, "train")
    file.write_text("{}")
    with pytest.raises(UserError, match="not in SQuAD's format"):
        recipe.qa_chains.passages(file, 40, "train")


def test_texts_of_a_file_are_halved(recipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    lines = [f"Line {i} has one plain sentence of eight words. It ends here." for i in range(30)]
    headings = " = A heading of at least eight words = \n \n = = Below it one more, as long = = \n"
    file.write_text(headings + "\n\n".join(lines))
    halves = [recipe.text_chains.sentences(str(file), half, 8, 20) for half in ("train", "test")]
    assert len(halves[0]) + len(halves[1]) == 30
    assert not set(halves[0]) & set(halves[1])
    with pytest.raises(UserError, match="no sentence of 60 to 70 words"):
        recipe.text_chains.sentences(str(file), "train", 60, 70)
    with pytest.raises(UserError, match="cannot read"):
        recipe.text_chains.sentences(str(tmp_path / "none.txt"), "train", 8, 20)


# ---- mechanics ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(recipe: Any, made: Any) -> dict[str, Any]:
    edited = recipe.chains.Chains("test", settings()).make("text_modification", 500, 5, 3)
    assert len(edited) == 500
    return recipe.mechanics.mechanics(made["test"], edited, {})


def test_criteria_1_to_4_are_met_by_generated_chains(recipe: Any, measured: Any) -> None:
    kept = recipe.mechanics.promised(measured)
    assert len(kept) == 7
    assert all(kept.values()), kept
    assert measured["strength"]["absent"] == 0
    assert measured["propagation"]["chains"] >= 2000


def test_chains_that_do_not_need_their_steps_fail_the_criteria(recipe: Any, measured: Any) -> None:
    text = "one two three four five six seven"
    chain = edits(recipe, *[("replace", word, f"{word}s") for word in text.split()[1:4]])
    independent = chained(recipe, text, chain)
    weak = recipe.mechanics.promised(
        {**measured, "strength": vars(recipe.faults.chain_strength([independent]))}
    )
    assert [name for name, met in weak.items() if not met] == [
        "3 20 % of edits or more aim at what an earlier one brought in"
    ]
    swamped = {**measured["propagation"], "measured": {3: 0.9}, "predicted": {3: 0.8}}
    off = recipe.mechanics.promised({**measured, "propagation": swamped})
    assert [name for name, met in off.items() if not met] == [
        "4 errors propagate by the formula, within 0.03"
    ]


def test_the_floor_and_the_ceiling(measured: Any) -> None:
    table = measured["oracles"]
    for task in TASKS:
        assert table["gold answers"][task]["sample_accuracy"] == 100
        assert table["all golds in every answer"][task]["sample_accuracy"] == 100
        assert table["empty"][task]["sample_accuracy"] == 0
        # what gives it away is its length
        full = table["all golds in every answer"][task]["length"]
        assert full > table["gold answers"][task]["length"]
    # a copy of the passage holds the first answer: why S is the number to trust
    assert table["copies the context"]["qa"]["instruction_accuracy"] > 20
    assert table["copies the context"]["qa"]["sample_accuracy"] == 0


# ---- files ----------------------------------------------------------------------------------


def test_files_of_the_official_schema_go_out_and_in(recipe: Any, made: Any, tmp_path: Path) -> None:
    for task in TASKS[:3]:
        recipe.samples.write(tmp_path / f"{task}.jsonl", made["test"][task])
    found = recipe.samples.read(tmp_path)
    assert list(found) == list(TASKS[:3])
    for task, samples in found.items():
        for sample, before in zip(samples, made["test"][task], strict=True):
            assert (sample.steps, sample.golds, sample.context) == (
                before.steps, before.golds, before.context,
            )  # fmt: skip
    row = json.loads((tmp_path / "qa.jsonl").read_text().split("\n")[0])
    assert {"id", "context", "instruction_1", "answer_2"} <= set(row)
    assert "context" not in json.loads((tmp_path / "math.jsonl").read_text().split("\n")[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction_1": "a"}', "has instruction_1 without answer_1"),
        ('{"context": "a"}', "line 1 has no instruction"),
        ("nonsense", "line 1 is not JSON"),
        ("[1]", "line 1 is no object"),
        ("", "is empty"),
    ],
)
def test_rows_that_are_no_samples(recipe: Any, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "qa.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        recipe.samples.read(file)
    with pytest.raises(UserError, match=r"holds none of text_modification\.jsonl"):
        recipe.samples.read(tmp_path / "..")


def test_a_prompt_and_an_answer_are_one_step(recipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "say a", "answer": "a"}\n{"prompt": "say b", "answer": "b"}\n')
    samples = recipe.samples.read(file)["mine"]
    assert [(s.task, s.steps, s.golds) for s in samples] == [
        ("mine", ("say a",), ("a",)),
        ("mine", ("say b",), ("b",)),
    ]


def test_prompt_and_answer(recipe: Any, made: Any) -> None:
    sample = made["test"]["security"][0]
    text = recipe.prompts.prompt(sample)
    assert f"Context: {sample.context}\nInstruction_1. {sample.steps[0]}\n" in text
    assert "Context:" not in recipe.prompts.prompt(made["test"]["math"][0])
    written = recipe.prompts.answer(sample.golds)
    assert recipe.verifier.parse_response(written) == list(sample.golds)
    assert recipe.verifier.well_formed(written, len(sample.steps))


# ---- official files, if there are any -------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("SIFO_DATA"), reason="SIFO_DATA names no folder")
def test_the_official_files_give_the_published_figures(recipe: Any, measured: Any) -> None:
    official = recipe.samples.read(Path(os.environ["SIFO_DATA"]))
    assert {task: len(samples) for task, samples in official.items()} == dict.fromkeys(TASKS, 200)
    found = recipe.mechanics.mechanics(
        official, [s for s in official["text_modification"] if len(s.steps) > 2], official
    )
    kept = recipe.mechanics.promised(found)
    known = [name for name in kept if "official" in name]
    assert len(known) == 3
    assert all(kept[name] for name in known)
    strength = found["own"]["strength"]
    assert strength["omission"] == pytest.approx(0.931, abs=1e-3)
    assert strength["necessary"] == pytest.approx(0.765, abs=1e-3)
    assert strength["linked"] == pytest.approx(0.2975, abs=1e-3)
    assert strength["order"] == pytest.approx(236 / 600, abs=1e-3)
    wanted = {3: 0.738, 4: 0.665, 5: 0.616}
    assert found["own"]["propagation"]["measured"] == pytest.approx(wanted, abs=0.03)
    # their words are not trained on
    texts = [t for rows in official.values() for s in rows for t in (s.context, *s.steps)]
    assert all(recipe.mechanics.is_official(task, samples) for task, samples in official.items())
    left = recipe.lexicons.lexicon("train", avoid=texts)
    together = "\n".join(texts).lower()
    assert not [word for word in left.words() if word.lower() in together and len(word) > 12]
