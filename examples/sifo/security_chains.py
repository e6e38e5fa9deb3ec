"""Chains of rules for a list: who may add to it, by password or by permission."""

from __future__ import annotations

import random
from collections.abc import Iterator

from lexicons import Lexicon, Scene
from samples import SifoSample
from simulators import SecurityState

__all__ = ["make"]

# The official mixes of steps (specification, section 2.4): whether it counts, and what it is.
_PASSWORD = {(True, "add"): 166, (False, "add"): 121, (True, "change"): 56, (False, "change"): 55}
_PERMISSION = {(True, "add"): 185, (False, "add"): 129, (True, "grant"): 100}
# How often a step that does not count has a password or a name that stands in the chain.
_STALE = 0.5
_TOLD = (
    "The {place} keeps a {listed}. Its first entry is '{item}'. To add an entry or to change the"
    " password, an instruction must begin with the current password; all others are ignored. The"
    " current password is '{password}'."
)
_OWNED = (
    "The {place} keeps a {listed}. Its first entry is '{item}'. At the start, only {owner} has the"
    " right to add entries; whoever has the right can give it to others and keeps it. Entries by"
    " others are ignored."
)


def make(generator: random.Random, lexicon: Lexicon, steps: int) -> SifoSample:
    """Make a chain of either family, with as many of each kind of step as the official data."""
    scene = generator.choice(lexicon.scenes)
    items = generator.sample(scene.items, min(steps + 1, len(scene.items)))
    family = generator.choice((_by_password, _by_person))
    context, instructions = family(generator, lexicon, scene, items, steps)
    state, golds = SecurityState.read(context), []
    for instruction in instructions:
        state = state.after(instruction)
        golds.append(state.listed)
    meta = {"family": family.__name__.strip("_")}
    return SifoSample("security", tuple(instructions), tuple(golds), context, meta)


def _by_password(
    generator: random.Random, lexicon: Lexicon, scene: Scene, items: list[str], steps: int
) -> tuple[str, list[str]]:
    passwords = _passwords(generator, lexicon)
    current, known, made = next(passwords), [], []
    told = {"place": scene.place, "listed": scene.listed, "item": items[0]}
    context = _TOLD.format(**told, password=current)
    for item in _after_first(items, steps):
        counts, what = _drawn(generator, _PASSWORD)
        stale = [word for word in known if word != current]
        used = current
        if not counts:
            used = (
                generator.choice(stale)
                if stale and generator.random() < _STALE
                else next(passwords)
            )
        if what == "add":
            made.append(f"{used} Add '{item}' to the {scene.listed}.{_question(scene)}")
            continue
        new = next(passwords)
        made.append(f"{used} Change the password to '{new}'.{_question(scene)}")
        known += [current, new]  # the one is stale, or the other was never valid
        current = new if counts else current
    return context, made


def _by_person(
    generator: random.Random, lexicon: Lexicon, scene: Scene, items: list[str], steps: int
) -> tuple[str, list[str]]:
    names = generator.sample(lexicon.names, 6)
    holders, others, made = names[:1], names[1:], []
    told = {"place": scene.place, "listed": scene.listed, "item": items[0]}
    context = _OWNED.format(**told, owner=names[0])
    for item in _after_first(items, steps):
        counts, what = _drawn(generator, _PERMISSION)
        if not others:
            counts, what = True, "add"
        if what == "grant":
            new = others.pop()
            giver = generator.choice(holders)
            made.append(f"{giver} gives {new} the right to add entries.{_question(scene)}")
            holders.append(new)
            continue
        # the newest holder shows whether the step before was followed
        who = generator.choice((holders[-1], generator.choice(holders)))
        if not counts:
            who = generator.choice(others)
        made.append(f"{who} adds '{item}' to the {scene.listed}.{_question(scene)}")
    return context, made


def _drawn(generator: random.Random, mix: dict[tuple[bool, str], int]) -> tuple[bool, str]:
    return generator.choices(list(mix), weights=list(mix.values()))[0]


def _passwords(generator: random.Random, lexicon: Lexicon) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        word = f"{generator.choice(lexicon.stems)}{generator.randint(10, 99)}"
        if word not in seen:
            seen.add(word)
            yield word


def _after_first(items: list[str], steps: int) -> list[str]:
    return [items[1 + i % (len(items) - 1)] for i in range(steps)]


def _question(scene: Scene) -> str:
    return f" What is on the {scene.listed}?"
