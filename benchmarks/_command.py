"""The pattern of every command: check, time, report; a command adds its cases and its aims."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from benchmarks._cases import SIZES
from benchmarks._measure import CLOCKS, Stages, interleave
from benchmarks._report import Panel, Place, Row, append, plot, show

RESULTS = Path(__file__).parent / "results"

Fact = tuple[str, str, str, float]  # mode, metric, unit, value


@dataclass(frozen=True)
class Work:
    """What one run of a mode gets done, for a rate such as tokens a second."""

    metric: str
    unit: str  # per second
    amount: float


@dataclass(frozen=True)
class Subject:
    """A provider made ready for one case.

    `error` is its distance from the reference. `work` gives the rates that are reported next to the
    times. `facts` measures what is not a time; it runs after the timing, and only if the provider
    is right.
    """

    stages: Stages
    error: float
    facts: Callable[[], Iterable[Fact]] = tuple
    work: Mapping[str, Work] = field(default_factory=dict)  # by mode


@dataclass(frozen=True)
class Point:
    """A case at one size, with the providers to compare. Ratios are to `baseline`.

    `most_rounds` bounds the samples, where one takes long.
    """

    case: str
    x: int
    tolerance: float
    baseline: str
    subjects: Mapping[str, Subject]
    totals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # sums of stages
    most_rounds: int | None = None


@dataclass(frozen=True)
class Aim:
    """A figure to reach: `provider` at most `limit` times `against`, or the plain figure.

    With `at_least`, the inverse ratio has to be `limit` or more (so many times faster). Only cases
    with `cases` in their name count, at the size `x` if it is given, on the `device` if it is.
    """

    text: str
    provider: str
    mode: str
    metric: str
    limit: float
    against: str | None = None
    at_least: bool = False
    cases: str = ""
    x: int | None = None
    device: str | None = None  # "cpu" or "cuda"

    def judge(self, rows: Sequence[Row]) -> dict[str, object]:
        """Give how often the aim is reached, and the worst value with its case."""
        found = {
            (r.case, r.x, r.provider): r.p50
            for r in rows
            if (r.mode, r.metric) == (self.mode, self.metric)
            and self.cases in r.case
            and self.x in (None, r.x)
        }
        values: dict[tuple[str, int], float] = {}
        for (case, x, provider), value in found.items():
            other = found.get((case, x, self.against)) if self.against else 1.0
            if provider == self.provider and other is not None:
                values[case, x] = other / value if self.at_least else value / other
        if not values:
            return {"aim": self.text, "reached": 0, "of": 0}
        worst = (min if self.at_least else max)(values, key=lambda place: values[place])
        reached = [v >= self.limit if self.at_least else v <= self.limit for v in values.values()]
        return {
            "aim": self.text,
            "reached": sum(reached),
            "of": len(reached),
            "worst": float(f"{values[worst]:.4g}"),
            "worst_case": f"{worst[0]} x={worst[1]}",
        }


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line, as `points` needs it."""

    size: str
    device: torch.device
    only: re.Pattern[str]


@dataclass(frozen=True)
class Command:
    """One benchmark: `points` yields what to measure, one at a time to bound the memory."""

    name: str
    about: str
    points: Callable[[Settings], Iterator[Point]]
    panels: tuple[Panel, ...]
    aims: tuple[Aim, ...] = ()
    rounds: Mapping[str, int] = field(
        default_factory=lambda: {"tiny": 3, "quick": 7, "full": 9, "gpu": 50}
    )


def main(command: Command, argv: Sequence[str] | None = None) -> int:
    """Run `command`; return 1 if a provider disagrees with the reference."""
    args = _parse(command, argv)
    device = torch.device(args.device)
    size = args.size or ("gpu" if device.type == "cuda" else "full")
    settings = Settings(size, device, re.compile(args.only))
    console = Console(width=None if sys.stdout.isatty() else 180)
    if args.threads or args.clock == "cpu":
        torch.set_num_threads(args.threads or 1)
    place = Place.here(device, args.clock)
    csv, png = args.out / f"{command.name}.csv", args.out / f"{command.name}.png"
    if args.save:
        csv = RESULTS / csv.name
    rows: list[Row] = []
    append(csv, rows)  # so that there is a file even where --only matches nothing
    torch.manual_seed(0)
    for point in command.points(settings):
        rounds = args.rounds or command.rounds[size]
        rounds = min(rounds, point.most_rounds or rounds)
        measured = measure(point, place, rounds, device, args.clock)
        show(console, measured)
        append(csv, measured)
        rows += measured
    args.out.mkdir(parents=True, exist_ok=True)
    plot(csv, png, command.panels)
    judged = [aim.judge(rows if aim.device in (None, device.type) else ()) for aim in command.aims]
    for verdict in judged:
        console.print(*(f"{k}: {v}" for k, v in verdict.items()), sep="; ", highlight=False)
    wrong = [f"{r.case} x={r.x}: {r.provider}" for r in rows if r.metric == "wrong"]
    summary = {
        "benchmark": command.name,
        "size": size,
        "device": place.device,
        "rows": len(rows),
        "csv": str(csv),
        "png": str(png),
        "wrong": wrong,
        "aims": judged,
    }
    print(json.dumps(summary))
    return 1 if wrong else 0


def measure(
    point: Point, place: Place, rounds: int, device: torch.device, clock: str = "wall"
) -> list[Row]:
    """Give the rows of one point: errors first, then times and facts of the providers in order."""
    rows, right = [], {}
    for name, subject in point.subjects.items():
        if subject.error <= point.tolerance:
            right[name] = subject
        metric = "error" if name in right else "wrong"
        rows.append(
            place.row(point.case, name, "check", metric, "relative", point.x, [subject.error])
        )
    timed = interleave({name: s.stages for name, s in right.items()}, rounds, device, clock)
    for stages in timed.values():
        for total, parts in point.totals.items():
            summed = [stages[part] for part in parts if part in stages]
            stages[total] = [sum(times) for times in zip(*summed, strict=True)]
    for name, subject in right.items():
        for mode, samples in timed[name].items():
            ratios = _ratios(samples, timed.get(point.baseline, {}).get(mode, []))
            figures = [("time", "ms", samples), ("ratio", f"of {point.baseline}", ratios)]
            if mode in subject.work:
                work = subject.work[mode]
                rates = [work.amount / ms * 1e3 for ms in samples]
                figures.append((work.metric, work.unit, rates))
            for metric, unit, values in figures:
                if values:
                    rows.append(place.row(point.case, name, mode, metric, unit, point.x, values))
        for mode, metric, unit, value in subject.facts():
            rows.append(place.row(point.case, name, mode, metric, unit, point.x, [value]))
    return rows


def _ratios(samples: list[float], baseline: list[float]) -> list[float]:
    """Compare within a round where both have the round, otherwise with the baseline's median."""
    if len(samples) == len(baseline):
        return [a / b for a, b in zip(samples, baseline, strict=True)]
    if not baseline:
        return []
    median = sorted(baseline)[len(baseline) // 2]
    return [a / median for a in samples]


def _parse(command: Command, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command.name}", description=command.about
    )
    parser.add_argument("--quick", dest="size", action="store_const", const="quick")
    parser.add_argument(
        "--size", choices=SIZES, help="which cases; 'gpu' on CUDA and 'full' elsewhere if not given"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="samples of each figure")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="'cpu' counts processor time, for a machine whose cores are shared; implies 1 thread",
    )
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="cases whose name contains a match"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench-output"), help="folder of the CSV and the plot"
    )
    parser.add_argument(
        "--save",
        action="store_true",
        help="append the rows to benchmarks/results instead of a CSV in --out",
    )
    return parser.parse_args(argv)
