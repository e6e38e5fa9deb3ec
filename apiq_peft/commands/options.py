"""Options of the commands: from the command line, and from a file under it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


class CommandParser(argparse.ArgumentParser):
    """A parser that raises what is wrong, and knows its options by the names of a file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.by_name: dict[str, argparse.Action] = {}
        self.replaces: dict[str, Collection[str]] = {}  # options of a file, by that of a flag
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        """Add one; a flag that takes a value can also be given in a file."""
        action = super().add_argument(*names, **kwargs)
        if action.option_strings and action.dest not in ("help", "config"):
            self.by_name[action.dest] = action
        return action

    def error(self, message: str) -> NoReturn:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; `{self.prog} --help` lists what is allowed")


def add_config(parser: CommandParser) -> None:
    """Let a command take its options from a file."""
    parser.set_defaults(parser=parser)
    parser.add_argument(
        "--config",
        type=Path,
        help="JSON or flat YAML with options by their names, such as group_size; what is given on"
        " the command line counts more",
    )


def add_machine(parser: CommandParser) -> None:
    """Let a command choose the device and the dtype of its models."""
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of the model; default: that of its files"
    )


def parse(parser: CommandParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and, if it names one, the file with further options.

    Raises:
        ValueError: an option that is not known or not allowed, on the command line or in the file.
        ImportError: the file is YAML and pyyaml is not installed.
        OSError: the file cannot be read.
    """
    options = parser.parse_args(arguments)
    path = getattr(options, "config", None)
    if path is not None:
        chosen: CommandParser = options.parser
        values = _values(path, chosen.by_name)
        for name in _given(parser, chosen, arguments) & chosen.replaces.keys():
            values = {n: value for n, value in values.items() if n not in chosen.replaces[name]}
        chosen.set_defaults(**values)
        options = parser.parse_args(arguments)
    return options


def _given(
    parser: CommandParser, chosen: CommandParser, arguments: Sequence[str] | None
) -> set[str]:
    """Give the options of the chosen command that stand on the command line itself."""
    defaults = {name: action.default for name, action in chosen.by_name.items()}
    try:
        for action in chosen.by_name.values():
            action.default = argparse.SUPPRESS
        return vars(parser.parse_args(arguments)).keys() & defaults.keys()
    finally:
        for name, action in chosen.by_name.items():
            action.default = defaults[name]


def _values(path: Path, known: Mapping[str, argparse.Action]) -> dict[str, Any]:
    held = _read(path)
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}; give names and values")
    held = held.get("settings", held)  # a settings.json, which says more than the options
    unknown = sorted(str(name) for name in held if name not in known)
    if unknown:
        raise ValueError(
            f"{path} has unknown options {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return {name: _value(path, known[name], v) for name, v in held.items() if v is not None}


def _read(path: Path) -> Any:
    text = read_text(path)
    if path.suffix not in (".yaml", ".yml"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"{path} is not JSON ({error}); name it .yaml if it is YAML"
            ) from error
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError(f"{path} is YAML; pip install pyyaml, or give JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML ({error})") from error


def _value(path: Path, action: argparse.Action, given: Any) -> Any:
    """Read a value, or a list where the command line takes several, as if it were text there."""
    if action.nargs == "+" and isinstance(given, list) and given:
        return [_one(path, action, item) for item in given]
    one = _one(path, action, given)
    return [one] if action.nargs == "+" else one


def _one(path: Path, action: argparse.Action, given: Any) -> Any:
    if isinstance(given, list | dict):
        raise ValueError(f"{path}: {action.dest} is {given!r}; give one value")
    read: Any = action.type or str
    try:
        value = read(str(given))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{path}: {action.dest} is {given!r} ({error})") from error
    if action.choices is not None and value not in action.choices:
        allowed = ", ".join(map(str, action.choices))
        raise ValueError(f"{path}: {action.dest} is {given!r}; choose from {allowed}")
    return value


def read_text(path: Path) -> str:
    """Read a file of text.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error


def truth(text: str) -> bool:
    """Read true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


def device_of(text: str) -> torch.device:
    """Give the device of that name, which works.

    Raises:
        ValueError: there is none.
    """
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    # torch built without CUDA says so by an assertion
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {text!r} cannot be used here ({reason}); give cpu, or a device that is there"
        ) from error
    return device


def dtype_of(name: str) -> torch.dtype | None:
    """Give a dtype by its name, None for that of the files."""
    return None if name == "auto" else getattr(torch, name)
