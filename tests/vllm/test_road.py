"""RoAd per request in vLLM's offline engine, against transformers one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm._engine import answers, engine, request
from tests.vllm._models import (
    LORAS,
    ROADS,
    Answer,
    expected,
    lora_configs,
    prompts,
    road_configs,
    save_adapters,
)

NAMES = [*ROADS, *LORAS]


@pytest.fixture(scope="module")
def adapted(model: Any, folder: Path) -> dict[str, Any]:
    """Models by the library that adapts them, whose adapters lie in `folder` by name."""
    return {
        "": copy.deepcopy(model),
        "road": save_adapters(copy.deepcopy(model), road_configs(), folder),
        "lora": save_adapters(copy.deepcopy(model), lora_configs(), folder),
    }


def answer_of(adapted: dict[str, Any], name: str | None, prompt: list[int]) -> Answer:
    """Give what transformers answers with the adapter of that name."""
    if name is None:
        return expected(adapted[""], prompt)
    tuned = adapted["road" if name in ROADS else "lora"]
    tuned.set_adapter(name)
    return expected(tuned, prompt)


@pytest.fixture(scope="module")
def llm(base: Path, adapted: dict[str, Any]) -> Iterator[Any]:
    """An engine with four slots, and room for six adapters in the host's memory."""
    with engine(base, max_cpu_loras=6) as running:
        yield running


def test_every_kind_in_one_batch(llm: Any, adapted: dict[str, Any], folder: Path) -> None:
    """More adapters than slots and host memory hold: vLLM evicts, loads again, and is right."""
    names: list[str | None] = [None, *NAMES] * 2
    asked = prompts(len(names))
    requests = [n and request(n, NAMES.index(n) + 1, folder) for n in names]
    for name, prompt, found in zip(names, asked, answers(llm, asked, requests), strict=True):
        answer_of(adapted, name, prompt).check(found, str(name))


def test_the_adapters_differ(adapted: dict[str, Any]) -> None:
    """A batch that took a wrong adapter would be noticed."""
    prompt = prompts(1)[0]
    found = [answer_of(adapted, name, prompt) for name in (None, *NAMES)]
    assert len({tuple(round(p, 3) for p in a.logprobs) for a in found}) == len(found)


def test_a_slot_passes_from_one_kind_to_the_other(
    llm: Any, adapted: dict[str, Any], folder: Path
) -> None:
    asked = prompts(1, seed=5) * 4
    for names in (["one", "two", "four", "mixed"], ["low", "low_some", "some", "narrow"]) * 2:
        requests = [request(n, NAMES.index(n) + 1, folder) for n in names]
        found = answers(llm, asked, requests)
        for name, prompt, one in zip(names, asked, found, strict=True):
            answer_of(adapted, name, prompt).check(one, name)
