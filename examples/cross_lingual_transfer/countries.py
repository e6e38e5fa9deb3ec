"""Countries and their names in many languages, out of the catalogues of iso-codes.

A country has a short name and an official one (Armenia, Republic of Armenia), translated by people.
Whether both are of one country is a question like that of PAWS-X, with overlap as its shortcut.
"""

from __future__ import annotations

import gettext
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel_pairs import Items

from recipes_peft import assets
from recipes_peft.errors import UserError, explained

__all__ = ["read"]

# where the table and the catalogues are in the package pycountry, and in a system's /usr/share
LAYOUTS = (
    ("databases/iso3166-1.json", "locales/{}/LC_MESSAGES/iso3166-1.mo"),
    ("iso-codes/json/iso_3166-1.json", "locale/{}/LC_MESSAGES/iso_3166-1.mo"),
)
_KINDS = (OSError, ValueError, KeyError, zipfile.BadZipFile)


class _Missing(gettext.NullTranslations):
    def gettext(self, message: str) -> str:
        return ""


def read(where: str, languages: Sequence[str]) -> Items:
    """Give the countries whose official name is another than the short one.

    `where` is `pycountry`, which is fetched once, or a folder: that package's, or one such as
    /usr/share with Debian's package iso-codes. English comes from the table itself. A country that
    a catalogue does not translate, or leaves as it is in both names, is missing in that language.

    Raises:
        UserError: there are no such files, or no catalogue for a language.
    """
    root: Any = Path(where)
    if where == "pycountry":
        with explained(*_KINDS, before="cannot read the package pycountry: "):
            root = zipfile.Path(assets.fetch("countries"), "pycountry/")
    found = [layout for layout in LAYOUTS if (root / layout[0]).exists()]
    if not found:
        raise UserError(
            f"{where} holds neither {LAYOUTS[0][0]} nor {LAYOUTS[1][0]}; give pycountry, the"
            " folder of that package, or /usr/share with the system's package iso-codes"
        )
    table, catalogue = found[0]
    with explained(*_KINDS, before=f"cannot read {where}: "):
        rows = json.loads((root / table).read_bytes())["3166-1"]
        named = [row for row in rows if row.get("official_name", row["name"]) != row["name"]]
        keys = [row["alpha_2"] for row in named]
        names = [(row["name"], row["official_name"]) for row in named]
    texts: dict[str, list[tuple[str, str] | None]] = {}
    for language in languages:
        if language == "en":
            texts[language] = list(names)
            continue
        file = root / catalogue.format(language)
        if not file.exists():
            raise UserError(
                f"there is no catalogue of countries for the language {language!r} in {where};"
                " languages go by the catalogues' names, such as de or zh_CN"
            )
        with explained(*_KINDS, before=f"cannot read the catalogue {file}: "):
            texts[language] = _translated(file.read_bytes(), names)
    return Items(keys, texts)


def _translated(catalogue: bytes, names: Sequence[tuple[str, str]]) -> list[tuple[str, str] | None]:
    translations = gettext.GNUTranslations(io.BytesIO(catalogue))
    translations.add_fallback(_Missing())
    found: list[tuple[str, str] | None] = []
    for short, official in names:
        pair = translations.gettext(short), translations.gettext(official)
        found.append(pair if all(pair) and pair != (short, official) else None)
    return found
