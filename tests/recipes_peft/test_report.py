"""Tables on the screen, curves and documents in the folder."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from recipes_peft.loop import Point, Result
from recipes_peft.report import before_after, compare, curves, perplexity, show, write_json


def test_curves_are_a_picture_and_the_same_numbers_as_csv(tmp_path: Path) -> None:
    curves(tmp_path, 4.0, {"A": [Point(1, 0.5, 3.0, 2.0), Point(2, 1.0, 2.0, 1.5)]})
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["held_out_loss"] for row in rows] == ["2.0", "1.5"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"curves.csv", "curves.png"}


def test_runs_that_start_apart_have_a_first_point_of_their_own(tmp_path: Path) -> None:
    points = [Point(1, 0.5, 3.0, 2.0)]
    curves(tmp_path, {"A": 9.0, "B": 4.0}, {"A": points, "B": points})
    with (tmp_path / "curves.csv").open() as file:
        rows = [(row["run"], row["step"], row["held_out_loss"]) for row in csv.DictReader(file)]
    assert rows == [("A", "0", "9.0"), ("A", "1", "2.0"), ("B", "0", "4.0"), ("B", "1", "2.0")]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_document_replaces_the_one_before(tmp_path: Path) -> None:
    for content in ({"a": 1}, {"b": "ü"}):
        write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"b": "ü"}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_tables_show_what_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    show("Title", ["name", "value"], [["[bold]kept[/bold]", "1.5"]])
    compare(
        "Models",
        {
            "base": Result(1.0, 0.25, []),
            "lm": Result(1.0, None, []),
            "A": Result(0.5, 1.0, [], 1200, 61.4),
        },
    )
    shown = capsys.readouterr().out
    for text in ("[bold]kept[/bold]", "25.0%", "2.72", "1,200", "61"):
        assert text in shown


def test_runs_are_shown_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = Result(1.0, None, [], seconds=90.0), Result(0.0, None, [], seconds=6.0)
    before_after("Starts", {"A": (before, after), "B": (after, after)}, {"A": {"bits": 2.25}})
    shown = capsys.readouterr().out
    for text in ("bits", "2.25", "2.72", "1.00", "1.5", "0.1"):
        assert text in shown
    assert "right" not in shown
    before_after("Starts", {"A": (Result(1.0, 0.5, []), Result(0.0, 0.75, []))}, {})
    shown = capsys.readouterr().out
    assert "right" in shown
    assert "75.0%" in shown


def test_perplexity_of_any_loss() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == math.inf
