"""The benchmark's own mechanics, without a model: criteria 1 to 4 on any chains."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import simulators
from faults import RESPONDERS, chain_strength, predicted, skip_at_random
from samples import TASKS, SifoSample
from verifier import Report, aggregate, normalise, score

__all__ = [
    "OFFICIAL",
    "is_official",
    "mechanics",
    "oracle_table",
    "promised",
    "propagation",
    "replayed",
]

SKIP = 0.1  # the chance of the propagation oracle
CHAINS = 6000  # that it is run on, at least; 2,000 are promised

# Sample accuracy, instruction accuracy and depth of the responders on the official files, as
# measured for the specification (section 4); where it leaves out the depth, it is None.
OFFICIAL: Mapping[str, Mapping[str, tuple[float, float, float | None]]] = {
    "gold answers": {
        "text_modification": (100, 100, 4.0), "qa": (100, 100, 4.6), "math": (100, 100, 4.015),
        "security": (100, 100, 4.06),
    },
    "copies the context": {
        "text_modification": (1.0, 2.05, 0.05), "qa": (0, 48.75, 1.0), "math": (0, 0, 0),
        "security": (0, 25.32, 0.975),
    },
    "lags one step": {
        "text_modification": (3.5, 2.77, 0.05), "qa": (0, 49.21, 0.99), "math": (12.0, 6.27, 0),
        "security": (36.5, 57.17, 0.975),
    },
    "repeats the instruction": {
        "text_modification": (0, 0, 0), "qa": (0, 0.71, 0.01), "math": (2.0, 17.18, 0.445),
        "security": (0, 0.25, 0),
    },
    "all golds in every answer": dict.fromkeys(TASKS, (100, 100, None)),
    "empty": dict.fromkeys(TASKS, (0, 0, 0)),
}  # fmt: skip
# by which the official files are known, whatever they are called: checksums of their content
CONTENT = {
    "text_modification": "259267b95df3b32e",
    "qa": "4222e0c98aaeda62",
    "math": "3c3b3434d9421807",
    "security": "d0df1768a5e74503",
}
REPLAYS = {
    "text_modification": simulators.replay_text,
    "security": simulators.replay_security,
}
# how many official steps each simulator must give exactly
REPLAYED = {"text_modification": 800, "security": 801}


def is_official(task: str, samples: Sequence[SifoSample]) -> bool:
    """Say whether samples are those of the official file of a task, in its order."""
    content = json.dumps([[s.context, *s.steps, *s.golds] for s in samples])
    return hashlib.sha256(content.encode()).hexdigest()[:16] == CONTENT.get(task)


def oracle_table(chains: Mapping[str, Sequence[SifoSample]]) -> dict[str, dict[str, Report]]:
    """Score the responders of known behaviour on each task."""
    return {
        name: {
            task: aggregate([score(task, s.golds, respond(s)) for s in samples], draws=0)
            for task, samples in chains.items()
        }
        for name, respond in RESPONDERS.items()
    }


def replayed(task: str, samples: Sequence[SifoSample]) -> tuple[int, int]:
    """Give how many golds a simulator reproduces, after normalisation, and of how many.

    In text modification each step starts from the gold before it, as the official count does. A
    sample that a simulator cannot read counts as not reproduced.
    """
    same = 0
    for sample in samples:
        before = [sample.context, *sample.golds[:-1]]
        try:
            if task == "text_modification":
                found = [
                    simulators.run_edits(text, [simulators.read_edit(step)])[0]
                    for text, step in zip(before, sample.steps, strict=True)
                ]
            else:
                found = REPLAYS[task](sample)
        except ValueError:
            continue
        pairs = zip(found, sample.golds, strict=True)
        same += sum(normalise(task, a) == normalise(task, b) for a, b in pairs)
    return same, sum(len(sample.steps) for sample in samples)


def propagation(samples: Sequence[SifoSample], repeats: int, seed: int = 0) -> dict[str, Any]:
    """Let an oracle skip steps of text modification by chance and go on from its own state.

    Gives, by the length of chains, the final accuracy measured and that which the formula predicts,
    and the accuracy by position of all.
    """
    generator, scores = random.Random(seed), []
    for _ in range(repeats):
        for sample in samples:
            edits = [simulators.read_edit(step) for step in sample.steps]
            texts = skip_at_random(generator, sample.context, edits, SKIP)
            scores.append(score(sample.task, sample.golds, texts))
    strength = chain_strength(samples)
    lengths = sorted({len(found.hits) for found in scores})
    finals = {n: [found.final for found in scores if len(found.hits) == n] for n in lengths}
    return {
        "chains": len(scores),
        "measured": {n: sum(f) / len(f) for n, f in finals.items()},
        "predicted": {n: predicted(strength, SKIP, n) for n in lengths},
        "positions": [value / 100 for value in aggregate(scores, draws=0).positions],
    }


def mechanics(
    made: Mapping[str, Sequence[SifoSample]],
    edited: Sequence[SifoSample],
    own: Mapping[str, Sequence[SifoSample]],
) -> dict[str, Any]:
    """Measure criteria 1 to 4; `edited` are chains of text modification of 3 to 5 steps.

    What files the user has of the four tasks is measured beside them. Samples of text modification
    with a step that cannot be read as an edit are left out of strength and propagation.
    """
    found: dict[str, Any] = {
        "oracles": _plain(oracle_table(made)),
        "steps": {task: _mean_length(samples) for task, samples in made.items()},
        "replayed": {task: replayed(task, made[task]) for task in REPLAYS if task in made},
        "strength": asdict(chain_strength(edited)),
        "propagation": propagation(edited, -(-CHAINS // len(edited))),
    }
    if own:
        texts = own.get("text_modification", [])
        readable = [sample for sample in texts if _is_readable(sample)]
        found["own"] = {
            "official": [task for task, samples in own.items() if is_official(task, samples)],
            "oracles": _plain(oracle_table(own)),
            "replayed": {task: replayed(task, own[task]) for task in REPLAYS if task in own},
            "unreadable": len(texts) - len(readable),
        }
        if readable:
            found["own"]["strength"] = asdict(chain_strength(readable))
            found["own"]["propagation"] = propagation(readable, 20)
    return found


def promised(found: Mapping[str, Any]) -> dict[str, bool]:
    """Say which of criteria 1 to 4 are met; of the user's files the official ones are judged."""
    oracles, strength, spread = found["oracles"], found["strength"], found["propagation"]
    steps = found["steps"]
    gold, empty = oracles["gold answers"], oracles["empty"]
    full = all(_close(gold[t], (100, 100, steps[t])) for t in steps)
    none = all(_close(empty[t], (0, 0, 0)) for t in steps)
    differences = [abs(spread["measured"][n] - spread["predicted"][n]) for n in spread["measured"]]
    positions = spread["positions"]
    falls = all(later < sooner for sooner, later in pairwise(positions))
    kept = {
        "1 gold answers score 100 with full depth, empty ones 0": full and none,
        "2 simulators give all golds of generated chains": all(
            same == count for same, count in found["replayed"].values()
        ),
        "3 omitting a step fails the final check in 85 % or more": strength["omission"] >= 0.85,
        "3 every step is necessary in 70 % of chains or more": strength["necessary"] >= 0.70,
        "3 20 % of edits or more aim at what an earlier one brought in": strength["linked"] >= 0.20,
        "4 errors propagate by the formula, within 0.03": spread["chains"] >= 2000
        and max(differences) <= 0.03,
        "4 accuracy falls from each position to the next": falls,
    }
    if "own" in found and (official := found["own"]["official"]):
        own = found["own"]
        kept["1 the oracle table of the official files, within 0.01"] = all(
            _close(row[task], OFFICIAL[name][task])
            for name, row in own["oracles"].items()
            for task in official
        )
        for task, (same, _) in own["replayed"].items():
            if task in official:
                kept[f"2 {REPLAYED[task]} official steps of {task} or more"] = (
                    same >= REPLAYED[task]
                )
    return kept


def _is_readable(sample: SifoSample) -> bool:
    try:
        simulators.replay_text(sample)
    except ValueError:
        return False
    return True


def _close(values: Mapping[str, Any], wanted: Sequence[float | None]) -> bool:
    names = ("sample_accuracy", "instruction_accuracy", "depth")
    pairs = zip(names, wanted, strict=True)
    return all(w is None or abs(values[name] - w) <= 0.01 for name, w in pairs)


def _mean_length(samples: Sequence[SifoSample]) -> float:
    return sum(len(sample.steps) for sample in samples) / len(samples)


def _plain(table: Mapping[str, Mapping[str, Report]]) -> dict[str, dict[str, Any]]:
    return {name: {t: found._asdict() for t, found in row.items()} for name, row in table.items()}
