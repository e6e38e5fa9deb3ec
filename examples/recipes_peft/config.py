"""Read a recipe's settings: a flat YAML file, its sections of overrides, then the command line.

The file's top level holds one value per field of the recipe's dataclass. A key that holds a mapping
is a section (`smoke:`, `paper:`): it replaces some of these values and gives the flag `--smoke`.
Every field is also an option of the command line, which wins.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from recipes_peft.errors import UserError

__all__ = ["check", "load"]

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def load(settings: type[T], default: Path, argv: Sequence[str], description: str) -> T:
    """Give the settings that the file, the sections asked for and the command line make together.

    `--config FILE` names another file than `default`. A field's help is its metadata's "help".

    Raises:
        UserError: an unreadable file, an unknown key or option, or a value of the wrong type.
    """
    first = _Parser(add_help=False)
    first.add_argument("--config", type=Path, default=default)
    path = first.parse_known_args(argv)[0].config
    values, sections = _read(path)
    hints = typing.get_type_hints(settings)

    parser = _Parser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help="file of settings", default=default)
    for name in sections:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, action="store_true", help=f"apply `{name}:` of the file")
    for field in fields(settings):  # type: ignore[arg-type]
        option = f"--{field.name.replace('_', '-')}"
        nargs = "+" if list in _origins(hints[field.name]) else None
        parser.add_argument(option, nargs=nargs, metavar="X", help=field.metadata.get("help"))
    given = vars(parser.parse_args(argv))

    known = {field.name for field in fields(settings)}  # type: ignore[arg-type]
    for name, section in {"the top level": values, **sections}.items():
        if unknown := sorted(set(section) - known):
            raise UserError(
                f"{path}: {name} has the unknown key {unknown[0]!r}; the keys are"
                f" {', '.join(sorted(known))}"
            )
    for name, section in sections.items():
        if given.pop(name, False):
            values |= section
    if missing := sorted(known - set(values) - set(given)):
        raise UserError(f"{path}: the key {missing[0]!r} is missing; add it to the file")
    made = {n: _convert(f"{path}: {n}", v, hints[n]) for n, v in values.items() if n not in given}
    made |= {
        name: _convert(f"--{name.replace('_', '-')}", value, hints[name])
        for name, value in given.items()
        if name in known
    }
    return settings(**made)


def check(
    settings: Any, zero: Sequence[str] = (), choices: Mapping[str, Collection[str]] | None = None
) -> None:
    """Refuse numbers that are not above zero, and words that are not among those to choose from.

    Raises:
        UserError: such a value; fields named in `zero` may be zero as well.
    """
    for name, value in vars(settings).items():
        least = 0 if name in zero else 1e-12
        if isinstance(value, int | float) and value < least:
            allowed = "zero or above" if name in zero else "above zero"
            raise UserError(f"{name} is {value}; it must be {allowed}")
    for name, known in (choices or {}).items():
        given = getattr(settings, name)
        for word in [given] if isinstance(given, str) else given:
            if word not in known:
                raise UserError(f"{name} is {word!r}; choose from {', '.join(known)}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the settings {path} ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML ({error}); correct it") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no settings; it must have lines of the form 'key: value'")
    sections = {str(k): dict(v) for k, v in content.items() if isinstance(v, Mapping)}
    return {str(k): v for k, v in content.items() if not isinstance(v, Mapping)}, sections


def _origins(hint: Any) -> list[Any]:
    """Give the plain types of an annotation: `list[str] | None` has list and NoneType."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [typing.get_origin(part) or part for part in parts]


def _convert(name: str, value: Any, hint: Any) -> Any:
    allowed = _origins(hint)
    if value is None and types.NoneType in allowed:
        return None
    if list in allowed:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    # A bool is an int for Python but never a count for a user.
    elif str in allowed and isinstance(value, str):
        return value
    elif not isinstance(value, bool):
        for kind in (int, float):
            if kind in allowed and not (kind is int and isinstance(value, float)):
                try:
                    return kind(value)
                except (TypeError, ValueError):
                    break
    words = {str: "text", int: "a whole number", float: "a number", list: "a list of words"}
    wanted = " or ".join(words.get(kind, "nothing") for kind in allowed)
    raise UserError(f"{name} is {value!r}; it must be {wanted}")
