"""`quantize`: from a model in full precision and a text to a packed base and its LoRA."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from apiq_peft.calibration import PRESETS, Calibration, preset
from apiq_peft.calibration.processes import Processes
from apiq_peft.commands.models import folder_of, tokenizer_of, window_of
from apiq_peft.commands.options import (
    CommandParser,
    add_config,
    add_machine,
    device_of,
    dtype_of,
    read_text,
    truth,
)
from apiq_peft.config import ApiQConfig
from apiq_peft.export import BASE
from apiq_peft.folder import is_quantised
from apiq_peft.quantize import quantize_folder
from apiq_peft.quantizer import SCHEMES
from apiq_peft.report import tables, write_csv, write_plot, write_whole
from apiq_peft.samples import samples_of
from kernels_peft.packing import FORMATS

_DESCRIPTION = """\
Write OUT/base, a packed model, and OUT/adapter, the LoRA that belongs to it; beside them
report.csv, report.png and settings.json, which --config takes. One block is in memory at a time. If
it is interrupted, the same command goes on after the last block that was finished."""
_EXAMPLES = """\
examples:
  %(prog)s MODEL OUT --text train.txt --bits 2                      the paper's algorithm
  %(prog)s MODEL OUT --text train.txt --random-windows 2            and its way to draw samples
  %(prog)s MODEL OUT --text train.txt --preset fast --bits 4        seconds a block
  %(prog)s MODEL OUT --text train.txt --preset best --device cuda --compute-dtype bfloat16
  %(prog)s MODEL OUT2 --config OUT/settings.json --bits 3           the same with one change
  %(prog)s MODEL OUT3 --config OUT/settings.json --preset fast      and with another preset"""


def add(commands: Any) -> None:
    """Add the command and its options."""
    parser: CommandParser = commands.add_parser(
        "quantize",
        help="quantise a causal language model and initialise its LoRA",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", help="folder or hub id of a model in full precision")
    parser.add_argument("out", type=Path, help="folder to make")
    add_config(parser)
    parser.add_argument("--text", type=Path, help="calibration text, UTF-8; needed")
    parser.add_argument("--samples", type=int, default=128, help="default: %(default)s")
    parser.add_argument(
        "--length", type=int, help="tokens; default: 2048, or the model's positions if fewer"
    )
    parser.add_argument(
        "--random-windows",
        type=int,
        metavar="SEED",
        help="draw the samples at random from the text; default: its beginning, side by side",
    )
    parser.add_argument(
        "--bits", type=int, default=2, choices=list(FORMATS), help="default: %(default)s"
    )
    parser.add_argument("--group-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--scheme", default="asymmetric", choices=list(SCHEMES), help="default: %(default)s"
    )
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA; default: %(default)s")
    parser.add_argument("--alpha", type=int, default=16, help="lora_alpha; default: %(default)s")
    parser.add_argument("--target-modules", nargs="+", help="default: every linear layer of blocks")
    add_machine(parser)
    parser.add_argument(
        "--preset",
        default="apiq-bw",
        choices=list(PRESETS),
        help="of the options below; given here, it counts more than all of them in the file of"
        " --config. Default: %(default)s",
    )
    parser.replaces["preset"] = {entry.name for entry in fields(Calibration)}
    for entry in fields(Calibration):
        kinds: dict[str, Any] = {"int": int, "bool": truth, "str": str, "str | None": str}
        assert entry.default is not MISSING
        parser.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=kinds.get(str(entry.type), float),
            help=entry.metadata["help"].replace("%", "%%") + " Default: the preset's.",
        )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.text is None:
        raise ValueError("--text is missing; give the file to calibrate on")
    if options.rank < 1:
        raise ValueError(f"rank is {options.rank}; it must be at least 1")
    if (options.out / BASE).exists():
        raise ValueError(f"{options.out / BASE} exists; choose a new folder")
    given = {entry.name: getattr(options, entry.name) for entry in fields(Calibration)}
    settings = preset(options.preset, **{k: v for k, v in given.items() if v is not None})
    config = ApiQConfig(
        bits=options.bits,
        group_size=options.group_size,
        scheme=options.scheme,
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=options.target_modules,
        task_type="CAUSAL_LM",
    )
    device = device_of(options.device)
    text = read_text(options.text)
    source = folder_of(options.model)
    if is_quantised(source):
        raise ValueError(f"{source} is quantised already; give the model in full precision")
    options.length = window_of(source) if options.length is None else options.length
    samples = samples_of(
        text, tokenizer_of(source), options.samples, options.length, options.random_windows
    )
    reports = quantize_folder(
        source,
        options.out,
        samples,
        config,
        settings,
        dtype=dtype_of(options.dtype),
        device=device,
    )
    if Processes.running().rank:
        return 0
    used = {name: getattr(options, name) for name in options.parser.by_name} | asdict(settings)
    record = {
        "model": options.model,
        "versions": {n: version(n) for n in ("road-apiq-peft", "torch", "transformers", "peft")},
        "settings": used,
    }
    text = json.dumps(record, indent=2, default=str)
    write_whole(options.out / "settings.json", text.encode())
    write_csv(reports, options.out / "report.csv")
    try:
        write_plot(reports, options.out / "report.png")
    except ImportError as error:
        print(f"apiq_peft: there is no report.png: {error}", file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else 100)
    for table in tables(reports):
        console.print(table)
    return 0
