"""Command line: `python -m road_peft inspect PATH`."""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from road_peft.diagnostics import LayerReport, inspect_adapter, plot

_HEADINGS = (
    *("layer", "variant", "group", "blocks", "mean |angle| °", "max °", "mean scale"),
    *("min det", "max det", "RoPE share"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m road_peft", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="angles and scales of an adapter")
    inspect.add_argument("path", help="adapter folder or hub repository")
    inspect.add_argument(
        "--head-dim", type=int, help="head size, for the share that commutes with RoPE"
    )
    inspect.add_argument("--csv", type=Path, help="write the table to this file")
    inspect.add_argument("--plot", type=Path, help="write a PNG of angles and scales to this file")
    options = parser.parse_args(arguments)
    try:
        reports = inspect_adapter(options.path, options.head_dim or _head_dim(options.path))
        if options.csv:
            _write_csv(reports, options.csv)
        if options.plot:
            plot(reports, options.plot)
    except (ValueError, OSError) as error:
        print(f"road_peft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"road_peft: --plot needs {error.name}; pip install 'road-apiq-peft[bench]'",
            file=sys.stderr,
        )
        return 2
    Console(width=None if sys.stdout.isatty() else 140).print(_table(reports))
    return 0


def _head_dim(path: str) -> int | None:
    """Read the head size from the base model's configuration if that lies on this machine."""
    from transformers import AutoConfig

    from road_peft.config import RoadConfig

    base = RoadConfig.from_pretrained(path).base_model_name_or_path
    if not base or not Path(base).is_dir():
        return None
    config = AutoConfig.from_pretrained(base, local_files_only=True).get_text_config()
    explicit = getattr(config, "head_dim", None)
    return explicit or config.hidden_size // config.num_attention_heads


def _table(reports: list[LayerReport]) -> Table:
    table = Table(title=f"{len(reports)} layers, {sum(r.blocks for r in reports)} blocks")
    for heading in _HEADINGS:
        left = heading in ("layer", "variant")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for report in reports:
        table.add_row(*(_text(value) for value in asdict(report).values()))
    return table


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_csv(reports: list[LayerReport], path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(LayerReport)])
        writer.writeheader()
        writer.writerows(asdict(report) for report in reports)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
