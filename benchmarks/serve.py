"""Measure serving a batch whose rows ask for different adapters: decode, prefill and generation.

The panels of RoAd's figure 4 (the rank of LoRA, the number of generated tokens, the number of
distinct adapters), workloads, and prefill. Compared are the bare model, one adapter merged, RoAd of
this library and of PEFT, LoRA as PEFT mixes it, as batched and as grouped products, and (IA)3. On
CUDA also the rotation alone. Usage: `python -m benchmarks.serve --quick`. With `--engine vllm`,
inside vLLM: RoAd against LoRA of the same engine, under the same load.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._bank import FLOOR, OP, bank_points
from benchmarks._cases import LINEARS, SERVE, TOLERANCE, ServeCase, dtype_name
from benchmarks._command import Aim, Command, Fact, Point, Settings, Subject, Work, main
from benchmarks._decoding import Context, Session, closing
from benchmarks._models import VOCABULARY, language_model
from benchmarks._providers import BASE, LORA, OURS, STOCK
from benchmarks._report import Panel
from benchmarks._serving import (
    BMM,
    SERVED,
    SINGLE,
    Served,
    Server,
    active_lora,
    bmm_lora,
    serving_error,
)
from benchmarks._workloads import WORKLOADS, names_of_rows

_PROMPT = 16  # tokens before a generation

AIMS = (
    Aim(
        "a decode step with 32 adapters within 1.05 of the bare model",
        OURS,
        "decode",
        "time",
        1.05,
        BASE,
        cases="batch:",
        x=32,
        device="cpu",
    ),
    Aim(
        "2.2 times faster than PEFT's RoAd with 32 adapters",
        OURS,
        "decode",
        "time",
        2.2,
        STOCK,
        at_least=True,
        cases="batch:",
        x=32,
    ),
    Aim(
        "1.9 times faster than PEFT's LoRA with 32 adapters",
        OURS,
        "decode",
        "time",
        1.9,
        LORA,
        at_least=True,
        cases="batch:",
        x=32,
    ),
    Aim(
        "no more operations for more adapters",
        OURS,
        "decode",
        "more operations",
        0.0,
        cases="batch:",
    ),
    Aim(
        "the rotation alone at 80 % of a copy's bandwidth, 8192 x 4096",
        OP,
        "graph",
        "time",
        0.8,
        FLOOR,
        at_least=True,
        cases="rotation_bank d=4096",
        x=8192,
        device="cuda",
    ),
    Aim(
        "a captured decode step within 1.03 of the bare model",
        OURS,
        "graph",
        "time",
        1.03,
        BASE,
        cases="batch:",
        device="cuda",
    ),
    Aim(
        "2 times faster than LoRA by batched products with 8 adapters",
        OURS,
        "decode",
        "time",
        2,
        BMM,
        at_least=True,
        cases="batch:",
        x=8,
        device="cuda",
    ),
)


class Bench:
    """One base model, and the servers on it, each built when it is first asked for."""

    def __init__(self, case: ServeCase, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.base: Any = language_model(case, dtype, device)
        self.adapters = [f"a{number}" for number in range(case.adapters)]
        self._servers: dict[tuple[str, int], tuple[Server, float]] = {}

    def server(self, name: str, served: Served, adapters: int) -> tuple[Server, float]:
        """Give the server with so many adapters (one, if it mixes none), and its error."""
        adapters = adapters if served.mixed else 1
        if (name, adapters) not in self._servers:
            names = self.adapters[:adapters]
            server = served.build(self.base, names)
            self._servers[name, adapters] = server, serving_error(self.base, server, names)
        return self._servers[name, adapters]

    def mixing(self) -> Iterator[tuple[str, Served, Server, float]]:
        """Give every provider with all adapters."""
        for name, served in SERVED.items():
            yield name, served, *self.server(name, served, self.case.adapters)

    def point(self, label: str, x: int, subjects: Mapping[str, Subject], **more: Any) -> Point:
        """Give a point with ratios to the base."""
        return Point(label, x, TOLERANCE[self.dtype], BASE, subjects, **more)

    def prompts(self, rows: int, tokens: int) -> Tensor:
        """Give random prompts without padding."""
        return torch.randint(1, VOCABULARY, (rows, tokens), device=self.device)


def points(settings: Settings) -> Iterator[Point]:
    """Yield every panel of every model of the size asked for, then the rotation alone on CUDA."""
    for case in SERVE[settings.size]:
        for dtype in case.dtypes:
            labels = {
                panel: f"{panel}: {case.blocks} blocks {case.shape} {dtype_name(dtype)}"
                for panel in PANELS
            }
            wanted = [panel for panel, label in labels.items() if settings.only.search(label)]
            if wanted:
                bench = Bench(case, dtype, settings.device)
                for panel in wanted:
                    yield from PANELS[panel](bench, labels[panel])
    if settings.device.type == "cuda":
        yield from bank_points(settings)


def rank_points(bench: Bench, label: str) -> Iterator[Point]:
    """One row and one adapter, LoRA of several ranks; x is the rank."""
    for rank in bench.case.ranks:
        lora = {"lora active": active_lora(rank), "bmm lora": bmm_lora(rank)}
        subjects, sessions = {}, []
        context = Context.random(bench.base, 1, bench.case.context)
        for name, served in {**SINGLE, **lora}.items():
            key = f"{name} r{rank}" if name in lora else name
            server, error = bench.server(key, served, 1)
            session = Session(server, bench.adapters[:1], context)
            sessions.append(session)
            stages = session.stages("decode", "_first", captured=False)
            subjects[name] = Subject(stages, error, work=_tokens(1, "decode"))
        with closing(sessions):
            yield bench.point(label, rank, subjects)


def generate_points(bench: Bench, label: str) -> Iterator[Point]:
    """`generate` with an adapter for each row; x is the number of tokens every row gets."""
    rows = bench.case.batch
    prompts = bench.prompts(rows, _PROMPT)
    for tokens in bench.case.generated:
        subjects = {}
        for name, _, server, error in bench.mixing():
            run = partial(_generate, server, bench.adapters[:rows], prompts, tokens)
            work = _tokens(rows * tokens, "generate")
            subjects[name] = Subject({"generate": run}, error, work=work)
        yield bench.point(label, tokens, subjects, most_rounds=3)


def _generate(server: Server, names: list[str], prompts: Tensor, tokens: int) -> None:
    with server.rows(names):
        server.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
        )


def batch_points(bench: Bench, label: str) -> Iterator[Point]:
    """A decode step of rows that all have adapters of their own; x is the number of rows."""
    for rows in bench.case.batches:
        context = Context.random(bench.base, rows, bench.case.context)
        own, same = (
            names_of_rows(workload, rows, bench.adapters) for workload in ("distinct", "identical")
        )
        layers = bench.case.blocks * len(LINEARS)
        subjects, sessions = {}, {}
        for name, served, server, error in bench.mixing():
            sessions[name] = session = Session(server, own, context)
            count = partial(
                _operations, session, Session(server, same, context), sessions[BASE], layers
            )
            stages = session.stages("decode", "first", served.captured(bench.dtype))
            subjects[name] = Subject(stages, error, count, _tokens(rows, "decode", "graph"))
        with closing(list(sessions.values())):
            yield bench.point(label, rows, subjects)


def _operations(own: Session, same: Session, base: Session, layers: int) -> Iterator[Fact]:
    count = own.operations()
    beyond, more = count - base.operations(), count - same.operations()
    yield "decode", "operations", "a layer", beyond / layers
    yield "decode", "more operations", "a layer", more / layers


def workload_points(bench: Bench, label: str) -> Iterator[Point]:
    """A decode step of the same number of rows for every workload, which are the modes."""
    rows = bench.case.workload_rows
    if not rows:
        return
    context = Context.random(bench.base, rows, bench.case.context)
    subjects, sessions = {}, []
    for name, _, server, error in bench.mixing():
        stages: dict[str, Callable[[], object]] = {}
        for workload in WORKLOADS:
            names = names_of_rows(workload, rows, bench.adapters[:rows])
            session = Session(server, names, context)
            sessions.append(session)
            stages |= session.stages(workload, f"_first {workload}", captured=False)
            stages[f"_close {workload}"] = session.close
        subjects[name] = Subject(stages, error, work=_tokens(rows, *WORKLOADS))
    with closing(sessions):
        yield bench.point(label, rows, subjects)


def prefill_points(bench: Bench, label: str) -> Iterator[Point]:
    """Prompts with an adapter each, from the names on; x is the number of tokens of a prompt."""
    rows = bench.case.batch
    for tokens in bench.case.prompts:
        prompts = bench.prompts(rows, tokens)
        subjects = {}
        for name, _, server, error in bench.mixing():
            run = partial(_prefill, server, bench.adapters[:rows], prompts)
            work = _tokens(rows * tokens, "prefill")
            subjects[name] = Subject({"prefill": run}, error, work=work)
        yield bench.point(label, tokens, subjects, most_rounds=7)


@torch.no_grad()
def _prefill(server: Server, names: list[str], prompts: Tensor) -> None:
    with server.rows(names):
        server.model(input_ids=prompts, use_cache=True)


def _tokens(count: int, *modes: str) -> dict[str, Work]:
    return dict.fromkeys(modes, Work("throughput", "tokens/s", count))


PANELS: dict[str, Callable[[Bench, str], Iterator[Point]]] = {
    "rank": rank_points,
    "generate": generate_points,
    "batch": batch_points,
    "workloads": workload_points,
    "prefill": prefill_points,
}

COMMAND = Command(
    "serve",
    __doc__ or "",
    points,
    panels=(
        Panel(("decode",), "throughput", "rank:", "rank of LoRA (one row, one adapter)"),
        Panel(("generate",), "throughput", "generate:", "tokens generated by each of the rows"),
        Panel(("decode",), "throughput", "batch:", "rows, each with its own adapter"),
        Panel(("decode",), "ratio", "batch:", "rows, each with its own adapter"),
        Panel(("graph",), "ratio", "batch:", "rows, each with its own adapter"),
        Panel(tuple(WORKLOADS), "ratio", "workloads:", "which adapters the rows ask for"),
        Panel(("prefill",), "ratio", "prefill:", "tokens of each of the prompts"),
        Panel(("inference",), "bandwidth", "rotation_bank", "rows"),
        Panel(("graph",), "bandwidth", "rotation_bank", "rows"),
    ),
    aims=AIMS,
    rounds={"tiny": 2, "quick": 5, "full": 11, "gpu": 20},
)


def _run() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    chosen, others = parser.parse_known_args()
    if chosen.engine == "transformers":
        return main(COMMAND, others)
    from benchmarks._vllm import PANELS as VLLM_PANELS
    from benchmarks._vllm import vllm_points

    return main(
        replace(COMMAND, name="serve_vllm", points=vllm_points, panels=VLLM_PANELS, aims=()),
        others,
    )


if __name__ == "__main__":
    raise SystemExit(_run())
