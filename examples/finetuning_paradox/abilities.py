"""All abilities of a model that there is data for, measured at one time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from corpus import Corpus
from probes import Figures, Maker, Probe, written_figures

from recipes_peft import translation


@dataclass(frozen=True)
class Measured:
    """Figures by name, and what sacrebleu and COMET say of all translations together."""

    figures: Figures
    scores: dict[str, Any]

    @property
    def values(self) -> dict[str, float]:
        """The figures without their items."""
        return {name: figure.value for name, figure in self.figures.items()}


class Abilities:
    """Measures what a model is able to do."""

    def __init__(self, maker: Maker, corpus: Corpus, given: Any) -> None:
        """Make the probes that there is data for."""
        self.maker, self.given, self.dictionary = maker, given, corpus.dictionary
        self.translated = corpus.held_out[: given.generated]
        languages, new = (given.source, given.target), given.max_new_tokens
        self.probes: list[Probe] = [
            maker.translation(corpus.held_out),
            maker.few_shot(corpus.domain, corpus.examples),
            maker.context(corpus.in_order, given.sentences, given.items, given.longest),
            maker.language(corpus.held_out_text),
        ]
        if corpus.registers:
            rows, shown = corpus.registers, corpus.register_examples
            self.probes += [
                maker.steerability(rows, shown, languages),
                maker.register(rows[: given.generated], shown, languages, new),
            ]
        if corpus.pronouns:
            self.probes.append(maker.pronouns(corpus.pronouns, new))
        if contrasts := [item for item in corpus.pronouns if item.others]:
            self.probes.append(maker.contrastive(contrasts))

    def measure(self, model: Any) -> Measured:
        """Measure a model; figures without an item are left out."""
        pairs, given = self.translated, self.given
        written = self.maker.translate(model, pairs, given.max_new_tokens)
        figures = written_figures(pairs, written, self.dictionary)
        for probe in self.probes:
            figures |= probe(model)
        sources, wanted = [p.source for p in pairs], [p.target for p in pairs]
        scores = asdict(translation.score(written, wanted, "zh" if given.target == "zh" else "13a"))
        if given.comet:
            scores["comet"] = translation.comet(Path(given.comet), sources, written, wanted)
        return Measured({name: f for name, f in figures.items() if f.groups}, scores)
