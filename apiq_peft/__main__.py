"""Command line: `python -m apiq_peft quantize | evaluate | export | inspect`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from safetensors import SafetensorError

from apiq_peft.calibration import CalibrationError
from apiq_peft.commands import evaluate, export, inspect, quantize
from apiq_peft.commands.options import CommandParser, parse

_REFUSED = (
    *(ValueError, OSError, ImportError),
    *(CalibrationError, SafetensorError, torch.OutOfMemoryError),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status, 2 for bad input, told in a line."""
    parser = CommandParser(prog="python -m apiq_peft", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (quantize, evaluate, export, inspect):
        command.add(commands)
    try:
        options = parse(parser, arguments)
        return options.run(options)
    except _REFUSED as error:
        print(f"apiq_peft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
