"""How it is measured: time, peak memory, and what autograd keeps for the backward.

Providers take turns in a random order within every round, so that a slow moment of the machine
falls on all of them, and a ratio compares samples of the same round.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

Stages = Mapping[str, Callable[[], object]]  # run in this order, each timed on its own
Samples = dict[str, list[float]]  # stage -> milliseconds, one entry a round

T = TypeVar("T")

_SAMPLE_S = 2e-3  # cycles shorter than this are repeated within a sample, on a CPU
_SLOW_S = 5.0  # a provider whose first cycle is slower is measured by this cycle alone
_MAX_REPEATS = 1000


CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,  # all threads together; does not run while others have the cores
}


def interleave(
    providers: Mapping[str, Stages], rounds: int, device: torch.device, clock: str = "wall"
) -> dict[str, Samples]:
    """Give milliseconds of every stage of every provider, one sample a round.

    A first cycle warms up and is dropped, except for a provider that is slow (over 5 s). On CUDA
    events take the time, whatever the clock, and the second-level cache is overwritten before
    every cycle, as a model's other layers would. Of a stage whose name begins with "_", which
    prepares another, there are no samples.
    """
    cycle: Callable[[Stages, int], dict[str, float]]
    cycle = _CudaCycle(device) if device.type == "cuda" else partial(_cpu_cycle, CLOCKS[clock])
    samples: dict[str, Samples] = {name: {} for name in providers}
    repeats: dict[str, int] = {}
    for name, stages in providers.items():
        first = cycle(stages, 1)
        if sum(first.values()) > _SLOW_S * 1e3:
            samples[name] = {s: [ms] for s, ms in first.items() if not s.startswith("_")}
            continue
        spent_s = sum(cycle(stages, 1).values()) / 1e3
        repeats[name] = max(1, min(_MAX_REPEATS, round(_SAMPLE_S / max(spent_s, 1e-9))))
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(repeats), len(repeats)):
            for stage, ms in cycle(providers[name], repeats[name]).items():
                if not stage.startswith("_"):
                    samples[name].setdefault(stage, []).append(ms)
    return samples


def _cpu_cycle(clock: Callable[[], float], stages: Stages, repeats: int) -> dict[str, float]:
    spent = dict.fromkeys(stages, 0.0)
    for _ in range(repeats):
        for name, run in stages.items():
            start = clock()
            run()
            spent[name] += clock() - start
    return {name: seconds / repeats * 1e3 for name, seconds in spent.items()}


class _CudaCycle:
    """Times stages with CUDA events, with a cold second-level cache."""

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * cache_bytes, dtype=torch.int8, device=device)

    def __call__(self, stages: Stages, repeats: int) -> dict[str, float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        self._flush.zero_()
        events[0].record()
        for run, event in zip(stages.values(), events[1:], strict=True):
            run()
            event.record()
        torch.cuda.synchronize(self._flush.device)
        return {
            name: begin.elapsed_time(end)
            for name, begin, end in zip(stages, events[:-1], events[1:], strict=True)
        }


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Capture `run` in a CUDA graph; give what replays it. It reads the tensors `run` read."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # a capture must not meet what happens in a first call only
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth(device: torch.device) -> float:
    """Measure how many bytes a second a large copy reads and writes on a CUDA device."""
    source = torch.empty(2**28, dtype=torch.int8, device=device)
    copied = interleave({"copy": {"copy": source.clone}}, 20, device)["copy"]["copy"]
    return 2 * source.nbytes / (quantiles(copied)[1] / 1e3)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], object]) -> int:
    """Count the operations that `run` hands to torch's dispatcher, views included.

    A registered operator counts as one, whatever its implementation calls.
    """
    with _Operations() as seen:
        run()
    return seen.count


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Give the 20th, 50th and 80th percentile, interpolated."""
    values = torch.tensor(samples, dtype=torch.float64)
    p20, p50, p80 = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return p20, p50, p80


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors beyond those held at the start: at the peak, and left behind."""

    peak: int
    held: int


def memory_of(
    prepare: Callable[[], T], stages: Mapping[str, Callable[[T], object]], device: torch.device
) -> dict[str, Memory]:
    """Give the memory of every stage; all get what `prepare` makes, in this order.

    On CUDA these are the caching allocator's figures. On a CPU they are sums of torch's own
    allocations, from the profiler's trace: exact and repeatable, unlike resident memory, but blind
    to what other libraries allocate. There, freeing a tensor older than `prepare` does not count.
    """
    if device.type == "cuda":
        subject = prepare()
        return {
            name: _memory_on_cuda(partial(run, subject), device) for name, run in stages.items()
        }
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every trace prints two lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        subject = prepare()
        for name, run in stages.items():
            with record_function(f"stage {name}"):
                run(subject)
    events = sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    memory = {}
    for name in stages:
        stage = next(e for e in events if e.name() == f"stage {name}")
        begin, end = stage.start_ns(), stage.start_ns() + stage.duration_ns()
        sums = list(accumulate((size for at, size in changes if begin <= at <= end), initial=0))
        memory[name] = Memory(max(sums), sums[-1])
    return memory


def _memory_on_cuda(run: Callable[[], object], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Memory(peak, torch.cuda.memory_allocated(device) - before)


def saved_bytes(forward: Callable[[], object], not_counted: Iterable[Tensor]) -> int:
    """Give the bytes that autograd keeps for the backward of `forward`.

    Every storage counts once and whole, however many tensors look at it. Storages of
    `not_counted` (parameters, buffers, the input of the layer) do not count.
    """
    known = {t.untyped_storage().data_ptr() for t in not_counted}
    kept: dict[int, torch.UntypedStorage] = {}  # held until the end, so that no address recurs

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    size = sum(storage.nbytes() for storage in kept.values())
    del output
    return size


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Give the largest relative error (Frobenius norm) among pairs of tensors; nan stays nan."""
    errors = [
        (a.detach().double() - e.detach().double()).norm() / e.detach().double().norm()
        for a, e in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(errors).max())
