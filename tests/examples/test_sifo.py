"""The SIFo recipe: its verifier, simulators and faults, on values that are known by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.examples import _recipes


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("sifo") as modules:
        yield modules


# ---- parsing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strict", "robust"),
    [
        ('{"Instruction_1": "a", "Instruction_2": "b"}', ["a", "b"], ["a", "b"]),
        # values in order against values by number
        ('{"Instruction_2": "b", "Instruction_1": "a"}', ["b", "a"], ["a", "b"]),
        ('{"Instruction_1": "a", "Instruction_3": "c"}', ["a", "c"], ["a", "", "c"]),
        ('{"x": "a", "y": "b"}', ["a", "b"], ["a", "b"]),
        ('{"Instruction_1": null, "Instruction_2": ["a", 2]}', ["", "a, 2"], ["", "a, 2"]),
        ('{"Instruction_1": 12, "Instruction_2": true}', ["12", "True"], ["12", "True"]),
        ('{"Instruction_1": "a", "Instruction_1": "b"}', ["b"], ["b"]),
        # a text around the object: the strict mode splits on markers, and keeps what follows
        (
            'Sure: {"Instruction_1": "a", "Instruction_2": "b"} done',
            ["a", 'b"} done'],
            ["a", "b"],
        ),
        # cut off
        ('{"Instruction_1": "a", "Instruction_2": "b', ["a", "b"], ["a", "b"]),
        ("Instruction_1: a\nInstruction_2: b", ["a", "b"], ["a", "b"]),
        ("Instruction_2: b\nInstruction_1: a", ["b", "a"], ["a", "b"]),
        ("no answer", [], []),
        ("", [], []),
        ("[1, 2]", [], []),
        ('{"a": {"Instruction_1": "in"}}', ["{'Instruction_1': 'in'}"], None),
    ],
)
def test_both_modes_of_parsing(
    recipe: Any, text: str, strict: list[str], robust: list[str] | None
) -> None:
    assert recipe.verifier.parse_response(text) == strict
    if robust is not None:
        assert recipe.verifier.parse_response(text, "robust") == robust


def test_a_mode_that_there_is_not(recipe: Any) -> None:
    with pytest.raises(ValueError, match="mode is 'lax'; choose from strict, robust"):
        recipe.verifier.parse_response("", "lax")


@pytest.mark.parametrize(
    ("text", "steps", "fine"),
    [
        ('{"a": 1, "b": 2}', 2, True),
        ('{"a": 1, "b": 2}', 3, False),
        ('{"a": 1} and', 1, False),
        ("[1]", 1, False),
        ("", 0, False),
    ],
)
def test_well_formed(recipe: Any, text: str, steps: int, fine: bool) -> None:
    assert recipe.verifier.well_formed(text, steps) is fine


# ---- metrics --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "text", "bare"),
    [
        ("text_modification", "The  end, of\nit's.", "The end of its"),
        ("qa", "The  end, of a thing.", "end of thing"),
        ("security", "An apple, the pear", "apple pear"),
        ("qa", "Theodore and Anna", "theodore and anna"),
        ("math", "1,200.50", "1200.50"),
        ("another name", "The end!", "end"),
    ],
)
def test_normalise(recipe: Any, task: str, text: str, bare: str) -> None:
    assert recipe.verifier.normalise(task, text) == bare


def test_a_hit_is_a_part_of_the_answer(recipe: Any) -> None:
    score = recipe.verifier.score
    assert score("math", ["1"], ["16"]).final  # a known weakness of the official test
    assert not score("math", ["16"], ["1"]).final
    assert score("text_modification", ["A b."], ["so: a B"]).final
    assert score("security", ["oats, rye"], ["the oats, rye, corn"]).hits == (True,)
    assert not score("security", ["oats, rye"], ["rye, oats"]).final


def test_the_final_answer_is_the_last_one_given(recipe: Any) -> None:
    score = recipe.verifier.score
    found = score("qa", ["x", "y"], ["x", "y", "z"])
    assert (found.hits, found.final, found.depth) == ((True, True), False, 2)
    found = score("qa", ["x", "y"], ["y"])
    assert (found.hits, found.final, found.depth) == ((False, False), False, 0)
    found = score("qa", ["x", "y", "z"], ["x", "no", "z"])
    assert (found.hits, found.final, found.depth) == ((True, False, True), True, 1)
    assert score("qa", ["ab"], ["abcd"]).length == 4


def test_samples_together(recipe: Any) -> None:
    score = recipe.verifier.score
    scores = [
        score("qa", ["p", "q", "r"], ["p", "q", "no"]),
        score("qa", ["p", "q"], ["p", "q"]),
        score("qa", ["p", "q"], ["no", "q"]),
    ]
    found = recipe.verifier.aggregate(scores)
    assert found.samples == 3
    assert found.sample_accuracy == 66.67
    assert found.instruction_accuracy == 72.22  # (2/3 + 1 + 1/2) / 3, not 5 of 7 steps
    assert found.depth == pytest.approx(4 / 3)
    assert found.positions == (66.67, 100.0, 0.0)
    assert found.consistency == 50.0  # of two right finals one has all others right
    assert found.lucky == 100.0  # the one sample with an earlier miss ends right
    low, high = found.sample_interval
    assert 0 <= low <= 66.67 <= high <= 100
    assert found == recipe.verifier.aggregate(scores)
    assert found.curves("qa") == {
        "qa, answers": {1: 66.67, 3: 0.0},
        "qa, revisions": {2: 100.0},
    }
    assert found.curves("math") == {"math": {1: 66.67, 2: 100.0, 3: 0.0}}
    with pytest.raises(ValueError, match="no scores"):
        recipe.verifier.aggregate([])


def test_an_interval_of_many_samples_is_that_of_the_binomial(recipe: Any) -> None:
    scores = [recipe.verifier.Score((i % 2 == 0,), i % 2 == 0, 1.0) for i in range(400)]
    low, high = recipe.verifier.aggregate(scores).sample_interval
    assert low == pytest.approx(50 - 4.9, abs=1)
    assert high == pytest.approx(50 + 4.9, abs=1)


# ---- simulators -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "edit", "after"),
    [
        ("a cat, a cat sat", ("delete", "cat"), "a cat, a sat"),  # `cat,` is another token
        ("Cat cat", ("delete", "cat"), "Cat"),
        ("the cat catches", ("replace", "cat", "Dog"), "the Dog Dogches"),
        ("The theatre", ("before", "the", "New"), "The New theatre"),
        ("cat, cat", ("after", "cat", "New"), "cat New, cat New"),
        ("a  b", ("delete", "x"), "a b"),
    ],
)
def test_edits(recipe: Any, text: str, edit: tuple[str, ...], after: str) -> None:
    state = recipe.simulators.TextModState(text)
    assert state.after(recipe.simulators.Edit(*edit)).text == after
    assert state.text == text


def test_an_edit_is_read_from_an_instruction(recipe: Any) -> None:
    s = recipe.simulators
    for edit in (
        s.Edit("delete", "cat"), s.Edit("replace", "cat", "Dog"),
        s.Edit("before", "cat", "Dog"), s.Edit("after", "cat", "Dog"),
    ):  # fmt: skip
        assert s.read_edit(recipe.text_chains.instruction(edit)) == edit
    assert s.read_edit('Replace "a" by "b".') == s.Edit("replace", "a", "b")
    for wrong in ('Underline "a".', "Delete a.", 'Replace "a".', 'Insert "a" within "b".'):
        with pytest.raises(ValueError, match="names no edit"):
            s.read_edit(wrong)
    with pytest.raises(ValueError, match="an edit is 'turn'"):
        s.TextModState("a").after(s.Edit("turn", "a"))


def test_a_password_opens_the_list_until_it_is_changed(recipe: Any) -> None:
    state = recipe.simulators.SecurityState.read("A list holds 'oats'. The password is 'elm1'.")
    assert (state.items, state.password) == (("oats",), "elm1")
    assert state.after("fir2 Add 'rye' to it.").listed == "oats"
    assert state.after("Add 'rye' with elm1 to it.").listed == "oats"
    state = state.after("elm1 Add 'rye' to it.").after("elm1 Change the password to 'fir2'.")
    assert state.after("elm1 Add 'corn' to it.").listed == "oats, rye"
    assert state.after("fir22 Add 'corn' to it.").listed == "oats, rye"
    assert state.after("fir2 Add 'farmer's corn' to it.").listed == "oats, rye, farmer's corn"
    assert state.after("elm1 Change the password to 'ash3'.").password == "fir2"


def test_the_right_to_add_is_given_and_kept(recipe: Any) -> None:
    state = recipe.simulators.SecurityState.read(
        "A list holds 'oats'. Only Manager Ann has the right to add."
    )
    assert state.after("Bo adds 'rye' to it.").listed == "oats"
    assert state.after("Ann adds 'rye' to it.").listed == "oats, rye"  # a title is no other person
    assert state.after("Bo gives Cy the right to add.").after("Cy adds 'a' to it.").listed == "oats"
    state = state.after("Manager Ann gives Bo the right to add.").after("Bo adds 'rye' to it.")
    assert state.after("Manager Ann adds 'dr. corn' to it.").listed == "oats, rye, dr. corn"
    assert state.after("Bo adds barley to it.").listed == "oats, rye, barley"
    with pytest.raises(ValueError, match="is no scenario"):
        recipe.simulators.SecurityState.read("Nothing is kept here.")


# ---- faults ---------------------------------------------------------------------------------


def edits(recipe: Any, *parts: tuple[str, ...]) -> list[Any]:
    return [recipe.simulators.Edit(*part) for part in parts]


def test_a_step_is_skipped_or_two_are_swapped(recipe: Any) -> None:
    chain = edits(recipe, ("replace", "b", "X"), ("after", "X", "Y"), ("delete", "a"))
    assert recipe.simulators.run_edits("a b c", chain) == ["a X c", "a X Y c", "X Y c"]
    assert recipe.faults.skipped("a b c", chain, 0) == ["a b c", "a b c", "b c"]
    assert recipe.faults.skipped("a b c", chain, 1) == ["a X c", "a X c", "X c"]
    assert recipe.faults.skipped("a b c", chain, 2)[-1] == "a X Y c"
    assert recipe.faults.swapped("a b c", chain, 0) == ["a b c", "a X c", "X c"]
    assert recipe.faults.swapped("a b c", chain, 1)[-1] == "X Y c"


def test_skipping_by_chance_at_its_ends(recipe: Any) -> None:
    chain = edits(recipe, ("replace", "b", "X"), ("delete", "a"))
    generator = random.Random(0)
    assert recipe.faults.skip_at_random(generator, "a b", chain, 0.0) == ["a X", "X"]
    assert recipe.faults.skip_at_random(generator, "a b", chain, 1.0) == ["a b", "a b"]


def chained(recipe: Any, text: str, chain: list[Any]) -> Any:
    steps = tuple(recipe.text_chains.instruction(edit) for edit in chain)
    golds = tuple(recipe.simulators.run_edits(text, chain))
    return recipe.samples.SifoSample("text_modification", steps, golds, text)


def test_the_strength_of_chains_by_hand(recipe: Any) -> None:
    linked = chained(recipe, "a b c", edits(recipe, ("replace", "b", "X"), ("replace", "X", "Y")))
    found = recipe.faults.chain_strength([linked])
    # without the first step the second finds nothing; one of two steps is linked
    assert (found.omission, found.necessary, found.linked, found.order) == (1.0, 1.0, 0.5, 1.0)
    apart = chained(recipe, "a b c", edits(recipe, ("replace", "b", "X"), ("replace", "c", "Y")))
    found = recipe.faults.chain_strength([apart])
    assert (found.omission, found.necessary, found.linked, found.order) == (1.0, 1.0, 0.0, 0.0)
    idle = chained(recipe, "a b", edits(recipe, ("replace", "z", "X"), ("delete", "a")))
    found = recipe.faults.chain_strength([idle])
    # what is left in at the beginning is not noticed: the right text is a part of the answer
    assert (found.omission, found.necessary, found.idle, found.absent) == (0.0, 0.0, 0.5, 0.5)


def test_the_formula_of_propagation(recipe: Any) -> None:
    strength = SimpleNamespace(omission=0.93125)
    # the specification's figures for the official files
    for steps, wanted in {3: 0.746, 4: 0.676, 5: 0.613}.items():
        assert recipe.faults.predicted(strength, 0.1, steps) == pytest.approx(wanted, abs=5e-4)
