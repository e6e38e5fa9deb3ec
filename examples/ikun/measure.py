"""What is measured of a model: tokens and bits per character, translations and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import corpus
import health
import vocabulary

from recipes_peft import translation
from recipes_peft.parallel import Pair

# what BLEU cuts into words by other means than spaces; signs where the words' package is missing
WORDS = {
    "zh": "zh",
    "ja": "ja-mecab" if find_spec("MeCab") else "char",
    "ko": "ko-mecab" if find_spec("mecab_ko") else "char",
    "th": "char",
}


def aligned(parts: corpus.Parts, part: str) -> dict[str, tuple[list[str], list[str]]]:
    """Give lines of each language and, aligned with them, of English, where a direction has it."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name, pairs in getattr(parts, part).items():
        one, other = name.split("-")
        sides = [p.source for p in pairs], [p.target for p in pairs]
        if one == "en":
            found.setdefault(other, (sides[1], sides[0]))
        elif other == "en":
            found.setdefault(one, sides)
    return found


def ratios(tokenizer: Any, lines: Mapping[str, tuple[list[str], list[str]]]) -> dict[str, float]:
    """Give the length ratio of each language; English has 1."""
    found = {
        name: vocabulary.length_ratio(*(vocabulary.lengths(tokenizer, side) for side in sides))
        for name, sides in lines.items()
    }
    return {"en": 1.0, **found}


def text_bits(work: Any, model: Any, tokenizer: Any) -> dict[str, float]:
    """Give the bits per character of the test's lines as plain text, by language."""
    lines: dict[str, dict[str, None]] = {}
    for pairs in work.parts.test.values():
        for pair in pairs[: work.given.test_pairs]:
            lines.setdefault(pair.source_language, {})[pair.source] = None
            lines.setdefault(pair.target_language, {})[pair.target] = None
    given = work.given
    groups = {
        name: [(corpus.text_row(text, tokenizer, given.max_length), text) for text in texts]
        for name, texts in lines.items()
    }
    return health.measured(model, groups, given.micro_batch_size, tokenizer.pad_token_id)


def tested(work: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Measure a translator: bits per character of the references, scores and lengths."""
    given, size = work.given, work.given.micro_batch_size
    test = {name: pairs[: given.test_pairs] for name, pairs in work.parts.test.items()}
    groups = {
        name: [(corpus.pair_row(p, tokenizer, given.max_length), p.target) for p in pairs]
        for name, pairs in test.items()
    }
    bits = health.measured(model, groups, size, tokenizer.pad_token_id)
    ratio, guess = ratios(tokenizer, aligned(work.parts, "tuning")), health.Guess(guessable(work))
    wanted = [pair for pairs in test.values() for pair in pairs[: given.translated]]
    caps = [
        health.token_cap(
            vocabulary.lengths(tokenizer, [p.source])[0],
            ratio.get(p.source_language, 1.0),
            ratio.get(p.target_language, 1.0),
            given.cap_margin,
        )
        for p in wanted
    ]
    prompts = [corpus.prompt(pair) for pair in wanted]
    # RoAd is merged by now, so beams need no care for adapters
    outputs, cut = health.translate(
        model, tokenizer, prompts, caps, given.translated_batch, given.beams
    )
    found: dict[str, Any] = {}
    for name in test:
        rows = [
            i for i, p in enumerate(wanted) if f"{p.source_language}-{p.target_language}" == name
        ]
        found[name] = judged(
            [wanted[i] for i in rows], [outputs[i] for i in rows], [cut[i] for i in rows], guess
        )
    return {"bits": bits, "translations": found}


def judged(
    pairs: Sequence[Pair], outputs: Sequence[str], cut: Sequence[bool], guess: health.Guess
) -> dict[str, Any]:
    """Give scores and health of the translations of one direction."""
    sources, references = [p.source for p in pairs], [p.target for p in pairs]
    language = pairs[0].target_language
    return {
        **asdict(translation.score(outputs, references, WORDS.get(language, "13a"))),
        "at_cap": sum(cut) / len(cut),
        "unfinished": health.unfinished(outputs),
        "unfinished_references": health.unfinished(references),
        "off_target": guess.off_target(outputs, language),
        "off_target_references": guess.off_target(references, language),
        "sources": sources,
        "outputs": list(outputs),
        "references": references,
    }


def guessable(work: Any) -> dict[str, list[str]]:
    """Give texts to know languages by: of the pairs to learn from, which no test line is among."""
    found: dict[str, list[str]] = {}
    for pairs in work.parts.tuning.values():
        for pair in pairs:
            found.setdefault(pair.source_language, []).append(pair.source)
            found.setdefault(pair.target_language, []).append(pair.target)
    return found
