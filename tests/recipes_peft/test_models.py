"""Loading by name or folder; what cannot be loaded is a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes_peft import tiny
from recipes_peft.errors import UserError
from recipes_peft.models import NAMES, linear_layers, load, target_modules


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path / "cache"))


def test_the_tiny_model_by_name_and_by_folder(tmp_path: Path) -> None:
    named, tokenizer = load("tiny")
    tiny.save(tmp_path / "own")
    own, _ = load(str(tmp_path / "own"))
    assert not named.training
    assert tokenizer.pad_token is not None
    for a, b in zip(named.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)
    assert load("tiny", "bfloat16")[0].dtype == torch.bfloat16


def test_byte_tokens_give_back_any_text() -> None:
    tokenizer = tiny.tokenizer()
    text = "Grüße, 世界\n <x>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_toy_examples_are_distinct() -> None:
    assert len(set(tiny.examples(100))) == 100


def test_linear_layers_are_listed_with_their_outputs() -> None:
    assert linear_layers(tiny.model()) == (
        "down_proj (64), gate_proj (128), k_proj (64), lm_head (257), o_proj (64), q_proj (64),"
        " up_proj (128), v_proj (64)"
    )


@pytest.mark.parametrize("what", ["nobody/nothing", "no such thing!", "empty", "torn"])
def test_what_is_no_model_is_a_sentence(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    tiny.save(tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\0" * 20)
    place = str(tmp_path / what) if (tmp_path / what).exists() else what
    with pytest.raises(UserError, match="cannot load the model ") as caught:
        load(place)
    assert all(name in str(caught.value) for name in NAMES)


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(UserError, match="choose float32, bfloat16 or float16"):
        load("tiny", "float8")


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (None, None),
        (["q_proj"], ["q_proj"]),
        (["self_attn.q_proj", "v_proj"], ["self_attn.q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*\.q_proj"], r".*\.q_proj"),
    ],
)
def test_target_modules(words: list[str] | None, given: list[str] | str | None) -> None:
    assert target_modules(words) == given
