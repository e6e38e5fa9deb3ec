"""A model that is read from its folder block by block, and written back in the same way."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict
from transformers.utils import logging

from apiq_peft.calibration.processes import Processes
from apiq_peft.calibration.progress_files import write_whole
from apiq_peft.calibration.stacks import Stack
from apiq_peft.fingerprint import codes_digest
from apiq_peft.packed import PackedLinear

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ModelFolder:
    """A model of which one block at a time is in memory; a `BlockStore`.

    `model` is on the meta device until `begin`. Keys are renamed and tensors fused as transformers
    does it when it loads the folder, and renamed back in what `finish` writes to `target`: a file
    for each block, and one for all that lies outside of them. `kept` then has the tensors that
    `keep` asks for by their names in the model, on the CPU.
    """

    def __init__(
        self,
        folder: Path,
        target: Path,
        auto_class: Any,
        dtype: torch.dtype | None,
        device: torch.device,
        keep: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Build the model of a folder without its weights.

        Raises:
            ValueError: it is no folder of a model in full precision, in safetensors files.
        """
        self.folder, self.target, self.device = folder, target, device
        self._files = _files(folder)
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{folder} is quantised already; give the model in full precision")
        self._dtype = dtype or config.dtype or self._stored_dtype()
        with torch.device("meta"):
            self.model = auto_class.from_config(config, dtype=self._dtype).eval()
        self._mapping = get_model_conversion_mapping(self.model)
        self._parts: dict[str, list[str]] = {}  # keys of the files, by block; "" is outside
        self._shards: dict[str, list[str]] = {}  # names in the files that were written
        self.kept: dict[str, Tensor] = {}
        self.digests: dict[str, str | None] = {}  # of the codes of finished layers
        self._keep = keep
        self._processes = Processes.running()

    def begin(self, stacks: Sequence[Stack]) -> None:
        """Read what lies outside of the blocks of `stacks`, and tie and compute the rest there.

        Raises:
            ValueError: a weight is missing, or one in a block is tied to another.
        """
        model = self.model
        blocks = [stack.block_name(i) for stack in stacks for i in range(len(stack.blocks))]
        for tied in model.all_tied_weights_keys.items():
            if any(_inside(key, blocks) for key in tied):
                raise ValueError(
                    f"{tied[0]} is tied to {tied[1]}, so blocks cannot be read one by one; load the"
                    " model and give it to apiq_peft.quantize"
                )
        self._parts = {block: [] for block in ("", *blocks)}
        for key, name in self._names().items():
            self._parts[_inside(name, blocks)].append(key)
        for name, buffer in list(model.named_non_persistent_buffers()):
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._buffers[child] = torch.empty_like(
                buffer, device=self.device
            )
        missing = self._load("")
        model.initialize_weights()  # only buffers that no file has; the rest is meta or marked
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        outside = [n for n in _meta_tensors(model) if not _inside(n, blocks)]
        self._check(outside, "")
        model.requires_grad_(False)

    def fetch(self, block: str) -> None:
        """Read the weights of a block.

        Raises:
            ValueError: one is missing.
        """
        module = self.model.get_submodule(block)
        self._load(block)
        self._check([f"{block}.{n}" for n in _meta_tensors(module)], block)
        module.requires_grad_(False)

    def finish(self, block: str) -> None:
        """Write a block and drop its tensors."""
        module = self.model.get_submodule(block)
        for name, layer in module.named_modules():
            if isinstance(layer, PackedLinear):
                self.digests[f"{block}.{name}"] = codes_digest(layer)
        self._write(block, self._kept({f"{block}.{n}": t for n, t in module.state_dict().items()}))
        module.to("meta")

    def finish_outside(self) -> None:
        """Write what lies outside of the blocks, and the index of all files."""
        blocks = [block for block in self._parts if block]
        state = {n: t for n, t in self.model.state_dict().items() if not _inside(n, blocks)}
        self._kept(state)
        for key in self.model._keys_to_ignore_on_save or ():
            state.pop(key, None)
        self._write("", remove_tied_weights_from_state_dict(state, self.model))
        names = {n: self._shard(part) for part, held in self._shards.items() for n in held}
        size = sum((self.target / name).stat().st_size for name in set(names.values()))
        index = {"metadata": {"total_size": size}, "weight_map": names}
        text = json.dumps(index, indent=2, sort_keys=True)
        self._processes.from_first(lambda: (self.target / _INDEX).write_text(text))

    def _kept(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        self.kept |= {n: t.detach().cpu() for n, t in state.items() if self._keep(n)}
        return state

    def _write(self, part: str, state: dict[str, Tensor]) -> None:
        state = revert_weight_conversion(self.model, state)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        self._shards[part] = list(tensors)
        path = self.target / self._shard(part)

        def write() -> None:
            self.target.mkdir(parents=True, exist_ok=True)
            write_whole(path, tensors, {"format": "pt"})

        self._processes.from_first(write)

    def _shard(self, part: str) -> str:
        return (
            f"model-{list(self._parts).index(part) + 1:05d}-of-{len(self._parts):05d}.safetensors"
        )

    def _stored_dtype(self) -> torch.dtype:
        for key in self._files:
            with self._slices([key]) as slices:
                name = slices[key].get_dtype()
            if name in _FLOATS:
                return _FLOATS[name]
        raise ValueError(f"{self.folder} has no weights in floating point")

    def _names(self) -> dict[str, str]:
        """Give the name in the model of each key of the files, of those that it has."""
        known = self.model.state_dict()
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        names = {}
        for key in self._files:
            name, _ = rename_source_key(
                key, renamings, converters, self.model.base_model_prefix, known
            )
            if name not in known and key in known:
                name = key
            if name in known:
                names[key] = name
        return names

    def _load(self, part: str) -> set[str]:
        """Read the tensors of a part into the model; give the names that it still lacks."""
        settings = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=self._mapping,
        )
        with self._slices(self._parts[part]) as slices, _silent():
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, settings, None)
        wrong = [*info.error_msgs, *info.conversion_errors.values()]
        wrong += [f"{n} has shape {tuple(a)}, not {tuple(b)}" for n, a, b in info.mismatched_keys]
        if wrong:
            raise ValueError(f"{self.folder} does not fit its config.json: {'; '.join(wrong[:3])}")
        return info.missing_keys

    @contextmanager
    def _slices(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Give tensors of the files that are read when they are used."""
        by_file = defaultdict(list)
        for key in keys:
            by_file[self._files[key]].append(key)
        with ExitStack() as opened:
            path, slices = self.folder, {}
            try:
                for path, held in by_file.items():  # the error names it
                    file = opened.enter_context(safe_open(path, "pt"))
                    slices.update({key: file.get_slice(key) for key in held})
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error})") from error
            yield slices

    def _check(self, missing: Sequence[str], part: str) -> None:
        if missing:
            used = {key for keys in self._parts.values() for key in keys}
            unused = [key for key in self._files if key not in used]
            raise ValueError(
                f"{self.folder} has no {', '.join(missing[:3])} for {part or 'the model'}"
                + (f", but has {', '.join(unused[:3])}, which the model lacks" if unused else "")
                + "; choose the auto_class that the folder was saved from"
            )


def _files(folder: Path) -> dict[str, Path]:
    """Give the file of each key."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; download the model first")
    try:
        if (folder / _INDEX).exists():
            held = json.loads((folder / _INDEX).read_text())["weight_map"]
            return {key: folder / name for key, name in held.items()}
        with safe_open(folder / _SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), folder / _SINGLE)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder} has no {_SINGLE} or {_INDEX} that can be read ({error}); save the model with"
            " save_pretrained"
        ) from error


def _inside(name: str, blocks: Sequence[str]) -> str:
    """Give the block that a tensor belongs to, "" if none."""
    return next((block for block in blocks if name.startswith(block + ".")), "")


def _meta_tensors(module: nn.Module) -> list[str]:
    named = (*module.named_parameters(), *module.named_buffers())
    return [name for name, tensor in named if tensor.is_meta]


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from showing a progress bar for every block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
