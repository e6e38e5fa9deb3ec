"""`evaluate`: perplexity, activation errors, tasks and size of a model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from apiq_peft.commands.models import folder_of, load, tokenizer_of, window_of
from apiq_peft.commands.options import (
    CommandParser,
    add_config,
    add_machine,
    device_of,
    dtype_of,
    read_text,
)
from apiq_peft.evaluation import activation_errors, harness, perplexity, run_tasks, size_of
from apiq_peft.export import ADAPTER, BASE
from apiq_peft.folder import disk_bytes, is_quantised
from apiq_peft.samples import check_length, tokens_of

_DESCRIPTION = """\
Measure a model by a text, by tasks of EleutherAI's harness, or by both, and its size in memory and
on disk. The last line is JSON with all numbers."""
_EXAMPLES = """\
examples:
  %(prog)s QUANTISED --text test.txt                                windows side by side, as GPTQ
  %(prog)s QUANTISED --text test.txt --stride 512                   overlapping
  %(prog)s QUANTISED --text test.txt --original MODEL --limit 8     how far each layer is off
  %(prog)s QUANTISED --tasks arc_easy,piqa --limit 100
  %(prog)s QUANTISED --tasks mine --include-path FOLDER             FOLDER/mine.yaml"""


def add(commands: Any) -> None:
    """Add the command and its options."""
    parser: CommandParser = commands.add_parser(
        "evaluate",
        help="perplexity, activation errors, tasks and size of a model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", help="quantised folder, or any causal language model")
    add_config(parser)
    parser.add_argument("--text", type=Path, help="text to predict, UTF-8")
    parser.add_argument(
        "--window", type=int, help="tokens; default: 2048, or the model's positions if fewer"
    )
    parser.add_argument("--stride", type=int, help="less than the window: windows overlap")
    parser.add_argument("--limit", type=int, help="windows, and documents of a task, at most")
    parser.add_argument(
        "--original",
        metavar="MODEL",
        help="the model in full precision, to compare the output of each layer on the text with",
    )
    parser.add_argument("--tasks", help="of the harness, a,b,c; needs lm-eval")
    parser.add_argument("--include-path", type=Path, help="folder of further tasks")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="of the tasks; default: %(default)s"
    )
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    _check(options)
    device, dtype = device_of(options.device), dtype_of(options.dtype)
    text = None if options.text is None else read_text(options.text)
    folder = folder_of(options.model)
    original = None if options.original is None else folder_of(options.original)
    if original is not None and not is_quantised(folder):
        raise ValueError(f"--original is for quantised folders, and {folder} is none")
    tokenizer = tokenizer_of(folder)
    tokens = None if text is None else tokens_of(text, tokenizer)
    if tokens is not None and len(tokens) < 2:
        raise ValueError(f"{options.text} has {len(tokens)} tokens, and at least 2 are needed")
    model = load(folder, device, dtype)
    if tokens is not None:
        options.window = window_of(folder) if options.window is None else options.window
        check_length(model, min(options.window, len(tokens)))
    values: dict[str, Any] = {}
    if tokens is not None:
        found = perplexity(
            model, tokens, options.window, options.stride, options.limit, show_progress=True
        )
        values |= {"perplexity": found.value, "tokens": found.tokens}
    values |= _sizes(model, folder)
    if original is not None and tokens is not None:
        samples = _windows(tokens, options.window, options.limit)
        errors = activation_errors(model, load(original, device, dtype), samples)
        values |= {"activation_error": fmean(errors.values()), "activation_errors": errors}
    if options.tasks is not None:
        values["tasks"] = run_tasks(
            model,
            tokenizer,
            options.tasks.split(","),
            options.limit,
            options.include_path,
            options.batch_size,
        )
    _show(values)
    print(json.dumps(_finite(values)))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what does not go together before anything is loaded."""
    if options.text is None and options.tasks is None:
        raise ValueError("there is nothing to measure; give --text, --tasks or both")
    for name in ("limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if options.original is not None and options.text is None:
        raise ValueError("--original needs --text, on which the layers are compared")
    if options.tasks is not None:
        harness()
    elif options.include_path is not None:
        raise ValueError("--include-path is for --tasks; give both")


def _windows(tokens: Tensor, window: int, limit: int | None) -> Tensor:
    """Give the windows of the perplexity that lie side by side."""
    length = min(window, len(tokens))
    count = len(tokens) // length
    count = count if limit is None else min(count, limit)
    return tokens[: count * length].view(count, length)


def _sizes(model: Any, folder: Path) -> dict[str, Any]:
    size, quantised = size_of(model), is_quantised(folder)
    return {
        **asdict(size),
        "bits_per_weight": size.bits_per_weight,
        "bits_with_adapters": size.bits_with_adapters,
        "base_disk_bytes": disk_bytes(folder / BASE if quantised else folder),
        "adapter_disk_bytes": disk_bytes(folder / ADAPTER) if quantised else 0,
    }


def _show(values: Mapping[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in values.items():
        if not isinstance(value, dict):
            table.add_row(name.replace("_", " "), _number(value))
    for task, metrics in values.get("tasks", {}).items():
        for name, value in metrics.items():
            table.add_row(f"{task}: {name}", _number(value))
    kinds: dict[str, list[float]] = {}
    for name, value in values.get("activation_errors", {}).items():
        kinds.setdefault(name.rpartition(".")[2], []).append(value)
    for kind, errors in kinds.items():
        table.add_row(f"activation error of {kind}", _number(fmean(errors)))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4f}"


def _finite(value: Any) -> Any:
    """Give null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
