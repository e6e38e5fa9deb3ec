"""Generation from batches whose rows take different adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from tests.road_peft._models import (
    call_silently,
    no_hooks,
)
from tests.road_peft._rows import (
    LENGTH,
    NAMES,
    mixed_model,
    only,
    tokens_for_rows,
)

FIXED = {"max_new_tokens": 3, "min_new_tokens": 3}
# arguments of generate, and the rows that come back for each row
GENERATIONS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({"do_sample": False}, 1),
    "sampling": ({"do_sample": True}, 1),
    "beams": ({"do_sample": False, "num_beams": 3}, 1),
    "sampled beams": ({"do_sample": True, "num_beams": 2}, 1),
    "return sequences": ({"do_sample": True, "num_return_sequences": 3}, 3),
    "beams and return sequences": (
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        2,
    ),
    "no cache": ({"do_sample": False, "num_beams": 2, "use_cache": False}, 1),
}


def _generate(model: Any, tokens: Tensor, how: str, settings: dict[str, Any], **kwargs) -> Tensor:
    torch.manual_seed(7)
    mask = {"attention_mask": torch.ones_like(tokens)}
    if how == "arguments":
        return call_silently(model.generate, input_ids=tokens, **mask, **settings, **kwargs)
    config = GenerationConfig(pad_token_id=1, eos_token_id=1, **settings)
    if model.get_base_model().config.is_encoder_decoder:
        config.decoder_start_token_id = model.get_base_model().config.decoder_start_token_id
    if how == "generation_config":
        return call_silently(
            model.generate, input_ids=tokens, **mask, generation_config=config, **kwargs
        )
    model.get_base_model().generation_config = config
    return call_silently(model.generate, input_ids=tokens, **mask, **kwargs)


ARRIVALS = [
    *(("llama", case, "arguments") for case in GENERATIONS),
    ("llama", "beams and return sequences", "generation_config"),
    ("llama", "beams and return sequences", "model's defaults"),
    ("llama", "return sequences", "model's defaults"),
    *((name, case, "arguments") for name in ("opt", "t5") for case in ("greedy", "beams")),
    ("gpt2", "beams and return sequences", "arguments"),
    ("bart", "return sequences", "arguments"),
    ("opt", "return sequences", "arguments"),
]


@pytest.mark.parametrize(("name", "case", "how"), ARRIVALS)
def test_generated_rows_are_those_of_their_adapters(name: str, case: str, how: str) -> None:
    """Rows do not see each other: with a seed, row i is row i of the batch with its adapter."""
    settings, copies = GENERATIONS[case]
    settings = {**FIXED, **settings}
    model, tokens = mixed_model(name), tokens_for_rows()
    mixed = _generate(model, tokens, how, settings, adapter_names=NAMES)
    assert len(mixed) == len(NAMES) * copies
    assert no_hooks(model)
    outputs = {
        adapter: only(model, adapter, lambda: _generate(model, tokens, how, settings))
        for adapter in set(NAMES)
    }
    for i, adapter in enumerate(NAMES):
        rows = slice(i * copies, (i + 1) * copies)
        assert torch.equal(mixed[rows], outputs[adapter][rows])
    distinct = {tuple(output.flatten().tolist()) for output in outputs.values()}
    assert len(distinct) == 3  # the adapters do change what is generated


def test_generated_rows_are_the_rows_alone() -> None:
    model, tokens = mixed_model("llama"), tokens_for_rows()
    mixed = _generate(model, tokens, "arguments", {**FIXED, "num_beams": 2}, adapter_names=NAMES)
    for i, adapter in enumerate(NAMES):
        row = tokens[i : i + 1]
        alone = only(
            model,
            adapter,
            lambda row=row: _generate(model, row, "arguments", {**FIXED, "num_beams": 2}),
        )
        assert torch.equal(mixed[i], alone[0])


def test_a_generation_config_given_by_position_is_read() -> None:
    model, tokens = mixed_model("llama"), tokens_for_rows()
    config = GenerationConfig(num_beams=2, pad_token_id=1, eos_token_id=1, **FIXED)
    mixed = call_silently(model.generate, tokens, config, adapter_names=NAMES)
    wanted = call_silently(model.generate, tokens, generation_config=config, adapter_names=NAMES)
    assert torch.equal(mixed, wanted)


def test_left_padded_prompts_generate_the_tokens_of_the_prompts_alone() -> None:
    model = mixed_model("llama")
    tokens, mask = tokens_for_rows(), torch.ones(len(NAMES), LENGTH, dtype=torch.long)
    for i, pad in enumerate([0, 3, 1, 2]):
        tokens[i, :pad], mask[i, :pad] = 1, 0
    mixed = call_silently(
        model.generate, input_ids=tokens, attention_mask=mask, **FIXED, adapter_names=NAMES
    )
    for i, adapter in enumerate(NAMES):
        prompt = tokens[i][mask[i].bool()][None]
        alone = only(
            model, adapter, lambda p=prompt: call_silently(model.generate, input_ids=p, **FIXED)
        )
        assert torch.equal(mixed[i, LENGTH:], alone[0, prompt.shape[1] :])


def test_continuous_batching_refuses_names_that_it_would_ignore() -> None:
    model = mixed_model("llama")
    with pytest.raises(ValueError, match="serves the active adapter to all"):
        model.generate_batch([[3, 4], [5, 6]], adapter_names=["c", "e"])
