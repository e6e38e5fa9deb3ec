"""The protocol of `benchmarks.quantize`: texts, one measurement from a fresh model, finetuning."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup
from transformers.utils import logging

from apiq_peft import PackedLinear
from apiq_peft.evaluation import perplexity, size_of
from benchmarks._cases import GROUP_SIZE
from benchmarks._command import Fact
from benchmarks._quantizers import FULL_BITS, METHODS, Made, Task, targets

SEED = 0
WARMUP, LARGEST_NORM = 0.1, 1.0  # of the finetuning
_ADAPTER_BITS = 16  # of a value of A and B
_CHARACTERS = 16  # of a text, at most, for each token that is needed
_TIMED = 3  # windows, after a first


@dataclass(frozen=True)
class Protocol:
    """How much of everything; lengths in tokens. `epochs` None leaves those of a preset."""

    model: str
    blocks: int | None  # to quantise, the first ones; None is all
    samples: int
    length: int  # of a window, in calibration, finetuning and evaluation
    windows: int  # of the evaluation
    steps: int  # of the finetuning; 0 leaves it out
    batch: int
    rate: float
    epochs: int | None
    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    own_process: bool = True  # each measurement in one, whose peak of memory is its own


PROTOCOLS = {
    "tiny": Protocol("tiny", None, 2, 32, 2, 2, 1, 1e-3, 1, (2,), (4,), own_process=False),
    "quick": Protocol("smollm2-135m", 3, 8, 128, 4, 4, 1, 5e-4, 2, (2,), (16,)),
    "full": Protocol("smollm2-135m", None, 24, 512, 8, 64, 1, 5e-4, 4, (4, 3, 2), (16, 64)),
    "gpu": Protocol("smollm2-135m", None, 128, 1024, 32, 200, 2, 5e-4, None, (4, 3, 2), (16, 64)),
}


@dataclass(frozen=True)
class Texts:
    """Token ids, in windows, of three texts without overlap.

    Shapes:
        each: (windows, length).
    """

    calibration: Tensor
    finetuning: Tensor
    evaluation: Tensor


def split(tokenizer: Any, text: str, how: Protocol) -> Texts:
    """Take calibration and finetuning from the first half of a text, evaluation from the second.

    Raises:
        ValueError: the text is too short.
    """
    half = len(text) // 2
    wanted = (how.samples + how.steps * how.batch, how.windows)
    parts = []
    for part, windows in zip((text[:half], text[half:]), wanted, strict=True):
        tokens = windows * how.length
        ids = tokenizer(
            part[: tokens * _CHARACTERS],
            add_special_tokens=False,
            return_tensors="pt",
            verbose=False,
        ).input_ids[0]
        if len(ids) < tokens:
            raise ValueError(
                f"half of the text has {len(ids)} tokens, but {windows} windows of {how.length} are"
                " needed of it; give a longer text"
            )
        parts.append(ids[:tokens].view(windows, how.length))
    return Texts(parts[0][: how.samples], parts[0][how.samples :], parts[1])


@dataclass(frozen=True)
class Job:
    """One measurement. `place` is a folder of a model or its id on the hub."""

    place: str
    method: str
    bits: int
    rank: int
    how: Protocol
    texts: Texts
    device: str

    def digest(self) -> str:
        """Give eight signs that differ if anything differs that the figures depend on."""
        settings = METHODS[self.method].settings(self.how.epochs)
        known = {
            "job": [self.place, self.method, self.bits, self.rank, self.device, SEED, GROUP_SIZE],
            "how": {k: v for k, v in asdict(self.how).items() if k not in ("bits", "ranks")},
            "settings": settings and asdict(settings),
            "texts": [_digest(text) for text in vars(self.texts).values()],
        }
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Outcome:
    """The figures of one measurement, and which rules were broken."""

    facts: list[Fact]
    wrong: list[str]


def measure(job: Job) -> Outcome:
    """Quantise a fresh model, finetune it if it has steps, and give its perplexity after each."""
    method, how, texts = METHODS[job.method], job.how, job.texts
    torch.manual_seed(SEED)
    model = _load(job)
    names = targets(model, how.blocks)
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    kept = _digests(model, names if job.bits != FULL_BITS else ())
    samples = texts.calibration.to(job.device)
    task = Task(model, names, samples, job.bits, GROUP_SIZE, job.rank, method.settings(how.epochs))
    started = time.monotonic()
    made = method.make(task)
    minutes, peak = (time.monotonic() - started) / 60, peak_bytes(job.device)
    evaluation = texts.evaluation.flatten()
    before = perplexity(made.model, evaluation, how.length).value
    frozen = _digests(made.model)
    wrong = _broken(made, names, kept, frozen)
    size = size_of(made.model, _ADAPTER_BITS)
    base = size.bits_per_weight if made.bits is None else made.bits
    total = base + size.adapter_bits / weights
    facts: list[Fact] = [
        ("base", "bits", "per weight", base),
        ("quantised", "bits", "per weight", total if method.adapter else base),
        ("quantised", "perplexity", "", before),
        ("quantised", "time", "min", minutes),
        ("quantised", "peak", "MiB", peak / 2**20),
    ]
    if how.steps:
        started = time.monotonic()
        finetune(made.model, texts.finetuning.to(job.device), how)
        tuned_minutes = (time.monotonic() - started) / 60
        after = perplexity(made.model, evaluation, how.length).value
        if _digests(made.model) != frozen:
            wrong.append("finetuning changed more than the adapters")
        facts += [
            ("finetuned", "bits", "per weight", total),
            ("finetuned", "perplexity", "", after),
            ("finetuned", "time", "min", tuned_minutes),
        ]
    wrong += [
        f"the perplexity, {mode}, is {value}"
        for mode, metric, _, value in facts
        if metric == "perplexity" and not math.isfinite(value)
    ]
    if task.settings and task.settings.epochs and task.settings.granularity == "block":
        passes = task.settings.epochs + task.settings.final_epochs
        del model, made, task  # room for the gradients
        ratio = minutes / (passes * _pass_minutes(job, names))
        facts.append(("quantised", "cost", "of training passes", ratio))
    return Outcome(facts, wrong)


def _load(job: Job) -> Any:
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(job.place, dtype=torch.float32)
    return model.eval().requires_grad_(False).to(job.device)


def _pass_minutes(job: Job, names: Collection[str]) -> float:
    """Time a forward and backward over all samples in full precision, from a few of them.

    Gradients are those of the weights of the layers `names`, as if these were trained.
    """
    model = _load(job)
    for name in names:
        model.get_submodule(name).weight.requires_grad_(True)
    samples = job.texts.calibration.to(job.device)
    seconds = []
    for ids in samples[: 1 + _TIMED].split(1):
        started = time.monotonic()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        if torch.device(job.device).type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds[1:]) * len(samples) / 60


def finetune(model: Any, windows: Tensor, how: Protocol) -> None:
    """Train the adapters: AdamW without decay, a linear schedule, windows in their order."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * how.steps), how.steps)
    model.train()
    for ids in windows.split(how.batch):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def peak_bytes(device: str) -> float:
    """Give the most memory held so far: of tensors on CUDA, resident memory of the process else.

    nan where the system does not say.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # not getrusage: its figure begins with that of the process this one was forked from
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
    return int(found[1]) * 1024 if found else math.nan


def _digests(model: nn.Module, without: Collection[str] = ()) -> dict[str, str]:
    """Fingerprint everything but adapters and the layers `without`, by the names without PEFT."""
    tensors = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if ".lora_" not in name
    }
    return {n: _digest(t) for n, t in tensors.items() if n.rpartition(".")[0] not in without}


def _digest(tensor: Tensor) -> str:
    raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()


def _broken(
    made: Made, names: Collection[str], kept: dict[str, str], now: dict[str, str]
) -> list[str]:
    """Name the rules that a quantised model breaks."""
    wrong = [f"{name} was changed" for name, digest in kept.items() if now.get(name) != digest]
    packed = [m for m in made.model.modules() if isinstance(m, PackedLinear)]
    if len(packed) != (len(names) if made.bits is None else 0):
        wrong.append(f"{len(packed)} layers are packed, of {len(names)} to quantise")
    for layer in packed:
        layer.check()
    return wrong
