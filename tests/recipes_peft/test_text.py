"""Texts are packed into windows, every token predicted once, and nothing is read needlessly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes_peft import assets, tiny
from recipes_peft.data import Encoded, Example, encode
from recipes_peft.errors import UserError
from recipes_peft.text import read, rows, samples, windows

TOKENIZER = tiny.tokenizer()


def texts() -> list[Example]:
    return [Example("ab", " cd", "1", raw=True), Example("ask", "say", "2"), Example("", "x", "3")]


def test_windows_lie_side_by_side_and_the_rest_is_dropped() -> None:
    whole = "ab cd\n\nask\nsay\n\n\nx\n\n"
    found = list(windows(texts(), TOKENIZER, 8))
    assert [len(row.prompt) for row in found] == [1, 1]
    assert "".join(TOKENIZER.decode(row.prompt + row.answer) for row in found) == whole[:16]
    assert list(windows(texts(), TOKENIZER, len(whole) + 1)) == []


def test_a_window_begins_as_the_tokenizer_begins_a_text() -> None:
    class Beginning:
        bos_token_id = 256

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            found = TOKENIZER(text)
            found["input_ids"] = [256] * add_special_tokens + found["input_ids"]
            return found

    found = list(windows(texts(), Beginning(), 8))
    assert [row.prompt for row in found] == [[256], [256]]
    assert "".join(TOKENIZER.decode(row.answer) for row in found) == "ab cd\n\nask\nsay"


def test_windows_are_made_as_they_are_taken() -> None:
    def endless() -> Iterator[Example]:
        while True:
            yield Example("", "text", "1", raw=True)

    assert len(list(islice(rows(endless(), TOKENIZER, 16, packed=True), 5))) == 5


def test_rows_that_are_not_packed_are_encoded_one_by_one() -> None:
    found = list(rows(texts(), TOKENIZER, 16, packed=False))
    assert found == [encode(example, TOKENIZER, 16) for example in texts()]


def test_samples_are_cut_from_rows_laid_end_to_end() -> None:
    found = samples([Encoded([1], [2, 3]), Encoded([4, 5], [6]), Encoded([7], [])], 3, 2)
    assert torch.equal(found, torch.tensor([[1, 2], [3, 4], [5, 6]]))
    with pytest.raises(UserError, match="has 3 tokens, but 2 samples of 2 need 4"):
        samples([Encoded([1], [2, 3])], 2, 2)


def test_a_set_of_its_own_to_test_on_is_not_trained_on(tmp_path: Path) -> None:
    for name in ("train", "test"):
        made = [{"prompt": f"{name} {i}", "answer": "b"} for i in range(8)]
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    train, test = str(tmp_path / "train.json"), str(tmp_path / "test.json")
    learnt, held_out = read(train, test, 3, 0, packed=False, instruction="Do.")
    assert [e.prompt for e in learnt] == [f"train {i}" for i in range(8)]
    assert [e.prompt for e in held_out] == ["test 0", "test 1", "test 2"]
    assert {e.instruction for e in learnt} == {"Do."}
    learnt, held_out = read(train, None, 2, 0, packed=False)
    assert (len(learnt), len(held_out)) == (6, 2)
    assert not {e.prompt for e in learnt} & {e.prompt for e in held_out}


def test_names_stand_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "boolq.jsonl"
    made = [{"passage": f"T{i} -- Text.", "question": "is it", "label": True} for i in range(8)]
    file.write_text("\n".join(map(json.dumps, made)))
    monkeypatch.setattr(assets, "fetch", lambda name: file)
    text, _ = read("boolq", None, 2, 0, packed=True)
    assert text[0].answer.endswith("-- Text.")
    asked, _ = read("boolq", None, 2, 0, packed=False, instruction="Say.")
    assert (asked[0].answer, asked[0].instruction) == ("yes", "Say.")
    assert len(read("tiny", "tiny", 5, 0, packed=True)[1]) == 5
