"""Tests inside vLLM: `make test-vllm` runs them in an environment of its own.

Where vLLM is not installed none of them is collected.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "900",  # machines may be busy
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models and adapters of all tests."""
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def base(folder: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    from tests.vllm._models import save_base

    return save_base(folder / "base")


@pytest.fixture(scope="session")
def model(base: Path) -> LlamaForCausalLM:
    """The same, by transformers."""
    return LlamaForCausalLM.from_pretrained(base).eval()
