"""What is measured of a model: tokens and bits per character, translations and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import corpus
import health
import torch
import vocabulary

from recipes_peft import models, translation
from recipes_peft.errors import UserError
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


def vocabulary_checks(work: Any, extension: vocabulary.Extension, model: Any) -> dict[str, Any]:
    """Measure what A1 promises, on the test's text."""
    base, new = work.tokenizer, extension.tokenizer
    lines = aligned(work.parts, "test")
    if not lines:
        raise UserError("length ratios need English; give a direction that has it, en-ru")
    everything = [t for ps in work.parts.test.values() for p in ps for t in (p.source, p.target)]
    english = list(dict.fromkeys(text for sides in lines.values() for text in sides[1]))
    plain = max(english, key=lambda t: (base(t).input_ids == new(t).input_ids, len(t)))
    ids, rows = torch.tensor([base(plain).input_ids]), extension.ids[0]
    before = vocabulary.logits_of(model, ids, rows)
    longer = vocabulary.extend_model(models.load(work.given.model, work.given.dtype)[0], extension)
    return {
        "pieces": len(extension.ids),
        "ratios": ratios(base, lines),
        "new_ratios": ratios(new, lines),
        "english_tokens": sum(vocabulary.lengths(base, english)),
        "new_english_tokens": sum(vocabulary.lengths(new, english)),
        "lossless": vocabulary.lossless(new, everything),
        "expands_to_base": vocabulary.expands_to_base(extension, base, everything),
        "logit_change": vocabulary.change(before, vocabulary.logits_of(longer, ids, rows)),
    }


@dataclass(frozen=True)
class Measured:
    """What bits per character are measured on, the same for all runs: nothing of it is cut."""

    pairs: dict[str, list[Pair]]  # by direction
    lines: dict[str, list[str]]  # by language
    left_out: int  # pairs and lines that do not fit


def measured(work: Any) -> Measured:
    """Give the pairs and lines of the test that fit into `max_length` in every vocabulary.

    Raises:
        UserError: none of a direction or language does.
    """
    given = work.given
    pairs = {name: some[: given.test_pairs] for name, some in work.parts.test.items()}
    lines: dict[str, dict[str, None]] = {}
    for pair in (pair for some in pairs.values() for pair in some):
        lines.setdefault(pair.source_language, {})[pair.source] = None
        lines.setdefault(pair.target_language, {})[pair.target] = None
    sizes = work.tokenizers, given.max_length
    fit = {name: corpus.fitting(corpus.pair_row, some, *sizes) for name, some in pairs.items()}
    own = {name: corpus.fitting(corpus.text_row, some, *sizes) for name, some in lines.items()}
    if none := [name for name, some in {**fit, **own}.items() if not some]:
        raise UserError(
            f"no line of the test of {none[0]} fits into {given.max_length} tokens; give a larger"
            " --max-length"
        )
    counts = [sum(map(len, found.values())) for found in (pairs, lines, fit, own)]
    return Measured(fit, own, counts[0] + counts[1] - counts[2] - counts[3])


def text_bits(work: Any, model: Any, tokenizer: Any) -> dict[str, float]:
    """Give the bits per character of the test's lines as plain text, by language."""
    groups = {
        name: [(corpus.text_row(text, tokenizer), text) for text in texts]
        for name, texts in work.measured.lines.items()
    }
    return health.measured(model, groups, work.given.micro_batch_size, tokenizer.pad_token_id)


def tested(work: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Measure a translator: bits per character of the references, scores and lengths."""
    given, size = work.given, work.given.micro_batch_size
    groups = {
        name: [(corpus.pair_row(p, tokenizer), p.target) for p in pairs]
        for name, pairs in work.measured.pairs.items()
    }
    bits = health.measured(model, groups, size, tokenizer.pad_token_id)
    ratio, guess = ratios(tokenizer, aligned(work.parts, "tuning")), health.Guess(guessable(work))
    some = min(given.test_pairs, given.translated)
    wanted = [pair for pairs in work.parts.test.values() for pair in pairs[:some]]
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
    for name in work.parts.test:
        rows = [
            i for i, p in enumerate(wanted) if f"{p.source_language}-{p.target_language}" == name
        ]
        found[name] = judged(
            [wanted[i] for i in rows], [outputs[i] for i in rows], [cut[i] for i in rows], guess
        )
        if given.comet:
            sides = (found[name][key] for key in ("sources", "outputs", "references"))
            found[name]["comet"] = translation.comet(Path(given.comet), *sides)
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
