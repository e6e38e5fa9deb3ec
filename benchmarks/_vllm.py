"""Serving inside vLLM: rows without adapters, with a RoAd each, and with a LoRA each.

All share one engine, which runs in this process, and have the same prompts; every row has an
adapter of its own. The engine has slots for all adapters, so nothing is loaded while it is timed.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model

from benchmarks._cases import SERVE, TOLERANCE, ServeCase, dtype_name
from benchmarks._command import Point, Settings, Subject, Work
from benchmarks._models import LINEARS_OF_BLOCK, VOCABULARY, language_model
from benchmarks._providers import BASE, LORA, OURS, RANK, TRAINED
from benchmarks._report import Panel

_PROMPT, _NEW = 16, 16  # tokens of each row

PANELS = (
    Panel(("generate",), "throughput", "vllm:", "rows, each with its own adapter"),
    Panel(("generate",), "ratio", "vllm:", "rows, each with its own adapter"),
)


def vllm_points(settings: Settings) -> Iterator[Point]:
    """Yield a point for every number of rows of every model of the size asked for."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that either clock sees its work
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    for case in SERVE[settings.size]:
        for dtype in case.dtypes:
            label = f"vllm: {case.blocks} blocks {case.shape} {dtype_name(dtype)}"
            if settings.only.search(label):
                with (
                    TemporaryDirectory() as folder,
                    closing(_Engine(case, dtype, settings.device, Path(folder))) as engine,
                ):
                    for rows in case.batches:
                        yield engine.point(label, rows)


class _Engine:
    """An engine and, by kind, the models of transformers whose adapters it serves."""

    def __init__(
        self, case: ServeCase, dtype: torch.dtype, device: torch.device, folder: Path
    ) -> None:
        from vllm import LLM

        self.dtype, self.device, self.folder = dtype, device, folder
        model: Any = language_model(case, dtype, device)
        model.save_pretrained(folder / "model")
        self.names = [f"a{number}" for number in range(case.adapters)]
        self.references = {kind: self._adapted(model, kind) for kind in (OURS, LORA)}
        self.llm = LLM(
            model=str(folder / "model"),
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            enable_lora=True,
            max_loras=2 * case.adapters,
            max_lora_rank=RANK,
            max_num_seqs=case.adapters,
            max_model_len=_PROMPT + _NEW,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def close(self) -> None:
        """End the engine now: when it is collected later, it takes down the one that runs then."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _adapted(self, base: Any, kind: str) -> Any:
        """Write adapters with random values, and give the model that has them."""
        config: Any = TRAINED[kind].config
        targets = list(LINEARS_OF_BLOCK)
        tuned: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        tuned = get_peft_model(tuned, config(targets), adapter_name=self.names[0])
        for name in self.names[1:]:
            tuned.add_adapter(name, config(targets))
        torch.manual_seed(0)
        for key, value in tuned.named_parameters():
            if "road_theta" in key or "lora_B" in key:
                torch.nn.init.normal_(value.data, std=0.1)
        for name in self.names:
            tuned.save_pretrained(self.folder / kind, selected_adapters=[name])
        return tuned.eval()

    def point(self, label: str, rows: int) -> Point:
        """Give a point with ratios to rows without adapters."""
        draw = torch.Generator().manual_seed(rows)
        prompts = torch.randint(1, VOCABULARY, (rows, _PROMPT), generator=draw).tolist()
        subjects = {}
        for place, kind in enumerate((BASE, OURS, LORA)):
            run = partial(self._generate, prompts, self._requests(kind, place, rows))
            error = self._error(kind, prompts[0], run()[0])
            work = {"generate": Work("throughput", "tokens/s", rows * _NEW)}
            subjects[kind] = Subject({"generate": run}, error, work=work)
        return Point(label, rows, TOLERANCE[self.dtype], BASE, subjects, most_rounds=7)

    def _requests(self, kind: str, place: int, rows: int) -> list[Any]:
        from vllm.lora.request import LoRARequest

        if kind == BASE:
            return [None] * rows
        first = place * len(self.names)
        return [
            LoRARequest(f"{kind} {name}", first + i, str(self.folder / kind / name))
            for i, name in enumerate(self.names[:rows])
        ]

    def _generate(self, prompts: Sequence[Sequence[int]], requests: Sequence[Any]) -> list[Any]:
        """Give each row's tokens with their log-probabilities, in order."""
        from vllm import SamplingParams

        asked: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        sampling = SamplingParams(temperature=0, max_tokens=_NEW, ignore_eos=True, logprobs=0)
        outputs = self.llm.generate(asked, sampling, lora_request=list(requests), use_tqdm=False)
        found: list[Any] = []
        for output in outputs:
            best: Any = output.outputs[0]
            steps = zip(best.token_ids, best.logprobs, strict=True)
            found.append([(token, step[token].logprob) for token, step in steps])
        return found

    @torch.no_grad()
    def _error(self, kind: str, prompt: Sequence[int], row: Any) -> float:
        """Give how far log-probabilities are from transformers', relative to their range."""
        tokens, found = zip(*row, strict=True)
        ids = torch.tensor([[*prompt, *tokens]], device=self.device)
        model = self.references[OURS if kind == BASE else kind]
        model.set_adapter(self.names[0])
        if kind == BASE:
            with model.disable_adapter():
                logits = model(ids).logits
        else:
            logits = model(ids).logits
        expected = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        picked = expected.gather(1, torch.tensor(tokens, device=self.device)[:, None])[:, 0]
        spread = expected.amax() - expected.amin()  # log-probabilities of small models lie close
        return float((picked.cpu() - torch.tensor(found)).abs().max() / spread.cpu())
