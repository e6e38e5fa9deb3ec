"""Quantising a model and finding its LoRA together, in one call."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from apiq_peft.assembly import write_adapter, write_base
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
from apiq_peft.samples import samples_of

Samples = Tensor | Sequence[Mapping[str, Tensor]] | str | Sequence[str]


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
        CalibrationError: a loss is not finite.
        OSError: a file cannot be written; the blocks before are kept.
    Source:
        ApiQ (arXiv:2402.05147); by default block-wise, as in the published script.
    """
    settings = calibration or Calibration()
    config = copy.deepcopy(config)
    samples = _tokenised(samples, tokenizer, count, length, seed)
    batches = _batches(model, samples, settings)
    result = calibrate(
        model, batches, config, settings, Path(folder) if folder else None, show_progress
    )
    if config.target_modules == "all-linear":
        config.target_modules = sorted(result.solutions)
    peft_model = get_peft_model(model, config)
    tuner: Any = peft_model.base_model
    layers = dict(tuner.model.named_modules())
    with torch.no_grad():
        for name, solution in result.solutions.items():
            layer: Any = layers[name]
            layer.lora_A["default"].weight.copy_(solution.lora_A)
            layer.lora_B["default"].weight.copy_(solution.lora_B)
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
    whole at last. Texts and several processes are dealt with as in `quantize`.

    Shapes:
        samples: as for `quantize`.
    Raises:
        ValueError: a folder, samples or layers that do not fit, or a weight that is missing.
        CalibrationError: a loss is not finite; the blocks before are kept.
        OSError: a file cannot be written; the blocks before are kept.
    """
    source, out = Path(source), Path(out)
    base, adapter, blocks = out / "base", out / "adapter", out / "blocks"
    if base.exists() or (adapter.exists() and not blocks.exists()):
        raise ValueError(f"{base if base.exists() else adapter} exists; choose a new folder")
    settings, config = calibration or Calibration(), copy.deepcopy(config)
    processes = Processes.running()
    unfinished = blocks / "base"
    store = ModelFolder(source, unfinished, auto_class, dtype, torch.device(device))
    samples = _tokenised(samples, tokenizer, count, length, seed)
    batches = _batches(store.model, samples, settings)
    result = calibrate(store.model, batches, config, settings, blocks, show_progress, store)
    store.finish_outside()
    model = store.model.to("meta")
    if config.target_modules == "all-linear":
        config.target_modules = sorted(packed_layers(model))
    config.base_model_name_or_path = str(base.resolve())
    mark_quantized(model, config.scheme)

    def write() -> None:
        write_base(model, source, unfinished)
        names = [report.block for report in result.reports]
        write_adapter(model, config, names, blocks)

    def finish() -> None:
        if not adapter.exists():  # as it does if the last call was interrupted just here
            os.replace(blocks / "adapter", adapter)
        os.replace(unfinished, base)
        shutil.rmtree(blocks)

    processes.from_first(write)
    if settings.final_epochs:
        low = auto_class.from_pretrained(unfinished, dtype=dtype).to(device)
        trained = PeftModel.from_pretrained(low, str(blocks / "adapter"), is_trainable=True)
        _finish_together(trained, batches, result, settings, show_progress)
        processes.from_first(lambda: _rewrite_factors(trained, blocks / "adapter"))
    processes.from_first(finish)
    return result.reports


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
            [p for name, p in peft_model.named_parameters() if ".lora_" in name],
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


def _tokenised(samples: Any, tokenizer: Any, count: int, length: int, seed: int | None) -> Any:
    """Give token ids for texts, and anything else as it is."""
    texts = isinstance(samples, str) or (
        not isinstance(samples, Tensor) and len(samples) > 0 and isinstance(samples[0], str)
    )
    if not texts:
        return samples
    if tokenizer is None:
        raise ValueError("samples are texts; give the model's own tokenizer= as well")
    return samples_of(samples, tokenizer, count, length, seed)


def _batches(model: Any, samples: Any, settings: Calibration) -> list[Mapping[str, Tensor]]:
    if settings.final_epochs and model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no head that predicts tokens, which the last pass learns"
            " from; set final_epochs to 0"
        )
    if not isinstance(samples, Tensor):
        if not samples:
            raise ValueError("there are no samples; give at least one batch")
        return list(samples)
    if samples.dim() != 2 or samples.is_floating_point() or not samples.numel():
        raise ValueError(
            f"samples have shape {tuple(samples.shape)} and dtype {samples.dtype}; give token ids"
            " (samples, length), or batches as dictionaries of tensors"
        )
    names = ["input_ids"]
    if getattr(model.config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    return [dict.fromkeys(names, part) for part in samples.split(settings.batch_size)]
