"""One run: the vocabulary, the first stage, the second, and what is measured after each."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import corpus
import measure
import mixture
import stages
import torch
import vocabulary
from accelerate import Accelerator
from accelerate.utils import set_seed

from apiq_peft.export import save_whole
from recipes_peft import data, loop, models, parallel, report
from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair

ADDED = {"road": stages.with_road, "full": stages.with_all}


@dataclass(frozen=True)
class Run:
    """What a run does; S, S+, C and CV are the arms that are compared."""

    vocabulary: bool = False  # extend it first
    first: str | None = None  # how the first stage trains: road, full, or there is none
    second: str = "road"  # the same of the second; apiq, or same: the first stage's own adapter
    longer: bool = False  # as many steps of the second stage as C has of both
    calibration: str = "mixture"  # texts ApiQ is calibrated on, or english


RUNS = {
    "S": Run(),
    "S+": Run(longer=True),
    "C": Run(first="road"),
    "CV": Run(vocabulary=True, first="road"),
    "C-same": Run(first="road", second="same"),
    "S-full": Run(second="full"),
    "S+-full": Run(second="full", longer=True),
    "C-full": Run(first="full", second="full"),
    "CV-full": Run(vocabulary=True, first="full", second="full"),
    "C-apiq": Run(first="road", second="apiq"),
    "C-apiq-english": Run(first="road", second="apiq", calibration="english"),
}


@dataclass(frozen=True)
class Work:
    """What all runs share."""

    given: Any
    accelerator: Accelerator
    folder: Path
    parts: corpus.Parts
    texts: Mapping[str, Any]  # of the first stage, by language
    met: Mapping[str, set[str]]  # lines of the pairs that were left out of texts, by language
    tokenizer: Any
    extension: vocabulary.Extension | None

    @property
    def tokenizers(self) -> list[Any]:
        return [self.tokenizer, *([self.extension.tokenizer] if self.extension else [])]

    @cached_property
    def measured(self) -> measure.Measured:
        return measure.measured(self)

    def known(self, run: Run) -> Any:
        return self.extension.tokenizer if run.vocabulary and self.extension else self.tokenizer


def read(given: Any) -> tuple[corpus.Parts, dict[str, Any], dict[str, set[str]]]:
    """Give the parts of the data, the texts of the first stage, and lines left out of these.

    Texts of their own lose the lines of the pairs, which are noted by language as they are met.
    """
    test = directions([given.test_data], given) if given.test_data else given.test_share
    found = corpus.parts_of(
        directions(given.data, given), given.tuning_share, test, 0, given.max_characters
    )
    languages = sorted({code for name in given.directions for code in name.split("-")})
    needed = {} if given.monolingual else {name: found.texts.get(name) for name in languages}
    needed |= {name: found.tuning.get(name) and found.test.get(name) for name in given.directions}
    if missing := [name for name, some in needed.items() if not some]:
        raise UserError(
            f"no text is left for {missing[0]}; give more data, larger --max-characters, or texts"
            " with --monolingual"
        )
    if not given.monolingual:
        return found, dict(found.texts), {}
    texts = mixture.monolingual(given.monolingual, given.monolingual_subset, languages, 0)
    held, met = corpus.held_lines(found), {name: set[str]() for name in languages}
    apart = {name: mixture.without(own, held[name], met[name]) for name, own in texts.items()}
    return found, apart, met


def directions(places: Sequence[str], given: Any) -> dict[str, list[Pair]]:
    """Read the pairs of all directions; of several places a direction need not be in each."""
    found: dict[str, list[Pair]] = {}
    for name in given.directions:
        for where in places:
            place = where.replace("{direction}", name)
            if place != where and len(places) > 1 and not Path(place).exists():
                continue
            found.setdefault(name, []).extend(
                corpus.without_canary(parallel.read(place, *name.split("-")))
            )
        if not found.get(name):
            raise UserError(f"none of {', '.join(places)} has pairs of {name}; give some")
    return found


def extended(
    given: Any, folder: Path, texts: Mapping[str, Any], parts: corpus.Parts, base: Any
) -> vocabulary.Extension:
    """Give the extension of the vocabulary, learned on the first stage's languages in balance."""
    if (folder / "vocabulary").exists():
        return vocabulary.Extension.load(folder / "vocabulary")
    others = {name: some for name, some in texts.items() if name != "en"}
    wanted = mixture.quotas(*balance(given, others, given.vocabulary_characters))
    lines = [text for _, text in mixture.mixture(others, wanted)]
    english = list(islice(texts.get("en", ()), len(lines)))
    both, target = measure.aligned(parts, "tuning"), given.target_ratio

    def enough(tokenizer: Any) -> bool:
        return all(ratio <= target for ratio in measure.ratios(tokenizer, both).values())

    made = vocabulary.extend(
        base, lines, english, given.new_pieces, given.multiple, enough if target else None
    )
    save_whole(folder / "vocabulary", made.save)
    return made


def balance(given: Any, texts: Mapping[str, Any], total: float) -> tuple[Any, ...]:
    """Give the arguments of `quotas`: streams, whose size is not known, count as equal."""
    sizes = {n: sum(map(len, t)) if isinstance(t, list) else total for n, t in texts.items()}
    return sizes, total, given.temperature, given.max_epochs


@dataclass(frozen=True)
class Documents:
    """The first stage's texts as blocks, from the beginning every time they are asked for."""

    work: Work
    tokenizer: Any
    seed: int

    def lines(self, languages: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
        """Give (language, text) in balance, of all languages or of some, in the seed's order."""
        given = self.work.given
        texts = {n: t for n, t in self.work.texts.items() if not languages or n in languages}
        for name, some in texts.items():
            if isinstance(some, list):
                texts[name] = random.Random(f"{self.seed} {name}").sample(some, len(some))
        wanted = mixture.quotas(*balance(given, texts, given.first_characters))
        return mixture.mixture(texts, wanted)

    def __iter__(self) -> Iterator[corpus.Block]:
        ids = (corpus.document_ids(self.tokenizer, text) for _, text in self.lines())
        return corpus.pack_blocks(ids, self.work.given.block_length)


def first_steps(work: Work, documents: Documents) -> int:
    """Give how many steps the first stage has: given, or as many as its texts fill."""
    return work.given.first_steps or max(1, sum(1 for _ in documents) // work.given.batch_size)


def training(work: Work, steps: int, rate: float, batch: int, seed: int) -> loop.Training:
    """Give the settings of a stage."""
    given = work.given
    return loop.Training(
        steps, batch, given.micro_batch_size, rate, steps, seed, given.warmup, 1.0, given.schedule
    )


def rate(given: Any, method: str) -> float:
    """Give the learning rate of a method."""
    return {"full": given.full_rate, "apiq": given.lora_rate}.get(method, given.road_rate)


def dtype(work: Work, run: Run) -> str:
    """Give the type that a run's weights have: a step on 16 bits would round to nothing."""
    return "float32" if "full" in (run.first, run.second) else work.given.dtype


def base_model(work: Work, run: Run) -> Any:
    """Load the model, with rows for the new pieces where the run has them."""
    model = models.load(work.given.model, dtype(work, run))[0].to(work.accelerator.device)
    if run.vocabulary and work.extension:
        vocabulary.extend_model(model, work.extension)
    return model


def first_stage(work: Work, run: Run, seed: int) -> Path:
    """Train the first stage, unless it is there already; give its folder."""
    kind = f"{run.first}{'-vocabulary' if run.vocabulary else ''}"
    folder, given = work.folder / f"first-{kind}-{seed}", work.given
    saved = work.folder / f"{folder.name}-unfinished.safetensors"
    if (folder / "stage.json").exists():
        return folder
    set_seed(seed)
    model, tokenizer = base_model(work, run), work.known(run)
    rows = vocabulary.new_rows(model, work.extension) if run.vocabulary and work.extension else {}
    adapted = ADDED[run.first or ""](model, rows, given)
    documents = Documents(work, tokenizer, seed)
    steps = first_steps(work, documents)
    how = training(work, steps, rate(given, run.first or ""), given.batch_size, seed)
    collate = partial(corpus.block_batch, within=given.attention == "within")
    said = f"first, {kind} {seed}"
    losses = stages.train(
        work.accelerator, adapted, documents, collate, how, given.row_rate, said, saved
    )
    found = {
        "steps": steps,
        "last_loss": losses[-1],
        "left_out": sum(map(len, work.met.values())),
        "texts": measure.text_bits(work, adapted, tokenizer),
    }
    if work.accelerator.is_main_process:
        stages.keep(adapted, folder, found)
        saved.unlink(missing_ok=True)
    work.accelerator.wait_for_everyone()
    return folder


def second_stage(work: Work, name: str, seed: int) -> dict[str, Any]:
    """Do a run, or read what it found before; everything it needs is done before it."""
    run, given = RUNS[name], work.given
    file = work.folder / f"{name}-{seed}.json"
    saved = work.folder / f"{name}-{seed}-unfinished.safetensors"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    folder = first_stage(work, run, seed) if run.first else None
    set_seed(seed)  # the same whether the first stage was there already or not
    tokenizer, model, first, moved = work.known(run), base_model(work, run), None, 0.0
    pairs, left_out = drawn(work, seed)
    rows = [corpus.pair_row(pair, tokenizer) for pair in pairs]
    probe = loop.to(data.collate(rows[:2], tokenizer.pad_token_id), work.accelerator.device)
    if folder:
        first = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        model = stages.restore(model, folder, dtype(work, run)).to(work.accelerator.device)
        if run.second != "same":
            model, moved = stages.merged(model, probe)
    if run.second == "apiq":
        model = stages.with_apiq(model.requires_grad_(False), samples(work, run, seed), given)
    elif run.second != "same":
        model = ADDED[run.second](model, {}, given)
    steps = given.second_steps or max(1, given.epochs * len(rows) // given.second_batch_size)
    if run.longer:
        steps += first_steps(work, Documents(work, tokenizer, seed))
    how = training(work, steps, rate(given, run.second), given.second_batch_size, seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    collate, said = partial(data.collate, pad=tokenizer.pad_token_id), f"{name} {seed}"
    stages.train(work.accelerator, model, rows, collate, how, given.row_rate, said, saved)
    if run.second in ("road", "same"):
        model, again = stages.merged(model, probe)
        moved = max(moved, again)
    if run.second == "full":
        model = model.to(getattr(torch, given.dtype))  # translates as the others do
    found = {
        "run": name,
        "seed": seed,
        "first": first,
        "steps": steps,
        "left_out": left_out,
        "trained_parameters": trained,
        "merge_difference": moved,
        **measure.tested(work, model, tokenizer),
    }
    if work.accelerator.is_main_process:
        report.write_json(file, found)
        saved.unlink(missing_ok=True)
    work.accelerator.wait_for_everyone()
    return found


def drawn(work: Work, seed: int) -> tuple[list[Pair], int]:
    """Give the pairs to learn from: of each direction as many, in an order of the seed.

    Those that do not fit into `max_length` in every vocabulary are left out, and counted.
    """
    given, chance, found = work.given, random.Random(seed), []
    for pairs in work.parts.tuning.values():
        lines = corpus.join_lines(pairs, given.lines) if given.lines > 1 else pairs
        found += chance.sample(lines, min(len(lines), given.tuning_pairs))
    chance.shuffle(found)
    fit = corpus.fitting(corpus.pair_row, found, work.tokenizers, given.max_length)
    if not fit:
        raise UserError(
            f"no pair to learn from fits into {given.max_length} tokens; give a larger --max-length"
        )
    return fit, len(found) - len(fit)


def samples(work: Work, run: Run, seed: int) -> torch.Tensor:
    """Give samples for ApiQ: of the first stage's texts in balance, or of English alone."""
    given, count = work.given, work.given.calibration_samples
    documents = Documents(work, work.known(run), seed)
    lines = documents.lines(("en",) if run.calibration == "english" else ())
    ids = (corpus.document_ids(documents.tokenizer, text) for _, text in lines)
    blocks = list(islice(corpus.pack_blocks(ids, given.calibration_length), count))
    if len(blocks) < count:
        raise UserError(
            f"the texts give {len(blocks)} samples to calibrate on, {count} are wanted; give more"
            " --first-characters, or fewer --calibration-samples"
        )
    return torch.tensor([block.ids for block in blocks])
