"""One arm of the experiment: trained on generated chains, then asked; kept when it is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from answering import agreement, interleaved, reports, respond
from arms import ARMS, add_apiq, add_lora, add_road, mismatched
from chains import Chains
from peft import PeftModel
from prompts import encode, prompt_length
from samples import TASKS, SifoSample
from settings import Settings
from verifier import well_formed

from apiq_peft import CalibrationError
from apiq_peft.export import save_whole
from recipes_peft import errors, loop, models, report, text

__all__ = ["Work", "prepare", "run_arm", "security"]

Tests = Mapping[str, Sequence[SifoSample]]
_CHECKED = 32  # tokens that answers of one batch and of one adapter at a time are compared for


@dataclass(frozen=True)
class Work:
    """The settings, the chains to train on and those to test, and where finished pieces are."""

    given: Settings
    accelerator: Accelerator
    folder: Path
    train: Tests
    tests: Tests
    held: Sequence[SifoSample]
    tokenizer: Any
    left_out: Mapping[str, int]  # prompts that are too long, by set
    tested: Mapping[str, int]  # of what is not trained on because it is tested, by option

    def model(self) -> Any:
        """Load the base, anew for every arm."""
        return models.load(self.given.model, self.given.dtype)[0].to(self.accelerator.device)

    def rows(self, samples: Sequence[SifoSample]) -> list[Any]:
        """Give the tokens of prompts and right answers."""
        return [encode(s, self.tokenizer, self.given.max_length) for s in samples]

    def answers(
        self, model: Any, tests: Tests, name: str, adapters: Mapping[str, str] | None = None
    ) -> dict[str, list[str]]:
        return respond(self.accelerator, model, self.tokenizer, tests, self.given, adapters, name)


def prepare(
    given: Settings, accelerator: Accelerator, folder: Path, own: Mapping[str, Sequence[SifoSample]]
) -> Work:
    """Make the chains and check that the adapters fit; `own` are samples of the user's to test.

    What occurs in those is not trained on. Prompts that are too long are left out.

    Raises:
        UserError: there are too few words or texts, or an adapter does not fit the model.
    """
    tested = [sample for rows in own.values() for sample in rows]
    model, tokenizer = models.load(given.model, given.dtype)
    advice = (
        "; change --group-size, --bits-group-size or --target-modules; the linear layers are, with"
        f" their outputs, {models.linear_layers(model)}"
    )
    with errors.explained(ValueError, before="the adapter does not fit: ", after=advice):
        add_road(model, given)
    train, test = Chains("train", given, tested), Chains("test", given)
    count = given.steps * given.batch_size
    learned = {task: train.make(task, count, given.train_steps) for task in TASKS}
    tests = {task: test.make(task, given.test_chains, given.test_steps) for task in TASKS}
    held = test.make("security", given.held_chains, given.train_steps)
    tests |= {f"given {name}": samples[: given.test_chains] for name, samples in own.items()}
    short = {
        name: [s for s in samples if prompt_length(s, tokenizer) <= given.max_prompt]
        for name, samples in tests.items()
    }
    left_out = {name: len(tests[name]) - len(samples) for name, samples in short.items()}
    short = {name: samples for name, samples in short.items() if samples}
    if not short:
        raise errors.UserError(
            f"no prompt has {given.max_prompt} tokens or fewer; raise --max-prompt"
        )
    return Work(
        given, accelerator, folder, learned, short, held, tokenizer, left_out, train.left_out
    )


def run_arm(work: Work, name: str) -> dict[str, Any]:
    """Train and test an arm, or read what came of it before."""
    file = work.folder / f"{name}.json"
    if not file.exists():
        set_seed(work.given.seed)
        found = _tasks(work) if name == "tasks" else _one_adapter(work, name)
        if work.accelerator.is_main_process:
            report.write_json(file, found)
        work.accelerator.wait_for_everyone()
    with errors.explained(ValueError, before=f"{file} is torn: ", after="; delete it"):
        return json.loads(file.read_text(encoding="utf-8"))


def security(work: Work) -> dict[str, Any]:
    """Measure criterion 5: the base and an adapter for each order of the data, on held-out chains.

    Gives the loss per token of the right answer, in nats, and the share of well-formed responses.
    """
    found = {}
    for name in ("base", *(f"security-{seed}" for seed in range(work.given.seeds))):
        file = work.folder / f"held-{name}.json"
        if not file.exists():
            model, _ = _with_road(work, name) if name != "base" else (work.model(), [])
            rows, size = work.rows(work.held), work.given.micro_batch_size
            loss = loop.held_out_loss(model, rows, size, work.tokenizer.pad_token_id)
            answers = work.answers(model, {"held": work.held}, f"{name}, held out")["held"]
            pairs = zip(work.held, answers, strict=True)
            form = sum(well_formed(a, len(s.steps)) for s, a in pairs) / len(answers)
            kept = {"loss": loss, "well_formed": form, "answers": answers}
            if work.accelerator.is_main_process:
                report.write_json(file, kept)
            work.accelerator.wait_for_everyone()
        with errors.explained(ValueError, before=f"{file} is torn: ", after="; delete it"):
            found[name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _tasks(work: Work) -> dict[str, Any]:
    """Answer all tests with an adapter for each task, and the joint one for sets of other names."""
    names = {task: f"{task}-0" for task in TASKS} | {"other": "joint"}
    curves = {name: _train_road(work, name) for name in names.values()}
    model: Any = work.model()
    for i, name in enumerate(names.values()):
        place = str(work.folder / "adapters" / name)
        if i == 0:
            model = PeftModel.from_pretrained(model, place, adapter_name=name)
        else:
            model.load_adapter(place, adapter_name=name)
    adapters = {s.task: names.get(s.task, "joint") for xs in work.tests.values() for s in xs}
    rows = interleaved({task: work.tests[task] for task in TASKS if task in work.tests})
    rows = rows[: work.given.answer_batch]
    prompts = [encode(sample, work.tokenizer, 10**9).prompt for _, sample in rows]
    mixed = [adapters[sample.task] for _, sample in rows]
    most = min(_CHECKED, work.given.max_new_tokens)
    difference, same = agreement(model, work.tokenizer, prompts, mixed, most)
    check = {"adapters": len(set(mixed)), "rows": len(mixed), "logits": difference, "same": same}
    answers = work.answers(model, work.tests, "tasks, mixed batches", adapters)
    return _found(work, answers, model, curves) | {"mixed": check}


def _one_adapter(work: Work, name: str) -> dict[str, Any]:
    """Answer all tests with one model; of ApiQ also before it is trained."""
    arm, before, curves = ARMS[name], None, {}
    if arm.tuner == "road":
        model, points = _with_road(work, name)
        curves = {name: points}
    else:
        model = work.model()
    if arm.tuner in ("lora", "apiq"):
        model = _low_rank(work, model, name)
        if arm.tuner == "apiq":
            asked = work.answers(model, work.tests, f"{name}, not trained")
            before = reports(work.tests, asked)
        curves = {name: _fit(work, model, name, _learned(work, name), work.given.lora_rate)}
    answers = work.answers(model, work.tests, name)
    found = _found(work, answers, model, curves)
    (work.folder / f"{name}.safetensors").unlink(missing_ok=True)
    shutil.rmtree(work.folder / f"{name}-blocks", ignore_errors=True)
    return found | ({"before": before} if before else {})


def _found(work: Work, answers: Any, model: Any, curves: Any) -> dict[str, Any]:
    named = model.named_parameters()
    return {
        "reports": reports(work.tests, answers),
        "answers": answers,
        "trained": sum(p.numel() for n, p in named if ".lora_" in n or ".road_" in n),
        "curves": curves,
    }


def _low_rank(work: Work, model: Any, name: str) -> Any:
    bits = ARMS[name].bits
    if bits is None:
        return add_lora(model, work.given)
    rows = work.rows(_learned(work, name))
    shape = (work.given.calibration_samples, work.given.calibration_length)
    samples = text.samples(rows, *shape).to(work.accelerator.device)
    with errors.explained(ValueError, CalibrationError, before=f"{name}: "):
        return add_apiq(model, work.given, bits, samples, work.folder / f"{name}-blocks")


# ---- training -----------------------------------------------------------------------------------


def _learned(work: Work, name: str) -> list[SifoSample]:
    """Give the chains that an adapter is trained on: of its task, or of all in turn."""
    task = name.rpartition("-")[0]
    if task in work.train:
        return list(work.train[task])
    train = work.train
    if name in ARMS and ARMS[name].mismatched:
        train = {task: mismatched(samples) for task, samples in train.items()}
    mixed = [sample for _, sample in interleaved(train)]
    return mixed[: work.given.steps * work.given.batch_size]


def _with_road(work: Work, name: str) -> tuple[Any, list[Any]]:
    points = _train_road(work, name)
    place = work.folder / "adapters" / name
    return PeftModel.from_pretrained(work.model(), str(place)).eval(), points


def _train_road(work: Work, name: str) -> list[Any]:
    """Train a RoAd adapter unless it is there; gives the points of its curve."""
    place, curve = work.folder / "adapters" / name, work.folder / "adapters" / f"{name}.json"
    if not (place.exists() and curve.exists()):
        shutil.rmtree(place, ignore_errors=True)  # of a run that ended between the two
        set_seed(work.given.seed)
        model = add_road(work.model(), work.given)
        points = _fit(work, model, name, _learned(work, name), work.given.road_rate)
        if work.accelerator.is_main_process:
            save_whole(place, lambda part: model.save_pretrained(part))
            report.write_json(curve, {"points": points})
            (work.folder / f"{name}.safetensors").unlink(missing_ok=True)
        work.accelerator.wait_for_everyone()
    with errors.explained(ValueError, before=f"{curve} is torn: ", after="; delete it"):
        return json.loads(curve.read_text(encoding="utf-8"))["points"]


def _fit(
    work: Work, model: Any, name: str, samples: Sequence[SifoSample], rate: float
) -> list[dict[str, Any]]:
    """Train on chains; an adapter of a task has the number of its order of data in its name."""
    given, task, number = work.given, *name.rpartition("-")[::2]
    order = int(number) if task in TASKS else 0
    how = loop.Training(
        given.steps,
        given.batch_size,
        given.micro_batch_size,
        rate,
        given.evaluate_every,
        given.seed + order,
        given.warmup,
        schedule=given.schedule,
    )
    own = [task] if task in work.tests else [name for name in work.tests if name in TASKS]
    held = [sample for name in own for sample in work.tests[name]] or work.held
    points = loop.train(
        work.accelerator,
        model,
        work.rows(samples),
        work.rows(held),
        how,
        work.tokenizer,
        name,
        saved=work.folder / f"{name}.safetensors",
    )
    return [asdict(point) for point in points]
