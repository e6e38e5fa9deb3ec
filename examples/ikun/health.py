"""What a translator does wrong without a low score saying so: omissions, cuts, other languages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recipes_peft import data, loop
from recipes_peft.data import Encoded

FINAL = ".!?\u2026\u3002\uff01\uff1f\u0964\"'\u00bb\u201d\u300d)\uff09"  # ends of sentences
EDGES = (60, 120)  # characters of a source: where buckets end


@dataclass(frozen=True)
class Bucket:
    """Translations of sources of about one length."""

    longest: float  # characters of a source, infinity for the last bucket
    count: int
    output: float  # characters of outputs per character of sources
    reference: float  # the same of references

    @property
    def off(self) -> float:
        """Give how far outputs are from the references' length, as a share of it."""
        return self.output / self.reference - 1


def length_health(
    sources: Sequence[str],
    outputs: Sequence[str],
    references: Sequence[str],
    edges: Sequence[float] = EDGES,
) -> list[Bucket]:
    """Compare lengths of outputs and references, by the source's length; no bucket is empty.

    An output that shrinks with the source's length leaves sentences out, even where it ends well.
    """
    found = []
    least = -1.0
    for longest in (*edges, math.inf):
        rows = [
            (len(s), len(o), len(r))
            for s, o, r in zip(sources, outputs, references, strict=True)
            if least < len(s) <= longest
        ]
        least = longest
        if rows:
            source, output, reference = map(sum, zip(*rows, strict=True))
            found.append(Bucket(longest, len(rows), output / source, reference / source))
    return found


def unfinished(texts: Sequence[str]) -> float:
    """Give the share of texts that do not end as sentences do."""
    return sum(not text.rstrip().endswith(tuple(FINAL)) for text in texts) / len(texts)


class Guess:
    """Guess the language of a text among a few, from how often runs of three signs occur in each.

    A script that no other language has decides at once; between languages of one script, short
    texts are guessed wrong now and then: compare with the share of references.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]]) -> None:
        self.counts = {
            name: Counter(gram for line in lines for gram in _grams(line))
            for name, lines in texts.items()
        }
        self.kinds = len(set().union(*self.counts.values())) + 1

    def __call__(self, text: str) -> str:
        """Name the likeliest language, the first one in the alphabet for an empty text."""

        def likelihood(name: str) -> float:
            counts = self.counts[name]
            total = counts.total() + self.kinds
            return sum(math.log((counts[gram] + 1) / total) for gram in _grams(text))

        return max(sorted(self.counts), key=likelihood)

    def off_target(self, texts: Sequence[str], language: str) -> float:
        """Give the share of texts that are in another language, or empty."""
        return sum(not text.strip() or self(text) != language for text in texts) / len(texts)


def _grams(text: str) -> list[str]:
    padded = f" {' '.join(text.lower().split())} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


def token_cap(source_tokens: int, source_ratio: float, target_ratio: float, margin: float) -> int:
    """Give how many tokens a translation may have.

    The source's length in tokens of English times the target's length ratio, with a margin: a cap
    for all languages would cut those that take many tokens.
    """
    return math.ceil(margin * source_tokens / source_ratio * target_ratio) + 8


@torch.no_grad()
def translate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    caps: Sequence[int],
    batch_size: int,
    beams: int = 1,
) -> tuple[list[str], list[bool]]:
    """Translate prompts; also tell which answers reached their cap of tokens without an end.

    An answer ends at the first line's end. Where beams give nothing, the greedy answer is taken.
    """
    model.eval()
    answers: list[str] = [""] * len(prompts)
    cut: list[bool] = [False] * len(prompts)
    rows = [Encoded(tokenizer(prompt).input_ids, []) for prompt in prompts]
    ranked = sorted(range(len(rows)), key=lambda i: caps[i])
    for start in range(0, len(ranked), batch_size):
        chosen = ranked[start : start + batch_size]
        batch = data.collate([rows[i] for i in chosen], tokenizer.pad_token_id)
        width = batch["input_ids"].shape[1]
        inputs = {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask")}
        output = model.generate(
            **inputs,
            max_new_tokens=max(caps[i] for i in chosen),
            do_sample=False,
            num_beams=beams,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, width:]
        for i, ids in zip(chosen, output.tolist(), strict=True):
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            text = tokenizer.decode(ids[: min(end, caps[i])], skip_special_tokens=True)
            line, newline, _ = text.lstrip().partition("\n")
            answers[i] = line.strip()
            cut[i] = not newline and (end > caps[i] or end == len(ids))
    if beams > 1 and (empty := [i for i, answer in enumerate(answers) if not answer]):
        again = translate(
            model, tokenizer, [prompts[i] for i in empty], [caps[i] for i in empty], batch_size
        )
        for i, answer, was_cut in zip(empty, *again, strict=True):
            answers[i], cut[i] = answer, was_cut
    return answers, cut


def nats(model: Any, rows: Sequence[Encoded], batch_size: int, pad: int) -> float:
    """Give the information of all answers of the rows together, in nats."""
    tokens = sum(len(row.answer) for row in rows)
    return loop.held_out_loss(model, rows, batch_size, pad) * tokens


def bits_per_character(nats: float, characters: int) -> float:
    """Give the information of a text per character, which needs no common vocabulary to compare."""
    return nats / math.log(2) / characters


def measured(
    model: Any, groups: Mapping[str, Sequence[tuple[Encoded, str]]], batch_size: int, pad: int
) -> dict[str, float]:
    """Give the bits per character of each group of (row, the text that the row's answer is)."""
    return {
        name: bits_per_character(
            nats(model, [row for row, _ in rows], batch_size, pad),
            sum(len(text) for _, text in rows),
        )
        for name, rows in groups.items()
    }
