"""Continuous batching of requests with adapters of their own: `generate_batch(adapter_names=...)`.

| property                                         | oracle                                       |
|--------------------------------------------------|----------------------------------------------|
| tokens of every request                          | the prompt alone, with its adapter           |
| the same when prompts are cut, wait, or offload  | the same                                     |
| equal prompts with different adapters            | the same (a shared prefix would be wrong)    |
| several sequences of a request                   | their number and names; logits of each step  |
| without names                                    | transformers' own tokens                     |
| after the end, an error, or a refusal            | no route in force, attention as before       |
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from road_peft import AdapterBatching, RoadConfig
from tests.road_peft._banks import bank_of, configs_of, loaded, prompts, sources_of
from tests.road_peft._models import VOCABULARY, Mlp, call_silently, tiny, with_adapters
from tests.road_peft._rows import BASE, configs, only

if not hasattr(ContinuousBatchingConfig, "page_size"):
    pytest.skip("needs a newer transformers", allow_module_level=True)

NAMES = ["a", BASE, "e", "c", "a", "d"]
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=-1, pad_token_id=1)


def small(**settings: Any) -> ContinuousBatchingConfig:
    defaults = {"num_blocks": 16, "page_size": 8, "max_batch_tokens": 32}
    return ContinuousBatchingConfig(**{**defaults, **settings})


def one_by_one(model: Any, inputs: list[list[int]], names: list[str]) -> list[list[int]]:
    never = VOCABULARY  # an end of the sequence that no model gives
    config = GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=never, pad_token_id=1)

    def generate(tokens: list[int]) -> list[int]:
        out = call_silently(model.generate, torch.tensor([tokens]), generation_config=config)
        return out[0, len(tokens) :].tolist()

    return [
        only(model, name, lambda t=tokens: generate(t))
        for tokens, name in zip(inputs, names, strict=True)
    ]


def batch(model: Any, inputs: list[list[int]], names: list[str], **kwargs: Any) -> list[list[int]]:
    settings = kwargs.pop("settings", {})
    config = kwargs.pop("generation_config", GREEDY)
    outputs = model.generate_batch(
        inputs,
        generation_config=config,
        continuous_batching_config=small(**settings),
        adapter_names=names,
        **kwargs,
    )
    assert model.base_model.routing.current is None
    return [output.generated_tokens for output in outputs.values()]


def sliding(class_name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """Give a tiny model whose attention sees a window."""
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
        sliding_window=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **settings,
    )
    return model_class(config).to(dtype).eval()


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """Spare what exists already from the collections of garbage at the end of each generation."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def llama() -> peft.PeftModel:
    return with_adapters(tiny("llama", dtype=torch.float64), configs("a", "b", "c", "d", "e"))


# ---- tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batch_tokens": 4},
        {"max_requests_per_batch": 2},
        {"num_blocks": 3},
        {"num_blocks": 4, "max_batch_tokens": 8, "safety_margin": 0.0},
        {"scheduler_type": "prefill_first", "max_batch_tokens": 8},
        {"allow_block_sharing": True, "use_async_batching": True},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_requests_alone(llama: Any, settings: dict[str, Any]) -> None:
    """Prompts are cut where a batch holds few tokens, and wait or start again where blocks end."""
    inputs = [tokens[: 3 + 2 * i] for i, tokens in enumerate(prompts(len(NAMES), 16))]
    got = batch(llama, inputs, NAMES, settings=settings)
    assert got == one_by_one(llama, inputs, NAMES)
    assert len({tuple(tokens) for tokens in got}) > 3


def test_many_more_requests_than_fit(llama: Any) -> None:
    names = NAMES * 3
    inputs = prompts(len(names), 9)
    settings = {"num_blocks": 4, "max_batch_tokens": 12}
    assert batch(llama, inputs, names, settings=settings) == one_by_one(llama, inputs, names)


def test_equal_prompts_with_different_adapters(llama: Any) -> None:
    """Blocks of a prompt are of its adapter: sharing them would give wrong tokens."""
    inputs = prompts(1, 20) * len(NAMES)
    settings = {"page_size": 4, "num_blocks": 48, "allow_block_sharing": True}
    got = batch(llama, inputs, NAMES, settings=settings)
    assert got == one_by_one(llama, inputs, NAMES)
    assert got[0] == got[4]
    assert len({tuple(tokens) for tokens in got}) == 5


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_other_models(name: str) -> None:
    model = with_adapters(tiny(name, dtype=torch.float64), configs("a", "c", "d", "e"))
    inputs = prompts(len(NAMES))
    got = batch(model, inputs, NAMES, settings={"max_batch_tokens": 8})
    assert got == one_by_one(model, inputs, NAMES)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("MistralForCausalLM", {}),
        ("Gemma2ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_models_with_a_sliding_window(name: str, settings: dict[str, Any]) -> None:
    base = sliding(name, attn_implementation="eager", **settings)
    model = with_adapters(base, configs("a", "c", "d", "e"))
    inputs = prompts(len(NAMES), 11)
    got = batch(model, inputs, NAMES, settings={"max_batch_tokens": 16})
    assert got == one_by_one(model, inputs, NAMES)
    assert base.config._attn_implementation == "eager"


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("keeps", [True, False])
def test_heads_and_embeddings(targets: list[str], keeps: bool) -> None:
    """A head sees fewer tokens than the other layers, if the model knows which are wanted."""
    base = tiny("llama", dtype=torch.float64)
    if not keeps:
        base._supports_logits_to_keep = lambda: False
    model = with_adapters(base, configs("a", "b", "c", target_modules=targets))
    names = ["a", BASE, "b", "c", "a"]
    inputs = prompts(len(names), 7)
    got = batch(model, inputs, names, settings={"max_batch_tokens": 10})
    assert got == one_by_one(model, inputs, names)
    assert len({tuple(tokens) for tokens in got}) > 3


def test_a_lora_beside_a_head() -> None:
    model = with_adapters(
        tiny("llama", dtype=torch.float64), configs("d", "e", target_modules=["lm_head", "v_proj"])
    )
    names = ["d", "e", BASE, "d"]
    inputs = prompts(len(names))
    assert batch(model, inputs, names) == one_by_one(model, inputs, names)


def test_half_precision() -> None:
    model = with_adapters(tiny("llama", dtype=torch.bfloat16), configs("a", "b", "e"))
    names = ["a", BASE, "b", "e"]
    inputs = prompts(len(names))
    got = batch(model, inputs, names)
    wanted = one_by_one(model, inputs, names)
    # a near tie may fall the other way, since batches of other sizes round otherwise
    same = sum(g[0] == w[0] for g, w in zip(got, wanted, strict=True))
    assert same >= len(names) - 1


def test_names_by_position_of_the_configurations_and_of_one_request(llama: Any) -> None:
    inputs = prompts(1)
    outputs = llama.generate_batch(inputs, GREEDY, small(), adapter_names=["e"], max_new_tokens=2)
    (output,) = outputs.values()
    assert output.generated_tokens == one_by_one(llama, inputs, ["e"])[0][:2]
    assert output.prompt_ids == inputs[0]
    assert llama.generate_batch([], adapter_names=[]) == {}


# ---- several sequences ------------------------------------------------------------------------


def _determined() -> peft.PeftModel:
    """Give a model whose every distribution has nearly all its mass on one token."""
    base = tiny("llama", dtype=torch.float64)
    with torch.no_grad():
        base.lm_head.weight.mul_(1e4)
    return with_adapters(base, configs("a", "c", "e"))


@pytest.mark.parametrize("settings", [{}, {"num_blocks": 4, "max_batch_tokens": 8}], ids=str)
def test_several_sequences_of_a_request(settings: dict[str, Any]) -> None:
    """Sampling gives the likeliest tokens here, so each sequence is known."""
    model, names = _determined(), ["a", BASE, "c", "e"]
    inputs = prompts(len(names))
    config = GenerationConfig(
        do_sample=True, num_return_sequences=3, max_new_tokens=4, eos_token_id=-1, pad_token_id=1
    )
    outputs = model.generate_batch(
        inputs,
        generation_config=config,
        continuous_batching_config=small(**settings),
        adapter_names=names,
    )
    ids = [f"request-{i}{child}" for i in range(4) for child in ("__child#0", "__child#1", "")]
    assert list(outputs) == ids
    wanted = one_by_one(model, inputs, names)
    for i, output in enumerate(outputs.values()):
        assert output.generated_tokens == wanted[i // 3]


def test_a_request_holds_its_adapter_until_its_last_sequence_has_ended() -> None:
    """The first sequence of a request may end at once, and its others go on for long."""
    base = tiny("llama", dtype=torch.float64)
    bank = bank_of(base, sources_of(loaded(base, configs_of("a"))), slots=1)
    config = GenerationConfig(
        do_sample=True,
        num_return_sequences=6,
        max_new_tokens=9,
        eos_token_id=list(range(0, VOCABULARY, 3)),
        pad_token_id=1,
    )
    with AdapterBatching(bank, config, small()) as batching:
        batching.add_request(prompts(1)[0], "a")
        lengths = []
        for left in reversed(range(6)):
            output = batching.get_result(timeout=30)
            lengths.append(len(output.generated_tokens))
            assert bank._slots[0].uses == (left > 0)
    assert len(set(lengths)) > 1  # they did not end together


# ---- refusals ---------------------------------------------------------------------------------


def test_without_names_nothing_is_new(llama: Any) -> None:
    inputs = prompts(3)
    llama.set_adapter("c")
    got = llama.generate_batch(inputs, generation_config=GREEDY, continuous_batching_config=small())
    assert list(got) == ["req_0", "req_1", "req_2"]
    wanted = one_by_one(llama, inputs, ["c"] * 3)
    assert [output.generated_tokens for output in got.values()] == wanted


@pytest.mark.parametrize("field", ["modules_to_save", "trainable_token_indices"])
def test_adapters_with_modules_of_their_own_are_refused(field: str) -> None:
    given = configs("a", "b")
    value: Any = ["lm_head"] if field == "modules_to_save" else [3]
    setattr(given["b"], field, value)
    model = with_adapters(tiny("llama", dtype=torch.float64), given)
    with pytest.raises(ValueError, match=f"'b' has modules_to_save or .*{field}|'b' has"):
        batch(model, prompts(2), ["a", "b"])
    assert batch(model, prompts(1), ["a"])


def test_names_that_cannot_be_served(llama: Any) -> None:
    with pytest.raises(ValueError, match="non-existing adapter"):
        batch(llama, prompts(2), ["a", "nobody"])
    with pytest.raises(ValueError, match="there are 2 prompts and 1 adapter_names; give one each"):
        batch(llama, prompts(2), ["a"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has 0 tokens; give at least one, each from 0 to 39"),
        ([3, VOCABULARY], "each from 0 to 39"),
        ([-1], "each from 0 to 39"),
        ([3] * 126, r"126 tokens and 4 new ones need room for 129, but the cache holds 128"),
    ],
)
def test_prompts_that_would_end_all_generation(llama: Any, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch(llama, [[3, 4], prompt], ["a", "c"])
    assert llama.base_model.routing.current is None


def test_the_longest_prompt_that_fits(llama: Any) -> None:
    inputs = [[3 + i % 30 for i in range(21)]]
    got = batch(llama, inputs, ["e"], settings={"num_blocks": 3, "safety_margin": 0.0})
    assert got == one_by_one(llama, inputs, ["e"])


def test_a_manager_that_transformers_keeps_is_refused(llama: Any) -> None:
    inputs = prompts(2)
    wanted = batch(llama, inputs, ["a", "c"])
    base = llama.get_base_model()
    llama.generate_batch(
        inputs,
        generation_config=GREEDY,
        continuous_batching_config=small(),
        persistent_manager=True,
    )
    with pytest.raises(ValueError, match="keeps a continuous batching manager of another call"):
        batch(llama, inputs, ["a", "c"])
    base.destroy_cached_continuous_batching_manager()
    assert batch(llama, inputs, ["a", "c"]) == wanted


def test_models_that_cannot_generate_are_refused() -> None:
    bank = bank_of(Mlp(), {}, target_modules=["up"])
    with pytest.raises(ValueError, match="Mlp cannot generate by continuous batching"):
        AdapterBatching(bank)


@pytest.mark.parametrize("when", ["never", "warm-up", "forward", "configuration"])
def test_attention_and_route_are_as_before_after_the_end(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("llama", dtype=torch.float64, attn_implementation="eager")
    model = with_adapters(base, configs("a", "c"))
    assert base.config._attn_implementation == "eager"
    inputs, names = prompts(2), ["a", "c"]
    wanted = one_by_one(model, inputs, names)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        if when == "forward":
            patch.setattr(base.model, "forward", fail)
        elif when == "warm-up":
            manager = transformers.generation.continuous_batching.ContinuousBatchingManager
            patch.setattr(manager, "warmup", fail)
        settings = {"page_size": 0} if when == "configuration" else {}
        if when == "never":
            assert batch(model, inputs, names) == wanted
        else:
            with pytest.raises((RuntimeError, ValueError, ZeroDivisionError)):
                batch(model, inputs, names, settings=settings)
    assert base.config._attn_implementation == "eager"
    assert model.base_model.routing.current is None
    assert one_by_one(model, inputs, names) == wanted
    assert batch(model, inputs, names) == wanted


def test_merged_adapters_are_refused(llama: Any) -> None:
    llama.set_adapter("a")
    llama.merge_adapter()
    with pytest.raises(RuntimeError, match="merged adapters"):
        batch(llama, prompts(1), ["a"])
    llama.unmerge_adapter()
    assert batch(llama, prompts(1), ["a"])


def test_disabled_adapters_serve_the_base(llama: Any) -> None:
    inputs = prompts(2)
    with llama.disable_adapter():
        got = batch(llama, inputs, ["a", "e"])
    assert got == one_by_one(llama, inputs, [BASE, BASE])


def test_the_configurations_that_were_given_are_not_changed(llama: Any) -> None:
    config, batching = GenerationConfig(max_new_tokens=2), small()
    before = config.to_dict(), dict(vars(batching))
    llama.generate_batch(
        prompts(1),
        generation_config=config,
        continuous_batching_config=batching,
        adapter_names=["a"],
    )
    assert (config.to_dict(), dict(vars(batching))) == before


def test_an_adapter_that_has_no_layer_somewhere_is_the_base_there() -> None:
    given = {
        "a": RoadConfig(group_size=4, target_modules=["q_proj"]),
        "b": RoadConfig(group_size=8, target_modules=["down_proj", "lm_head"]),
    }
    model = with_adapters(tiny("llama", dtype=torch.float64), given)
    names = ["a", "b", BASE]
    inputs = prompts(3)
    assert batch(model, inputs, names) == one_by_one(model, inputs, names)


def test_a_transformers_that_hides_the_size_of_its_cache_is_refused(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ContinuousBatchingConfig, "page_size")
    with pytest.raises(ValueError, match=r"continuous batching with adapters is tested with 5\.23"):
        batch(llama, prompts(1), ["a"])
