"""Translation directions around one language: their text, one vocabulary, and batches of one task.

A task is a direction, written "en-fr". A row is a pair of sentences as tokens: the source begins
with the tag of its language, the target with its own, and both end with the end token.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from selection import sampling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes_peft import parallel
from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair

__all__ = ["Parts", "Row", "Task", "collate", "encode", "make_tokenizer", "parts", "stream", "tag"]

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # 0 to 3, as M2M-100 has them


@dataclass(frozen=True)
class Task:
    """A translation direction; `hub` is the language that all directions have on one side."""

    source: str
    target: str
    hub: str

    @property
    def name(self) -> str:
        return f"{self.source}-{self.target}"

    @property
    def kind(self) -> str:
        """Give "from" the hub, or "to" the hub."""
        return "from" if self.source == self.hub else "to"

    @property
    def language(self) -> str:
        """Give the side that is not the hub."""
        return self.target if self.kind == "from" else self.source


class Row(NamedTuple):
    source: list[int]
    target: list[int]
    pair: Pair


@dataclass(frozen=True)
class Parts:
    """The pairs of every task: to train on, to count and validate on, and to test on."""

    train: Mapping[Task, list[Pair]]
    valid: Mapping[Task, list[Pair]]
    test: Mapping[Task, list[Pair]]


def parts(
    hub: str,
    languages: Sequence[str],
    data: str,
    valid_data: str | None,
    test_data: str | None,
    valid_rows: int,
    test_rows: int,
    seed: int,
) -> Parts:
    """Read the pairs of the hub and each language, in both directions.

    Without data of their own, test and validation are whole documents, the same in all languages,
    of about so many pairs for each. What is tested stands in no training pair of its direction.
    `{source}` and `{target}` in the name of a file stand for the hub and the language.

    Raises:
        UserError: text cannot be read, or a language has too few pairs.
    """
    tasks = [Task(hub, language, hub) for language in languages]
    train, count = _read(data, tasks), len(languages)
    held = {}
    for name, own, rows in (("test", test_data, test_rows), ("valid", valid_data, valid_rows)):
        if own is None:
            train, held[name] = parallel.split_by_document(train, rows * count, seed)
        else:
            held[name] = _read(own, tasks)
            random.Random(seed).shuffle(held[name])
    test = _by_task(held["test"], tasks, test_rows)
    return Parts(
        _without(_by_task(train, tasks, None), test),
        _by_task(held["valid"], tasks, valid_rows),
        test,
    )


def _read(where: str, tasks: Iterable[Task]) -> list[Pair]:
    return [
        pair
        for task in tasks
        for pair in parallel.read(
            where.replace("{source}", task.source).replace("{target}", task.target),
            task.source,
            task.target,
        )
    ]


def _by_task(
    pairs: Iterable[Pair], out: Sequence[Task], most: int | None
) -> dict[Task, list[Pair]]:
    """Give the pairs of both directions, at most so many of each."""
    back = [Task(task.target, task.source, task.hub) for task in out]
    found: dict[Task, list[Pair]] = {task: [] for task in (*out, *back)}
    for pair in pairs:
        hub, language = pair.source_language, pair.target_language
        there, here = Task(hub, language, hub), Task(language, hub, hub)
        if most is None or len(found[there]) < most:
            found[there].append(pair)
            found[here].append(Pair(pair.target, pair.source, language, hub, pair.document))
    if empty := [task.name for task, rows in found.items() if not rows]:
        raise UserError(f"there are no pairs for {empty[0]} in one part of the data; give more")
    return found


def _without(
    train: dict[Task, list[Pair]], test: Mapping[Task, list[Pair]]
) -> dict[Task, list[Pair]]:
    """Leave out training pairs one side of which is tested in that direction word for word."""
    kept = {}
    for task, pairs in train.items():
        seen = {text for pair in test[task] for text in (pair.source, pair.target)}
        kept[task] = [p for p in pairs if p.source not in seen and p.target not in seen]
    return kept


def tag(language: str) -> str:
    """Give the token that names a language, as in the vocabulary of M2M-100."""
    return f"__{language}__"


def make_tokenizer(
    texts: Iterable[str], languages: Sequence[str], size: int
) -> PreTrainedTokenizerFast:
    """Train one vocabulary of byte-pair encoding for all languages, with a tag for each."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = [*_SPECIAL, *map(tag, languages)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def tag_id(language: str, tokenizer: Any) -> int:
    """Give the id of a language's tag: M2M-100's form, or the bare name, as NLLB has it.

    Raises:
        UserError: the vocabulary has neither.
    """
    for word in (tag(language), language):
        found = tokenizer.convert_tokens_to_ids(word)
        if found is not None and found != tokenizer.unk_token_id:
            return found
    raise UserError(
        f"the vocabulary has no tag for {language!r}, neither {tag(language)} nor {language}; name"
        " languages as the model does"
    )


def encode(
    pairs: Mapping[Task, list[Pair]], tokenizer: Any, max_length: int
) -> dict[Task, list[Row]]:
    """Give rows of tokens; pairs with a side longer than `max_length` tokens are left out.

    Raises:
        UserError: nothing is left of a task.
    """
    rows = {}
    for task, found in pairs.items():
        first = [tag_id(task.source, tokenizer), tag_id(task.target, tokenizer)]
        sides = [
            tokenizer(texts, add_special_tokens=False).input_ids
            for texts in ([p.source for p in found], [p.target for p in found])
        ]
        rows[task] = [
            Row(
                [first[0], *left, tokenizer.eos_token_id],
                [first[1], *right, tokenizer.eos_token_id],
                pair,
            )
            for left, right, pair in zip(*sides, found, strict=True)
            if max(len(left), len(right)) + 2 <= max_length
        ]
        if not rows[task]:
            raise UserError(
                f"{task.name} has no pair of {max_length} tokens a side; raise max_length"
            )
    return rows


def collate(rows: Sequence[Row], pad: int, start: int) -> dict[str, Tensor]:
    """Make a batch; the tag of the target is given to the decoder and not learnt.

    Shapes:
        input_ids, attention_mask: (rows, longest source). decoder_input_ids,
        decoder_attention_mask, labels: (rows, longest target); labels are -100 where not learnt.
    """

    def padded(sides: Sequence[list[int]], filler: int) -> Tensor:
        width = max(map(len, sides))
        return torch.tensor([side + [filler] * (width - len(side)) for side in sides])

    sources, targets = [row.source for row in rows], [row.target for row in rows]
    return {
        "input_ids": padded(sources, pad),
        "attention_mask": padded([[1] * len(side) for side in sources], 0),
        "decoder_input_ids": padded([[start, *side[:-1]] for side in targets], pad),
        "decoder_attention_mask": padded([[1] * len(side) for side in targets], 0),
        "labels": padded([[-100, *side[1:]] for side in targets], -100),
    }


def stream(
    rows: Mapping[Task, Sequence[Row]], tokens: int, temperature: float, seed: int
) -> Iterator[tuple[Task, list[Row]]]:
    """Give batches of one task each, without end: tasks at their shares, their rows reshuffled.

    A batch has at most `tokens` tokens of the longer side with padding, or one row.
    """
    draw = random.Random(seed)
    tasks = list(rows)
    shares = sampling([len(rows[task]) for task in tasks], temperature)
    waiting: dict[Task, list[list[Row]]] = {task: [] for task in tasks}
    while True:
        (task,) = draw.choices(tasks, shares)
        if not waiting[task]:
            order = draw.sample(list(rows[task]), len(rows[task]))
            waiting[task] = cut(order, tokens)
            draw.shuffle(waiting[task])
        yield task, waiting[task].pop()


def cut(rows: Iterable[Row], tokens: int) -> list[list[Row]]:
    """Cut rows into batches of about the same length, of at most `tokens` tokens with padding."""
    batches: list[list[Row]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: max(len(row.source), len(row.target))):
        longest = max(len(row.source), len(row.target))
        if not batches or longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches
