"""What all arms start from: rows of every task, one vocabulary, and a base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
import directions
import translator
from accelerate import Accelerator
from accelerate.utils import set_seed
from directions import Row, Task
from settings import Settings
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from translator import Active, Extra, Training

from apiq_peft.export import save_whole
from recipes_peft import assets, errors
from recipes_peft.loop import Point

__all__ = ["Start", "prepare"]

Rows = Mapping[Task, list[Row]]


@dataclass(frozen=True)
class Start:
    """The settings, rows of tokens of every task, the vocabulary and the folder of the base."""

    given: Settings
    accelerator: Accelerator
    folder: Path  # of this run; finished pieces are kept there
    train: Rows
    valid: Rows
    test: Rows
    tokenizer: Any
    base: str

    @property
    def validated(self) -> Rows:
        """Give the rows that training is validated on."""
        return {task: rows[: self.given.validated] for task, rows in self.valid.items()}

    def model(self) -> Any:
        """Load the base, anew for every arm."""
        with errors.explained(OSError, ValueError, before=f"cannot load {self.base}: "):
            loaded = AutoModelForSeq2SeqLM.from_pretrained(self.base)
        return loaded.to(self.accelerator.device).eval()

    def samples(self, model: Any) -> list[dict[str, Any]]:
        """Give batches of every task to calibrate a quantiser on."""
        return [
            {
                name: values.to(model.device)
                for name, values in translator.batch(
                    model, rows[: self.given.calibration_rows]
                ).items()
                if name != "labels"
            }
            for rows in self.train.values()
        ]

    def fit(
        self,
        model: Any,
        rows: Rows,
        how: Training,
        name: str,
        active: Active,
        extra: Extra,
        saved: Path | None = None,
    ) -> list[Point]:
        """Train a model on rows, as the settings say; `saved` is where a long one goes on from."""
        return translator.train(
            self.accelerator, model, rows, self.validated, how, name, active, extra, saved
        )


def prepare(given: Settings, accelerator: Accelerator, folder: Path) -> Start:
    """Read the text, make or load the vocabulary and the base; what is there is not made again.

    Raises:
        UserError: text or model cannot be read, or do not fit.
    """
    with accelerator.main_process_first():  # it fetches and trains what the others then find
        texts = directions.parts(
            given.hub,
            given.languages,
            given.data,
            given.valid_data,
            given.test_data,
            given.valid_rows,
            given.test_rows,
            given.seed,
        )
        if given.model == "scratch":
            place = assets.once(folder / "vocabulary", lambda to: _vocabulary(given, texts, to))
        with errors.explained(
            OSError, ValueError, before=f"cannot load the vocabulary of {given.model}: "
        ):
            tokenizer = AutoTokenizer.from_pretrained(
                place if given.model == "scratch" else given.model
            )
    coded = [
        directions.encode(part, tokenizer, given.max_length)
        for part in (texts.train, texts.valid, texts.test)
    ]
    base = folder / "base" if given.model == "scratch" else given.model
    start = Start(given, accelerator, folder, *coded, tokenizer, str(base))
    if given.model == "scratch" and not (folder / "base").exists():
        _train_base(start)
    return start


def _vocabulary(given: Settings, texts: directions.Parts, folder: Path) -> None:
    languages = [given.hub, *given.languages]
    lines = (text for pairs in texts.train.values() for p in pairs for text in (p.source, p.target))
    directions.make_tokenizer(lines, languages, given.vocabulary).save_pretrained(folder)


def _train_base(start: Start) -> None:
    given, accelerator = start.given, start.accelerator
    set_seed(given.seed)
    shape = (given.layers, given.width, given.ffn, given.heads, given.dropout)
    model = translator.make_model(len(start.tokenizer), *shape, given.max_length + 8)
    how = Training.of(given, seed=given.seed)
    model.to(accelerator.device)
    saved = start.folder / "base-unfinished.safetensors"
    start.fit(model, start.train, how, "base", arms.dense, arms.no_extra, saved)
    if accelerator.is_main_process:

        def write(part: Path) -> None:
            model.save_pretrained(part)
            start.tokenizer.save_pretrained(part)

        save_whole(start.folder / "base", write)
        saved.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
