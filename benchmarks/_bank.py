"""The rotation by slot alone: every row of a batch by coefficients from a table.

`floor` copies the rows. `op` is what the tuner calls. `compiled` gathers the coefficients of every
row and rotates, for groups of one size, compiled by torch. `peft` is what PEFT's RoAd does in a
mixed batch: a loop over the distinct adapters, each with its angles. On CUDA, `graph` replays the
same from a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import peft.tuners.road.layer as stock
import torch
from torch import Tensor

from benchmarks._cases import BANK, GROUP_SIZE, TOLERANCE, BankCase, dtype_name
from benchmarks._command import Fact, Point, Settings, Subject, Work
from benchmarks._measure import copy_bandwidth, graphed, relative_error
from kernels_peft import rotate_by_slot, rotate_by_slot_reference, rotate_reference
from road_peft.variants import VARIANTS

FLOOR, OP, COMPILED = "floor", "op", "compiled"
_VARIANT: Literal["road_2"] = "road_2"


def bank_points(settings: Settings) -> Iterator[Point]:
    """Yield every size of the rotation by slot."""
    bandwidth = None
    for case in BANK[settings.size]:
        for dtype in case.dtypes:
            name = f"rotation_bank d={case.features} slots={case.slots} {dtype_name(dtype)}"
            if not settings.only.search(name):
                continue
            if settings.device.type == "cuda" and bandwidth is None:
                bandwidth = copy_bandwidth(settings.device)
            for rows in case.rows:
                yield _point(name, case, rows, dtype, settings.device, bandwidth)


@torch.no_grad()
def _point(
    name: str,
    case: BankCase,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    bandwidth: float | None,
) -> Point:
    x = torch.randn(rows, case.features, device=device).to(dtype)
    theta = torch.randn(case.slots, case.features, device=device) * 0.3
    alpha = torch.randn_like(theta) * 0.1 + 1
    pairs = [
        VARIANTS[_VARIANT].coefficients(t, a, GROUP_SIZE) for t, a in zip(theta, alpha, strict=True)
    ]
    table = torch.stack([torch.stack(pair) for pair in pairs])
    sizes = torch.full((case.slots,), GROUP_SIZE, dtype=torch.int32, device=device)
    slots = torch.randint(case.slots, (rows,), device=device)
    chosen = slots.tolist()

    runs: dict[str, Callable[[], Tensor]] = {
        OP: partial(rotate_by_slot, x, table, sizes, slots),
        "reference": partial(rotate_by_slot_reference, x, table, sizes, slots),
        "peft": partial(_peft, x, theta, alpha, chosen),
    }
    if case.compiled:
        torch.compiler.reset()  # every case starts with an empty cache: no limit is met
        compiled = torch.compile(_gathered, fullgraph=True, dynamic=False)
        runs[COMPILED] = partial(compiled, x, table, slots)
    expected = rotate_by_slot_reference(x.double(), table.double(), sizes, slots)
    moved = 2 * x.nbytes + len(set(chosen)) * table[0].nbytes
    facts: list[Fact] = []
    if bandwidth is not None:
        facts = [("inference", "floor by bandwidth", "ms", moved / bandwidth * 1e3)]
    subjects = {FLOOR: _subject(x.clone, 0.0, device, True, 2 * x.nbytes)}
    for provider, run in runs.items():
        error = relative_error([run()], [expected])
        captured = provider in (OP, COMPILED)  # the others wait for the device
        subjects[provider] = _subject(run, error, device, captured, moved, facts)
    return Point(name, rows, TOLERANCE[dtype], FLOOR, subjects)


def _subject(
    run: Callable[[], Tensor],
    error: float,
    device: torch.device,
    captured: bool,
    moved: int,
    facts: Sequence[Fact] = (),
) -> Subject:
    @torch.no_grad()
    def inference() -> None:
        run()

    stages: dict[str, Callable[[], object]] = {"inference": inference}
    if captured and device.type == "cuda":
        stages["graph"] = graphed(inference, device)
    work = dict.fromkeys(stages, Work("bandwidth", "GB/s", moved / 1e9))
    return Subject(stages, error, lambda: facts, work)


def _gathered(x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    first, second = table[slots].unbind(1)
    return rotate_reference(x, first, second, GROUP_SIZE)


def _peft(x: Tensor, theta: Tensor, alpha: Tensor, slots: list[int]) -> Tensor:
    out = x.clone()  # in PEFT it is the output of the layer, changed in place
    for slot in set(slots):
        rows = [row for row, other in enumerate(slots) if other == slot]
        part = stock._apply_road(
            _VARIANT, GROUP_SIZE, theta[slot], alpha[slot], out[rows].to(theta.dtype)
        )
        out[rows] = part.to(out.dtype)
    return out
