"""Numbers for Prometheus: none of them is kept per adapter, of which there may be thousands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from road_peft.leases import BankMemory

if TYPE_CHECKING:
    from road_peft.serve.engine import Engine
    from road_peft.serve.jobs import Job

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# field of BankMemory: help
_BANK = {
    "slots": "Adapters that can be applied at one time.",
    "slots_used": "Slots that hold an adapter.",
    "slots_held": "Slots whose adapter a request has.",
    "slots_pinned": "Slots whose adapter is pinned.",
    "registered": "Adapters known by name.",
    "host_adapters": "Adapters whose values are in the host's memory.",
    "host_bytes": "Bytes of adapter values in the host's memory.",
    "table_bytes": "Bytes of all slots on the device.",
}
_BANK_TOTALS = {
    "loads": "Adapters written into a slot.",
    "reads": "Adapters read from files.",
    "evictions": "Adapters that lost their slot to another.",
}


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "road_requests",
            "Requests by endpoint and status; 499 is a client that left.",
            ("endpoint", "status"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "road_request_seconds",
            "From the request to the end of the answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._prompt = Counter(
            "road_prompt_tokens", "Tokens of prompts taken.", registry=self.registry
        )
        self._generated = Counter(
            "road_generated_tokens", "Tokens generated.", registry=self.registry
        )
        self._first = Histogram(
            "road_first_token_seconds",
            "From the request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_State(engine))

    def count(self, job: Job) -> None:
        """Take over the numbers of a request that has ended."""
        self._prompt.inc(job.prompt_tokens if job.running else 0)
        self._generated.inc(job.generated_tokens)
        if job.first_token is not None:
            self._first.observe(max(0.0, job.first_token - job.began))

    def text(self) -> bytes:
        """Give all numbers in Prometheus' text format."""
        return generate_latest(self.registry)


class _State(Collector):
    """What is read off when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        jobs = list(self._engine.jobs.values())
        running = sum(job.running for job in jobs)
        yield GaugeMetricFamily("road_requests_running", "In the batch.", running)
        yield GaugeMetricFamily("road_requests_waiting", "Waiting for a slot.", len(jobs) - running)
        account: BankMemory = self._engine.bank.memory()
        for name, text in _BANK.items():
            yield GaugeMetricFamily(f"road_bank_{name}", text, getattr(account, name))
        for name, text in _BANK_TOTALS.items():
            yield CounterMetricFamily(f"road_bank_{name}", text, getattr(account, name))

    def describe(self) -> Iterator[Metric]:
        """Name nothing ahead of time: the bank may not stand yet."""
        return iter(())
