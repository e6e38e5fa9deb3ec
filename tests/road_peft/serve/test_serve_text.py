"""Text in pieces: characters stay whole, and stop strings are found wherever the pieces part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from road_peft.serve.text import Detokeniser, StopStrings, decode
from tests.road_peft.serve._server import build_tokenizer

TOKENIZER = build_tokenizer()
SPECIAL = [TOKENIZER.bos_token_id, TOKENIZER.eos_token_id]


def _pieces(ids: list[int], step: int = 1) -> list[str]:
    words = Detokeniser(TOKENIZER)
    ends = [*range(step, len(ids), step), len(ids)]
    return [words.feed(ids[:end], last=end == len(ids)) for end in ends]


@pytest.mark.parametrize("text", ["größer", "東京 🙂🙂!", "a\u0301é", " lead and trail ", "🏳️‍🌈"])
def test_no_character_is_split(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    pieces = _pieces(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > 1


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=30), st.integers(1, 4))
def test_the_pieces_make_the_text_of_all_tokens(ids: list[int], step: int) -> None:
    assert "".join(_pieces(ids, step)) == decode(TOKENIZER, ids)


def test_special_tokens_give_no_text() -> None:
    ids = [*SPECIAL, *TOKENIZER("fox").input_ids, *SPECIAL]
    assert "".join(_pieces(ids)) == "fox"


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_a_stop_string_is_found_wherever_the_pieces_part(
    text: str, stops: list[str], size: int
) -> None:
    parts = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    finder, shown, ended = StopStrings(stops), "", False
    for number, part in enumerate(parts, 1):
        more, ended = finder.feed(part, last=number == len(parts))
        shown += more
        if ended:
            break
    assert ended == any(stop in text for stop in stops)
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(found)[1]] if found else text)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    finder = StopStrings(["\n\n", "END"])
    assert finder.feed("one\n") == ("one", False)
    assert finder.feed("two E") == ("\ntwo ", False)
    assert finder.feed("N") == ("", False)
    assert finder.feed("T") == ("ENT", False)
    assert finder.feed("EN", last=True) == ("EN", False)
