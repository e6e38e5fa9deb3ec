"""Pretrain BERTs and OPTs whose attention reaches exact zeros, and ask what that costs and gives.

Arms attend by the plain softmax (vanilla), a clipped one (cs), clipped ones whose normalisation
does not depend on the length (ncs, ncs-a, ncs-half), or with gates. Measured are the loss at other
lengths, outliers, and 8-bit weights and activations; then they are finetuned with RoAd on texts of
another length, and their weights quantised with ApiQ.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import corpus
import low_bits
import measure
import results
import toys
import transfer
from accelerate import Accelerator
from pretrain import Text, pretrain
from settings import Settings
from transformers import AutoTokenizer
from transformers.utils import logging

from recipes_peft import assets, config, errors, report


def main() -> int:
    argv = sys.argv[1:]
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), argv, str(__doc__))
    out = Path(given.out)
    # what is there is not made again: a run with the same settings goes on where it stopped
    models, records = out / f"models-{given.key(pretraining=True)}", out / f"runs-{given.key()}"
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        models.mkdir(parents=True, exist_ok=True)
        records.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    with errors.explained(ValueError, before=f"precision {given.precision}: "):
        accelerator = Accelerator(mixed_precision=given.precision)
    keep = partial(results.kept, writes=accelerator.is_main_process)
    found: results.Found = {}
    curves: dict[str, Any] = {}
    laws = keep(records / "toys.json", show_toys) if "toys" in given.stages else None
    if set(given.stages) - {"toys"}:
        with accelerator.main_process_first():  # it fetches what the others then find
            text = prepare(given, models)
        bases = train(given, accelerator, text, models, curves)
        if "measure" in given.stages:
            found["measure"] = measured(given, accelerator, text, bases, records, keep)
        if "transfer" in given.stages:
            found["transfer"] = transferred(given, accelerator, text, bases, records, keep)
        if "apiq" in given.stages:
            found["apiq"] = quantized(given, accelerator, text, bases, records, keep)
    if accelerator.is_main_process:
        conclude(given, out, laws, found, curves)
    return 0


Bases = dict[tuple[str, str, int], Path]  # family, arm, seed: its folder


def prepare(given: Settings, models: Path) -> Text:
    """Make tokenizer and tokens, or load what is there."""
    read = partial(corpus.read, given.data, given.test_data, given.held_out_share)
    place = assets.once(
        models / "tokenizer",
        lambda to: corpus.make_tokenizer(given.tokenizer, read()[0]).save_pretrained(to),
    )
    tokenizer = AutoTokenizer.from_pretrained(place)
    # texts held out are a small part, of which more than is measured is never needed
    most = (given.held_out_windows + given.task_held_out) * given.length
    write = corpus.write_tokens
    held = assets.once(models / "tokens-held-out", lambda to: write(read()[1], tokenizer, to, most))
    train = assets.once(
        models / "tokens-train", lambda to: write(read()[0], tokenizer, to, given.most_tokens)
    )
    return Text(tokenizer, train, held)


def train(
    given: Settings, accelerator: Accelerator, text: Text, models: Path, curves: dict[str, Any]
) -> Bases:
    """Pretrain every arm with its seeds; gives their folders, and curves of the first seed."""
    bases: Bases = {}
    for family in given.families:
        arms = getattr(given, f"{family}_arms")
        for seed in range(given.seeds):
            for arm in arms if seed else dict.fromkeys([*arms, *given.once]):
                folder = models / f"{family}-{arm}-{seed}"
                pretrain(accelerator, given, family, arm, seed, text, folder)
                bases[family, arm, seed] = folder
                if not seed:
                    content = (folder / "curve.json").read_text(encoding="utf-8")
                    curves[f"{family} {arm}"] = json.loads(content)
    return bases


def measured(
    given: Settings, accelerator: Accelerator, text: Text, bases: Bases, records: Path, keep: Any
) -> dict[str, list[Any]]:
    """Measure every pretrained model."""
    found: dict[str, list[Any]] = {}
    for (family, arm, seed), base in bases.items():
        make = partial(measure.evaluate, given, family, arm, base, text, accelerator.device)
        record = keep(records / f"measure-{family}-{arm}-{seed}.json", make)
        found.setdefault(f"{family} {arm}", []).append(record)
        print(f"measured {family} {arm}, seed {seed}: loss {record['loss']:.3f}")
    return found


def transferred(
    given: Settings, accelerator: Accelerator, text: Text, bases: Bases, records: Path, keep: Any
) -> dict[str, list[Any]]:
    """Finetune on the short task: every arm named, with every tuner and every seed there is."""
    task, found = transfer.read(given, text), {}
    for (family, arm, seed), base in bases.items():
        names = [arm, "cs>ncs"] if arm == "cs" else [arm]
        for name in (n for n in names if n in given.transferred):
            for tuner in given.tuners:
                key = f"{family}-{name.replace('>', '-to-')}-{tuner}-{seed}"
                run = (accelerator, given, family, name, tuner, seed, base, task, records / key)
                record = keep(records / f"transfer-{key}.json", partial(transfer.finetune, *run))
                found.setdefault(f"{family} {name} {tuner}", []).append(record)
    return found


def quantized(
    given: Settings, accelerator: Accelerator, text: Text, bases: Bases, records: Path, keep: Any
) -> dict[str, list[Any]]:
    """Quantise the first seed of the arms named, by rounding and with ApiQ."""
    found: dict[str, list[Any]] = {}
    for (family, arm, seed), base in bases.items():
        if seed or arm not in given.quantized:
            continue
        for bits in given.bits:
            for start in low_bits.STARTS:
                run = (given, family, base, int(bits), start, text, accelerator.device)
                name = f"apiq-{family}-{arm}-{bits}-{start}.json"
                record = keep(records / name, partial(low_bits.measure, *run))
                found[f"{family} {arm} {bits} {start}"] = [record]
    return found


def show_toys() -> dict[str, Any]:
    """Compute what needs no training on text."""
    rows = {
        name: [toys.row_statistics(variant, length) for length in toys.LENGTHS]
        for name, variant in toys.RANDOM.items()
    }
    return {
        "lengths": toys.LENGTHS,
        "sums": {name: [total for total, _ in values] for name, values in rows.items()},
        "zeros": {name: [zeros for _, zeros in values] for name, values in rows.items()},
        "heads": {name: toys.no_op_head(variant) for name, variant in toys.NO_OP.items()},
    }


def conclude(given: Settings, out: Path, laws: Any, found: results.Found, curves: Any) -> None:
    """Show the tables and what was promised, and write all of it to the folder."""
    results.present(given, out, found, laws, curves)
    promises = toys.promised(laws["sums"], laws["heads"]) if laws else {}
    promises |= results.promised(found, given.lengths)
    for promise, met in promises.items():
        print(f"{'yes' if met else 'NO '}  {promise}")
    report.write_json(
        out / "results.json",
        {"settings": asdict(given), "promises": promises, "toys": laws, "runs": found},
    )
    print(f"results.json, and the tables and plots of what was run, are in {out}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
