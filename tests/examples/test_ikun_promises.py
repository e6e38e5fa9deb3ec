"""The recipe of IKUN: what was promised before the run is decided from the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.examples import _recipes


@pytest.fixture
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("ikun") as modules:
        yield modules


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


def test_two_stages_are_judged_by_the_runs_that_there_are(recipe: Any) -> None:
    one, two = {0: found_of(2.0)}, {0: found_of(1.0, output="x" * 12)}
    found = recipe.promises.two_stages({"CV-full": two, "CV": one, "S-full": one, "S": two})
    assert found == {
        "A3 CV-full below S-full by 2 % in two of three seeds": True,
        "A3 CV-full below S+-full by 2 % in two of three seeds: there is no run S+-full": None,
        "A3 chrF of CV-full is that of S+-full or better: there is no run S+-full": None,
    }
    assert list(recipe.promises.healthy({"CV-full": two, "CV": one}, True).items()) == [
        ("A4 CV-full: lengths within 15 % of the references' in every bucket", False),
        ("A4 CV-full: 2 % or fewer in another language", True),
    ]
    for judge in (recipe.promises.two_stages, lambda runs: recipe.promises.healthy(runs, True)):
        ((name, met),) = judge({"S": one}).items()
        assert "there is no run C, C-full, CV-full, CV" in name
        assert met is None


def test_what_was_promised_of_health(recipe: Any) -> None:
    for length, kept in ((9, True), (11, True), (8, False), (12, False)):
        runs = {"C": {0: found_of(1, output="x" * length)}}
        assert list(recipe.promises.healthy(runs, True).values()) == [kept, True]
    assert len(recipe.promises.healthy(runs, False)) == 1
    runs["C"][0]["merge_difference"] = 1e-3
    assert list(recipe.promises.merges(runs, "float32").values()) == [False]
    assert list(recipe.promises.merges(runs, "bfloat16").values()) == [True]
