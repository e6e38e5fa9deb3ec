"""A wrong provider is named and never timed; aims are judged as they read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks._command import Aim, Command, Point, Settings, Subject, Work, main, measure
from benchmarks._report import Panel, Place

PLACE = Place("device", "versions", "commit", "date")


def _point(error: float) -> Point:
    def fail() -> None:
        raise AssertionError("a wrong provider was run")

    good = Subject({"forward": lambda: None}, 1e-7)
    wrong = Subject({"forward": fail}, error, facts=fail)  # type: ignore[arg-type]
    return Point("case", 1, 1e-4, "good", {"good": good, "wrong": wrong})


@pytest.mark.parametrize("error", [1.0, float("nan"), float("inf")])
def test_wrong_provider_is_reported_and_not_timed(error: float) -> None:
    rows = measure(_point(error), PLACE, 2, torch.device("cpu"))
    assert [(r.metric, r.mode) for r in rows if r.provider == "wrong"] == [("wrong", "check")]
    assert {r.metric for r in rows if r.provider == "good"} == {"error", "time", "ratio"}


def test_wrong_provider_makes_the_command_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def points(_: Settings) -> Iterator[Point]:
        yield _point(0.5)

    command = Command("some", "about", points, panels=(Panel(("forward",)),))
    assert main(command, ["--size", "tiny", "--out", str(tmp_path)]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["wrong"] == ["case x=1: wrong"]


@pytest.mark.parametrize(
    ("aim", "reached", "worst"),
    [
        (Aim("plain", "a", "step", "time", 2.0), 1, 4.0),
        (Aim("ratio", "a", "step", "time", 0.5, "b"), 2, 0.4),
        (Aim("speed-up", "a", "step", "time", 3.0, "b", at_least=True), 1, 2.5),
        (Aim("one case", "a", "step", "time", 2.0, cases="first"), 1, 1.0),
        (Aim("one size", "a", "step", "time", 2.0, x=2), 0, None),
        (Aim("nothing measured", "c", "step", "time", 2.0), 0, None),
    ],
    ids=lambda value: value.text if isinstance(value, Aim) else "",
)
def test_aim(aim: Aim, reached: int, worst: float | None) -> None:
    figures = {("first", "a"): 1.0, ("first", "b"): 5.0, ("last", "a"): 4.0, ("last", "b"): 10.0}
    rows = [
        PLACE.row(case, provider, "step", "time", "ms", 1, [value])
        for (case, provider), value in figures.items()
    ]
    verdict = aim.judge(rows)
    assert verdict["reached"] == reached
    assert verdict.get("worst") == worst


def test_rates_are_the_work_by_the_time() -> None:
    work = {"decode": Work("throughput", "tokens/s", 32)}
    subject = Subject({"decode": lambda: None}, 0.0, work=work)
    point = Point("case", 32, 1e-4, "a", {"a": subject})
    found = {r.metric: r for r in measure(point, PLACE, 1, torch.device("cpu"))}
    assert found["throughput"].unit == "tokens/s"
    assert found["throughput"].p50 == pytest.approx(32 / (found["time"].p50 / 1e3))


def test_aims_of_another_device_are_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def points(_: Settings) -> Iterator[Point]:
        yield Point("case", 1, 1e-4, "good", {"good": Subject({"forward": lambda: None}, 0.0)})

    aims = tuple(
        Aim(device, "good", "forward", "ratio", 1.0, device=device) for device in ("cpu", "cuda")
    )
    command = Command("some", "about", points, panels=(Panel(("forward",)),), aims=aims)
    options = ["--size", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command, options) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {aim["aim"]: aim["of"] for aim in summary["aims"]} == {"cpu": 1, "cuda": 0}
