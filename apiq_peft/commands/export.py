"""`export`: a quantised folder as files that others read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from apiq_peft.commands.models import folder_of, load, tokenizer_of
from apiq_peft.commands.options import DTYPES, CommandParser
from apiq_peft.export import ADAPTER, BASE, export_gptq, export_plain
from apiq_peft.folder import is_quantised
from apiq_peft.gptq import VERSIONS

_DESCRIPTION = """\
Write OUT/base and OUT/adapter, a plain LoRA that PEFT reads without this library. The base is a
model in full precision, 'plain', or a GPTQ checkpoint: 'gptq_v2', or 'gptq', the older format, for
models of the scheme gptq_symmetric."""
_EXAMPLES = """\
examples:
  %(prog)s QUANTISED OUT
  %(prog)s QUANTISED OUT --format gptq_v2"""


def add(commands: Any) -> None:
    """Add the command and its options."""
    parser: CommandParser = commands.add_parser(
        "export",
        help="a base in full precision or as a GPTQ checkpoint, and a plain LoRA",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", help="quantised folder")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--format", default="plain", choices=("plain", *VERSIONS), help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype",
        default="float16",
        choices=[name for name in DTYPES if name != "auto"],
        help="of what is not packed; default: %(default)s",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    source = folder_of(options.model)
    if not is_quantised(source):
        raise ValueError(f"{source} has no {BASE} and {ADAPTER}; give a quantised folder")
    if options.out.exists():
        raise ValueError(f"{options.out} exists; choose a new folder")
    model, tokenizer = load(source, torch.device("cpu"), None), tokenizer_of(source)
    dtype = getattr(torch, options.dtype)
    if options.format == "plain":
        export_plain(model, options.out, dtype, tokenizer)
    else:
        export_gptq(model, options.out, options.format, dtype, tokenizer)
    return 0
