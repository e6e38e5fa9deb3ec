"""Prompts and rows of translation, greedy batches, and scores."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recipes_peft import tiny, translation
from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair
from recipes_peft.translation import comet, encode, prompt, score, translate

PAIR = Pair("Guten Tag", "Good day", "de", "en", "d")


def test_a_prompt_names_the_languages() -> None:
    assert prompt(PAIR) == "German: Guten Tag\nEnglish:"
    assert prompt("Guten Tag", "de", "en") == prompt(PAIR)
    assert prompt(PAIR, target_language="transliteration").endswith("\nTransliteration:")


def test_the_loss_counts_the_translation_and_its_end() -> None:
    tokenizer = tiny.tokenizer()
    row = encode(PAIR, tokenizer, 100)
    assert tokenizer.decode(row.prompt) == prompt(PAIR)
    assert tokenizer.decode(row.answer) == " Good day<end>"
    short = encode(PAIR, tokenizer, 20)
    assert len(short.prompt) + len(short.answer) == 20
    assert prompt(PAIR).endswith(tokenizer.decode(short.prompt))


def test_a_batch_translates_as_each_alone() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    sources: list[Pair | str] = ["a", "a longer sentence", PAIR, "bb"]
    options: dict[str, Any] = {"max_new_tokens": 5}
    together = translate(model, tokenizer, sources, "de", "en", batch_size=3, **options)
    alone = [
        translate(model, tokenizer, [s], "de", "en", batch_size=1, **options)[0] for s in sources
    ]
    assert together == alone


def test_the_first_line_counts_and_no_mark_of_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["Good day\nGerman: more ...", "Good ...", ""]
    monkeypatch.setattr(translation.loop, "generate", lambda *_: said)
    found = translate(None, tiny.tokenizer(), ["x"] * 3, "de", "en", batch_size=1, max_new_tokens=1)
    assert found == ["Good day", "Good", ""]


def test_scores_have_signatures_and_agree_with_known_values() -> None:
    same = score(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert (same.chrf, round(same.bleu, 6)) == (100, 100)
    assert "nw:2" in same.chrf_signature
    assert "tok:13a" in same.bleu_signature
    # 5 of 6 words, 4 of 5 pairs, 3 of 4 triples, 2 of 3 fours
    near = score(["the cat sat on the rug"], ["the cat sat on the mat"])
    assert near.bleu == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert 0 < near.chrf < 100
    assert "tok:char" in score(["a"], ["a"], tokenize="char").bleu_signature


def test_what_cannot_be_scored_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 translations and 2 references"):
        score(["a"], ["a", "b"])
    with pytest.raises(UserError, match="at least one"):
        score([], [])
    monkeypatch.setattr(translation, "SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"flores200 needs .*is not downloaded"):
        score(["a"], ["a"], tokenize="flores200")


def test_comet_reads_a_local_file_as_weights_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "model.ckpt"
    seen: dict[str, Any] = {}

    def load(path: str, local_files_only: bool) -> Any:
        if seen.get("broken"):
            raise ValueError("Weights only load failed")
        seen["forced"] = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        return SimpleNamespace(predict=lambda rows, **_: {"system_score": len(rows) / 4})

    fake = ModuleType("comet")
    fake.load_from_checkpoint = load  # type: ignore[attr-defined]
    monkeypatch.setattr(translation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package unbabel-comet"):
        comet(file, ["s"], ["h"], ["r"])
    monkeypatch.setattr(translation, "find_spec", lambda name: fake)
    monkeypatch.setitem(sys.modules, "comet", fake)
    with pytest.raises(UserError, match="there is no checkpoint"):
        comet(file, ["s"], ["h"], ["r"])
    file.write_bytes(b"")
    assert comet(file, ["s"], ["h"], ["r"]) == 0.25
    assert seen["forced"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    seen["broken"] = True
    with pytest.raises(UserError, match="Weights only load failed"):
        comet(file, ["s"], ["h"], ["r"])
