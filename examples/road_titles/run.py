"""Finetune a language model with RoAd, beside LoRA, and check that the adapter merges exactly.

The model learns to answer a paragraph of an encyclopedia with its title. What is measured: the
loss on held-out paragraphs, the share of titles that are exactly right, and, in a new process that
loads the saved adapter, the largest difference between the logits before and after merging.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model

from recipes_peft import adapters, assets, config, data, errors, loop, models, process, report, tiny
from road_peft import RoadConfig

# The largest difference of logits that merging may make, relative to the largest logit.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Settings:
    model: str = field(metadata={"help": f"folder, hub id, or one of {', '.join(models.NAMES)}"})
    data: str = field(metadata={"help": "titles, tiny, or a .jsonl, .json or text file"})
    instruction: str = field(metadata={"help": "what to ask of a paragraph (for titles)"})
    out: str = field(metadata={"help": "folder for the results"})
    seed: int
    variant: str = field(metadata={"help": "road_1, road_2 or road_4"})
    group_size: int = field(metadata={"help": "features whose halves are paired"})
    target_modules: list[str] | None = field(
        metadata={"help": "names of linear layers, one regular expression, or all-linear"}
    )
    learning_rate: float
    lora_rank: int
    lora_learning_rate: float
    steps: int | None
    epochs: int
    batch_size: int
    micro_batch_size: int
    max_length: int = field(metadata={"help": "tokens of a prompt and its answer"})
    dtype: str
    held_out: int = field(metadata={"help": "examples to measure on"})
    evaluate_every: int = field(metadata={"help": "steps"})
    max_new_tokens: int
    check: str | None = field(
        metadata={"help": "adapter to reload, merge and compare; no training"}
    )

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and value <= 0 and name != "seed":
                raise errors.UserError(f"{name} is {value}; it must be above zero")


def main() -> int:
    argv = sys.argv[1:]
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), argv, str(__doc__))
    out = Path(given.out)
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        out.mkdir(parents=True, exist_ok=True)

    accelerator = Accelerator()
    with accelerator.main_process_first():  # it fetches what the others then find
        train_set, held_out = data.split(read_examples(given), given.held_out, given.seed)
        model, tokenizer = models.load(given.model, given.dtype)
    model.to(accelerator.device)
    wanted = [example.answer.strip() for example in held_out]
    held_rows = [data.encode(example, tokenizer, given.max_length) for example in held_out]

    def measure(measured: Any) -> loop.Result:
        size = given.micro_batch_size
        return loop.measure(measured, tokenizer, held_rows, wanted, given.max_new_tokens, size)

    if given.check:
        adapted = adapters.load_adapter(model, Path(given.check))
        return check(given, adapted, measure, held_rows, tokenizer.pad_token_id)

    # What does not fit shall fail now, not after the base model has been measured.
    advice = (
        "; change --variant, --group-size or --target-modules; the linear layers are, with their"
        f" outputs, {models.linear_layers(model)}"
    )
    with errors.explained(ValueError, before="the adapter does not fit: ", after=advice):
        for add_adapter in (add_road, add_lora):
            model = add_adapter(model, given).unload()

    steps = given.steps or max(1, given.epochs * len(train_set) // given.batch_size)
    used = train_set[: steps * given.batch_size]
    rows = [data.encode(example, tokenizer, given.max_length) for example in used]
    accelerator.print(
        f"{given.model}: {steps} steps of {given.batch_size} for each adapter, on {len(used)} of"
        f" {len(train_set)} examples; first the base model on the {len(held_out)} held out"
    )
    results, curves = {"base": measure(model)}, {}
    for name, add_adapter, rate in (
        ("RoAd", add_road, given.learning_rate),
        ("LoRA", add_lora, given.lora_learning_rate),
    ):
        set_seed(given.seed)
        adapted = add_adapter(model, given)
        how = loop.Training(
            steps, given.batch_size, given.micro_batch_size, rate, given.evaluate_every, given.seed
        )
        curves[name] = loop.train(accelerator, adapted, rows, held_rows, how, tokenizer, name)
        count, seconds = adapted.get_nb_trainable_parameters()[0], curves[name][-1].seconds
        results[name] = replace(measure(adapted), trained_parameters=count, seconds=seconds)
        if accelerator.is_main_process:
            adapted.save_pretrained(out / name.lower())
        model = adapted.unload()

    if not accelerator.is_main_process:
        return 0
    status = process.run_alone(__file__, [*argv, "--check", str(out / "road")])
    if status in (0, 1):
        report.curves(out, results["base"].held_out_loss, curves)
        present(given, out, results, held_out)
    return status


def add_road(model: Any, given: Settings) -> Any:
    return get_peft_model(
        model,
        RoadConfig(
            variant=given.variant,
            group_size=given.group_size,
            target_modules=models.target_modules(given.target_modules),
            task_type="CAUSAL_LM",
        ),
    )


def add_lora(model: Any, given: Settings) -> Any:
    return get_peft_model(
        model,
        LoraConfig(
            r=given.lora_rank,
            lora_alpha=2 * given.lora_rank,
            target_modules=models.target_modules(given.target_modules) or "all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def read_examples(given: Settings) -> list[data.Example]:
    if given.data == "titles":
        return data.paragraph_titles(assets.fetch("boolq"), given.instruction)
    return tiny.examples() if given.data == "tiny" else data.read(Path(given.data))


def check(given: Settings, adapted: Any, measure: Any, rows: Any, pad: int) -> int:
    """Merge the reloaded adapter and compare logits on the held-out set; 1 if they differ."""
    size = given.micro_batch_size
    loss = loop.held_out_loss(adapted, rows, size, pad)
    batches = [loop.to(batch, adapted.device) for batch in data.batches(rows, size, pad)]
    merged, difference = adapters.merge(adapted, batches)
    agrees = difference <= TOLERANCE[given.dtype]  # false for NaN
    found = {"reloaded_loss": loss, "merge_difference": difference, "merge_agrees": agrees}
    report.write_json(Path(given.out) / "check.json", {**found, "merged": asdict(measure(merged))})
    print(
        f"reloaded in a new process: merging moves the logits by at most {difference:.1e} of the"
        f" largest, {'within' if agrees else 'NOT WITHIN'} {TOLERANCE[given.dtype]:.0e}"
    )
    return 0 if agrees else 1


def present(given: Settings, out: Path, results: dict[str, loop.Result], held_out: Any) -> None:
    """Show examples, the table and what was promised, and write all of it to the folder."""
    checked = json.loads((out / "check.json").read_text(encoding="utf-8"))
    base, road = results["base"], results["RoAd"]
    drift = abs(checked["reloaded_loss"] - road.held_out_loss)
    promises = {
        "the reloaded adapter has the same loss": drift <= 1e-3 * road.held_out_loss,
        "merged and unmerged logits agree": checked["merge_agrees"],
    }
    if given.data == "titles":  # promised for this task alone
        gained = road.exact_match - base.exact_match
        promises["RoAd at least halves the loss"] = road.held_out_loss <= base.held_out_loss / 2
        promises["RoAd gains at least 40 points of exact match"] = gained >= 0.4
    answers = zip(held_out, base.answers, checked["merged"]["answers"], strict=True)
    rows = [[e.prompt, before, after, e.answer.strip()] for e, before, after in answers]
    shown = list({row[-1]: row for row in rows}.values())[:6]  # one of each answer
    report.show("Held-out examples", ["prompt", "base", "RoAd, merged", "wanted"], shown)
    report.compare(f"{given.model}, held out: {len(rows)} examples", results)
    for promise, met in promises.items():
        print(f"{'yes' if met else 'NO '}  {promise}")
    kept = {"settings": asdict(given), "promises": promises, "check": checked}
    kept["results"] = {name: asdict(result) for name, result in results.items()}
    report.write_json(out / "results.json", kept)
    print(f"adapters, results.json, curves.csv and curves.png are in {out}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
