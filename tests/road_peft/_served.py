"""A bank that serves requests of a tiny model, whose every step waits until a test lets it."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from road_peft import AdapterBatching
from tests.road_peft._banks import bank_of, configs_of, loaded, sources_of
from tests.road_peft._models import VOCABULARY, call_silently, tiny
from tests.road_peft._rows import only

PATIENCE = 30.0  # seconds until a test that hangs fails
LENGTH = 5  # tokens that a request generates
GREEDY = {"do_sample": False, "max_new_tokens": LENGTH, "pad_token_id": 1}
SMALL = {"num_blocks": 16, "page_size": 8, "max_batch_tokens": 32}


class Steps:
    """Lets the model take steps one by one, or all."""

    def __init__(self, model: Any) -> None:
        self._allowed, self._all = threading.Semaphore(0), False
        self._waiting = threading.Semaphore(0)
        model.register_forward_pre_hook(self._wait)

    def _wait(self, *args: Any) -> None:
        if not self._all:
            self._waiting.release()
            assert self._allowed.acquire(timeout=PATIENCE)

    def take(self, count: int) -> None:
        """Let it take so many steps, and wait until it stands before the next one."""
        for _ in range(count):
            assert self._waiting.acquire(timeout=PATIENCE)
            self._allowed.release()
        assert self._waiting.acquire(timeout=PATIENCE)
        self._waiting.release()

    def open(self) -> None:
        self._all = True
        self._allowed.release(1000)


class Served:
    """A bank on a tiny model, the model loaded by PEFT beside it, and the steps of the bank's."""

    def __init__(self, slots: int = 3) -> None:
        base = tiny("llama", dtype=torch.float64)
        self.loaded = loaded(base, configs_of("abcf"))
        self.bank = bank_of(base, sources_of(self.loaded), slots)
        self.steps = Steps(base)

    def batching(self, settings: dict[str, Any] | None = None, **options: Any) -> AdapterBatching:
        config = GenerationConfig(**{**GREEDY, "eos_token_id": -1, **options})
        return AdapterBatching(
            self.bank, config, ContinuousBatchingConfig(**{**SMALL, **(settings or {})})
        )

    def wanted(self, prompt: list[int], name: str, count: int = LENGTH) -> list[int]:
        config = GenerationConfig(**{**GREEDY, "max_new_tokens": count}, eos_token_id=VOCABULARY)
        tokens = torch.tensor([prompt])
        out = only(
            self.loaded,
            name,
            lambda: call_silently(self.loaded.generate, tokens, generation_config=config),
        )
        return out[0, len(prompt) :].tolist()

    def uses(self, name: str) -> int:
        return sum(s.uses for s in self.bank._slots if s.entry and s.entry.name == name)


def results(batching: AdapterBatching, count: int) -> dict[str, Any]:
    """Wait for so many requests to finish."""
    found: dict[str, Any] = {}
    end = time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < end:
        output = batching.get_result(timeout=0.1)
        if output is not None and output.is_finished():
            found[output.request_id] = output
    assert len(found) == count
    return found


def tokens_of(outputs: dict[str, Any]) -> dict[str, list[int]]:
    return {name: output.generated_tokens for name, output in outputs.items()}
