"""Mixed batches on quantised bases: bitsandbytes everywhere, the others where they are installed.

The oracle is the batch with the adapter of the row: quantised layers may round a row by what else
is in the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, HqqConfig, LlamaForCausalLM, TorchAoConfig

from tests.helpers import TOLERANCES
from tests.road_peft._models import VOCABULARY, call_silently, no_hooks, tiny, with_adapters
from tests.road_peft._rows import (
    BASE,
    NAMES,
    belongs,
    configs,
    gradients,
    only,
)

F32, BF16 = torch.float32, torch.bfloat16


def _four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _hqq() -> HqqConfig:
    pytest.importorskip("hqq.core.quantize")
    return HqqConfig(nbits=4, group_size=64)


def _torchao() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))


# name: (configuration, dtype of the model, the least precise dtype inside)
BACKENDS: dict[str, tuple[Callable[[], Any], torch.dtype, torch.dtype]] = {
    "4-bit": (lambda: _four_bit(F32), F32, F32),
    "4-bit, bf16": (lambda: _four_bit(BF16), BF16, BF16),
    "8-bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), F32, torch.float16),
    "8-bit, bf16": (lambda: BitsAndBytesConfig(load_in_8bit=True), BF16, BF16),
    "hqq": (_hqq, F32, F32),
    "torchao": (_torchao, F32, F32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    tiny("llama", num_hidden_layers=1, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(params=BACKENDS)
def quantised(request: pytest.FixtureRequest, folder: Path) -> tuple[Any, torch.dtype]:
    """Give a model that trains "c" and "e", and the least precise dtype inside it."""
    make, dtype, inside = BACKENDS[request.param]
    base = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=copy.deepcopy(make()), device_map="cpu", dtype=dtype
    )
    model = with_adapters(base, configs("c", "e", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["c", "e"])
    return model, inside


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (len(NAMES), 6))


def _distance(actual: Tensor, wanted: Tensor) -> float:
    return ((actual.float() - wanted.float()).norm() / wanted.float().norm()).item()


def _check_rows(model: Any, tokens: Tensor, inside: torch.dtype) -> None:
    with torch.no_grad():
        mixed = model(tokens, adapter_names=NAMES).logits
        for i, adapter in enumerate(NAMES):
            wanted = only(model, adapter, lambda: model(tokens).logits)
            # 8-bit layers round their inputs too, so a rounding before them may count for more
            assert _distance(mixed[i], wanted[i]) <= 10 * TOLERANCES[inside], f"row {i}"
            other = "c" if adapter != "c" else "e"
            wrong = only(model, other, lambda other=other: model(tokens).logits)
            assert _distance(mixed[i], wrong[i]) > 0.1
    model.base_model.set_adapter(["c", "e"])


def test_rows_and_gradients_on_a_quantised_base(quantised) -> None:
    """In evaluation, training, evaluation and training again, which some layers repack for."""
    model, inside = quantised
    tokens = _tokens()
    found = []
    for _ in range(2):
        model.eval()
        _check_rows(model, tokens, inside)
        model.train()
        logits = model(tokens, adapter_names=NAMES).logits
        weights = torch.linspace(-1, 1, logits[0].numel()).view_as(logits[0])
        (logits.float() * weights).sum().backward()
        found.append(gradients(model))
        assert found[0].keys() == found[-1].keys()
        for name, gradient in found[0].items():
            assert torch.equal(found[-1][name], gradient)
    (ours, _), wanted = found, {}
    for adapter in ("c", "e"):
        kept = torch.tensor([name == adapter for name in NAMES]).view(-1, 1, 1)
        logits = only(model, adapter, lambda: model(tokens).logits)
        (logits.float() * weights * kept).sum().backward()
        wanted |= gradients(model)
    assert ours.keys() == wanted.keys()
    assert {adapter for adapter in "ce" if any(belongs(n, adapter) for n in ours)} == {"c", "e"}
    for name, gradient in wanted.items():
        assert gradient.any(), name
        # several roundings lie between the two, and in 8-bit layers the other rows take part
        assert _distance(ours[name], gradient) <= 4 * TOLERANCES[inside], name


def test_a_quantised_base_generates_by_rows(quantised) -> None:
    model, inside = quantised
    tokens = _tokens()
    settings: dict[str, Any] = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    model.eval()
    for beams in (1, 2):
        settings["num_beams"] = beams
        mixed = call_silently(model.generate, **settings, adapter_names=NAMES)
        for i, adapter in enumerate(NAMES):
            wanted = only(model, adapter, lambda: call_silently(model.generate, **settings))
            first, other = (output.logits[0][i * beams] for output in (mixed, wanted))
            assert _distance(first, other) <= 10 * TOLERANCES[inside]
            if inside == F32:  # a coarser rounding may turn a close decision
                assert torch.equal(mixed.sequences[i], wanted.sequences[i])
    assert no_hooks(model)


def test_gradients_with_checkpoints_on_a_quantised_base(quantised) -> None:
    model, _ = quantised
    tokens = _tokens()

    def run() -> dict[str, Tensor]:
        model(tokens, adapter_names=NAMES).logits.float().square().sum().backward()
        return gradients(model)

    model.train()
    wanted = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = run()
    assert ours.keys() == wanted.keys()
    assert BASE in NAMES
    for name, gradient in wanted.items():
        assert torch.equal(ours[name], gradient), name
