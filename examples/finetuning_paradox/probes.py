"""Abilities of a translation model, measured in between the steps of its training.

Each has a likelihood form, which needs no decoding; translation, register and pronouns have a form
that generates as well. A probe is a function of the model, made once from its data; it gives
figures by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from formality import REGISTERS, Contrast, labels
from likelihood import row_losses
from literalness import contextual_hit, crossing_rate, dictionary_links, unaligned_share
from pronouns import Pronoun
from retention import Figure
from sacrebleu.metrics import CHRF

from recipes_peft import loop, translation
from recipes_peft.data import Encoded
from recipes_peft.parallel import Pair

Figures = dict[str, Figure]
Probe = Callable[[Any], Figures]


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

    def fits(self, prompt: str, answer: str) -> bool:
        """Tell whether a row keeps all of its prompt."""
        asked = self.tokenizer(answer, add_special_tokens=False).input_ids
        return len(self.tokenizer(prompt).input_ids) + len(asked) <= self.max_length

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
        return lambda model: {"translation": Figure(self.losses(model, rows), sizes, groups)}

    def few_shot(self, pairs: Sequence[Pair], examples: Sequence[Pair]) -> Probe:
        """What examples of the same domain lower the loss by, in nats per character (G_k)."""
        bare = [self.row(translation.prompt(p), " " + p.target) for p in pairs]
        shown = [self.row(_with_examples(examples, p), " " + p.target) for p in pairs]
        return self._difference("few-shot", pairs, bare, shown)

    def context(
        self, stretches: Sequence[Sequence[Pair]], sentences: int, items: int, longest: int
    ) -> Probe:
        """What the sentences before, with their translation, lower the loss by (C).

        Pairs of a stretch follow on each other in a document. The first `items` pairs count that
        have at most `longest` characters a side, enough before them, and a prompt that fits.
        """
        kept, bare, shown = [], [], []
        windows = (
            stretch[i - sentences : i + 1]
            for stretch in stretches
            for i in range(sentences, len(stretch))
            if max(len(stretch[i].source), len(stretch[i].target)) <= longest
        )
        for *before, pair in windows:
            if len(kept) == items:
                break
            source = " ".join(p.source for p in (*before, pair))
            passage = replace(pair, source=source)
            prompt = " ".join([translation.prompt(passage), *(p.target for p in before)])
            if self.fits(prompt, " " + pair.target):
                kept.append(pair)
                bare.append(self.row(translation.prompt(pair), " " + pair.target))
                shown.append(self.row(prompt, " " + pair.target))
        return self._difference("context", kept, bare, shown)

    def steerability(
        self, rows: Sequence[Contrast], examples: Sequence[Contrast], languages: tuple[str, str]
    ) -> Probe:
        """How far examples of a register move the preference for it (Steer), in nats.

        d is log p(formal) - log p(informal); the figure is the mean of d after formal examples
        minus d after informal ones. `steer-accuracy` is the share of d that is above 0 after formal
        examples and below 0 after informal ones.
        """
        scored = [
            self.row(_register_prompt(row, examples, shown, languages), " " + row.reference(asked))
            for row in rows
            for shown in REGISTERS
            for asked in REGISTERS
        ]
        ones, groups = [1.0] * len(rows), [row.domain + row.source for row in rows]

        def probe(model: Any) -> Figures:
            losses = self.losses(model, scored)
            preferred = [losses[i + 1] - losses[i] for i in range(0, len(losses), 2)]
            both = list(zip(preferred[::2], preferred[1::2], strict=True))
            right = [((formal > 0) + (informal < 0)) / 2 for formal, informal in both]
            return {
                "steer": Figure([formal - informal for formal, informal in both], ones, groups),
                "steer-accuracy": Figure(right, ones, groups),
            }

        return probe

    def language(self, texts: Mapping[str, Sequence[str]]) -> Probe:
        """Bits per character of running text, but for its first token: of all and of each side."""
        rows = [self.running(text) for side in texts.values() for text in side]
        sizes = [float(len(self.tokenizer.decode(row.answer))) for row in rows]
        groups = [text for side in texts.values() for text in side]
        names = [name for name, side in texts.items() for _ in side]

        def probe(model: Any) -> Figures:
            every = Figure([n / math.log(2) for n in self.losses(model, rows)], sizes, groups)
            sides = {name: [n == name for n in names] for name in texts}
            return {"lm": every} | {f"lm-{name}": every.part(of) for name, of in sides.items()}

        return probe

    def register(
        self,
        rows: Sequence[Contrast],
        examples: Sequence[Contrast],
        languages: tuple[str, str],
        max_new_tokens: int,
    ) -> Probe:
        """Matched accuracy of translations after examples of each register, and the share matched.

        Only translations that match one register count; the accuracy is that of both registers
        together and of each.
        """
        asked = [register for register in REGISTERS for _ in rows]
        prompts = [
            self.row(_register_prompt(row, examples, register, languages), "")
            for register in REGISTERS
            for row in rows
        ]

        def probe(model: Any) -> Figures:
            written = self._written(model, prompts, max_new_tokens)
            found = labels(written, [*rows, *rows], languages[1])
            matched = [float(label in REGISTERS) for label in found]
            right = [float(label == register) for label, register in zip(found, asked, strict=True)]
            groups = [row.domain + row.source for row in rows] * 2
            both = Figure(right, matched, groups)
            parts = {each: both.part([a == each for a in asked]) for each in REGISTERS}
            return {
                "register": both,
                **{f"register-{each}": part for each, part in parts.items()},
                "register-matched": Figure(matched, [1.0] * len(found), groups),
            }

        return probe

    def pronouns(self, items: Sequence[Pronoun], max_new_tokens: int) -> Probe:
        """Contextual accuracy: the word that the sentences before ask for is in the last one."""
        pairs = [item.pair for item in items]

        def probe(model: Any) -> Figures:
            written = self.translate(model, pairs, max_new_tokens)
            hits = [
                float(contextual_hit(text, item.expected))
                for text, item in zip(written, items, strict=True)
            ]
            return {"pronouns": Figure(hits, [1.0] * len(hits), [p.document for p in pairs])}

        return probe

    def contrastive(self, items: Sequence[Pronoun]) -> Probe:
        """How often the right translation is more probable than those with other pronouns."""
        rows, counts = [], [1 + len(item.others) for item in items]
        for item in items:
            prompt = " ".join([translation.prompt(item.pair), *item.before])
            rows += [self.row(prompt, " " + text) for text in (item.pair.target, *item.others)]

        def probe(model: Any) -> Figures:
            losses = iter(self.losses(model, rows))
            hits = []
            for count in counts:
                right, *others = islice(losses, count)
                hits.append(float(right < min(others)))
            groups = [item.pair.document for item in items]
            return {"contrastive": Figure(hits, [1.0] * len(hits), groups)}

        return probe

    def translate(self, model: Any, pairs: Sequence[Pair], max_new_tokens: int) -> list[str]:
        """Translate greedily, without examples."""
        rows = [self.row(translation.prompt(pair), "") for pair in pairs]
        return self._written(model, rows, max_new_tokens)

    def _written(self, model: Any, rows: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        answers = loop.generate(model, self.tokenizer, rows, max_new_tokens, self.batch_size)
        return [translation.first_line(answer) for answer in answers]

    def _difference(
        self, name: str, pairs: Sequence[Pair], bare: Sequence[Encoded], shown: Sequence[Encoded]
    ) -> Probe:
        sizes, groups = _characters(pairs), [p.document for p in pairs]

        def probe(model: Any) -> Figures:
            losses = zip(self.losses(model, bare), self.losses(model, shown), strict=True)
            return {name: Figure([a - b for a, b in losses], sizes, groups)}

        return probe


def written_figures(
    pairs: Sequence[Pair], written: Sequence[str], dictionary: Mapping[str, Collection[str]]
) -> Figures:
    """Give the figures of translations: chrF++, the mean of the sentences, and how free they are.

    USW (source words without a link) and NM (links that cross) need links: those of a dictionary,
    the same for all systems.
    """
    metric, groups = CHRF(word_order=2), [p.document for p in pairs]
    rows = list(zip(pairs, written, strict=True))
    values = {"chrf": [metric.sentence_score(text, [pair.target]).score for pair, text in rows]}
    if dictionary:
        words = [pair.source.split() for pair in pairs]
        links = [
            dictionary_links(source, text.split(), dictionary)
            for source, text in zip(words, written, strict=True)
        ]
        values["unaligned"] = [
            unaligned_share(of, len(source)) for of, source in zip(links, words, strict=True)
        ]
        values["crossing"] = [crossing_rate(of) for of in links]
    return {name: Figure(each, [1.0] * len(each), groups) for name, each in values.items()}


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
