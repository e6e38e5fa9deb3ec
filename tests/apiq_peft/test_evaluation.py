"""Perplexity, errors and tasks against what is written out here, and sizes against files."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from apiq_peft import ApiQConfig, dequantize
from apiq_peft.evaluation import activation_errors, perplexity, run_tasks, size_of
from tests.apiq_peft._models import VOCABULARY, tiny, tokens


def nats(model, ids: Tensor, first: int) -> tuple[float, int]:
    """Sum the surprise of the tokens from `first` on, one by one."""
    with torch.no_grad():
        logs = model(input_ids=ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
    picked = [-logs[i - 1, ids[i]].item() for i in range(first, len(ids))]
    return sum(picked), len(picked)


TEXT = tokens(1, 50)[0]


def test_windows_side_by_side() -> None:
    model = tiny()
    found = perplexity(model, TEXT, 12)
    parts = [nats(model, TEXT[start : start + 12], 1) for start in range(0, 48, 12)]
    assert found.tokens == sum(count for _, count in parts) == 44
    assert found.value == pytest.approx(math.exp(sum(n for n, _ in parts) / 44), rel=1e-5)


def test_the_limit_keeps_the_right_denominator() -> None:
    model = tiny()
    found = perplexity(model, TEXT, 12, limit=2)
    parts = [nats(model, TEXT[start : start + 12], 1) for start in (0, 12)]
    assert found.tokens == 22
    assert found.value == pytest.approx(math.exp(sum(n for n, _ in parts) / 22), rel=1e-5)


def test_overlapping_windows_predict_every_token_once() -> None:
    model = tiny()
    found = perplexity(model, TEXT, 12, stride=4)
    total, counted, end = 0.0, 0, 1
    for start in range(0, 49, 4):
        part = TEXT[start : start + 12]
        first = max(1, end - start)
        if len(part) <= first:
            continue
        more, count = nats(model, part, first)
        total, counted, end = total + more, counted + count, start + len(part)
    assert found.tokens == counted == 49
    assert found.value == pytest.approx(math.exp(total / 49), rel=1e-5)


def test_a_text_shorter_than_a_window() -> None:
    assert perplexity(tiny(), TEXT[:5], 12).tokens == 4


def test_training_mode_is_restored() -> None:
    model = tiny().train()
    perplexity(model, TEXT, 12)
    assert model.training


@pytest.mark.parametrize(
    ("ids", "window", "stride", "message"),
    [
        (TEXT[:1], 4, None, "at least two"),
        (TEXT.view(1, -1), 4, None, "in one row"),
        (TEXT, 1, None, "window 1"),
        (TEXT, 4, 5, "stride 5"),
    ],
)
def test_nonsense_is_refused(ids: Tensor, window: int, stride: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(tiny(), ids, window, stride)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit is {limit}"):
        perplexity(tiny(), TEXT, 12, limit=limit)


def test_a_stride_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="stride 0"):
        perplexity(tiny(), TEXT, 12, stride=0)


def packed(kind: str = "llama", bits: int = 2) -> Any:
    """Give a packed model whose LoRA does something."""
    model = get_peft_model(tiny(kind), ApiQConfig(bits=bits, group_size=32, r=4)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def seen(model: Any, ids: Tensor, name: str) -> Tensor:
    """Give the output of one module."""
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, y: found.append(y))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return found[0]


def test_activation_errors_are_of_each_layer_in_its_own_model() -> None:
    original, model = tiny(), packed()
    errors = activation_errors(model, original, tokens())
    assert list(errors) == [n for n, m in original.model.named_modules(prefix="model") if _is(m)]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        wanted = seen(original, tokens(), name)
        actual = seen(model.base_model.model, tokens(), name)
        expected = (actual - wanted).norm() / wanted.norm()
        assert errors[name] == pytest.approx(float(expected), rel=1e-4)


def _is(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def test_batches_of_samples_and_of_encoders_count_as_one() -> None:
    original, model = tiny("t5"), packed("t5")
    names = ("input_ids", "decoder_input_ids")
    at_once = activation_errors(model, original, [dict.fromkeys(names, tokens())])
    parts = [dict.fromkeys(names, part) for part in tokens().split(2)]
    one_by_one = activation_errors(model, original, parts)
    assert any(name.startswith("decoder.") for name in at_once)
    assert one_by_one == pytest.approx(at_once, rel=1e-4)


def test_a_model_is_not_off_from_itself() -> None:
    model = packed(bits=3)
    same = dequantize(copy.deepcopy(model))
    errors = activation_errors(model.train(), same.train(), tokens(2))
    assert max(errors.values()) < 1e-5
    assert model.training
    assert same.training


def test_errors_of_other_models_are_refused_and_leave_no_hook() -> None:
    model = packed()
    with pytest.raises(ValueError, match="the original has no layer"):
        activation_errors(model, tiny("gpt2"), tokens())
    with pytest.raises(ValueError, match="0 packed layers"):
        activation_errors(tiny(), tiny(), tokens())
    with pytest.raises(ValueError, match="0 samples"):
        activation_errors(model, tiny(), [])
    original = tiny()
    wider = torch.nn.Linear(64, 96)
    original.model.layers[0].mlp.up_proj = original.model.layers[0].mlp.gate_proj = wider
    original.model.layers[0].mlp.down_proj = torch.nn.Linear(96, 64)
    with pytest.raises(ValueError, match=r"gate_proj gives \(1, 12, 128\), the original"):
        activation_errors(model, original, tokens())
    for one in (model, original):
        assert not any(m._forward_hooks for m in one.modules())


# ---- tasks --------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path: Path) -> list[dict[str, Any]]:
    """Write a task `toy` of questions with four answers of one word; give them."""
    words = tokens(10, 9)
    asked = [
        {"asked": [*row[:5]], "answers": [*row[5:]], "right": i % 4}
        for i, row in enumerate(words.tolist())
    ]
    lines = [
        {
            "question": " ".join(f"w{i}" for i in one["asked"]),
            "choices": [f"w{i}" for i in one["answers"]],
            "label": one["right"],
        }
        for one in asked
    ]
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "toy.yaml").write_text(f"""
task: toy
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "toy.jsonl"}
  cache_dir: {tmp_path / "cache"}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")
    return asked


@pytest.fixture
def tokenizer() -> Any:
    words = {"<none>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    bare = Tokenizer(models.WordLevel(words, unk_token="<none>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<none>", eos_token="<end>")


def test_a_task_of_a_folder_is_what_the_likelihoods_say(
    tmp_path: Path, questions: list[dict[str, Any]], tokenizer: Any
) -> None:
    pytest.importorskip("lm_eval")
    model = packed()
    right = 0
    for one in questions[:8]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one["asked"]])).logits[0, -1]
        right += int(logits[one["answers"]].argmax()) == one["right"]
    found = run_tasks(model, tokenizer, ["toy"], limit=8, include_path=tmp_path)
    assert found["toy"]["acc,none"] == pytest.approx(right / 8)
    with pytest.raises(ValueError, match="is no folder"):
        run_tasks(model, tokenizer, ["toy"], include_path=tmp_path / "none")


def test_tasks_without_the_harness_are_refused_with_the_remedy(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'road-apiq-peft\[eval\]'"):
        run_tasks(tiny(), tokenizer, ["piqa"])


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "wanted"), [(2, 2.5625), (3, 3.59375), (4, 4.625)])
def test_bits_are_those_of_the_formula_and_of_the_file(
    tmp_path: Path, bits: int, wanted: float
) -> None:
    model = get_peft_model(tiny(), ApiQConfig(bits=bits, group_size=32, r=8))
    size = size_of(model)
    assert size.bits_per_weight == pytest.approx(wanted)  # b + 16 / g + b / g
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert size.bits_with_adapters == pytest.approx(wanted + 16 * lora / size.weights)
    model.unload().save_pretrained(tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert size.packed_bytes + size.other_bytes == pytest.approx(on_disk, rel=0.1)
