"""`inspect`: what a quantised folder holds, without loading it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apiq_peft.commands.options import CommandParser
from apiq_peft.folder import read_folder


def add(commands: Any) -> None:
    """Add the command and its options."""
    parser: CommandParser = commands.add_parser(
        "inspect",
        help="layers, widths and bits of a quantised model",
        description="Show the packed layers of a folder, and its size on disk; the last line is"
        " JSON. Only headers are read.",
        epilog="examples:\n  %(prog)s QUANTISED\n  %(prog)s QUANTISED/base",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", type=Path, help="quantised folder, or its base alone")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    stored = read_folder(options.model)
    table = Table(title=str(options.model))
    for heading in ("layer", "inputs", "outputs", "bits", "group", "bits a weight", "rank"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for x in stored.layers:
        grid = (x.in_features, x.out_features, x.bits, x.group_size, f"{x.bits_per_weight:.4f}")
        table.add_row(x.layer, *map(str, grid), str(x.rank or "-"))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    values = {
        "layers": len(stored.layers),
        "scheme": stored.scheme,
        "weights": sum(layer.weights for layer in stored.layers),
        "bits_per_weight": stored.bits_per_weight,
        "bits_with_adapters": stored.bits_with_adapters,
        "base_disk_bytes": stored.base_disk_bytes,
        "adapter_disk_bytes": stored.adapter_disk_bytes,
    }
    print(json.dumps(values))
    return 0
