"""Settings: the file, then a section, then the command line; every mistake is a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes_peft.config import check, load
from recipes_peft.errors import UserError


@dataclass(frozen=True)
class Settings:
    name: str
    steps: int | None
    rate: float
    words: list[str] | None


FILE = "name: one\nsteps: 5\nrate: 1.0e-3\nwords: null\nsmoke:\n  steps: 1\n  name: small\n"


def read(tmp_path: Path, text: str, *argv: str) -> Settings:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load(Settings, file, argv, "a recipe")


def test_the_file_alone(tmp_path: Path) -> None:
    assert read(tmp_path, FILE) == Settings("one", 5, 1e-3, None)


def test_the_command_line_wins_over_a_section_which_wins_over_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, FILE, "--smoke") == Settings("small", 1, 1e-3, None)
    given = read(tmp_path, FILE, "--smoke", "--steps", "9", "--rate", "2", "--words", "a", "b")
    assert given == Settings("small", 9, 2.0, ["a", "b"])


def test_a_section_of_two_words_is_a_flag_with_a_hyphen(tmp_path: Path) -> None:
    text = FILE.replace("smoke:", "a_paper:")
    assert read(tmp_path, text, "--a-paper").steps == 1
    assert read(tmp_path, text).steps == 5


def test_values_are_checked_by_name() -> None:
    check(Settings("one", 0, 0.5, ["a", "b"]), zero=["steps"], choices={"words": ("a", "b")})
    check(Settings("one", None, 0.5, None))
    for settings, said in (
        (Settings("one", -1, 0.5, None), "steps is -1; it must be zero or above"),
        (Settings("one", 1, 0.0, None), "rate is 0.0; it must be above zero"),
        (Settings("two", 1, 0.5, None), "name is 'two'; choose from one"),
    ):
        with pytest.raises(UserError, match=f"^{said}$"):
            check(settings, zero=["steps"], choices={"name": ("one",)})
    with pytest.raises(UserError, match="words is 'c'; choose from a, b"):
        check(Settings("one", 1, 0.5, ["a", "c"]), choices={"words": ("a", "b")})


def test_another_file(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(FILE.replace("one", "two"))
    assert read(tmp_path, FILE, "--config", str(other)).name == "two"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no settings"),
        ("- a\n- b\n", "holds no settings"),
        ("name: [unclosed", "is not valid YAML"),
        (FILE + "speed: 3\n", "unknown key 'speed'; the keys are name, rate, steps, words"),
        (FILE + "  speed: 3\n", "smoke has the unknown key 'speed'"),
        (FILE.replace("rate: 1.0e-3\n", ""), "the key 'rate' is missing"),
        (FILE.replace("steps: 5", "steps: 5.5"), "steps is 5.5; it must be a whole number"),
        (FILE.replace("steps: 5", "steps: true"), "steps is True; it must be a whole number"),
        (FILE.replace("rate: 1.0e-3", "rate: fast"), "rate is 'fast'; it must be a number"),
        (FILE.replace("name: one", "name: 1"), "name is 1; it must be text"),
        (FILE.replace("words: null", "words: [1]"), "must be a list of words"),
        ("name: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
    assert "config.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--steps", "many"], "--steps is 'many'; it must be a whole number"),
        (["--speed", "3"], "unrecognized arguments: --speed 3; --help lists the options"),
        (["--config", "nowhere.yaml"], "cannot read the settings nowhere.yaml"),
    ],
)
def test_a_bad_command_line_is_named(tmp_path: Path, argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, FILE, *argv)
    assert said in str(caught.value)
