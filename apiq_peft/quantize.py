"""Quantising a model and finding its LoRA together, in one call."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from apiq_peft.assembly import check_adapter, in_adapter, write_adapter, write_base
from apiq_peft.calibration import BlockReport, Calibration, calibrate
from apiq_peft.calibration.capture import Batch
from apiq_peft.calibration.end_to_end import end_to_end
from apiq_peft.calibration.engine import Result
from apiq_peft.calibration.processes import Processes
from apiq_peft.calibration.progress_files import write_whole
from apiq_peft.calibration.stacks import Stack
from apiq_peft.calibration.streaming import ModelFolder
from apiq_peft.checkpoint import mark_quantized, packed_layers
from apiq_peft.config import ApiQConfig
from apiq_peft.fingerprint import fingerprint
from apiq_peft.layer import ApiQLinear
from apiq_peft.samples import batches_of, tokenised

Samples = Tensor | Sequence[Mapping[str, Tensor]] | str | Sequence[str]
_PATIENCE = 60.0  # seconds after which a shared file system shows a folder


def quantize(
    model: Any,
    samples: Samples,
    config: ApiQConfig,
    calibration: Calibration | None = None,
    *,
    tokenizer: Any = None,
    count: int = 128,
    length: int = 2048,
    seed: int | None = None,
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> tuple[PeftModel, list[BlockReport]]:
    """Quantise `model` in place to the bits of `config` and initialise a LoRA that makes up for it.

    Gives the model with the adapter "default", ready to be trained, and a report of every block.
    With `folder`, finished blocks are kept there; a call that was interrupted is repeated with the
    same arguments and goes on from the last one, with the same result to the bit.

    Where a batch has an `attention_mask` (or `decoder_attention_mask`) of its states' samples and
    length, padding counts neither in losses nor in errors nor in the closed form. Several processes
    (`accelerate launch`, `torchrun`, on one machine or several) each call this with the same
    arguments: they share the batches, so that P of them do what one does with P times the
    `batch_size`, and end with the same model; the first one alone writes. Another number of them
    may go on from `folder`, on the same steps, if it divides their batches.

    Texts need the model's `tokenizer`: `count` windows of `length` tokens are taken from them, the
    first ones, or with `seed` random ones.

    Shapes:
        samples: token ids (samples, length), all of them real, or batches of what the model takes,
        or a text or several.
    Raises:
        ValueError: samples or layers that do not fit; the model is unchanged then.
        CalibrationError: a loss, a parameter or an activation is not finite; blocks that are done
            are kept in `folder`.
        OSError: a file cannot be written; the blocks before are kept.
    Source:
        ApiQ (arXiv:2402.05147); by default block-wise, as in the published script.
    """
    settings = calibration or Calibration()
    config = copy.deepcopy(config)
    samples = tokenised(samples, tokenizer, count, length, seed)
    _check_head(model, settings)
    batches = batches_of(samples, model, settings.batch_size)
    result = calibrate(
        model, batches, config, settings, Path(folder) if folder else None, show_progress
    )
    if config.target_modules == "all-linear":
        config.target_modules = sorted(result.factors)
    peft_model = get_peft_model(model, config)
    tuner: Any = peft_model.base_model
    layers = dict(tuner.model.named_modules())
    with torch.no_grad():
        for name, (a, b) in result.factors.items():
            layer: Any = layers[name]
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    _finish_together(peft_model, batches, result, settings, show_progress)
    return peft_model, result.reports


def quantize_folder(
    source: str | Path,
    out: str | Path,
    samples: Samples,
    config: ApiQConfig,
    calibration: Calibration | None = None,
    *,
    tokenizer: Any = None,
    count: int = 128,
    length: int = 2048,
    seed: int | None = None,
    auto_class: Any = AutoModelForCausalLM,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    show_progress: bool = True,
) -> list[BlockReport]:
    """Quantise the model in the folder `source` with one block of it in memory at a time.

    Writes `out/base`, which `from_pretrained` of transformers loads, and `out/adapter` for PEFT's:
    to the bit what `quantize` and saving would give. Both appear when they are complete. A call
    that was interrupted is repeated with the same arguments and goes on after the last finished
    block, which is kept in `out/blocks` until then. `dtype` is that of the folder if not given.

    Beside a block memory holds embeddings and head, and the states of all samples, which
    `cache_dir` of the settings puts into files. With `final_epochs` the quantised model is loaded
    whole at last, by every process, so `out` has to be on a file system that all nodes share. If
    that pass fails, a call with another `final_lr`, or without it, goes on from the blocks. Texts
    and several processes are dealt with as in `quantize`.

    Shapes:
        samples: as for `quantize`.
    Raises:
        ValueError: a folder, samples, layers or an adapter that do not fit, a weight that is
            missing, or an `out` that some process does not see.
        CalibrationError: a loss, a parameter or an activation is not finite; the blocks before are
            kept.
        OSError: a file cannot be written; the blocks before are kept.
    """
    source, out = Path(source), Path(out)
    base, adapter, blocks = out / "base", out / "adapter", out / "blocks"
    if base.exists() or (adapter.exists() and not blocks.exists()):
        raise ValueError(f"{base if base.exists() else adapter} exists; choose a new folder")
    settings, config = calibration or Calibration(), copy.deepcopy(config)
    check_adapter(config)
    processes = Processes.running()
    unfinished = blocks / "base"
    store = ModelFolder(
        source, unfinished, auto_class, dtype, torch.device(device), partial(in_adapter, config)
    )
    samples = tokenised(samples, tokenizer, count, length, seed)
    _check_head(store.model, settings)
    batches = batches_of(samples, store.model, settings.batch_size)
    if settings.final_epochs:
        _check_shared(blocks, processes, store.device)
    result = calibrate(store.model, batches, config, settings, blocks, show_progress, store)
    store.finish_outside()
    model = store.model.to("meta")
    if config.target_modules == "all-linear":
        config.target_modules = sorted(packed_layers(model))
    config.base_model_name_or_path = str(base.resolve())
    config.base_codes = fingerprint(store.digests)
    mark_quantized(model, config.scheme)

    def write() -> None:
        write_base(model, source, unfinished)
        names = [report.block for report in result.reports]
        write_adapter(model, config, names, blocks, store.kept)

    def finish() -> None:
        if adapter.exists():  # of a call that was interrupted just here, maybe with another pass
            shutil.rmtree(adapter)
        os.replace(blocks / "adapter", adapter)
        os.replace(unfinished, base)
        shutil.rmtree(blocks)

    processes.from_first(write)
    store.kept.clear()
    if settings.final_epochs:
        low = auto_class.from_pretrained(unfinished, dtype=dtype).to(device)
        trained = PeftModel.from_pretrained(low, str(blocks / "adapter"), is_trainable=True)
        _finish_together(trained, batches, result, settings, show_progress)
        processes.from_first(lambda: _rewrite_factors(trained, blocks / "adapter"))
    processes.from_first(finish)
    return result.reports


def _check_head(model: Any, settings: Calibration) -> None:
    if settings.final_epochs and model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no head that predicts tokens, which the last pass learns"
            " from; set final_epochs to 0"
        )


def _check_shared(blocks: Path, processes: Processes, device: torch.device) -> None:
    """Make the folder of the blocks, which all processes are to read from.

    Raises:
        ValueError: some do not see it.
    """
    if processes.count == 1:
        return
    processes.from_first(lambda: blocks.mkdir(parents=True, exist_ok=True))
    until = time.monotonic() + _PATIENCE
    while not blocks.is_dir() and time.monotonic() < until:
        time.sleep(1)
    if processes.some(not blocks.is_dir(), device):
        raise ValueError(
            f"{blocks}, which the first process has made, is not there for all of the"
            f" {processes.count}; for the last pass give an `out` on a file system that all nodes"
            " share, or set final_epochs to 0"
        )


def _finish_together(
    peft_model: Any,
    batches: Sequence[Batch],
    result: Result,
    settings: Calibration,
    show_progress: bool,
) -> None:
    """Run the last pass, if there is one, and report its losses with the last block."""
    if not settings.final_epochs:
        return
    processes, model = result.processes, peft_model.get_base_model()
    blocks = model.get_submodule(result.final.stack.name)
    was_training = peft_model.training
    peft_model.eval()
    try:
        result.reports[-1].losses["end to end"] = end_to_end(
            model,
            replace(result.final, stack=Stack(result.final.stack.name, blocks)),
            {n: m for n, m in model.named_modules() if isinstance(m, ApiQLinear)},
            processes.share(batches),
            settings,
            processes,
            show_progress and processes.rank == 0,
        )
    finally:
        peft_model.train(was_training)


def _rewrite_factors(peft_model: PeftModel, adapter: Path) -> None:
    state = get_peft_model_state_dict(peft_model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_whole(adapter / "adapter_model.safetensors", tensors, {"format": "pt"})
