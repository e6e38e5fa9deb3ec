"""Two segments as one sequence of tokens, each tokenised once however many cells it stands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch

from recipes_peft import loop
from recipes_peft.errors import UserError

__all__ = ["Joined", "Segments", "Text", "outputs", "padded"]

KEPT = 2**15  # segments whose tokens are remembered


class Text(NamedTuple):
    """Tokens of a segment, and the characters that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Joined(NamedTuple):
    """Token ids, the numbers of their segments, and where segment b begins."""

    ids: list[int]
    types: list[int]
    second: int


class Segments:
    """Tokenises segments and joins two of them as the tokenizer itself would."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        probe = tokenizer(["a"], ["b"], return_token_type_ids=True)
        ids, types = probe.input_ids[0], probe.token_type_ids[0]
        # The ids around and between the segments: groups of None, 0, None, 1, None.
        places = [
            list(found) for _, found in groupby(range(len(ids)), probe.sequence_ids(0).__getitem__)
        ]
        if len(places) != 5:
            raise UserError(
                "the model's tokenizer joins two texts without tokens of its own before, between"
                " and after them; give an encoder such as BERT or XLM-R with --model"
            )
        self.around = [[ids[i] for i in places[part]] for part in (0, 2, 4)]
        self.types = [types[places[part][0]] for part in range(5)]
        self.room = max_length - sum(map(len, self.around))
        self.text = lru_cache(KEPT)(self._text)

    def _text(self, text: str) -> Text:
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return Text(found.input_ids, [(int(a), int(b)) for a, b in found.offset_mapping])

    def joined(self, a: Sequence[int], b: Sequence[int]) -> Joined:
        """Join two segments, which fit."""
        start, between, end = self.around
        parts = [start, a, between, b, end]
        types = [t for part, t in zip(parts, self.types, strict=True) for _ in part]
        ids = [token for part in parts for token in part]
        return Joined(ids, types, len(start) + len(a) + len(between))

    def pair(self, first: str, second: str) -> Joined:
        """Join two texts; where they are too long, the longer one loses its end."""
        a, b = self.text(first).ids, self.text(second).ids
        half = self.room // 2
        most_a = max(half, self.room - len(b))
        return self.joined(a[:most_a], b[: max(self.room - half, self.room - len(a))])


def padded(rows: Sequence[Joined], pad: int, with_types: bool) -> dict[str, torch.Tensor]:
    """Make a batch, padded on the right.

    Shapes:
        input_ids, attention_mask and perhaps token_type_ids: (rows, longest row).
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        types[i, : len(row.ids)] = torch.tensor(row.types)
        mask[i, : len(row.ids)] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, "token_type_ids": types} if with_types else batch


@torch.no_grad()
def outputs(
    model: Any,
    rows: Sequence[Joined],
    names: Sequence[str],
    batch_size: int,
    join: Callable[[Sequence[Joined]], Mapping[str, torch.Tensor]],
    take: Callable[[int, str, Any, int], None],
) -> None:
    """Run the model on rows of about the same length at a time, and hand out what it gives.

    With several names each row is in the batch once for each, with the adapter of that name: one
    batch for all of them. `take(row, name, output, place)` is called for each, `place` being that
    in the output.
    """
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    size = max(1, batch_size // len(names))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = loop.to(dict(join([rows[i] for i in chosen])), model.device)
        if len(names) > 1:
            batch = {k: v.repeat(len(names), 1) for k, v in batch.items()}
            batch["adapter_names"] = [name for name in names for _ in chosen]
        output = model(**batch)
        for n, name in enumerate(names):
            for place, i in enumerate(chosen):
                take(i, name, output, n * len(chosen) + place)
