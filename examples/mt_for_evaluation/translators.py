"""Machine translation from English by whatever there is: NLLB, a command, a Python call, a file.

All are a `Translator`: texts and a language in, as many texts out. Which one serves a language is
said in a word of the settings, `LANGUAGE=KIND:REST`, where `*` stands for every language.
"""

from __future__ import annotations

import hashlib
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from language_table import Language
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from recipes_peft.errors import UserError, explained

__all__ = [
    "CallableTranslator",
    "CommandTranslator",
    "MissingError",
    "NllbTranslator",
    "PrecomputedTranslator",
    "Translator",
    "make",
    "sentences",
]

_END = re.compile(r"(?<=[.!?;:\u3002\uff01\uff1f])\s+")


class MissingError(UserError):
    """A translator that is not installed here, or does not have the language."""


class Translator(Protocol):
    """Translates from English; `system` names it and its settings, for a cache and for reports."""

    system: str

    def translate(self, texts: Sequence[str], language: Language) -> list[str]:
        """Give a translation of each text, in their order."""
        ...


class NllbTranslator:
    """NLLB-200 or a model like it, by folder or hub id; decoding by beams.

    A text of more tokens than `longest` is translated sentence by sentence. The length of an answer
    is limited to twice that of its source.
    """

    def __init__(self, name: str, beams: int = 4, batch_size: int = 8, longest: int = 200) -> None:
        kinds = (OSError, ValueError)
        with explained(*kinds, before=f"cannot load the translator {name!r}: "):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, src_lang="eng_Latn")
            self.model: Any = AutoModelForSeq2SeqLM.from_pretrained(name).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.system = f"nllb:{name}, {beams} beams"
        self.beams, self.batch_size, self.longest = beams, batch_size, longest

    def translate(self, texts: Sequence[str], language: Language) -> list[str]:
        """Translate to the language's FLORES-200 code.

        Raises:
            MissingError: the language has none, or the model's vocabulary lacks it.
        """
        target = self.tokenizer.convert_tokens_to_ids(language.flores or "")
        if language.flores is None or target in (None, self.tokenizer.unk_token_id):
            raise MissingError(
                f"{self.system} does not have {language.code} ({language.flores or 'no code'});"
                " leave it out of --languages, or give another translator for it"
            )
        pieces = [(i, part) for i, text in enumerate(texts) for part in self._split(text)]
        order = sorted(range(len(pieces)), key=lambda k: len(pieces[k][1]))
        done: dict[int, str] = {}
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            for k, answer in zip(
                some, self._batch([pieces[k][1] for k in some], target), strict=True
            ):
                done[k] = answer  # noqa: PERF403 - of several batches
        parts: list[list[str]] = [[] for _ in texts]
        for k, (i, _) in enumerate(pieces):
            parts[i].append(done[k])
        return [" ".join(found) for found in parts]

    def _split(self, text: str) -> list[str]:
        long = len(self.tokenizer(text).input_ids) > self.longest
        return sentences(text) if long else [text]

    @torch.no_grad()
    def _batch(self, texts: Sequence[str], target: int) -> list[str]:
        inputs = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=512
        ).to(self.model.device)
        output = self.model.generate(
            **inputs,
            forced_bos_token_id=target,
            num_beams=self.beams,
            max_new_tokens=2 * inputs["input_ids"].shape[1] + 8,
        )
        return [a.strip() for a in self.tokenizer.batch_decode(output, skip_special_tokens=True)]


class CommandTranslator:
    """A program that translates its standard input, or several in a row: `apertium -u eng-spa`.

    Programs are parted by `|`; no shell is involved. Each text is a call of its own, for programs
    may carry words over from one line to the next.
    """

    def __init__(self, command: str, timeout_s: float = 120.0) -> None:
        self.system = f"command:{command}"
        self.timeout_s = timeout_s
        words = shlex.split(command)
        self.programs: list[list[str]] = [[]]
        for word in words:
            if word == "|":
                self.programs.append([])
            else:
                self.programs[-1].append(word)
        for program in self.programs:
            if not program or shutil.which(program[0]) is None:
                name = program[0] if program else command
                raise MissingError(
                    f"there is no program {name!r} for {self.system}; install it (Debian has"
                    " apertium and its languages as packages), or take the language out of"
                    " --translations"
                )

    def translate(self, texts: Sequence[str], language: Language) -> list[str]:
        """Translate one after the other.

        Raises:
            MissingError: a program ends with an error.
            UserError: it takes too long, or writes no UTF-8.
        """
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> str:
        said = " ".join(text.split()).encode()
        for program in self.programs:
            before = f"{self.system} failed: "
            with explained(subprocess.TimeoutExpired, before=before, after="; use a faster one"):
                done = subprocess.run(
                    program, input=said, capture_output=True, check=False, timeout=self.timeout_s
                )
            if done.returncode:
                words = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
                raise MissingError(
                    f"{self.system} failed with status {done.returncode} ({words[-1]}); check that"
                    " its language pair is installed"
                )
            said = done.stdout
        with explained(UnicodeDecodeError, before=f"{self.system} does not write UTF-8: "):
            return said.decode("utf-8").strip()


class CallableTranslator:
    """A function of Python, called for each text: any package that translates."""

    def __init__(self, function: Callable[[str], str], system: str) -> None:
        self.function, self.system = function, system

    @classmethod
    def named(cls, name: str) -> CallableTranslator:
        """Find a function by `module.name`, or a method by `module.Class.name`.

        The class is made without arguments. Only name what you trust: it is imported.

        Raises:
            MissingError: there is no such module or name.
        """
        owner, _, last = name.rpartition(".")
        try:
            found: Any = pkgutil.resolve_name(owner)
            found = getattr(found() if isinstance(found, type) else found, last)
        except (ImportError, AttributeError, ValueError) as error:
            raise MissingError(
                f"cannot import the translator {name!r} ({error}); install its package, or take"
                " the language out of --translations"
            ) from error
        return cls(found, f"python:{name}")

    def translate(self, texts: Sequence[str], language: Language) -> list[str]:
        """Call the function for each text.

        Raises:
            UserError: it gives something else than text.
        """
        found = [self.function(text) for text in texts]
        if odd := [answer for answer in found if not isinstance(answer, str)]:
            raise UserError(f"{self.system} gave {odd[0]!r}; it must give a text for each text")
        return found


class PrecomputedTranslator:
    """Translations made elsewhere: JSON lines with `source`, `target` and perhaps `language`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, str], str] = {}
        with explained(OSError, UnicodeDecodeError, before="cannot read the translations: "):
            content = path.read_bytes()
            lines = content.decode("utf-8").split("\n")
        # of another content it is another system, for the cache of translations
        self.system = f"file:{path.name} {hashlib.sha256(content).hexdigest()[:8]}"
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}: "
                with explained(ValueError, KeyError, TypeError, before=where, after=" is missing"):
                    row = json.loads(line)
                    self.found[row.get("language", "*"), row["source"]] = row["target"]

    def translate(self, texts: Sequence[str], language: Language) -> list[str]:
        """Look the texts up, by the language's code first.

        Raises:
            UserError: the file lacks one of them.
        """
        answers = []
        for text in texts:
            found = self.found.get((language.code, text), self.found.get(("*", text)))
            if found is None:
                raise UserError(
                    f"{self.path} has no translation to {language.code} of {text[:60]!r}; translate"
                    " exactly the texts of the task, or take the language out of --translations"
                )
            answers.append(found)
        return answers


KINDS: dict[str, Callable[[str], Translator]] = {
    "nllb": NllbTranslator,
    "command": CommandTranslator,
    "python": CallableTranslator.named,
    "file": lambda rest: PrecomputedTranslator(Path(rest)),
}


def make(word: str) -> tuple[str, Callable[[], Translator]]:
    """Give the language of a word `LANGUAGE=KIND:REST`, and what makes its translator.

    Raises:
        UserError: the word has another form, or there is no such kind.
    """
    language, _, spec = word.partition("=")
    kind, _, rest = spec.partition(":")
    if not language or kind not in KINDS or not rest:
        raise UserError(
            f"translations has {word!r}; write LANGUAGE=KIND:REST, such as 'spa=command:apertium -u"
            f" eng-spa', with one of the kinds {', '.join(KINDS)}"
        )
    return language, lambda: KINDS[kind](rest)


def sentences(text: str) -> list[str]:
    """Cut a text after the signs that end a sentence or a clause of a list."""
    return [part for part in _END.split(text.strip()) if part] or [text]
