"""Languages: what they are called where, their script and family, and how much of each a model saw.

Classes are fixed here before anything is scored. A language is `high` if a model's pretraining text
has at least so many GiB of it, `low` if less, `unseen` if none. The paper's own thresholds are not
known to us; ten GiB is a proposal, and a setting.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from recipes_peft.errors import UserError, explained

__all__ = [
    "CLASSES",
    "PRETRAINING",
    "Language",
    "choose",
    "describe",
    "flores",
    "machine_only",
    "read_by",
    "script",
    "sizes",
]

CLASSES = ("high", "low", "unseen")

# GiB of CC-100 by ISO 639-1: XLM-R (arXiv:1911.02116), appendix A, in a public transcription with
# the sizes of Swedish and Ukrainian as its authors corrected them. Romanised text is left out, of
# Chinese and of Burmese the larger row is kept.
_CC100 = """
en 300.8 ru 278 id 148.3 vi 137.3 fa 111.6 sv 85 uk 84.6 th 71.7 ja 69.3 de 66.6 ro 61.4 hu 58.4
bg 57.5 fr 56.8 fi 54.3 ko 54.2 es 53.3 pt 49.1 no 49 el 46.9 zh 46.9 da 45.6 pl 44.6 he 31.6
it 30.2 nl 29.3 ar 28 sk 23.2 tr 20.9 hr 20.5 hi 20.2 cs 16.3 lt 13.7 ta 12.2 sl 10.3 ca 10.1
ka 9.1 sr 9.1 lv 8.8 ms 8.5 bn 8.4 ml 7.6 az 6.5 kk 6.4 et 6.1 ur 5.7 hy 5.5 sq 5.4 mk 4.8 te 4.7
be 4.3 ne 3.8 si 3.6 kn 3.3 is 3.2 tl 3.1 mn 3 gl 2.9 mr 2.8 la 2.5 eu 2 gu 1.9 my 1.6 sw 1.6
km 1.5 af 1.3 ky 1.2 eo 0.9 am 0.8 cy 0.8 pa 0.8 ps 0.7 uz 0.7 lo 0.6 or 0.6 ga 0.5 ku 0.4 sd 0.4
so 0.4 ug 0.4 ha 0.3 sa 0.3 yi 0.3 fy 0.2 jv 0.2 mg 0.2 as 0.1 br 0.1 bs 0.1 gd 0.1 om 0.1 su 0.1
xh 0.1
"""

# Bytes of ROOTS (arXiv:2303.03915), which BLOOM read, as plotstables/figure_notebooks/xp3_languages
# of bigscience-workshop/xmtf has its table of languages; both scripts of Chinese together.
_ROOTS = """
en 484953009124 zh 261781923042 fr 208242620434 es 175098365045 pt 79277543375 ar 74854900600
vi 43709279959 hi 24622119985 id 19972325222 bn 18606823104 ca 17792493289 ta 7989206220
ml 3662571498 te 2993407159 ur 2781329959 ne 2551307393 eu 2360470848 kn 2098453560 mr 1775483122
pa 1572109752 gu 1199986460 or 1157100133 as 291522098 sw 236482543 yo 89695835 rw 40428299
xh 14304074 ig 14078521 zu 8511561 sn 6638639 lg 4568367 wo 3606973 rn 3272550 fon 2478546
nso 1764506 ln 1650804 tn 1502200 tw 1265041 ny 1187405 st 751034 ts 707634 ak 701554 bm 391747
ki 359615 tum 170360
"""


def _by_tag(words: str, unit: float) -> dict[str, float]:
    return {k: float(v) / unit for k, v in zip(*[iter(words.split())] * 2, strict=True)}


PRETRAINING = {
    "xlm-r": _by_tag(_CC100, 1),
    "bloom": _by_tag(_ROOTS, 2**30),
    "english": {"en": 300.8},
}
# What models read, by their names here or by how the last part of an id or a path begins.
# multilingual-e5 began as XLM-R, the small one as a MiniLM distilled from it: the same languages.
# BLOOMZ was tuned on tasks in the languages of BLOOM.
_NAMES = {"e5-small": "xlm-r", "minilm-l6": "english", "smollm2-135m": "english"}
_BEGINNINGS = {
    "xlm-roberta-": "xlm-r",
    "multilingual-e5-": "xlm-r",
    "bloom": "bloom",
    "smollm2-": "english",
}

_FAMILIES = {
    "Germanic": "en de sv no da nl af is fy yi",
    "Romance": "es fr it pt ro ca gl la",
    "Slavic": "ru uk pl cs sk bg hr sr sl mk be bs",
    "Baltic": "lt lv",
    "Celtic": "cy ga br gd",
    "Hellenic": "el",
    "Armenian": "hy",
    "Albanian": "sq",
    "Iranian": "fa ps ku",
    "Indo-Aryan": "hi ur bn mr gu pa ne si or as sd sa",
    "Dravidian": "ta te kn ml",
    "Turkic": "tr az kk uz ky ug",
    "Uralic": "fi hu et",
    "Semitic": "ar he am",
    "Cushitic": "om so",
    "Chadic": "ha",
    "Sinitic": "zh",
    "Tibeto-Burman": "my",
    "Austroasiatic": "vi km",
    "Austronesian": "id ms tl jv su mg",
    "Kra-Dai": "th lo",
    "Bantu": "sw xh",
    "Mongolic": "mn",
    "Kartvelian": "ka",
    "Japonic": "ja",
    "Koreanic": "ko",
    "Quechuan": "qu",
    "isolate": "eu",
    "constructed": "eo",
}
_FAMILY = {tag: family for family, tags in _FAMILIES.items() for tag in tags.split()}

# Tags of which a pretraining table has the wider one.
_WIDER = {"nb": "no", "nn": "no", "als": "sq", "zlm": "ms", "fil": "tl", "ckb": "ku"}

# ISO 639-3 for the codes of XCOPA, XQuAD, PAWS-X, XNLI and XStoryCloze, and where FLORES differs.
_ISO3_WORDS = """
ar:arb bg:bul de:deu el:ell en:eng es:spa et:est eu:eus fr:fra hi:hin ht:hat id:ind it:ita ja:jpn
ko:kor my:mya pt:por qu:quy ro:ron ru:rus sw:swh ta:tam te:tel th:tha tr:tur ur:urd vi:vie zh:zho
"""
_FLORES_ISO3 = {"cmn": "zho", "ekk": "est", "zlm": "zsm"}
# Tags (ISO 639-1, if there is one) of the FLORES languages that a pretraining table has.
_ISO1_WORDS = """
afr:af als:sq amh:am arb:ar asm:as azj:az bel:be ben:bn bos:bs bul:bg cat:ca ces:cs ckb:ku cym:cy
dan:da deu:de ell:el eng:en epo:eo est:et eus:eu fin:fi fra:fr gaz:om gla:gd gle:ga glg:gl guj:gu
hau:ha heb:he hin:hi hrv:hr hun:hu hye:hy ind:id isl:is ita:it jav:jv jpn:ja kan:kn kat:ka kaz:kk
khk:mn khm:km kir:ky kmr:ku kor:ko lao:lo lit:lt lvs:lv mal:ml mar:mr mkd:mk mya:my nld:nl nno:nn
nob:nb npi:ne ory:or pan:pa pbt:ps pes:fa plt:mg pol:pl por:pt prs:fa ron:ro rus:ru san:sa sin:si
slk:sk slv:sl snd:sd som:so spa:es srp:sr sun:su swe:sv swh:sw tam:ta tel:te tgl:tl tha:th tur:tr
uig:ug ukr:uk urd:ur uzn:uz vie:vi xho:xh ydd:yi zho:zh zsm:ms
aka:ak bam:bm ibo:ig kik:ki kin:rw lin:ln lug:lg nya:ny run:rn sna:sn sot:st tsn:tn tso:ts twi:tw
wol:wo yor:yo zul:zu
"""
_ISO3, _ISO1 = (
    dict(pair.split(":") for pair in words.split()) for words in (_ISO3_WORDS, _ISO1_WORDS)
)

_SCRIPTS = {
    "LATIN": "Latn",
    "CYRILLIC": "Cyrl",
    "ARABIC": "Arab",
    "DEVANAGARI": "Deva",
    "GREEK": "Grek",
    "HEBREW": "Hebr",
    "ARMENIAN": "Armn",
    "GEORGIAN": "Geor",
    "ETHIOPIC": "Ethi",
    "THAI": "Thai",
    "LAO": "Laoo",
    "KHMER": "Khmr",
    "MYANMAR": "Mymr",
    "BENGALI": "Beng",
    "TAMIL": "Taml",
    "TELUGU": "Telu",
    "KANNADA": "Knda",
    "MALAYALAM": "Mlym",
    "GUJARATI": "Gujr",
    "GURMUKHI": "Guru",
    "ORIYA": "Orya",
    "SINHALA": "Sinh",
    "TIBETAN": "Tibt",
    "TIFINAGH": "Tfng",
    "CHEROKEE": "Cher",
    "CANADIAN": "Cans",
    "MONGOLIAN": "Mong",
    "HANGUL": "Hang",
    "HIRAGANA": "Jpan",
    "KATAKANA": "Jpan",
    "CJK": "Hans",
}


@dataclass(frozen=True)
class Language:
    """A language of a data set: its code there, its tag (BCP 47), and what is known of it."""

    code: str
    tag: str
    script: str
    family: str  # "" where the table has none
    flores: str | None  # None: NLLB does not know it
    size: float  # GiB of it that the model was trained on
    resource: str  # high, low or unseen


def sizes(pretraining: str) -> dict[str, float]:
    """Give the GiB of text by language tag: of a model's name in the table, or of a JSON file.

    Raises:
        UserError: there is no such name or file, or it does not hold numbers.
    """
    if pretraining in PRETRAINING:
        return PRETRAINING[pretraining]
    advice = f"; give one of {', '.join(PRETRAINING)}, or a JSON file of sizes by language tag"
    before = f"cannot read the pretraining sizes {pretraining!r}: "
    with explained(OSError, ValueError, AttributeError, before=before, after=advice):
        found = json.loads(Path(pretraining).read_text(encoding="utf-8"))
        return {str(tag): float(size) for tag, size in found.items()}


def read_by(model: str) -> str:
    """Give the name of the table that holds what a model read.

    Raises:
        UserError: that is not known here.
    """
    if model in _NAMES:
        return _NAMES[model]
    last = Path(model).name.lower()
    for beginning, name in _BEGINNINGS.items():
        if last.startswith(beginning):
            return name
    raise UserError(
        f"how much of each language {model} read is not known here; give with --pretraining one of"
        f" {', '.join(PRETRAINING)}, or a JSON file of GiB by language tag"
    )


def describe(
    code: str, tag: str, iso3: str, text: str, known: Mapping[str, float], high_from: float
) -> Language:
    """Say what is known of a language, its script by the text in it."""
    written = script(text, tag)
    parts = tag.split("-")[0]
    wide = _WIDER.get(parts, parts)
    size = known.get(parts, known.get(wide, 0.0))
    resource = "unseen" if size == 0 else "high" if size >= high_from else "low"
    iso3 = iso3 or _ISO3.get(code, code)
    return Language(
        code, tag, written, _FAMILY.get(wide, ""), flores(iso3, written), size, resource
    )


def machine_only(
    codes: Sequence[str], have: Collection[str | None], known: Mapping[str, float], high_from: float
) -> list[Language]:
    """Give languages by FLORES-200 code, for which there is machine translation alone.

    `all` stands for every language of NLLB but English and those that are there already (`have`).

    Raises:
        UserError: NLLB has no such language.
    """
    found = []
    for code in FAIRSEQ_LANGUAGE_CODES if list(codes) == ["all"] else codes:
        if code not in FAIRSEQ_LANGUAGE_CODES:
            raise UserError(f"machine_languages has {code!r}; give codes of FLORES-200, or all")
        if code in have or code == "eng_Latn":
            continue
        iso3, written = code.split("_")
        plain = describe(code, _ISO1.get(iso3, iso3), iso3, "", known, high_from)
        found.append(replace(plain, script=written, flores=code))
    return found


def script(text: str, tag: str = "") -> str:
    """Give the script (ISO 15924) of most letters of a text; Chinese is Hans unless tagged Hant.

    Text with kana is Japanese, however many of its signs are Chinese.
    """
    names = Counter(
        unicodedata.name(sign, "?").split()[0].split("-")[0] for sign in text if sign.isalpha()
    )
    if not names:
        return "Zyyy"
    if names["HIRAGANA"] + names["KATAKANA"] > 0.1 * sum(names.values()):
        return "Jpan"
    found = _SCRIPTS.get(names.most_common(1)[0][0], "Zyyy")
    return "Hant" if found == "Hans" and "Hant" in tag.split("-") else found


def flores(iso3: str, written: str) -> str | None:
    """Give the FLORES-200 code of a language in a script, None if NLLB has no such language."""
    found = f"{_FLORES_ISO3.get(iso3, iso3)}_{written}"
    return found if found in FAIRSEQ_LANGUAGE_CODES else None


def choose(
    languages: Sequence[Language], keep: Collection[str], per_class: int, seed: int
) -> list[Language]:
    """Give the languages in `keep` and, of every class, so many others, drawn by a checksum.

    The draw looks at codes alone, never at scores.
    """

    def rank(language: Language) -> str:
        return hashlib.sha256(f"{seed}\0{language.code}".encode()).hexdigest()

    chosen = {language.code for language in languages if language.code in keep}
    for name in CLASSES:
        others = [x for x in languages if x.resource == name and x.code not in keep]
        chosen |= {x.code for x in sorted(others, key=rank)[:per_class]}
    found = [language for language in languages if language.code in chosen]
    if not found:
        raise UserError("no language is left to measure; name some with --languages")
    return found
