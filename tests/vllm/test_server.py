"""Many adapters under vLLM's OpenAI server: by name, loaded and unloaded under load."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from road_peft import RoadConfig
from tests.vllm._models import ALL, ROADS, Answer, expected, lora_configs, prompts, save_adapters
from tests.vllm._server import ask, server

REQUESTS, CLIENTS = 200, 12
KINDS = list(ROADS.values())
ROAD = [f"road{i}" for i in range(14)]
LORA = ["low", "low_some"]
PROMPTS = prompts(8)


def config(place: int) -> RoadConfig:
    """Give a configuration, of each kind in turn."""
    return RoadConfig(**{"target_modules": ALL, **KINDS[place % len(KINDS)]})


@pytest.fixture(scope="module")
def known(model: Any, folder: Path) -> dict[tuple[str, int], Answer]:
    """What transformers answers, by adapter and number of the prompt; adapters lie in `folder`."""
    roads = save_adapters(
        copy.deepcopy(model), {n: config(i) for i, n in enumerate([*ROAD, "visitor"])}, folder, 7
    )
    loras = save_adapters(copy.deepcopy(model), lora_configs(), folder, 8)
    found = {("base", i): expected(model, prompt) for i, prompt in enumerate(PROMPTS)}
    for tuned, names in ((roads, [*ROAD, "visitor"]), (loras, LORA)):
        for name in names:
            tuned.set_adapter(name)
            found |= {(name, i): expected(tuned, prompt) for i, prompt in enumerate(PROMPTS)}
    return found


@pytest.fixture(scope="module")
def client(
    base: Path, folder: Path, known: dict[Any, Answer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with server(base, folder, log, "--max-loras", "4", "--max-cpu-loras", "8") as running:
        yield running


def load(client: httpx.Client, name: str, folder: Path) -> httpx.Response:
    return client.post(
        "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder / name)}
    )


def test_two_hundred_requests_over_sixteen_adapters(
    client: httpx.Client, folder: Path, known: dict[tuple[str, int], Answer]
) -> None:
    """RoAd by the name of the folder, LoRA loaded at once; another comes and goes meanwhile."""
    for name in LORA:
        assert load(client, name, folder).status_code == 200
    draw = random.Random(0)
    names = [*ROAD, *LORA]
    asked = [(names[i % len(names)], draw.randrange(len(PROMPTS))) for i in range(REQUESTS)]
    asked += [("base", i) for i in range(len(PROMPTS))]
    draw.shuffle(asked)

    def come_and_go(times: int) -> None:
        for turn in range(times):
            reply = load(client, "visitor", folder)
            assert reply.status_code == 200, reply.text
            number = turn % len(PROMPTS)
            answer = ask(client, "visitor", PROMPTS[number])
            known["visitor", number].check(answer, "visitor")
            reply = client.post("/v1/unload_lora_adapter", json={"lora_name": "visitor"})
            assert reply.status_code == 200, reply.text

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        visitor = pool.submit(come_and_go, 10)
        found = list(pool.map(lambda a: ask(client, a[0], PROMPTS[a[1]]), asked))
        visitor.result()
    for key, answer in zip(asked, found, strict=True):
        known[key].check(answer, str(key))


def test_a_name_that_is_no_adapter_is_refused(client: httpx.Client) -> None:
    for name in ("nobody", "../base", "base/../road0"):
        body = {"model": name, "prompt": [5], "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 404


def test_an_adapter_that_does_not_fit_is_refused_and_the_server_stays(
    client: httpx.Client, folder: Path, known: dict[tuple[str, int], Answer]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=96)
    )
    save_adapters(wide, {"stranger": config(2)}, folder / "strangers")
    reply = client.post(
        "/v1/load_lora_adapter",
        json={"lora_name": "stranger", "lora_path": str(folder / "strangers" / "stranger")},
    )
    assert reply.status_code == 500  # vLLM's own, whatever keeps an adapter from loading
    assert "was it trained on another base model" in reply.text
    known["road0", 0].check(ask(client, "road0", PROMPTS[0]), "road0")
