"""Samples against the tokens written out."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from apiq_peft import ApiQConfig, preset, quantize
from apiq_peft.samples import samples_of, tokens_of
from tests.apiq_peft._models import tiny, tokens

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Give one token a word, one a line feed, and one before a text unless told not to."""
    words = {word: i for i, word in enumerate([*WORDS, "\n", "<s>"])}
    bare = Tokenizer(models.WordLevel(words, unk_token="w0"))
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    bare.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 41)])
    return PreTrainedTokenizerFast(tokenizer_object=bare, model_max_length=8)


def text(first: int, last: int) -> str:
    return " ".join(WORDS[first:last])


def test_texts_are_joined_by_blank_lines_without_special_tokens(tokenizer: Any) -> None:
    assert tokenizer("w1").input_ids == [41, 1]
    assert tokens_of("w1 w2", tokenizer).tolist() == [1, 2]
    found = tokens_of(iter([text(0, 6), "", text(6, 9)]), tokenizer)
    assert found.tolist() == [*range(6), *[40] * 4, *range(6, 9)]
    assert found.dtype == torch.long


def test_a_text_longer_than_the_model_takes_is_no_cause_for_a_warning(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokens_of(text(0, 13), tokenizer)
    assert not caplog.records
    tokenizer(text(0, 13))
    assert caplog.records  # which is where the warning would have been


def test_the_first_windows_lie_side_by_side(tokenizer: Any) -> None:
    found = samples_of(text(0, 40), tokenizer, 3, 12)
    assert found.flatten().tolist() == list(range(36))
    assert found.shape == (3, 12)


def test_random_windows_are_runs_of_the_text_and_depend_on_the_seed(tokenizer: Any) -> None:
    found = samples_of(text(0, 40), tokenizer, 200, 12, seed=2)
    starts = found[:, 0]
    assert torch.equal(found, starts[:, None] + torch.arange(12))
    assert set(starts.tolist()) == set(range(29))  # the first and the last window are among them
    assert torch.equal(found, samples_of(text(0, 40), tokenizer, 200, 12, seed=2))
    assert not torch.equal(found, samples_of(text(0, 40), tokenizer, 200, 12, seed=3))


@pytest.mark.parametrize(
    ("count", "length", "seed", "message"),
    [
        (4, 11, None, "has 40 tokens, but 4 x 11 = 44 are needed"),
        (4, 41, 0, "has 40 tokens, but 1 x 41 = 41 are needed"),
        (0, 4, None, "0 samples of 4"),
        (4, 0, 0, "4 samples of 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    tokenizer: Any, count: int, length: int, seed: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        samples_of(text(0, 40), tokenizer, count, length, seed)


def test_what_is_no_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="text 1 is NoneType"):
        tokens_of(["w1", None], tokenizer)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("kind", "positions"), [("gpt2", 64), ("opt", 64), ("roberta", 68), ("bart", 64)]
)
def test_samples_longer_than_a_table_of_positions_are_refused(kind: str, positions: int) -> None:
    model = tiny(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = ApiQConfig(group_size=32, r=4)
    with pytest.raises(ValueError, match=f"{positions + 1} tokens.* {positions} positions"):
        quantize(model, tokens(1, positions + 1), config, preset("fast"), show_progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    quantize(model, tokens(1, positions), config, preset("fast"), show_progress=False)
