"""Command line: `python -m apiq_peft quantize | evaluate | export | inspect`."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from apiq_peft.calibration import PRESETS, BlockReport, Calibration, CalibrationError, preset
from apiq_peft.checkpoint import dequantize, packed_layers
from apiq_peft.config import ApiQConfig
from apiq_peft.evaluation import perplexity, size_of
from apiq_peft.export import export_lora, save_whole
from apiq_peft.quantize import quantize
from apiq_peft.quantizer import SCHEMES
from kernels_peft.packing import FORMATS

BASE, ADAPTER = "base", "adapter"  # folders of a quantised model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, CalibrationError, SafetensorError) as error:
        print(f"apiq_peft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m apiq_peft", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser(
        "quantize",
        help="quantise a causal language model and initialise its LoRA",
        description="Write OUT/base, a packed model, and OUT/adapter, the LoRA that belongs to it."
        " If it is interrupted, the same command goes on where it was.",
    )
    command.add_argument("model", help="folder or hub id of a model in full precision")
    command.add_argument("out", type=Path, help="folder to make")
    command.add_argument("--text", type=Path, required=True, help="calibration text, UTF-8")
    command.add_argument("--samples", type=int, default=128, help="default: %(default)s")
    command.add_argument("--length", type=int, default=2048, help="tokens; default: %(default)s")
    command.add_argument("--bits", type=int, default=2, choices=list(FORMATS))
    command.add_argument("--group-size", type=int, default=64, help="default: %(default)s")
    command.add_argument("--scheme", default="asymmetric", choices=list(SCHEMES))
    command.add_argument("--rank", type=int, default=64, help="of the LoRA; default: %(default)s")
    command.add_argument("--alpha", type=int, default=16, help="lora_alpha; default: %(default)s")
    command.add_argument("--target-modules", nargs="+", help="default: every linear layer")
    command.add_argument(
        "--preset", default="apiq-bw", choices=list(PRESETS), help="default: %(default)s"
    )
    command.add_argument("--device", default="cpu", help="default: %(default)s")
    for entry in fields(Calibration):
        kind = {"int": int, "bool": _truth, "str": str, "str | None": str}.get(
            str(entry.type), float
        )
        assert entry.default is not MISSING
        command.add_argument(
            "--" + entry.name.replace("_", "-"),
            type=kind,  # type: ignore[arg-type]
            help=entry.metadata["help"].replace("%", "%%") + " Default: the preset's.",
        )
    command.set_defaults(run=_quantize)

    command = commands.add_parser("evaluate", help="perplexity and size of a model")
    command.add_argument("model", help="quantised folder, or any causal language model")
    command.add_argument("--text", type=Path, required=True, help="text to predict, UTF-8")
    command.add_argument("--window", type=int, default=2048, help="tokens; default: %(default)s")
    command.add_argument("--stride", type=int, help="less than the window: windows overlap")
    command.add_argument("--limit", type=int, help="windows at most")
    command.add_argument("--device", default="cpu", help="default: %(default)s")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser(
        "export", help="a full-precision base and a plain LoRA, for PEFT without this library"
    )
    command.add_argument("model", type=Path, help="quantised folder")
    command.add_argument("out", type=Path, help="folder to make")
    command.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    command.set_defaults(run=_export)

    command = commands.add_parser("inspect", help="layers, widths and bits of a quantised model")
    command.add_argument("model", help="quantised folder")
    command.set_defaults(run=_inspect)
    return parser


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


def _quantize(options: argparse.Namespace) -> int:
    if (options.out / BASE).exists():
        raise ValueError(f"{options.out / BASE} exists; choose a new folder")
    changes = {
        entry.name: getattr(options, entry.name)
        for entry in fields(Calibration)
        if getattr(options, entry.name) is not None
    }
    settings = preset(options.preset, **changes)
    config = ApiQConfig(
        bits=options.bits,
        group_size=options.group_size,
        scheme=options.scheme,
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=options.target_modules,
        task_type="CAUSAL_LM",
    )
    tokens = _tokens(options.model, options.text)
    wanted = options.samples * options.length
    if len(tokens) < wanted:
        raise ValueError(
            f"{options.text} has {len(tokens)} tokens, but {options.samples} samples of"
            f" {options.length} need {wanted}; give more text, or fewer or shorter samples"
        )
    model = AutoModelForCausalLM.from_pretrained(options.model).to(options.device)
    samples = tokens[:wanted].view(options.samples, options.length)
    peft_model, reports = quantize(model, samples, config, settings, folder=options.out / "blocks")
    base = peft_model.get_base_model()
    save_whole(options.out / ADAPTER, lambda to: _save_adapter(peft_model, to, options.out))
    _write_report(options.out / "report.csv", reports)
    del base
    bare = peft_model.unload()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def save_base(to: Path) -> None:
        bare.save_pretrained(to)
        tokenizer.save_pretrained(to)

    save_whole(options.out / BASE, save_base)
    shutil.rmtree(options.out / "blocks")
    _show(reports)
    return 0


def _save_adapter(model: Any, folder: Path, out: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = str((out / BASE).resolve())
    model.save_pretrained(folder)


def _evaluate(options: argparse.Namespace) -> int:
    model = _load(options.model, options.device)
    place = str(Path(options.model) / BASE) if _is_quantised(options.model) else options.model
    found = perplexity(
        model,
        _tokens(place, options.text),
        options.window,
        options.stride,
        options.limit,
        show_progress=True,
    )
    size = size_of(model)
    values = {"perplexity": found.value, "tokens": found.tokens, **asdict(size)}
    values["bits_per_weight"] = size.bits_per_weight
    values["bits_with_adapters"] = size.bits_with_adapters
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value:,.4f}" if value % 1 else f"{value:,.0f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(json.dumps(values))
    return 0


def _export(options: argparse.Namespace) -> int:
    model = _load(options.model, "cpu")
    if not _is_quantised(options.model):
        raise ValueError(f"{options.model} has no {BASE} and {ADAPTER}; give a quantised folder")

    def save(to: Path) -> None:
        export_lora(model, to / ADAPTER, base_model=str((options.out / BASE).resolve()))
        bare = dequantize(model.unload(), getattr(torch, options.dtype))
        bare.to(getattr(torch, options.dtype)).save_pretrained(to / BASE)
        AutoTokenizer.from_pretrained(options.model / BASE).save_pretrained(to / BASE)

    save_whole(options.out, save)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    model = _load(options.model, "cpu")
    table = Table(title=str(options.model))
    for heading in ("layer", "inputs", "outputs", "bits", "group", "bits a weight"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for name, layer in packed_layers(model).items():
        values = (layer.in_features, layer.out_features, layer.bits, layer.group_size)
        table.add_row(name, *map(str, values), f"{layer.bits_per_weight:.4f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


def _is_quantised(place: str | Path) -> bool:
    return (Path(place) / BASE).is_dir() and (Path(place) / ADAPTER).is_dir()


def _load(place: str | Path, device: str) -> Any:
    if not _is_quantised(place):
        return AutoModelForCausalLM.from_pretrained(place).to(device)
    base = AutoModelForCausalLM.from_pretrained(Path(place) / BASE)
    return PeftModel.from_pretrained(base, str(Path(place) / ADAPTER)).to(device)


def _tokens(model: str, text: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 text ({error})") from error
    return tokenizer(content, add_special_tokens=False, return_tensors="pt").input_ids[0]


def _write_report(path: Path, reports: Sequence[BlockReport]) -> None:
    rows = [
        {"block": report.block, "seconds": report.seconds, **asdict(layer)}
        for report in reports
        for layer in report.layers
    ]
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def _show(reports: Sequence[BlockReport]) -> None:
    table = Table(title="relative error of a block's output")
    for heading in ("block", "rounded", "calibrated", "seconds"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    for r in reports:
        table.add_row(r.block, f"{r.error_before:.4f}", f"{r.error_after:.4f}", f"{r.seconds:.1f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    sys.exit(main())
