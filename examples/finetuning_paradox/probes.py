"""Abilities of a translation model, measured in between the steps of its training.

Each has a likelihood form, which needs no decoding; translation and register have a form that
generates as well. A probe is a function of the model, made once from its data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from formality import REGISTERS, Contrast, labels
from likelihood import row_losses
from literalness import contextual_hit, crossing_rate, dictionary_links, unaligned_share
from retention import Figure
from sacrebleu.metrics import CHRF

from recipes_peft import loop, translation
from recipes_peft.data import Encoded
from recipes_peft.parallel import Pair

Probe = Callable[[Any], Figure]


class Maker:
    """Makes probes for one model family: its tokenizer, and how many rows fit in memory."""

    def __init__(self, tokenizer: Any, batch_size: int, max_length: int) -> None:
        """Keep what all probes share; prompts that are too long lose their beginning."""
        self.tokenizer, self.batch_size, self.max_length = tokenizer, batch_size, max_length

    def losses(self, model: Any, rows: Sequence[Encoded]) -> list[float]:
        """Give the loss of each row."""
        return row_losses(model, rows, self.batch_size, self.tokenizer.pad_token_id)

    def row(self, prompt: str, answer: str) -> Encoded:
        """Encode a prompt and what is to follow it; no end of text is asked for."""
        first = self.tokenizer(prompt).input_ids
        then = self.tokenizer(answer, add_special_tokens=False).input_ids
        return Encoded(first[-max(1, self.max_length - len(then)) :], then)

    def pair(self, pair: Pair) -> Encoded:
        """Encode a pair to learn: its translation and an end."""
        return translation.encode(pair, self.tokenizer, self.max_length)

    def other_format(self, pair: Pair) -> Encoded:
        """Encode a pair to learn in a format that no probe has."""
        end = self.tokenizer.eos_token
        return self.row(f"{pair.source} =", f" {pair.target}{end}")

    def running(self, text: str) -> Encoded:
        """Encode running text to learn, all of it but the first token."""
        ids = self.tokenizer(text).input_ids[: self.max_length]
        return Encoded(ids[:1], ids[1:])

    def translation(self, pairs: Sequence[Pair]) -> Probe:
        """Loss of translations in nats per character of the target, without examples."""
        rows = [self.row(translation.prompt(p), " " + p.target) for p in pairs]
        sizes, groups = _characters(pairs), [p.document for p in pairs]
        return lambda model: Figure(self.losses(model, rows), sizes, groups)

    def few_shot(self, pairs: Sequence[Pair], examples: Sequence[Pair]) -> Probe:
        """What examples of the same domain lower the loss by, in nats per character (G_k)."""
        bare = [self.row(translation.prompt(p), " " + p.target) for p in pairs]
        shown = [self.row(_with_examples(examples, p), " " + p.target) for p in pairs]
        return self._difference(pairs, bare, shown)

    def context(self, pairs: Sequence[Pair], sentences: int, items: int) -> Probe:
        """What the sentences before, with their translation, lower the loss by (C).

        Pairs stand in the order of their documents; the first `items` with enough before count.
        """
        kept, bare, shown = [], [], []
        for i, pair in enumerate(pairs):
            before = pairs[max(0, i - sentences) : i]
            if (
                len(kept) < items
                and len(before) == sentences
                and all(p.document == pair.document for p in before)
            ):
                kept.append(pair)
                bare.append(self.row(translation.prompt(pair), " " + pair.target))
                passage = Pair(
                    " ".join(p.source for p in (*before, pair)),
                    "",
                    pair.source_language,
                    pair.target_language,
                    pair.document,
                )
                prompt = " ".join([translation.prompt(passage), *(p.target for p in before)])
                shown.append(self.row(prompt, " " + pair.target))
        return self._difference(kept, bare, shown)

    def steerability(
        self, rows: Sequence[Contrast], examples: Sequence[Contrast], languages: tuple[str, str]
    ) -> Probe:
        """How far examples of a register move the preference for it (Steer), in nats.

        d is log p(formal) - log p(informal); the figure is the mean of d after formal examples
        minus d after informal ones.
        """
        scored = [
            self.row(_register_prompt(row, examples, shown, languages), " " + row.reference(asked))
            for row in rows
            for shown in REGISTERS
            for asked in REGISTERS
        ]

        def probe(model: Any) -> Figure:
            losses = self.losses(model, scored)
            steps = range(0, len(losses), 4)
            moved = [(losses[i + 1] - losses[i]) - (losses[i + 3] - losses[i + 2]) for i in steps]
            return Figure(moved, [1.0] * len(moved), [row.domain + row.source for row in rows])

        return probe

    def language(self, texts: Sequence[str]) -> Probe:
        """Bits per character of running text, but for its first token."""
        rows = [self.running(text) for text in texts]
        sizes = [float(len(self.tokenizer.decode(row.answer))) for row in rows]

        def probe(model: Any) -> Figure:
            bits = [loss / math.log(2) for loss in self.losses(model, rows)]
            return Figure(bits, sizes, list(texts))

        return probe

    def chrf(self, pairs: Sequence[Pair], max_new_tokens: int) -> Probe:
        """chrF++ of greedy translations, the mean of the sentences."""
        metric, groups = CHRF(word_order=2), [p.document for p in pairs]

        def probe(model: Any) -> Figure:
            written = self._translations(model, pairs, max_new_tokens)
            scores = [
                metric.sentence_score(text, [pair.target]).score
                for text, pair in zip(written, pairs, strict=True)
            ]
            return Figure(scores, [1.0] * len(scores), groups)

        return probe

    def register(
        self,
        rows: Sequence[Contrast],
        examples: Sequence[Contrast],
        languages: tuple[str, str],
        max_new_tokens: int,
    ) -> Probe:
        """Matched accuracy of translations after examples of each register, both together.

        Only translations that match one register count; `Figure.denominators` tells which.
        """
        asked = [register for register in REGISTERS for _ in rows]
        prompts = [
            self.row(_register_prompt(row, examples, register, languages), "")
            for register in REGISTERS
            for row in rows
        ]

        def probe(model: Any) -> Figure:
            written = self._written(model, prompts, max_new_tokens)
            found = labels(written, [*rows, *rows], languages[1])
            return Figure(
                [float(label == register) for label, register in zip(found, asked, strict=True)],
                [float(label in REGISTERS) for label in found],
                [row.domain + row.source for row in rows] * 2,
            )

        return probe

    def pronouns(
        self, pairs: Sequence[Pair], expected: Sequence[str], max_new_tokens: int
    ) -> Probe:
        """Contextual accuracy: the word that the sentences before ask for is in the last one."""

        def probe(model: Any) -> Figure:
            written = self._translations(model, pairs, max_new_tokens)
            hits = [float(contextual_hit(*each)) for each in zip(written, expected, strict=True)]
            return Figure(hits, [1.0] * len(hits), [p.document for p in pairs])

        return probe

    def freedom(
        self,
        pairs: Sequence[Pair],
        dictionary: Mapping[str, Collection[str]],
        max_new_tokens: int,
    ) -> dict[str, Probe]:
        """How free translations are: source words without a link (USW), links that cross (NM).

        Links are those of a dictionary, the same for all systems.
        """

        def probe(model: Any, crossing: bool) -> Figure:
            values = []
            written = self._translations(model, pairs, max_new_tokens)
            for pair, text in zip(pairs, written, strict=True):
                words = pair.source.split()
                links = dictionary_links(words, text.split(), dictionary)
                values.append(
                    crossing_rate(links) if crossing else unaligned_share(links, len(words))
                )
            return Figure(values, [1.0] * len(values), [p.document for p in pairs])

        return {
            "unaligned": lambda model: probe(model, crossing=False),
            "crossing": lambda model: probe(model, crossing=True),
        }

    def _translations(self, model: Any, pairs: Sequence[Pair], max_new_tokens: int) -> list[str]:
        rows = [self.row(translation.prompt(pair), "") for pair in pairs]
        return self._written(model, rows, max_new_tokens)

    def _written(self, model: Any, rows: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        answers = loop.generate(model, self.tokenizer, rows, max_new_tokens, self.batch_size)
        return [translation.first_line(answer) for answer in answers]

    def _difference(
        self, pairs: Sequence[Pair], bare: Sequence[Encoded], shown: Sequence[Encoded]
    ) -> Probe:
        sizes, groups = _characters(pairs), [p.document for p in pairs]

        def probe(model: Any) -> Figure:
            losses = zip(self.losses(model, bare), self.losses(model, shown), strict=True)
            return Figure([a - b for a, b in losses], sizes, groups)

        return probe


def _characters(pairs: Sequence[Pair]) -> list[float]:
    return [float(len(pair.target)) for pair in pairs]


def _with_examples(examples: Sequence[Pair], pair: Pair) -> str:
    shown = [f"{translation.prompt(p)} {p.target}" for p in examples]
    return "\n\n".join([*shown, translation.prompt(pair)])


def _register_prompt(
    row: Contrast, examples: Sequence[Contrast], register: str, languages: tuple[str, str]
) -> str:
    pairs = [Pair(e.source, e.reference(register), *languages, "") for e in examples]
    return _with_examples(pairs, Pair(row.source, "", *languages, ""))
