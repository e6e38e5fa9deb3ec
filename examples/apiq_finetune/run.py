"""Quantise a language model with ApiQ, finetune its LoRA, and compare with other starts.

All starts have a LoRA of one rank, and the same steps on the same data: the model in full precision
(full); low bits and PEFT's initial LoRA, as in QLoRA (data-free); low bits and a LoRA solved for a
few samples (closed-form); and codes and LoRA that were trained together on these (apiq).
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model

from apiq_peft import PRESETS, ApiQConfig, CalibrationError, preset, quantize
from apiq_peft.evaluation import size_of
from apiq_peft.export import save_whole
from recipes_peft import adapters, config, errors, loop, metrics, models, process, report, text

# How answers are compared; a language model gives none.
TASKS = {"lm": None, "classification": metrics.exact_match, "arithmetic": metrics.same_number}
TOLERANCE = 1e-5  # of the largest logit: how far a reloaded model may be from the one saved


def full(model: Any, samples: torch.Tensor, given: Settings) -> Any:
    return get_peft_model(model, LoraConfig(target_modules="all-linear", **lora(given)))


def data_free(model: Any, samples: torch.Tensor, given: Settings) -> Any:
    return get_peft_model(model, ApiQConfig(**grid(given), **lora(given)))


def closed_form(model: Any, samples: torch.Tensor, given: Settings) -> Any:
    return quantize(model, samples, ApiQConfig(**grid(given), **lora(given)), preset("fast"))[0]


def trained(model: Any, samples: torch.Tensor, given: Settings) -> Any:
    settings = preset(given.preset, epochs=given.calibration_epochs)
    return quantize(model, samples, ApiQConfig(**grid(given), **lora(given)), settings)[0]


def grid(given: Settings) -> dict[str, Any]:
    return {"bits": given.bits, "group_size": given.group_size}


def lora(given: Settings) -> dict[str, Any]:
    return {"r": given.rank, "lora_alpha": given.alpha, "task_type": "CAUSAL_LM"}


STARTS = {"full": full, "data-free": data_free, "closed-form": closed_form, "apiq": trained}


@dataclass(frozen=True)
class Settings:
    model: str = field(metadata={"help": f"folder, hub id, or one of {', '.join(models.NAMES)}"})
    task: str = field(metadata={"help": ", ".join(TASKS)})
    data: str = field(metadata={"help": "boolq, tiny, or a .jsonl, .json or text file"})
    test_data: str | None = field(metadata={"help": "the same; if not given, a part of the data"})
    instruction: str = field(metadata={"help": "for examples that have none of their own"})
    out: str = field(metadata={"help": "folder for the results"})
    seed: int
    starts: list[str] = field(metadata={"help": ", ".join(STARTS)})
    bits: int
    group_size: int
    rank: int
    alpha: int
    preset: str = field(metadata={"help": "how ApiQ is calibrated"})
    calibration_samples: int
    calibration_length: int
    calibration_epochs: int
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    steps: int | None
    epochs: int
    batch_size: int
    micro_batch_size: int
    max_length: int = field(metadata={"help": "tokens of a window, or of a prompt and its answer"})
    dtype: str
    held_out: int = field(metadata={"help": "examples or paragraphs to measure on, at most"})
    evaluate_every: int
    max_new_tokens: int
    check: str | None = field(metadata={"help": "saved model to reload and compare; no training"})

    def __post_init__(self) -> None:
        zero = ("seed", "warmup", "weight_decay", "calibration_epochs")
        config.check(self, zero, {"task": TASKS, "starts": STARTS, "preset": PRESETS})


def main() -> int:
    argv = sys.argv[1:]
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), argv, str(__doc__))
    out = Path(given.out)
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        out.mkdir(parents=True, exist_ok=True)
    accelerator, lm = Accelerator(), given.task == "lm"
    if given.check:
        return check(Path(given.check), given, accelerator.device)
    with accelerator.main_process_first():  # it fetches what the others then find
        train_set, held_out = text.read(
            given.data, given.test_data, given.held_out, given.seed, lm, given.instruction
        )
        model, tokenizer = models.load(given.model, given.dtype)
    shape = (tokenizer, given.max_length, lm)
    held_rows, wanted = list(text.rows(held_out, *shape)), [e.label or e.answer for e in held_out]
    most = given.steps * given.batch_size if given.steps else None
    rows = list(islice(text.rows(train_set, *shape), most))
    if not rows or not held_rows:
        raise errors.UserError("the data fills no window; give more of it, or lower --max-length")
    sizes = (given.calibration_samples, given.calibration_length)
    samples = text.samples(text.rows(train_set, *shape), *sizes)
    with errors.explained(ValueError, before="the settings do not fit: "):
        data_free(model, samples, given)  # that this fails shall not need hours to be found out
    steps = given.steps or max(1, given.epochs * len(rows) // given.batch_size)
    how, size = loop.Training.of(given, steps), given.micro_batch_size
    scored = (tokenizer, held_rows, wanted, given.max_new_tokens, size, TASKS[given.task])

    results, packed, curves = {}, {}, {}
    for name in given.starts:
        set_seed(given.seed)
        model = models.load(given.model, given.dtype)[0].to(accelerator.device)
        began = time.perf_counter()
        with errors.explained(ValueError, CalibrationError, before=f"{name}: "):
            adapted = STARTS[name](model, samples, given)
        seconds, count = time.perf_counter() - began, adapted.get_nb_trainable_parameters()[0]
        before = replace(loop.measure(adapted, *scored), seconds=seconds)
        curves[name] = loop.train(accelerator, adapted, rows, held_rows, how, tokenizer, name)
        after = loop.measure(adapted, *scored, curves[name][-1].held_out_loss)
        after = replace(after, seconds=curves[name][-1].seconds, trained_parameters=count)
        results[name] = (before, after)
        if (bits := size_of(adapted)).weights:  # in 16 bits a value, whatever they are now
            packed[name] = {"bits": bits.bits_per_weight, "with LoRA": bits.bits_with_adapters}
        if name == "apiq" and accelerator.is_main_process:
            save(adapted, tokenizer, samples[0, :32].tolist(), out / name)
    if not accelerator.is_main_process:
        return 0
    again = [*argv, "--check", str(out / "apiq")]
    status = process.run_alone(__file__, again) if "apiq" in results else 0
    if status in (0, 1):
        report.curves(out, {name: pair[0].held_out_loss for name, pair in results.items()}, curves)
        present(given, out, results, packed, status == 0)
    return status


def save(adapted: Any, tokenizer: Any, ids: list[int], folder: Path) -> None:
    """Write base and adapter, and a few logits to compare with, as a folder that appears whole."""

    def write(part: Path) -> None:
        adapters.record(adapted, ids, part / "logits.safetensors")
        adapted.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
        adapted.save_pretrained(part / "adapter", save_embedding_layers=False)
        adapted.unload().save_pretrained(part / "base")
        tokenizer.save_pretrained(part / "base")

    shutil.rmtree(folder, ignore_errors=True)  # of a run before
    save_whole(folder, write)


def check(folder: Path, given: Settings, device: torch.device) -> int:
    """Load what was saved and compare logits; 1 if they differ."""
    base = models.load(str(folder / "base"), given.dtype)[0].to(device)
    adapted = adapters.load_adapter(base, folder / "adapter")
    difference = adapters.recorded_difference(adapted, folder / "logits.safetensors")
    print(f"reloaded in a new process: logits differ by {difference:.1e} of the largest")
    return 0 if difference <= TOLERANCE else 1  # 1 for NaN


def present(given: Settings, out: Path, results: Any, packed: Any, same: bool) -> None:
    """Show the table and what was promised, and write all of it to the folder."""
    report.before_after(f"{given.model}, {given.task}, {given.bits} bits", results, packed)
    found = {name: report.perplexity(after.held_out_loss) for name, (_, after) in results.items()}
    promises = {"the reloaded model has the same logits": same} if "apiq" in found else {}
    if {"apiq", "data-free", "full"} <= set(found):
        promises["apiq ends below data-free"] = found["apiq"] < found["data-free"]
        promises["apiq ends within 1.5 times full"] = found["apiq"] <= 1.5 * found["full"]
    for promise, met in promises.items():
        print(f"{'yes' if met else 'NO '}  {promise}")
    kept = {"settings": asdict(given), "promises": promises, "bits": packed, "results": {}}
    for name, (before, after) in results.items():
        kept["results"][name] = {"before": asdict(before), "after": asdict(after)}
    report.write_json(out / "results.json", kept)
    print(f"the model, results.json, curves.csv and curves.png are in {out}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
