"""Ask whether machine translation can stand in for human translation in multilingual evaluation.

A test set is translated from English to many languages, labels copied. Models answer it there and,
where there is one, in human translation. Do both give the same scores? Are the languages that are
usually tested like the others of their class? Do large models beat simple baselines there? And what
do adapters and quantisation change of that, by class of language?
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import benchmark_tasks
import encoder_arms
import findings
import language_table
import measuring
import results
from accelerate import Accelerator
from arms import Start
from settings import Settings

from recipes_peft import config, errors, report


def main() -> int:
    argv = sys.argv[1:]
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), argv, str(__doc__))
    out = Path(given.out)
    folder = out / f"work-{given.key()}"  # a run with the same settings goes on where it stopped
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        folder.mkdir(parents=True, exist_ok=True)

    # languages and their classes, fixed before anything is scored
    known = language_table.sizes(given.pretrained_on())
    task = benchmark_tasks.read(given, known)
    everyone = list(task.languages.values())
    keep = task.official if given.languages == ["all"] else task.languages
    drawn = language_table.choose(everyone, keep, given.per_class, given.seed)
    if given.machine_languages != ["none"]:
        have = {language.flores for language in everyone}
        drawn += language_table.machine_only(given.machine_languages, have, known, given.high_from)
    compared = {language.code: language for language in drawn}
    # a language that is here only because a translator is has a D, and no part in its class
    translated = {word.partition("=")[0] for word in given.translations}
    beside = [x for x in everyone if x.code in translated and x.code not in compared]
    languages = compared | {language.code: language for language in beside}

    # MT_L: every field translated from English, labels copied
    chosen = list(languages.values())
    machine, training, reports, left_out = measuring.translate(
        given, task, chosen, out / "translations"
    )
    start = Start(given, task, machine, training, folder, Accelerator())
    runs = measuring.answer_all(start, list(languages))

    # the three questions
    draws, seed = given.draws, given.seed
    sides = findings.compare_sides(runs, reports, draws, seed)
    classes = findings.compare_classes(runs, compared, task.official, given.classes_on, draws, seed)
    control = control_of(runs, task)
    found: dict[str, Any] = {
        "settings": asdict(given),
        "pretraining": given.pretrained_on(),
        "languages": {code: asdict(language) for code, language in languages.items()},
        "compared": list(compared),
        "translations": reports,
        "left_out": left_out,
        "sides": sides,
        "classes": classes,
        "permuted": control,
        "promises": findings.promises(given.data == "udhr", sides, reports, classes, control),
    }
    results.show(found, task.chance)
    report.write_json(out / "results.json", found)
    results.write_languages(out / "languages.csv", runs, languages, compared, reports)
    results.plot(out / "accuracies.png", runs, compared, given.classes_on, task.official)
    if any(points := encoder_arms.curves(folder)):
        report.curves(out, *points)
    print(f"results.json, languages.csv and accuracies.png are in {out}")
    return 0


def control_of(runs: findings.Runs, task: benchmark_tasks.Task) -> dict[str, float] | None:
    """The negative control, on the machine's rows: answers against labels dealt anew."""
    arm = next((arm for arm in ("encoder", "lm", "road", "bow") if arm in runs), None)
    marks = runs[arm][0]["machine"] if arm else {}
    if not marks:
        return None
    labels = {item.key: item.label for item in task.english}
    return findings.permuted(marks, labels, 0)


if __name__ == "__main__":
    sys.exit(errors.run(main))
