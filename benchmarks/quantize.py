"""Quantise a language model in every way that is known here and compare what is left of it.

Each method makes a model of 2, 3 or 4 bits, with a LoRA or ready for one. Measured are perplexity
and size, then perplexity after the same finetuning for all, time and memory. Rows are written as
they are made; `--resume` goes on where a run stopped.

Usage: `python -m benchmarks.quantize --quick`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks._command import RESULTS, Aim
from benchmarks._process import alone
from benchmarks._quantization import PROTOCOLS, Job, Outcome, Protocol, Texts, measure, split
from benchmarks._quantization_plot import plot
from benchmarks._quantizer_peers import missing
from benchmarks._quantizers import BEST, BLOCKWISE, FULL_BITS, LOFTQ, METHODS
from benchmarks._report import Place, Row, append, read_all, show
from kernels_peft.packing import FORMATS
from recipes_peft import assets, boolq, models

NAME = "quantize"

AIMS = (
    Aim("2 bits, rank 64: at most 60", BEST, "quantised", "perplexity", 60.0, cases="2 bits", x=64),
    Aim("3 bits, rank 16: at most 29", BEST, "quantised", "perplexity", 29.0, cases="3 bits", x=16),
    Aim("block by block, at most 2 training passes", BLOCKWISE, "quantised", "cost", 2.0),
    Aim("quantised, below LoftQ", BEST, "quantised", "perplexity", 1.0, LOFTQ),
    Aim("finetuned, below LoftQ", BEST, "finetuned", "perplexity", 1.0, LOFTQ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for; return 1 if a method failed or broke a rule."""
    args = _parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes
    how = PROTOCOLS[args.size]
    how = replace(
        how,
        model=args.model or how.model,
        bits=tuple(args.bits or how.bits),
        ranks=tuple(args.rank or how.ranks),
        steps=how.steps if args.steps is None else args.steps,
    )
    csv, png = args.out / f"{NAME}.csv", args.out / f"{NAME}.png"
    if args.save:
        csv = RESULTS / csv.name
    console = Console(width=None if sys.stdout.isatty() else 180)
    here = Place.here(torch.device(args.device), "wall")
    label = Path(how.model).name + (f", first {how.blocks} blocks" if how.blocks else "")
    known = read_all(csv) if args.resume and csv.exists() else []
    rows: list[Row] = []
    wrong: list[str] = []
    failed: dict[str, str] = {}
    absent: set[str] = set()
    for job in _jobs(how, _texts(how, args.text), args.device, re.compile(args.only)):
        case, what = f"{label}, {job.bits} bits", f"{job.method}, {job.bits} bits, rank {job.rank}"
        place = replace(here, versions=f"{here.versions}, settings {job.digest()}")
        if found := _same(known, case, job, place):
            console.print(f"{what}: known", highlight=False)
            rows += found
            continue
        if missing(METHODS[job.method].needs):
            absent.add(METHODS[job.method].needs)
            continue
        try:
            outcome = alone(measure, job) if how.own_process else measure(job)
        except Exception as error:  # noqa: BLE001  # the other methods are measured nevertheless
            failed[what] = f"{type(error).__name__}: {error}"
            console.print(f"{what}: {failed[what]}", markup=False, highlight=False)
            continue
        made = _rows(place, case, job, outcome)
        append(csv, made)
        rows += made
        wrong += [f"{what}: {rule}" for rule in outcome.wrong]
        told = {r.mode: f"{r.p50:.5g}" for r in made if r.metric == "perplexity"}
        console.print(f"{what}:", *(f"{k} {v}" for k, v in told.items()), highlight=False)
    show(console, rows)
    if csv.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        plot(read_all(csv), png)
    for package in sorted(absent):
        console.print(f"not measured: what needs {package}, which is not installed")
    judged = [aim.judge(rows) for aim in AIMS]
    summary = {
        "benchmark": NAME,
        "size": args.size,
        "device": here.device,
        "rows": len(rows),
        "csv": str(csv),
        "png": str(png),
        "wrong": wrong,
        "failed": failed,
        "missing": sorted(absent),
        "aims": judged,
    }
    print(json.dumps(summary))
    return 1 if wrong or failed else 0


def _jobs(how: Protocol, texts: Texts, device: str, only: re.Pattern[str]) -> Iterator[Job]:
    """Yield the measurements to make, full precision first."""
    place = models.locate(how.model)
    for bits, (name, method), rank in product((FULL_BITS, *how.bits), METHODS.items(), how.ranks):
        if bits in method.widths and only.search(name):
            yield Job(place, name, bits, rank, how, texts, device)


def _texts(how: Protocol, file: Path | None) -> Texts:
    if file is None:
        text = "\n\n".join(p.answer for p in boolq.passages(assets.fetch("boolq")))
    else:
        text = file.read_text(encoding="utf-8")
    return split(AutoTokenizer.from_pretrained(models.locate(how.model)), text, how)


def _same(known: Sequence[Row], case: str, job: Job, place: Place) -> list[Row]:
    """Give the rows that an earlier run wrote with the same settings, unless it broke a rule."""
    settings = place.versions.rpartition(", ")[2]
    found = {
        (r.mode, r.metric): r
        for r in known
        if (r.case, r.provider, r.x, r.device) == (case, job.method, job.rank, place.device)
        and r.versions.endswith(settings)
    }
    broken = any(row.metric == "wrong" for row in found.values())
    return [] if broken else list(found.values())


def _rows(place: Place, case: str, job: Job, outcome: Outcome) -> list[Row]:
    facts = list(outcome.facts)
    if outcome.wrong:
        facts.append(("check", "wrong", "rules", len(outcome.wrong)))
    return [
        place.row(case, job.method, mode, metric, unit, job.rank, [value])
        for mode, metric, unit, value in facts
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument(
        "--quick", dest="size", action="store_const", const="quick", default=argparse.SUPPRESS
    )
    parser.add_argument("--size", choices=PROTOCOLS, default="full", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument(
        "--model", help="a name of the recipes, a folder or a hub id; default: the size's"
    )
    parser.add_argument("--text", type=Path, help="UTF-8; default: the paragraphs of BoolQ")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="methods whose name contains a match"
    )
    parser.add_argument("--bits", type=int, nargs="+", choices=list(FORMATS))
    parser.add_argument("--rank", type=int, nargs="+")
    parser.add_argument("--steps", type=int, help="of the finetuning; 0: none")
    parser.add_argument(
        "--resume", action="store_true", help="keep what the CSV has with the same settings"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench-output"), help="folder of the CSV and the plot"
    )
    parser.add_argument(
        "--save",
        action="store_true",
        help="append the rows to benchmarks/results instead of a CSV in --out",
    )
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 0:
        parser.error(f"--steps is {args.steps}; give a number of steps, 0 for no finetuning")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
