"""The SIFo recipe on files of the user's: what is tested is not trained on, what is official."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes_peft import errors
from tests.examples import _recipes
from tests.examples.test_sifo import chained, edits
from tests.examples.test_sifo_chains import settings
from tests.examples.test_sifo_run import SMALL, run


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("sifo") as modules:
        yield modules


def asked(recipe: Any, context: str, step: str = "What?", gold: str = "that") -> Any:
    return recipe.samples.SifoSample("qa", (step,), (gold,), context)


# ---- what is tested is not trained on -------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("the OLD  mill\nstood by a river.", True),  # without case and runs of spaces
        ("mill stood by", True),  # within a context
        ("Now: the old mill stood by a river. It burnt.", True),  # a context within it
        ("It burnt twice in one year. Nobody knew why.", True),  # a sentence, within a gold
        ("How far is it to the town?", True),  # within an instruction
        ("Nobody knew why. It is so.", False),
        ("Then he said: such is life. Indeed.", False),  # a context too short to tell
    ],
)
def test_a_text_that_is_tested_is_known(recipe: Any, text: str, known: bool) -> None:
    samples = [
        asked(recipe, "The old mill stood by a river."),
        asked(recipe, "Such is life.", "Read. How far is it to the town?"),
        asked(recipe, "", gold="So it was. It burnt twice in one year. It is so."),
    ]
    assert recipe.contamination.Tested(samples).has(text) is known
    assert not recipe.contamination.Tested([]).has(text)


def test_texts_problems_and_passages_that_are_tested_are_left_out(
    recipe: Any, tmp_path: Path
) -> None:
    text, math, qa = (tmp_path / name for name in ("text.txt", "math.jsonl", "squad.json"))
    text.write_text("\n\n".join(f"Line {i} has a sentence of some words." for i in range(20)))
    answer = "He has 3*4=<<3*4=12>>12 pens.\nHe keeps 12-5=<<12-5=7>>7 pens.\n#### 7"
    rows = [{"question": f"How many of all {i} are left?", "answer": answer} for i in range(20)]
    math.write_text("\n".join(map(json.dumps, rows)))
    contexts = [f"Town {i} was built in {1800 + i}. Its mayor was Anna{i}." for i in range(20)]
    # the passages are too long for the limit: a window is taken, the whole is compared
    ends = [" ".join(f"It went on in {i} by {j}." for j in range(12)) for i in range(20)]
    longer = [f"{context} {end}" for context, end in zip(contexts, ends, strict=True)]
    squad(qa, longer, [[str(1800 + i), f"Anna{i}"] for i in range(20)])
    given = settings(text=str(text), math=str(math), qa=str(qa), least_words=4)
    whole = recipe.chains.Chains("train", given)
    assert whole.left_out == {"text": 0, "math": 0, "qa": 0}
    tested = [
        asked(recipe, whole.texts[0].upper()),
        asked(recipe, "", f"{whole.problems[1].meta['question']} Say it in a word."),
        asked(recipe, whole.passages[2].paragraph[20:300]),
    ]
    found = recipe.chains.Chains("train", given, tested)
    assert found.left_out == {"text": 1, "math": 1, "qa": 1}
    assert found.texts == whole.texts[1:]
    assert found.problems == [p for i, p in enumerate(whole.problems) if i != 1]
    assert [p.text for p in found.passages] == [
        p.text for i, p in enumerate(whole.passages) if i != 2
    ]
    everything = [asked(recipe, passage.paragraph) for passage in whole.passages]
    with pytest.raises(errors.UserError, match="all that --qa has for the half train occurs in"):
        recipe.chains.Chains("train", given, everything)


def test_too_few_values_of_facts_are_a_sentence(recipe: Any) -> None:
    facts = recipe.lexicons.lexicon("train").facts
    avoid = [value for fact in facts[:3] for value in fact.values[:3]]
    with pytest.raises(errors.UserError, match=r"the lexicon has 3 facts left, 4 are needed"):
        recipe.chains.Chains("train", settings(), [asked(recipe, ", ".join(avoid))])


def test_no_chain_at_all_is_a_sentence(recipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "math.jsonl"
    lines = [f"<<{i}+1={i + 1}>>" for i in range(1, 4)]
    rows = [{"question": f"How many {i}?", "answer": "\n".join(lines)} for i in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(errors.UserError, match="no chain of math with 2 to 2 steps for the half"):
        recipe.chains.Chains("train", settings(math=str(file))).make("math", 4, 2)


# ---- passages -------------------------------------------------------------------------------


def squad(file: Path, contexts: list[str], answers: list[list[str]]) -> None:
    """Write a file of SQuAD's format; an answer may say where it begins: (text, start)."""

    def answer(context: str, given: Any) -> dict[str, Any]:
        text, start = (given, context.index(given)) if isinstance(given, str) else given
        return {"text": text, "answer_start": start}

    paragraphs = [
        {
            "context": context,
            "qas": [{"question": f"Q{i}?", "answers": [answer(context, g)]}
                    for i, g in enumerate(given)],
        }
        for context, given in zip(contexts, answers, strict=True)
    ]  # fmt: skip
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))


OTHERS = [
    "Adam",
    "Berta",
    "Carla",
    "Dora",
    "Emil",
    "Fritz",
    "Gerda",
    "Hans",
    "11",
    "12",
    "13",
    "14",
]


@pytest.mark.parametrize(
    ("context", "answers", "shown"),
    [
        # twice; not where the file says; in other letters only
        ("Ida met Ute and Ute in 99 or 98.", ["Ida", "Ute", "99"], {"Ida", "99"}),
        ("Ida met Ute in 99 or 98.", [("Ida", 8), "Ute", "99"], {"Ute", "99"}),
        ("Ida met Ute in 99 or 98.", [("IDA", 0), "Ute", "99"], {"Ute", "99"}),
        # once in these letters, in others as well
        ("Ida met Ute, not ute, in 99.", ["Ida", "Ute", "99"], {"Ida", "Ute", "99"}),
        # overlapping: the longest stays
        ("Ida Ute Bo met in 99.", ["Ida Ute", "Ute Bo", "Ute", "99"], {"Ida Ute", "99"}),
        # outside of the window, though its text is in it
        ("Ida met Ute in 99. So 98 came to the town of many roads.", [("99", 22), "Ida", "Ute"],
         {"Ida", "Ute"}),
    ],
)  # fmt: skip
def test_pairs_whose_answer_is_once_where_the_file_says(
    recipe: Any, context: str, answers: list[Any], shown: set[str], tmp_path: Path
) -> None:
    file = tmp_path / "squad.json"
    squad(file, [context, " ".join(OTHERS)], [answers, OTHERS])
    for half in ("train", "test"):
        passage = recipe.qa_chains.passages(file, 9, half)[0]
        assert {answer for _, answer, _ in passage.questions} == shown


def test_the_halves_share_no_replacement(recipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "squad.json"
    squad(file, [f"{name} saw {i}." for i, name in enumerate(OTHERS[:8])],
          [[name, str(i)] for i, name in enumerate(OTHERS[:8])])  # fmt: skip
    values = [
        {v for p in recipe.qa_chains.passages(file, 9, half) for *_, vs in p.questions for v in vs}
        for half in ("train", "test")
    ]
    assert min(map(len, values)) > 2
    assert not values[0] & values[1]


def test_a_revision_brings_no_other_answer(recipe: Any) -> None:
    # "Torch" makes "the old Tor" stand twice while it is still to be asked for
    text = "Ida saw the old Tor and the old Mill."
    given = recipe.qa_chains.Passage(
        text, (("Where?", "the old Tor", ("a hut",)), ("What?", "Mill", ("Torch", "Bell")))
    )
    for seed in range(20):
        chain = recipe.qa_chains.from_passage(random.Random(seed), given, 4)
        before = text
        for answer, revised in zip(chain.golds[::2], chain.golds[1::2], strict=True):
            assert before.count(answer) == 1
            before = revised
    none = given._replace(questions=(("What?", "Mill", ("Tor",)),))
    assert recipe.qa_chains.from_passage(random.Random(0), none, 4) is None


# ---- what is official -----------------------------------------------------------------------


def test_files_of_the_official_names_are_not_judged_as_official(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"qa": [asked(recipe, "A context.")], "security": [asked(recipe, "No scenario.")]}
    made = recipe.chains.Chains("test", settings())
    texts = made.make("text_modification", 4, 5, 3)
    plain = recipe.mechanics.mechanics({"qa": made.make("qa", 2, 2)}, texts, {})
    found = recipe.mechanics.mechanics({"qa": made.make("qa", 2, 2)}, texts, own)
    assert found["own"]["oracles"]["gold answers"]["qa"]["sample_accuracy"] == 100
    assert found["own"]["replayed"] == {"security": (0, 1)}
    assert list(recipe.mechanics.promised(found)) == list(recipe.mechanics.promised(plain))
    # what is official is known by its content
    content = json.dumps([["A context.", "What?", "that"]])
    checksum = hashlib.sha256(content.encode()).hexdigest()[:16]
    monkeypatch.setitem(recipe.mechanics.CONTENT, "qa", checksum)
    found = recipe.mechanics.mechanics({"qa": made.make("qa", 2, 2)}, texts, own)
    judged = recipe.mechanics.promised(found)
    assert set(judged) - set(recipe.mechanics.promised(plain)) == {
        "1 the oracle table of the official files, within 0.01"
    }


def test_steps_that_are_no_edits_are_left_out_and_counted(recipe: Any) -> None:
    fine = chained(recipe, "a b c", edits(recipe, ("replace", "b", "X"), ("after", "X", "Y")))
    odd = recipe.samples.SifoSample("text_modification", ("Write it in capitals.",), ("A",), "a")
    made = recipe.chains.Chains("test", settings())
    texts = made.make("text_modification", 4, 5, 3)
    for rows, count in (([fine, odd], 1), ([odd, odd], 2)):
        own = {"text_modification": rows}
        found = recipe.mechanics.mechanics({"qa": made.make("qa", 2, 2)}, texts, own)["own"]
        assert found["unreadable"] == count
        assert found.get("strength", {"samples": 0})["samples"] == 2 - count
        assert ("propagation" in found) is (count == 1)
        assert found["replayed"] == {"text_modification": (2 * (count == 1), 4 - count)}


def test_an_empty_instruction_changes_nothing(recipe: Any) -> None:
    state = recipe.simulators.SecurityState.read("A list holds 'oats'. The password is 'elm1'.")
    assert state.after("").listed == "oats"


def test_a_run_says_what_of_own_files_it_left_out(
    recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    (tmp_path / "own").mkdir()
    toy = recipe.text_chains.toy_sentences("train", 8, 20)
    odd = recipe.samples.SifoSample("text_modification", ("Shout it.",), (toy[0].upper(),), toy[0])
    recipe.samples.write(tmp_path / "own" / "text_modification.jsonl", [odd])
    assert run(recipe, monkeypatch, *SMALL, "--data", "own", "--arms", "base") == 0
    said = capsys.readouterr().out
    count = toy.count(toy[0])
    assert f"--text: {count} texts that occur in --data were left out of training" in said
    assert "text_modification of --data is not the official file" in said
    assert "1 samples have a step that is no edit" in said
    assert "official files" not in said
    assert "official steps" not in said
    found = json.loads(Path("demo-output/results.json").read_text())
    assert found["tested_left_out"] == {"text": count, "math": 0, "qa": 0}
