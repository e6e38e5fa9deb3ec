"""Answers of a model to chains of several tasks in one batch, each row with its own adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from prompts import encode
from samples import SifoSample
from tqdm.auto import tqdm
from verifier import MODES, Report, aggregate, parse_response, score, well_formed

from recipes_peft.data import Encoded, collate

__all__ = ["agreement", "decode", "interleaved", "reports", "respond"]


def interleaved(tests: Mapping[str, Sequence[SifoSample]]) -> list[tuple[str, SifoSample]]:
    """Give the samples of all sets in turn, so that every batch has rows of each."""
    named = [[(name, sample) for sample in samples] for name, samples in tests.items()]
    return [row for row in chain.from_iterable(zip_longest(*named)) if row is not None]


def respond(
    accelerator: Accelerator,
    model: Any,
    tokenizer: Any,
    tests: Mapping[str, Sequence[SifoSample]],
    given: Any,
    adapters: Mapping[str, str] | None = None,
    name: str = "answers",
) -> dict[str, list[str]]:
    """Answer all samples greedily; gives the responses of each set, in its order.

    With `adapters` (the adapter of each task), every row is answered with the adapter of its task.
    Processes share the batches.
    """
    rows = interleaved(tests)
    starts = range(0, len(rows), given.answer_batch)
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, str]] = []
    for start in tqdm(mine, desc=name, disable=not accelerator.is_main_process):
        part = rows[start : start + given.answer_batch]
        prompts = [encode(sample, tokenizer, 10**9).prompt for _, sample in part]
        names = [adapters[sample.task] for _, sample in part] if adapters else None
        texts = decode(model, tokenizer, prompts, given.max_new_tokens, names)
        found += [(start + i, text) for i, text in enumerate(texts)]
    texts_by_place = dict(gather_object(found) if accelerator.num_processes > 1 else found)
    answers: dict[str, list[str]] = {test: [] for test in tests}
    for place, (test, _) in enumerate(rows):
        answers[test].append(texts_by_place[place])
    return answers


@torch.no_grad()
def decode(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    names: Sequence[str] | None = None,
) -> list[str]:
    """Give the greedy answer to each prompt, one batch of all; `names` are the rows' adapters."""
    model.eval()
    batch = collate([Encoded(prompt, []) for prompt in prompts], tokenizer.pad_token_id)
    output = model.generate(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"adapter_names": list(names)} if names else {}),
    )[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


@torch.no_grad()
def agreement(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    max_new_tokens: int,
) -> tuple[float, bool]:
    """Compare a batch of mixed adapters with the same batch under one adapter at a time.

    Gives how far the logits of each row's last column are from those under its own adapter alone,
    the largest, relative to the largest logit; and whether all answers are the same.
    """
    model.eval()
    batch = collate([Encoded(prompt, []) for prompt in prompts], tokenizer.pad_token_id)
    inputs = {
        key: batch[key].to(model.device) for key in ("input_ids", "attention_mask", "position_ids")
    }

    def last(**options: Any) -> torch.Tensor:
        return model(**inputs, logits_to_keep=1, **options).logits[:, -1].float()

    mixed, together = (
        last(adapter_names=list(names)),
        decode(model, tokenizer, prompts, max_new_tokens, names),
    )
    worst, same = 0.0, True
    for name in dict.fromkeys(names):
        model.set_adapter(name)
        alone = last()
        answers = decode(model, tokenizer, prompts, max_new_tokens)
        for i in (i for i, other in enumerate(names) if other == name):
            worst = max(worst, (mixed[i] - alone[i]).abs().max().item())
            same = same and together[i] == answers[i]
    return worst / mixed.abs().max().item(), same


def reports(
    tests: Mapping[str, Sequence[SifoSample]], answers: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Give, for each set, the report of both parsing modes and the share of well-formed answers."""
    found: dict[str, dict[str, Any]] = {}
    for name, samples in tests.items():
        pairs = list(zip(samples, answers[name], strict=True))
        scored: dict[str, Report] = {
            mode: aggregate([score(s.task, s.golds, parse_response(a, mode)) for s, a in pairs])
            for mode in MODES
        }
        form = sum(well_formed(a, len(s.steps)) for s, a in pairs) / len(pairs)
        found[name] = {mode: report._asdict() for mode, report in scored.items()}
        found[name]["well_formed"] = 100 * form
    return found
