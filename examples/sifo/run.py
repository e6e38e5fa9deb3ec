"""Follow chains of instructions: SIFo's four tasks, a verifier, RoAd for each task, ApiQ's bits.

First the benchmark's own mechanics are checked without a model: the verifier on responders whose
behaviour is known, the simulators, how much the steps of generated chains need each other, and how
errors propagate. Then RoAd learns generated chains and is asked on held-out ones, all four tasks in
one batch, each row with the adapter of its task; and ApiQ's bit widths stand beside full precision.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import experiment
import lm_eval_tasks
import mechanics
import results
import samples
from accelerate import Accelerator
from chains import Chains
from settings import Settings
from transformers.utils import logging

from recipes_peft import config, errors, report

WORDS = (25, 45)  # of the texts that criteria 1 to 4 are measured on, as in the official data


def main() -> int:
    argv = sys.argv[1:]
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), argv, str(__doc__))
    out = Path(given.out)
    folder = out / f"work-{given.key()}"  # a run with the same settings goes on where it stopped
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    own = samples.read(Path(given.data)) if given.data else {}
    accelerator = Accelerator()

    with accelerator.main_process_first():  # it fetches what the others then find
        found = without_a_model(given, own)
        work = experiment.prepare(given, accelerator, folder, own)
    if accelerator.is_main_process:
        lm_eval_tasks.export(out / "lm_eval", work.tests, given.max_new_tokens)
        results.show_oracles(found["oracles"], "responders of known behaviour, generated chains")
        if "own" in found:
            results.show_own(found["own"])
    accelerator.wait_for_everyone()

    held = experiment.security(work)
    arms = {name: experiment.run_arm(work, name) for name in given.arms}
    if accelerator.is_main_process:
        present(given, out, work, found, held, arms)
    return 0


def without_a_model(given: Settings, own: Any) -> dict[str, Any]:
    """Measure criteria 1 to 4 on generated chains, and on files of the four tasks in `own`."""
    least, most = WORDS
    chains = Chains("test", replace(given, least_words=least, most_words=most))
    made = {task: chains.make(task, given.test_chains, given.test_steps) for task in samples.TASKS}
    edited = chains.make("text_modification", given.mechanic_chains, 5, 3)
    known = {task: rows for task, rows in own.items() if task in samples.TASKS}
    return mechanics.mechanics(made, edited, known)


def present(
    given: Settings, out: Path, work: Any, found: Any, held: Any, arms: dict[str, Any]
) -> None:
    """Show the tables and what was promised, and write all of it to the folder."""
    title = f"{given.model}, chains of 2 to {given.test_steps} steps"
    results.show(arms, title)
    rows = [
        [name, f"{values['loss']:.3f}", f"{values['well_formed']:.0%}"]
        for name, values in held.items()
    ]
    report.show("security, held-out chains", ["adapter", "loss per token", "well-formed"], rows)
    kept = mechanics.promised(found) | results.promised(held, arms, given.dtype)
    for promise, met in kept.items():
        print(f"{'yes' if met else 'NO '}  {promise}")
    for name, count in work.left_out.items():
        if count:
            print(f"{name}: {count} prompts of more than {given.max_prompt} tokens were left out")
    for option, count in work.tested.items():
        if count:
            print(f"--{option}: {count} texts that occur in --data were left out of training")
    report.write_json(
        out / "results.json",
        {
            "settings": asdict(given),
            "promises": kept,
            "mechanics": found,
            "security": held,
            "left_out": work.left_out,
            "tested_left_out": work.tested,
            "arms": arms,
        },
    )
    results.write_tables(out, arms)
    results.draw(out / "positions.png", arms)
    print(f"results.json, scores.csv, positions.csv, positions.png and lm_eval are in {out}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
