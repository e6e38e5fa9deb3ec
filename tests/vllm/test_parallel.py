"""Tensor parallelism: vLLM's engine on two processes, against transformers on one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.vllm._engine import answers, engine, request
from tests.vllm._models import expected, lora_configs, prompts, road_configs, save_adapters
from tests.vllm.test_apiq import packed

CUT = ["two", "four", "some", "narrow"]  # whose groups lie whole in one of two processes
TWO: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
}


def test_adapters_of_both_kinds(base: Path, model: Any, tmp_path: Path) -> None:
    """Also: an adapter that cannot be cut is refused, and the engine goes on."""
    roads = save_adapters(copy.deepcopy(model), road_configs([*CUT, "one"]), tmp_path, 21)
    loras = save_adapters(copy.deepcopy(model), lora_configs(["low"]), tmp_path, 22)
    names = [None, *CUT, "low"]
    asked = prompts(len(names), seed=3)
    with engine(base, **TWO) as llm:
        with pytest.raises(Exception, match="no whole groups of 64"):
            llm.llm_engine.add_lora(request("one", 9, tmp_path))
        found = answers(llm, asked, [n and request(n, names.index(n), tmp_path) for n in names])
    for name, prompt, answer in zip(names, asked, found, strict=True):
        tuned = model if name is None else loras if name == "low" else roads
        if name is not None:
            tuned.set_adapter(name)
        expected(tuned, prompt).check(answer, str(name))


@pytest.mark.parametrize("bits", [2, 3])
def test_a_packed_model_with_adapters_on_top(bits: int, base: Path, tmp_path: Path) -> None:
    packed(base, tmp_path / "packed", bits, group_size=32)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    roads = save_adapters(copy.deepcopy(own), road_configs(CUT), tmp_path, 23)
    names = [None, *CUT]
    asked = prompts(len(names), seed=bits)
    with engine(tmp_path / "packed", **TWO) as llm:
        found = answers(llm, asked, [n and request(n, names.index(n), tmp_path) for n in names])
    for name, prompt, answer in zip(names, asked, found, strict=True):
        if name is not None:
            roads.set_adapter(name)
        expected(own if name is None else roads, prompt).check(answer, f"{bits} bits, {name}")
