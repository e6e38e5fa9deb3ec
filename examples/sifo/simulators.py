"""What a chain should give: a text that is edited, and a list that is guarded, step by step.

States are values and steps are pure. Both read the official wording and that of the generators.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from samples import SifoSample

__all__ = [
    "Edit",
    "SecurityState",
    "TextModState",
    "read_edit",
    "replay_security",
    "replay_text",
    "run_edits",
]

# ---- text modification --------------------------------------------------------------------------

_EDIT = re.compile(
    r'\b(?P<kind>delete|remove|replace|insert)\b[^"]*"(?P<first>[^"]+)"'
    r'(?:[^"]*\b(?P<link>with|by|before|after)\b[^"]*"(?P<second>[^"]+)")?',
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Edit:
    """One edit of a text: `delete`, `replace`, `before` or `after`; at `word`, with `new`."""

    kind: str
    word: str
    new: str = ""


@dataclass(frozen=True)
class TextModState:
    """A text between two edits.

    Source:
        SIFo's golds, as measured for the specification (section 2.1): a deletion drops whole tokens
        that are equal to the word; all other edits substitute it wherever it stands, inside of
        longer words as well. Both tell capitals from small letters.
    """

    text: str

    def has(self, edit: Edit) -> bool:
        """Say whether the edit finds its word."""
        return edit.word in (self.text.split() if edit.kind == "delete" else self.text)

    def after(self, edit: Edit) -> TextModState:
        """Give the text after an edit.

        Raises:
            ValueError: there is no such kind of edit.
        """
        word, new = edit.word, edit.new
        if edit.kind == "delete":
            return TextModState(" ".join(token for token in self.text.split() if token != word))
        put = {"replace": new, "before": f"{new} {word}", "after": f"{word} {new}"}
        if edit.kind not in put:
            raise ValueError(f"an edit is {edit.kind!r}; choose delete, {', '.join(put)}")
        return TextModState(self.text.replace(word, put[edit.kind]))


def read_edit(instruction: str) -> Edit:
    """Read the edit that an instruction asks for.

    Raises:
        ValueError: it names no edit with its words in double quotes.
    """
    found = _EDIT.search(instruction)
    kind = found["kind"].lower() if found else ""
    if found and kind in ("delete", "remove"):
        return Edit("delete", found["first"])
    if found and found["second"]:
        link = found["link"].lower()
        if kind == "insert" and link in ("before", "after"):
            return Edit(link, found["second"], found["first"])
        if kind == "replace" and link in ("with", "by"):
            return Edit("replace", found["first"], found["second"])
    raise ValueError(
        f"{instruction!r} names no edit; it must delete, replace or insert words in double quotes"
    )


def run_edits(text: str, edits: Sequence[Edit]) -> list[str]:
    """Give the texts after each of the edits."""
    state, found = TextModState(text), []
    for edit in edits:
        state = state.after(edit)
        found.append(state.text)
    return found


def replay_text(sample: SifoSample) -> list[str]:
    """Follow a sample's instructions from its context alone."""
    return run_edits(sample.context, [read_edit(step) for step in sample.steps])


# ---- security -----------------------------------------------------------------------------------

_QUOTED = r"(?<!\w)['\"](?P<{}>.+?)['\"](?!\w)"
_PASSWORD = re.compile(rf"\bpassword is {_QUOTED.format('word')}", re.IGNORECASE)
_OWNER = re.compile(r"\b[Oo]nly (?P<name>[^,]+?)(?:, [^,]+,)? has (?:the )?(?:permission|right)\b")
_ADD = re.compile(rf"\badds?\b[^'\"]*?{_QUOTED.format('item')}", re.IGNORECASE)
_CHANGE = re.compile(rf"\bpassword\b[^'\"]*\bto\b\s*{_QUOTED.format('word')}", re.IGNORECASE)
_ADDS = re.compile(
    rf"^(?P<who>.+?) adds (?:{_QUOTED.format('item')}|(?P<bare>.+?)(?: (?:in)?to [^.]*)?\.)"
)
_GRANTS = re.compile(
    r"^(?P<who>.+?) (?:gives|grants) (?P<whom>.+?),? (?:the )?(?:permission|right)\b"
)


@dataclass(frozen=True)
class SecurityState:
    """A list that only a password opens, or only those who hold the right to add to it.

    With a password (`password` is not ""), an instruction counts if its first word is the current
    one. Otherwise it counts if who acts is a holder; a title does not tell two persons apart. An
    instruction that does not count changes nothing.

    Source:
        SIFo's golds, as measured for the specification (section 2.4); its patterns were found on
        the official data themselves.
    """

    items: tuple[str, ...]
    password: str = ""
    holders: tuple[str, ...] = ()

    @property
    def listed(self) -> str:
        """Give the list as it is answered: in the order of insertion."""
        return ", ".join(self.items)

    def holds(self, name: str) -> bool:
        """Say whether a person has the right to add."""
        return any(_same_person(name, holder) for holder in self.holders)

    @classmethod
    def read(cls, context: str) -> SecurityState:
        """Read a scenario: what is on the list, and the password or who may add.

        Raises:
            ValueError: the scenario has neither, or no first item in quotes.
        """
        secret = _PASSWORD.search(context)
        rule = re.split(r"\bTo add\b|\bpassword\b|\b[Oo]nly\b", context)[0]
        items = tuple(match["item"] for match in re.finditer(_QUOTED.format("item"), rule))
        owner = _OWNER.search(context)
        if not items or not (secret or owner):
            raise ValueError(
                f"{context!r} is no scenario; it needs a first item in quotes, and a password or"
                " the one person who may add"
            )
        if secret:
            return cls(items, password=secret["word"])
        return cls(items, holders=(owner["name"],)) if owner else cls(items)

    def after(self, instruction: str) -> SecurityState:
        """Give the state after an instruction."""
        return self._by_password(instruction) if self.password else self._by_person(instruction)

    def _by_password(self, instruction: str) -> SecurityState:
        first = (instruction.split(maxsplit=1) or [""])[0]
        if first.strip("'\",.:;") != self.password:
            return self
        if change := _CHANGE.search(instruction):
            return replace(self, password=change["word"])
        if add := _ADD.search(instruction):
            return replace(self, items=(*self.items, add["item"]))
        return self

    def _by_person(self, instruction: str) -> SecurityState:
        if grant := _GRANTS.search(instruction):
            if self.holds(grant["who"]):
                return replace(self, holders=(*self.holders, grant["whom"]))
            return self
        adds = _ADDS.search(instruction)
        if adds and self.holds(adds["who"]):
            return replace(self, items=(*self.items, adds["item"] or adds["bare"]))
        return self


def replay_security(sample: SifoSample) -> list[str]:
    """Follow a sample's instructions from its scenario alone."""
    state, found = SecurityState.read(sample.context), []
    for step in sample.steps:
        state = state.after(step)
        found.append(state.listed)
    return found


def _same_person(one: str, other: str) -> bool:
    """Say whether the shorter name ends the longer one; articles and capitals do not count."""
    words = [re.sub(r"^the ", "", name.lower()).split() for name in (one, other)]
    short, long = sorted(words, key=len)
    return bool(short) and short == long[-len(short) :]
