"""GPTQ checkpoints of 2, 3 and 4 bits: how they store zero points, and reading one for finetuning.

The tensors of a layer are those of `PackedLinear`, and `g_idx`, the group of every input. Format 2
("gptq_v2") stores a zero point as it is. Format 1 ("gptq") stores it less one, and its writers
differ where that is -1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from apiq_peft.checkpoint import ApiQQuantizationConfig, packed_layers
from apiq_peft.packed import PackedLinear
from apiq_peft.quantizer import SCALE_DTYPE
from kernels_peft.packed_linear import check_packed
from kernels_peft.packing import FORMATS, RUN, pack, unpack

VERSIONS = {"gptq": 1, "gptq_v2": 2}  # by the name in config.json
# of GPTQModel, from which its format 1 holds zero points of 0 that can be told from others
_EXACT_SINCE = {2: (0, 9), 3: (7, 0), 4: (0, 9)}
_TENSORS = ("qweight", "qzeros", "scales")


def shift_zeros(words: Tensor, bits: int, by: int) -> Tensor:
    """Take packed zero points from format 1 to 2 (`by` 1) or back (-1).

    Where no code lies across two words, whole words are added to, so that a zero point of 0 borrows
    from its neighbours and gives it back; at 3 bits each code is counted modulo 8.

    Shapes:
        words: (G, N bits / 32), int32. Returns the same.
    Source:
        GPTQModel's conversion of its files.
    """
    if RUN % bits:
        codes = (unpack(words, bits, dim=1).to(torch.int16) + by) % FORMATS[bits].levels
        return pack(codes, bits, dim=1)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    moved = (words.to(torch.int64) + by * ones) & 0xFFFFFFFF
    return torch.where(moved > 0x7FFFFFFF, moved - (1 << 32), moved).to(torch.int32)


def scheme_of(zeros: Iterable[tuple[Tensor, int]]) -> str:
    """Name the scheme of a model by the packed zero points of its layers and their bits."""
    offsets: set[int] = set()
    for words, bits in zeros:
        codes = unpack(words, bits, dim=1)
        offsets |= {int(end) - (1 << (bits - 1)) for end in (codes.min(), codes.max())}
    if len(offsets) != 1:
        return "asymmetric"
    return {0: "gptq_symmetric", -1: "apiq_symmetric"}.get(offsets.pop(), "asymmetric")


def load_gptq(
    folder: str | Path,
    model_class: Any = AutoModelForCausalLM,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
) -> Any:
    """Load a GPTQ checkpoint as a model of packed layers, for our tuners to adapt.

    `save_pretrained` of the model writes our own format. `dtype` is that of the file if not given;
    codes, scales and zero points are those of the file in any case.

    Raises:
        ValueError: the folder holds no such checkpoint, the layers are of another kind (other
            widths, groups in the order of activations), or the files are damaged or contradict
            each other.
    """
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise ValueError(f"{place} has no config.json; give the folder of a GPTQ checkpoint")
    config = AutoConfig.from_pretrained(place)
    settings = _settings(place, config)
    state = _tensors_of(place)
    names = sorted({name.rpartition(".")[0] for name in state if name.endswith(".qweight")})
    if not names:
        raise ValueError(f"{place} has no packed layer (no tensor named qweight)")
    layers = {name: _read_layer(place, name, state, settings) for name in names}
    scheme = scheme_of((state[f"{name}.qzeros"], layers[name][0]) for name in names)
    config.quantization_config = ApiQQuantizationConfig(layers, scheme).to_dict()
    kept = {"dtype": dtype} if dtype else {}
    model, report = model_class.from_pretrained(
        place, config=config, device_map=device_map, output_loading_info=True, **kept
    )
    _check_report(place, model, report, state)
    if settings.version == 1:
        for name, layer in packed_layers(model).items():
            layer.qzeros.copy_(state[f"{name}.qzeros"])
    return model


@dataclass(frozen=True)
class _Settings:
    """What `quantization_config` says; `rules` are patterns of names, None for "not packed"."""

    bits: Any
    group_size: Any
    version: int
    rules: Mapping[re.Pattern[str], Mapping[str, Any] | None]
    writer: tuple[int, int] | None  # the version of GPTQModel

    def grid_of(self, name: str) -> tuple[int, int]:
        found: Mapping[str, Any] | None = {}
        for pattern, values in self.rules.items():
            if pattern.match(name):
                found = values
                break
        if found is None:
            raise ValueError("config.json leaves it out (`dynamic`), but the file has it packed")
        bits = found.get("bits", self.bits)
        group_size = found.get("group_size", self.group_size)
        if not isinstance(bits, int) or not isinstance(group_size, int):
            raise ValueError(
                f"config.json gives it {bits!r} bits and group_size {group_size!r}; both must be"
                " whole numbers"
            )
        return bits, group_size


def _settings(place: Path, config: Any) -> _Settings:
    values = getattr(config, "quantization_config", None)
    old = place / "quantize_config.json"
    if values is None and old.is_file():
        values = {"quant_method": "gptq", **json.loads(old.read_text())}
    if not isinstance(values, dict) or values.get("quant_method") != "gptq":
        method = values.get("quant_method") if isinstance(values, dict) else None
        raise ValueError(f"{place} has quant_method {method!r}; only 'gptq' is read here")
    name = values.get("checkpoint_format") or values.get("format") or "gptq"
    if name not in VERSIONS or values.get("is_marlin_format"):
        raise ValueError(
            f"{place} has format {name!r}{' for Marlin' * bool(values.get('is_marlin_format'))};"
            f" {' and '.join(VERSIONS)} are read, so save it as one of them first"
        )
    rules: dict[re.Pattern[str], Mapping[str, Any] | None] = {}
    for pattern, changes in (values.get("dynamic") or {}).items():
        try:
            compiled = re.compile(pattern.removeprefix("+:").removeprefix("-:"))
        except re.error as error:
            raise ValueError(f"{place}: `dynamic` has {pattern!r}, no pattern: {error}") from error
        rules[compiled] = None if pattern.startswith("-:") else changes
    by = re.search(r"gptqmodel:(\d+)\.(\d+)", str((values.get("meta") or {}).get("quantizer")))
    return _Settings(
        values.get("bits"),
        values.get("group_size", -1),
        VERSIONS[name],
        rules,
        (int(by[1]), int(by[2])) if by else None,
    )


def _tensors_of(place: Path) -> dict[str, Tensor]:
    """Map every tensor of the checkpoint; nothing is read from the disk yet."""
    single, index = place / "model.safetensors", place / "model.safetensors.index.json"
    wanted: dict[str, str] = {}
    if single.is_file():
        files = [single]
    elif index.is_file():
        wanted = json.loads(index.read_text()).get("weight_map", {})
        if not all(Path(file).name == file for file in wanted.values()):
            raise ValueError(f"{index} names files outside of its folder")
        files = [place / file for file in sorted(set(wanted.values()))]
    else:
        raise ValueError(
            f"{place} has no model.safetensors and no index of several; other kinds of files are"
            " not read, so save the model as safetensors first"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _map(file)
    if wanted and wanted.keys() != state.keys():
        odd = sorted(wanted.keys() ^ state.keys())
        raise ValueError(f"{index} and its files differ in {len(odd)} tensors, such as {odd[0]}")
    return state


def _map(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); get the file again") from error


def _read_layer(
    place: Path, name: str, state: dict[str, Tensor], settings: _Settings
) -> tuple[int, int]:
    try:
        return _check_layer(name, state, settings)
    except ValueError as error:
        raise ValueError(f"{place}: {name}: {error}") from error


def _check_layer(name: str, state: dict[str, Tensor], settings: _Settings) -> tuple[int, int]:
    """Refuse the tensors of a layer, or take its zero points to format 2 and give its grid."""
    bits, group_size = settings.grid_of(name)
    missing = [kind for kind in _TENSORS if f"{name}.{kind}" not in state]
    if missing:
        raise ValueError(f"the file lacks its {', '.join(missing)}; get the file again")
    words, zeros, scales = (state[f"{name}.{kind}"] for kind in _TENSORS)
    check_packed(words, zeros, scales, bits)
    (K, N), groups = (words.shape[0] * RUN // bits, words.shape[1]), scales.shape[0]
    wanted = PackedLinear(K, N, bits, group_size, device="meta")
    if wanted.scales.shape[0] != groups:
        raise ValueError(
            f"scales has {groups} groups of {K // groups} inputs, but config.json says that groups"
            f" have {group_size}"
        )
    order = state.get(f"{name}.g_idx")
    plain = torch.arange(K) // wanted.group_size
    if order is not None and not torch.equal(order.to(torch.int64), plain):
        raise ValueError(
            "its groups do not lie in the order of the inputs (`g_idx`), as after quantising with"
            " desc_act; quantise it with desc_act false"
        )
    if not torch.isfinite(scales).all():
        raise ValueError("scales has values that are not finite; the file is broken")
    if not torch.equal(scales.to(SCALE_DTYPE).to(scales.dtype), scales):
        raise ValueError(f"scales is {scales.dtype} and has values that {SCALE_DTYPE} cannot hold")
    if settings.version == 1:
        state[f"{name}.qzeros"] = _zeros_of_format_1(zeros, bits, settings.writer)
    return bits, group_size


def _zeros_of_format_1(zeros: Tensor, bits: int, writer: tuple[int, int] | None) -> Tensor:
    doubtful = (unpack(zeros, bits, dim=1) == FORMATS[bits].levels - 1).any()
    since = _EXACT_SINCE[bits]
    if doubtful and (writer is None or writer < since):
        raise ValueError(
            "it has zero points of 0 in format 1, which most programs do not write correctly, and"
            f" config.json does not name GPTQModel {since[0]}.{since[1]} or later as the writer"
            " (`meta.quantizer`); quantise again and save as gptq_v2"
        )
    return shift_zeros(zeros, bits, 1)


def _check_report(place: Path, model: Any, report: Mapping[str, Any], state: Any) -> None:
    """Refuse a checkpoint that does not fill the model it is of, or holds more."""
    odd = {
        name
        for name in report["unexpected_keys"]
        # some writers give every layer a bias; where the model has none, it is of zeros
        if not (name.endswith(".bias") and name in state and not state[name].any())
    }
    if type(model).__name__ in (model.config.architectures or ()) and (
        report["missing_keys"] or odd
    ):
        raise ValueError(
            f"{place} does not hold a whole {type(model).__name__}: missing are"
            f" {sorted(report['missing_keys']) or 'none'}, too many {sorted(odd) or 'none'}"
        )
