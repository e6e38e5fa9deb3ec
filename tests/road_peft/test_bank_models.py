"""Batches of a bank on whole models: every row is that of its adapter.

| property                                        | oracle                                         |
|-------------------------------------------------|------------------------------------------------|
| rows, in any dtype, variant and group size      | the model with all of them loaded by PEFT      |
| rows                                            | the batch with one adapter for all             |
| rows of the base                                | the model before the bank, bit for bit         |
| generate: beams, padding, static cache          | the same, token by token                       |
| quantised bases, embeddings, heads, odd widths  | the same                                       |
| one compiled graph for all slots and adapters   | the eager rows, and dynamo's count of graphs   |
"""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from kernels_peft import rotate
from road_peft import RoadBank, RoadConfig
from tests.helpers import assert_close
from tests.road_peft._banks import (
    bank_of,
    configs_of,
    heard,
    loaded,
    loud_bank,
    no_lease,
    scaling,
    sources_of,
)
from tests.road_peft._models import Mlp, bytes_of, call_silently, no_hooks, tiny
from tests.road_peft._rows import BASE, LENGTH, only, tokens_for_rows

ROWS = ["c", BASE, "a", "f", "b", "c"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = ("llama", "opt", "gpt2", "t5", "bart")


def _inputs(model: Any, rows: int = len(ROWS)) -> dict[str, Tensor]:
    inputs = {"input_ids": tokens_for_rows(rows)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3].contiguous()
    return inputs


def _pair(base: Any, names: Any = "abcf", slots: int = 8, **common: Any) -> tuple[Any, RoadBank]:
    """Give the model with adapters loaded by PEFT, and a bank of the same on the base itself."""
    targets = common.get("target_modules")
    configs = names if isinstance(names, dict) else configs_of(names, **common)
    model = loaded(base, configs)
    bank = bank_of(base, sources_of(model), slots, target_modules=targets)
    return model, bank


@torch.no_grad()
def _check(model: peft.PeftModel, bank: RoadBank, before: Tensor, **inputs: Tensor) -> None:
    with bank.rows(ROWS):
        rows = bank.model(**inputs).logits
    assert torch.equal(rows, model(**inputs, adapter_names=ROWS).logits)
    for i, name in enumerate(ROWS):
        if name == BASE:
            assert torch.equal(rows[i], before[i])
            continue
        alone = only(model, name, lambda: model(**inputs).logits)
        assert torch.equal(rows[i], alone[i])
        assert not torch.equal(rows[i], before[i])
    assert torch.equal(bank.model(**inputs).logits, before)
    assert no_hooks(bank.model)
    assert no_lease(bank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_rows_of_a_model_are_those_of_their_adapters(name: str, dtype: torch.dtype) -> None:
    base = tiny(name, dtype=dtype)
    inputs = _inputs(base)
    with torch.no_grad():
        before = base(**inputs).logits
    model, bank = _pair(base)
    _check(model, bank, before, **inputs)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "lm_head"]),
        ("llama", ["embed_tokens", "down_proj"]),
        ("gpt2", ["wte", "c_attn"]),
        ("gpt2", ["lm_head"]),
        ("opt", ["embed_tokens", "lm_head", "fc1"]),
        ("t5", ["shared", "lm_head"]),
        ("bart", ["lm_head", "fc2"]),
    ],
)
def test_embeddings_and_heads(name: str, targets: list[str]) -> None:
    base = tiny(name, tie_word_embeddings=False)
    inputs = _inputs(base)
    with torch.no_grad():
        before = base(**inputs).logits
    model, bank = _pair(base, target_modules=targets)
    _check(model, bank, before, **inputs)


def test_widths_that_no_group_size_divides() -> None:
    base = tiny("llama", intermediate_size=23)
    configs = configs_of("abcf", remainder="identity")
    inputs = _inputs(base)
    with torch.no_grad():
        before = base(**inputs).logits
    model, bank = _pair(base, configs)
    _check(model, bank, before, **inputs)


def test_patterns_and_adapters_that_lack_layers() -> None:
    base = tiny("llama")
    configs = {
        "a": RoadConfig(
            group_size=4,
            variant_pattern={"q_proj": "road_2", r"layers.1.*up_proj": "road_4"},
            group_size_pattern={"down_proj": 8, r"layers.0.*v_proj": 2},
        ),
        "b": RoadConfig(group_size=2, target_modules=["q_proj"]),
        "c": RoadConfig(group_size=4, variant="road_4", layers_to_transform=[1]),
        "f": RoadConfig(group_size=8, exclude_modules=["q_proj", "v_proj"]),
    }
    inputs = _inputs(base)
    with torch.no_grad():
        before = base(**inputs).logits
    model, bank = _pair(base, configs)
    _check(model, bank, before, **inputs)


def test_slots_that_served_other_adapters_before() -> None:
    """What a former adapter has left in a slot does not show: other layers, other group sizes."""
    base = tiny("llama", dtype=torch.float32)
    configs = configs_of("abcf") | {
        "d": RoadConfig(group_size=2, target_modules=["q_proj"]),
        "e": RoadConfig(group_size=10, remainder="identity", target_modules=["up_proj"]),
    }
    model, bank = _pair(base, configs, slots=2)
    tokens = tokens_for_rows(2)
    for first, second in [*zip("abcdef", "bcdefa", strict=True), ("a", "d"), ("e", "c")]:
        with torch.no_grad(), bank.rows([first, second]):
            rows = base(tokens).logits
        assert torch.equal(rows, model(tokens, adapter_names=[first, second]).logits)
    assert bank.memory().evictions >= 6


# ---- generate ---------------------------------------------------------------------------------

GENERATIONS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({}, 1),
    "beams": ({"num_beams": 3}, 3),
    "return sequences": ({"do_sample": True, "num_return_sequences": 2}, 2),
    "static cache": ({"cache_implementation": "static"}, 1),
}


def _generate(model: Any, **kwargs: Any) -> Tensor:
    torch.manual_seed(7)
    return call_silently(model.generate, max_new_tokens=3, min_new_tokens=3, **kwargs)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("llama", how) for how in GENERATIONS),
        *((name, how) for name in ("t5", "opt") for how in ("greedy", "beams")),
        ("bart", "return sequences"),
        ("gpt2", "beams"),
    ],
)
def test_generated_rows(name: str, how: str) -> None:
    settings, repeats = GENERATIONS[how]
    base = tiny(name, dtype=torch.float64)
    inputs = {"input_ids": tokens_for_rows(len(ROWS))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    before = _generate(base, **inputs, **settings)
    model, bank = _pair(base)
    with bank.rows(ROWS, repeats=repeats):
        rows = _generate(base, **inputs, **settings)
    copies = len(rows) // len(ROWS)
    alone = {n: only(model, n, lambda: _generate(model, **inputs, **settings)) for n in {*ROWS}}
    for i, adapter in enumerate(ROWS):
        mine = slice(i * copies, (i + 1) * copies)
        assert torch.equal(rows[mine], alone[adapter][mine])
    assert torch.equal(_generate(base, **inputs, **settings), before)
    assert len({tuple(one.flatten().tolist()) for one in alone.values()}) >= 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(side: str) -> None:
    base = tiny("llama", dtype=torch.float64)
    model, bank = _pair(base)
    tokens, mask = tokens_for_rows(len(ROWS)), torch.ones(len(ROWS), LENGTH, dtype=torch.long)
    for i in range(len(ROWS)):
        pad = slice(0, i % 3) if side == "left" else slice(LENGTH - i % 3, LENGTH)
        tokens[i, pad], mask[i, pad] = 1, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), bank.rows(ROWS):
        rows = base(tokens, attention_mask=mask, position_ids=positions).logits
    for i, adapter in enumerate(ROWS):
        seen = mask[i].bool()
        prompt = tokens[i][seen][None]
        alone = only(model, adapter, lambda p=prompt: model(p).logits)[0]
        assert (rows[i][seen] - alone).abs().max() <= 1e-10 * alone.abs().max()


# ---- quantised bases --------------------------------------------------------------------------


def _quantised(kind: str) -> nn.Module:
    make = {
        "nf4": lambda i, o: bnb.nn.Linear4bit(i, o, compute_dtype=torch.float32, quant_type="nf4"),
        "int8": lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False),
    }[kind]
    model = Mlp(64, 128, 64)
    for name, layer in list(model.named_children()):
        quantised = make(layer.in_features, layer.out_features)
        quantised.load_state_dict(layer.state_dict())
        setattr(model, name, quantised.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@torch.no_grad()
def test_quantised_bases(kind: str) -> None:
    base, x = _quantised(kind), torch.randn(len(ROWS), 2, 64)
    before, weights = base(x), bytes_of(base)
    model, bank = _pair(base, target_modules=["up", "down"])
    with bank.rows(ROWS):
        rows = base(x)
    for i, name in enumerate(ROWS):
        h = x
        for child in ("up", "down"):
            h = getattr(base, child).base_layer(h)
            adapted = getattr(model.get_base_model(), child)
            if name != BASE:
                h = rotate(h, *adapted.coefficients(name), adapted.group_size[name])
            h = h.tanh() if child == "up" else h
        assert torch.equal(rows[i], h[i])
        assert torch.equal(rows[i], before[i]) is (name == BASE)
    bank.detach()
    assert bytes_of(base) == weights
    assert torch.equal(base(x), before)


# ---- compiled ---------------------------------------------------------------------------------


def test_one_compiled_graph_serves_all_slots_and_adapters() -> None:
    torch._dynamo.reset()
    bank = loud_bank(2, count=4)
    compiled = torch.compile(bank.model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    x = torch.ones(3, 4)
    slots = torch.full((3,), -1, dtype=torch.int32)
    with torch.no_grad():
        for names in (["n1", None, "n2"], ["n2", "n2", "n1"], ["n3", None, "n4"], [None] * 3):
            leases = [bank.acquire(name) for name in names]
            slots.copy_(torch.tensor([lease.slot for lease in leases], dtype=torch.int32))
            with bank.routed(slots):
                got = compiled(x)[:, :, 0].tolist()
            assert got == [[int(name[1:]) + 1 if name else 1] * 3 for name in names]
            for lease in leases:
                lease.release()
        bank.replace("n3", scaling(16))
        with bank.acquire("n3") as lease, bank.routed(slots.fill_(lease.slot)):
            assert compiled(x)[:, 0, 0].tolist() == [16] * 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert heard(bank, "n4") == [5]


def test_a_compiled_language_model_under_slots_of_tokens() -> None:
    torch._dynamo.reset()
    base = tiny("llama", num_hidden_layers=1)
    model, bank = _pair(base)
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    tokens = tokens_for_rows(4)
    slots = torch.full((4,), -1, dtype=torch.int64)
    torch._dynamo.utils.counters.clear()
    for names in (["a", "b", BASE, "f"], ["c", "a", "a", BASE]):
        leases = [bank.acquire(name) for name in names]
        slots.copy_(torch.tensor([lease.slot for lease in leases]))
        with torch.no_grad(), bank.routed(slots):
            rows = compiled(tokens, use_cache=False).logits
            by_token = slots[:, None].repeat(1, LENGTH)
            with bank.routed(by_token):
                assert torch.equal(base(tokens).logits, _rows(bank, names, tokens))
        wanted = model(tokens, adapter_names=names).logits
        assert_close(rows, wanted, dtype=torch.float32)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def _rows(bank: RoadBank, names: list[str], tokens: Tensor) -> Tensor:
    with bank.rows(names):
        return bank.model(tokens).logits


def test_a_copy_of_a_model_under_a_bank_is_the_base() -> None:
    """A route belongs to the thread and the bank; a copy of the layers has a fresh one."""
    bank = loud_bank(1, count=1)
    with bank.rows(["n1"]):
        other = copy.deepcopy(bank.model)
        assert torch.equal(other(torch.ones(1, 4)), torch.ones(1, 3, 4))
