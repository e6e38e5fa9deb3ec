"""Generation from batches whose rows take different adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from road_peft import RoadLayer
from tests.road_peft._models import (
    call_silently,
    no_hooks,
    tiny,
    with_adapters,
)
from tests.road_peft._rows import (
    BASE,
    LENGTH,
    NAMES,
    assert_network_close,
    configs,
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


# ---- logits -------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _steps(model: Any, tokens: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Give the sequences, and by row the logits of every step, which are kept in float32."""
    torch.manual_seed(11)
    output = call_silently(
        model.generate,
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        return_dict_in_generate=True,
        output_logits=True,
        **{**FIXED, **settings},
    )
    return output.sequences, torch.stack(output.logits, 1)


@pytest.mark.parametrize("copies", [1, 3])
def test_sampled_rows_have_the_logits_of_the_text_they_sampled(copies: int) -> None:
    model, tokens = mixed_model("llama"), tokens_for_rows()
    settings = {"do_sample": True, "temperature": 0.7, "num_return_sequences": copies}
    sequences, logits = _steps(model, tokens, **settings, adapter_names=NAMES)
    assert len(sequences) == len(NAMES) * copies
    for row, sequence in enumerate(sequences):
        adapter = NAMES[row // copies]
        alone = only(model, adapter, lambda s=sequence: model(s[None]).logits)
        assert_network_close(logits[row], alone[0, LENGTH - 1 : -1].float(), f"row {row}")
    assert len({tuple(s.tolist()) for s in sequences}) > len(NAMES) - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beams_in_half_precision_are_those_of_the_batch_with_their_adapter(dtype) -> None:
    model, tokens = mixed_model("llama", dtype), tokens_for_rows()
    settings = {"do_sample": False, "num_beams": 3}
    mixed = _generate(model, tokens, "arguments", {**FIXED, **settings}, adapter_names=NAMES)
    for i, adapter in enumerate(NAMES):
        batch = only(
            model,
            adapter,
            lambda: _generate(model, tokens, "arguments", {**FIXED, **settings}),
        )
        assert torch.equal(mixed[i], batch[i])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_static_cache_generates_the_same(beams: int) -> None:
    model, tokens = mixed_model("llama"), tokens_for_rows()
    settings = {"do_sample": False, "num_beams": beams, "adapter_names": NAMES}
    wanted, _ = _steps(model, tokens, **settings)
    static, _ = _steps(
        model, tokens, cache_implementation="static", disable_compile=True, **settings
    )
    assert torch.equal(static, wanted)


def test_a_sliding_window_serves_rows() -> None:
    sizes = {
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2},
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "sliding_window": 3},
    }
    base = MistralForCausalLM(MistralConfig(**sizes)).double().eval()
    model, tokens = with_adapters(base, configs("c", "e")), tokens_for_rows(length=8)
    mixed, logits = _steps(model, tokens, do_sample=False, adapter_names=NAMES)
    for i, adapter in enumerate(NAMES):
        alone, wanted = only(
            model, adapter, lambda i=i: _steps(model, tokens[i : i + 1], do_sample=False)
        )
        assert torch.equal(mixed[i], alone[0])
        assert_network_close(logits[i], wanted[0])


# ---- decoding with guesses, which transformers does for one row at a time ------------------------


@pytest.mark.parametrize("name", ["c", BASE])
@pytest.mark.parametrize("guess", ["assistant", "prompt lookup", "early exit"])
def test_guessed_decoding_gives_the_tokens_of_greedy_decoding(guess: str, name: str) -> None:
    model = mixed_model("llama")
    tokens = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    settings: dict[str, Any] = {
        "assistant": {"assistant_model": tiny("llama", dtype=torch.float64)},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "early exit": {"assistant_early_exit": 1},
    }[guess]
    settings |= {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    model.set_adapter("e")
    guessed, logits = _steps(model, tokens, **settings, adapter_names=[name])
    assert no_hooks(model)
    alone, wanted = only(
        model,
        name,
        lambda: _steps(model, tokens, do_sample=False, max_new_tokens=6, min_new_tokens=6),
    )
    assert torch.equal(guessed, alone)
    assert_network_close(logits, wanted)
    with pytest.raises(ValueError, match="batch_size = 1"):
        _steps(model, tokens_for_rows(2), **settings, adapter_names=["c", name])
    assert no_hooks(model)


def test_names_with_repetition_penalties_and_stop_tokens() -> None:
    """Rows end at different steps, by their own adapters."""
    model, tokens = mixed_model("llama"), tokens_for_rows()
    settings: dict[str, Any] = {"max_new_tokens": 8, "repetition_penalty": 1.3, "do_sample": False}
    free, _ = _steps(model, tokens, **settings, min_new_tokens=8, adapter_names=NAMES)
    stop = int(free[0, LENGTH + 2])  # row 0 stops at its third token
    settings |= {"eos_token_id": stop, "pad_token_id": 1, "min_new_tokens": 0}
    mixed, _ = _steps(model, tokens, **settings, adapter_names=NAMES)
    for i, adapter in enumerate(NAMES):
        alone, _ = only(model, adapter, lambda i=i: _steps(model, tokens[i : i + 1], **settings))
        length = alone.shape[1]
        assert torch.equal(mixed[i, :length], alone[0])
        assert (mixed[i, length:] == 1).all()


def test_a_generation_computes_the_coefficients_of_active_adapters_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mixed_model("llama")
    model.set_adapter("c")
    calls: list[str] = []
    compute = RoadLayer.coefficients

    def counted(layer: RoadLayer, name: str, *rest: Any) -> Any:
        calls.append(layer.module_name)
        return compute(layer, name, *rest)

    monkeypatch.setattr(RoadLayer, "coefficients", counted)
    first = model.generate(tokens_for_rows(2), max_new_tokens=6, do_sample=False)
    assert len(calls) == len(set(calls))
    for parameter in (p for n, p in model.named_parameters() if "road_alpha.c" in n):
        parameter.data.mul_(-3)  # which no version counter notices
    second = model.generate(tokens_for_rows(2), max_new_tokens=6, do_sample=False)
    assert len(calls) == 2 * len(set(calls))
    assert first.shape == second.shape
    assert model.base_model.routing.kept is None
