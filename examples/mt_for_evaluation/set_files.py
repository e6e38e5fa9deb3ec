"""Read the files of test sets as they are published: JSON lines, columns parted by tabs, packed."""

from __future__ import annotations

import csv
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from translated import Item

from recipes_peft.errors import UserError, explained

__all__ = ["copa", "folder", "lines", "pairs", "table", "text", "there", "unquoted"]


def folder(given: Any, name: str) -> Path:
    """Give the folder of a set: `data` itself, or the one of this name in it."""
    for path in (Path(given.data) / name, Path(given.data)):
        if path.is_dir():
            return path
    raise UserError(
        f"{given.task} needs a folder of its files, and {given.data} is none; give with --data a"
        f" folder that holds {name}/ as it is published"
    )


def there(path: Path) -> bool:
    """Say whether a file is there, as it is or packed."""
    return path.exists() or _packed(path).exists()


def text(path: Path) -> str:
    """Read a file, or the one packed with xz if it is there alone."""
    with explained(OSError, UnicodeDecodeError, lzma.LZMAError, before=f"cannot read {path}: "):
        if path.suffix == ".xz" or (_packed(path).exists() and not path.exists()):
            return lzma.decompress(_packed(path).read_bytes()).decode("utf-8")
        return path.read_text(encoding="utf-8")


def lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    with explained(json.JSONDecodeError, before=f"{path} is not JSON lines: "):
        return [json.loads(line) for line in text(path).split("\n") if line.strip()]


def table(path: Path, columns: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """Read columns parted by tabs; `columns` names them if the first line does not."""
    rows = _rows(path)
    named = not columns or columns[0] in rows[0].split("\t")
    names = None if named else columns
    return list(csv.DictReader(rows, names, delimiter="\t", quoting=csv.QUOTE_NONE))


def pairs(path: Path, classes: Mapping[str, int]) -> list[Item]:
    """Read two texts and a class a line, perhaps after an id, perhaps below names of columns.

    Raises:
        UserError: a line has other columns, or a class that is not in `classes`.
    """
    found: list[Item] = []
    for number, line in enumerate(_rows(path), 1):
        cells = line.split("\t")
        if number == 1 and cells[-1] == "label":
            continue
        if len(cells) not in (3, 4) or cells[-1] not in classes:
            raise UserError(
                f"{path}, line {number} is {line[:60]!r}; two texts and one of"
                f" {', '.join(classes)} are wanted, parted by tabs, perhaps after an id"
            )
        first, second, label = cells[-3:]
        found.append(Item(str(number), (unquoted(first), unquoted(second)), classes[label]))
    if not found:
        raise UserError(f"{path} has no rows; give a file with English pairs and their classes")
    return found


def copa(path: Path) -> list[dict[str, Any]]:
    """Read English COPA, validation: `copa/val.jsonl`, or a folder that `datasets` saved."""
    if (path / "copa/val.jsonl").exists():
        return lines(path / "copa/val.jsonl")
    saved = path / "olmo_hf_datasets/super_glue/copa"
    if not saved.is_dir():
        raise UserError(
            f"{path} has no English COPA; add copa/val.jsonl from SuperGLUE, or"
            f" {saved.relative_to(path)}/ as datasets saves it"
        )
    try:
        from datasets import load_from_disk  # large, and no other task needs it
    except ImportError as error:
        raise UserError(f"{saved} needs the package datasets; run: pip install datasets") from error
    place = next(part for part in (saved / "validation", saved) if part.is_dir())
    return [dict(row) for row in load_from_disk(str(place))]


def unquoted(text: str) -> str:
    """Undo the quotes of CSV that some rows carry."""
    quoted = len(text) > 1 and text.startswith('"') and text.endswith('"') and '""' in text
    return text[1:-1].replace('""', '"') if quoted else text


def _packed(path: Path) -> Path:
    return path if path.suffix == ".xz" else path.with_name(f"{path.name}.xz")


def _rows(path: Path) -> list[str]:
    return [line.removesuffix("\r") for line in text(path).split("\n") if line.strip()]
