"""vLLM's OpenAI server in a process of its own, on the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.vllm._models import LENGTH, Answer

PATIENCE = 900.0  # seconds until a server that does not start fails


@contextmanager
def server(base: Path, adapters: Path, log: Path, *options: str) -> Iterator[httpx.Client]:
    """Serve `base` with the adapters of a folder, until the context ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(base), "--served-model-name", "base", "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *("--max-model-len", "64", "--max-num-seqs", "16", "--enable-lora", "--max-lora-rank", "8"),
        *options,
    ]
    environment = {
        **os.environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(adapters),
        "VLLM_PLUGINS": "road_peft,apiq_peft,lora_filesystem_resolver",
    }
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            _wait(client, process, log)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


def ask(client: httpx.Client, model: str, prompt: Sequence[int]) -> Answer:
    """Give the answer of the adapter (or base) of that name."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": LENGTH,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
    }
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    found = reply.json()["choices"][0]["logprobs"]
    return Answer([int(t.rpartition(":")[2]) for t in found["tokens"]], found["token_logprobs"])
