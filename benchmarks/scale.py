"""Memory per device and bytes on the wire of a training step, for models of 8B to 405B weights.

    python -m benchmarks.scale --devices 8 --tokens 4096

Nothing is run: these are the formulas of `_scale.py`, which tests compare with small runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks._scale import table

GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, and the same as one JSON document in the last line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, on one device")
    args = parser.parse_args(argv)
    if args.devices < 1 or args.tokens < 1:
        parser.error("--devices and --tokens must be at least 1")
    columns = ("model", "method", "engine", "weights", "gradients, Adam", "gathered", "checkpoints")
    view = Table(*columns, "held, GB", "sent, GB", title=f"{args.devices} devices, a step")
    rows = []
    for model, method, engine, step in table(args.devices, args.tokens):
        if step is None:
            view.add_row(model, method, engine, *(["-"] * 6))
            continue
        parts = (step.weights, step.trained, step.gathered, step.checkpoints, step.held, step.sent)
        view.add_row(model, method, engine, *(f"{part / GB:.3g}" for part in parts))
        rows.append({"model": model, "method": method, "engine": engine, **vars(step)})
    Console(width=120).print(view)
    print(json.dumps({"devices": args.devices, "tokens": args.tokens, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
