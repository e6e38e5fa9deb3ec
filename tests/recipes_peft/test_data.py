"""Reading, splitting and batching of text; the loss of a batch against one computed row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from recipes_peft import tiny
from recipes_peft.data import (
    Encoded,
    Example,
    batches,
    collate,
    encode,
    paragraph_titles,
    read,
    split,
)
from recipes_peft.errors import UserError


def test_json_lines_and_lists_of_both_kinds_of_fields(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": "b"},
        {"instruction": "do", "input": "", "output": "c", "answer": "label"},
        {"instruction": "do", "input": "this", "output": "d"},
    ]
    wanted = [
        Example("a", "b", "a"),
        Example("do", "c", "do", label="label"),
        Example("this", "d", "this", instruction="do"),
    ]
    lines, whole = tmp_path / "x.jsonl", tmp_path / "x.json"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    whole.write_text(json.dumps(rows))
    assert read(lines) == wanted
    assert read(whole) == wanted


def test_worked_answers_end_in_words_and_keep_their_result(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(
        json.dumps({"question": "6 * 12?", "answer": "It is <<6*12=72>>72.\n#### 72"})
        + "\n"
        + json.dumps({"question": "why?", "answer": "because"})
    )
    worked, plain = read(file, "Think.")
    assert worked.answer == "It is <<6*12=72>>72.\nThe final answer is: 72"
    assert (worked.prompt, worked.label, worked.instruction) == ("6 * 12?", "72", "Think.")
    assert (plain.answer, plain.label) == ("because", "")


def test_an_instruction_is_for_those_without(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    own = {"instruction": "do", "input": "this", "output": "d"}
    file.write_text(json.dumps([own, {"prompt": "a", "answer": "b"}]))
    assert [e.instruction for e in read(file, "Else.")] == ["do", "Else."]


def test_plain_text_is_continued_from_the_middle_of_a_paragraph(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("one two\nthree four\n\nlonely\n\n five six ")
    first, second = read(file)
    assert (first.prompt, first.answer, first.raw) == ("one two", " three four", True)
    assert (second.prompt, second.answer) == ("five", " six")


GOOD = '{"prompt": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b"", "x.jsonl is empty"),
        ("x.jsonl", b"\n \n", "x.jsonl is empty"),
        ("x.json", b"", "x.json is empty"),
        ("x.json", b"{}", "x.json holds no list"),
        ("x.txt", b"word", "x.txt holds no paragraph"),
        ("x.jsonl", GOOD.encode() + b"{oops\n", "x.jsonl, line 2 is not JSON"),
        ("x.jsonl", GOOD.encode() + b'\n{"prompt": "a"}\n', "x.jsonl, line 3 lacks"),
        ("x.jsonl", b'{"prompt": "a", "answer": 3}\n', "line 1 lacks a prompt or an answer"),
        ("x.jsonl", b'{"instruction": "a", "answer": "b"}\n', "line 1 lacks a prompt or an answer"),
        ("x.json", b"[1]", "x.json, row 1 lacks"),
        ("x.txt", b"\xff\xfe\x00", "is not text in UTF-8"),
    ],
)
def test_a_bad_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_what_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot read the data"):
        read(tmp_path / name)


def test_titles_need_the_title_in_the_first_sentences(tmp_path: Path) -> None:
    body = (
        "The tea plant is an evergreen shrub whose leaves are used to make tea. "
        + "It grows. " * 40
    )
    passages = [
        f"Tea plant (botany) -- {body}",
        f"Coffee -- {body}",
        "Short -- Short.",
        f"Tea plant -- {body}",
    ]
    file = tmp_path / "boolq.jsonl"
    file.write_text("".join(json.dumps({"passage": p, "question": "q"}) + "\n" for p in passages))
    (only,) = paragraph_titles(file, "Name it.")
    assert (only.answer, only.group, only.instruction) == ("Tea plant", "Tea plant", "Name it.")
    assert only.prompt.startswith("The tea plant is an evergreen shrub")
    assert len(only.prompt) <= 241
    assert only.prompt.endswith(".")


def test_no_group_stands_on_both_sides_and_the_held_out_set_does_not_depend_on_the_seed() -> None:
    rows = [Example(f"p{i}", "a", group=str(i // 3)) for i in range(60)]
    train, held_out = split(rows, 10, seed=0)
    again, same = split(rows, 10, seed=1)
    assert len(held_out) == 10
    assert held_out == same
    assert train != again
    assert set(train) == set(again)
    assert not {e.group for e in train} & {e.group for e in held_out}


def test_at_most_a_quarter_is_held_out_and_one_group_is_too_few() -> None:
    train, held_out = split([Example(str(i), "a", str(i)) for i in range(8)], 100, seed=0)
    assert (len(train), len(held_out)) == (6, 2)
    for rows in ([Example("p", "a", "g")] * 8, [Example(str(i), "a", str(i)) for i in range(3)]):
        with pytest.raises(UserError, match="too few"):
            split(rows, 2, seed=0)


def test_templates() -> None:
    tokenizer = tiny.tokenizer()
    example = Example("text", "reply", "g", instruction="Do it.")

    def prompt(example: Example) -> str:
        return tokenizer.decode(encode(example, tokenizer, 200).prompt)

    assert prompt(example) == "Do it.\n\ntext\n\n### Response:\n"
    assert prompt(Example("text", " more", "g", raw=True)) == "text"
    assert tokenizer.decode(encode(example, tokenizer, 200).answer) == "reply<end>"
    tokenizer.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}"
    assert prompt(example) == "<system>Do it.<user>text"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{m.role}}>{{m.content}}{% endfor %}"
    )
    assert prompt(example) == "<user>Do it.\n\ntext"


def test_long_rows_keep_the_end_of_the_prompt_and_the_start_of_the_answer() -> None:
    tokenizer = tiny.tokenizer()
    row = encode(Example("abcdef", "xyz", "g", raw=True), tokenizer, 6)
    assert tokenizer.decode(row.prompt) == "ef"
    row = encode(Example("abcdef", "uvwxyz", "g", raw=True), tokenizer, 4)
    assert (tokenizer.decode(row.prompt), tokenizer.decode(row.answer)) == ("f", "uvw")


def test_the_loss_of_a_batch_counts_every_answer_token_once_and_nothing_else() -> None:
    model = tiny.model().eval()
    rows = [Encoded([1, 2, 3, 4], [5, 6]), Encoded([7], [8]), Encoded([9, 10], [11, 12, 13])]
    total = torch.zeros(())
    for prompt, answer in rows:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        predicted = logits[len(prompt) - 1 : -1]
        total = total + F.cross_entropy(predicted, torch.tensor(answer), reduction="sum")
    batch = collate(rows, pad=256)
    torch.testing.assert_close(model(**batch).loss, total / 6)
    assert batch["logits_to_keep"] == 4
    assert batch["labels"].shape == (3, 4)


def test_batches_hold_every_row_once() -> None:
    rows = [Encoded([i] * (1 + i % 5), [i]) for i in range(7)]
    seen = [b["labels"][:, -1].tolist() for b in batches(rows, 3, pad=256)]
    assert [len(part) for part in seen] == [3, 3, 1]
    assert sorted(last for part in seen for last in part) == list(range(7))
