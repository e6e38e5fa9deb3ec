"""Command line: `python -m road_peft.serve MODEL --adapters DIR`."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from dataclasses import fields
from typing import Any

import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from road_peft.serve.app import create_app
from road_peft.serve.engine import Engine
from road_peft.serve.options import ServeOptions
from road_peft.serve.server import DrainingServer

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_CPU_CACHE_TOKENS = 16384  # transformers would take most of the machine's memory
_KEY = "ROAD_API_KEY"


def main(arguments: list[str] | None = None) -> int:
    """Run the server until a signal ends it; return the exit status, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        engine = _engine(options)
    except (ValueError, OSError) as error:
        print(f"road_peft.serve: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if engine.options.api_key is None and not _is_loopback(options.host):
        print(
            f"road_peft.serve: {options.host} can be reached from other machines and no key is"
            f" asked for; set {_KEY}",
            file=sys.stderr,
        )
    config = uvicorn.Config(
        create_app(engine),
        host=options.host,
        port=options.port,
        log_level=options.log_level,
        lifespan="on",
        timeout_graceful_shutdown=5,  # for answers to reach their clients; draining came before
        ws="none",
    )
    server = DrainingServer(config, engine)
    server.run()
    return 0 if server.started else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m road_peft.serve", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder or hub repository, safetensors only")
    for one in fields(ServeOptions):
        flag = f"--{one.name.replace('_', '-')}"
        kind, text, default = one.metadata["kind"], one.metadata["help"], one.default
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            shown = text if default is None else f"{text} ({default})"
            parser.add_argument(flag, type=kind, default=default, help=shown)
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the model (auto)")
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    parser.add_argument("--log-level", default="info", choices=("info", "warning", "error"))
    return parser


def _engine(given: argparse.Namespace) -> Engine:
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = {one.name: getattr(given, one.name) for one in fields(ServeOptions)}
    settings["api_key"] = given.api_key or os.environ.get(_KEY) or None
    if torch.device(device).type == "cpu" and given.cache_tokens is None:
        settings["cache_tokens"] = _CPU_CACHE_TOKENS
    options = ServeOptions(**settings)  # before the model: its mistakes are told at once
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=given.dtype, use_safetensors=True
    )
    return Engine(model.to(device).eval(), tokenizer, options)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
