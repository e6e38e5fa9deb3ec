"""Packed models on disk, by transformers' own way: `quant_method: apiq` in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from apiq_peft.layer import ApiQLinear
from apiq_peft.packed import PackedLinear
from apiq_peft.quantizer import SCHEMES

METHOD = "apiq"
FORMAT = 1  # of the tensors and of this configuration
_GROUPS = r"\.g_idx$"  # a tensor of GPTQ's files; our groups lie in order, and have none
_WORDS, _FLOATS = ("I32",), ("F16", "BF16", "F32")
_DTYPES = {"qweight": _WORDS, "qzeros": _WORDS, "scales": _FLOATS}  # as safetensors names them


class ApiQQuantizationConfig(QuantizationConfigMixin):
    """Which modules of a saved model are packed, and how: `{name: [bits, group_size]}`."""

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        scheme: str = "asymmetric",
        format_version: int = FORMAT,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT:
            raise ValueError(
                f"the model has format {format_version} of ApiQ, this library reads format"
                f" {FORMAT}; install a version of apiq_peft that reads it"
            )
        if unknown or scheme not in SCHEMES:
            raise ValueError(
                f"quantization_config has scheme {scheme!r} and unknown keys {sorted(unknown)};"
                f" schemes are {', '.join(SCHEMES)}, and there are no other keys"
            )
        self.quant_method: Any = quant_method
        self.layers = {name: list(grid) for name, grid in (layers or {}).items()}
        self.scheme, self.format_version = scheme, format_version


class ApiQHfQuantizer(HfQuantizer):
    """Puts packed layers in place before transformers loads their tensors."""

    requires_calibration = True
    quantization_config: ApiQQuantizationConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        engine = getattr(model.config, "distributed_config", None)
        split = getattr(engine, "tp_size", None) or 1
        if split > 1:
            raise ValueError(
                f"tp_size is {split}, but packed layers cannot be split between processes;"
                " load the whole model on each and train by DDP or FSDP2"
            )
        layers: dict[str, PackedLinear] = {}
        for name, (bits, group_size) in self.quantization_config.layers.items():
            parent, _, child = name.rpartition(".")
            try:
                module: Any = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"the model has no module {name}, which is packed") from None
            layers[name] = PackedLinear(
                *_sizes(name, module),
                bits,
                group_size,
                bias=module.bias is not None,
                dtype=module.weight.dtype,
                device=module.weight.device,
                conv1d=isinstance(module, Conv1D),
            )
            setattr(model.get_submodule(parent), child, layers[name])
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), _GROUPS}  # type: ignore[assignment]
        if checkpoint_files is not None:
            _check_files(checkpoint_files, layers)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                try:
                    module.check()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return model

    def is_serializable(self) -> bool:
        """A packed model is saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed layers can be trained."""
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize(model, dtype)


def _sizes(name: str, module: Any) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise ValueError(f"{name} is a {type(module).__name__}; only linear layers can be packed")


def _check_files(files: Sequence[str], layers: Mapping[str, PackedLinear]) -> None:
    """Refuse files that do not hold the packed tensors of `layers`; reads their headers only.

    transformers fills what it does not find with anything, and warns.
    """
    found: dict[str, set[str]] = {kind: set() for kind in _DTYPES}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file; no other kind is read")
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # no dictionary
                    name, _, kind = key.rpartition(".")
                    if kind in found:
                        found[kind].add(name)
                        _check_tensor(key, opened.get_slice(key), layers.get(name))
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}); get the file again") from error
    for kind, names in found.items():
        if len(names) != len(layers):  # names themselves may differ, since transformers renames
            raise ValueError(
                f"config.json names {len(layers)} packed layers, but the files hold {kind} of"
                f" {len(names)}: missing are {sorted(layers.keys() - names) or 'none'}, too many"
                f" {sorted(names - layers.keys()) or 'none'}; get the files again"
            )


def _check_tensor(key: str, tensor: Any, layer: PackedLinear | None) -> None:
    kind = key.rpartition(".")[2]
    dtype, shape = tensor.get_dtype(), list(tensor.get_shape())
    wanted = shape if layer is None else list(getattr(layer, kind).shape)
    if dtype not in _DTYPES[kind] or shape != wanted:
        raise ValueError(
            f"{key} has shape {shape} and dtype {dtype} in the file; by config.json and the model"
            f" they must be {wanted} and {' or '.join(_DTYPES[kind])}"
        )


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Give the packed layers by the names that they have without adapters."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
    }


def grids_of(layers: Mapping[str, PackedLinear]) -> dict[str, tuple[int, int]]:
    """Give (bits, group_size) of every layer; -1 for all if whole rows are the groups of all."""
    whole = all(layer.group_size == layer.in_features for layer in layers.values())
    return {n: (layer.bits, -1 if whole else layer.group_size) for n, layer in layers.items()}


def mark_quantized(model: Any, scheme: str) -> None:
    """Tell transformers that `model` holds packed layers, so that it saves and treats it so."""
    layers = {n: [m.bits, m.group_size] for n, m in packed_layers(model).items()}
    config = ApiQQuantizationConfig(layers, scheme)
    if hasattr(model, "config"):
        model.config.quantization_config = config
        model.hf_quantizer = ApiQHfQuantizer(config)
        model.is_quantized, model.quantization_method = True, METHOD


def scheme_of(model: Any) -> str | None:
    """Give the scheme that `mark_quantized` or a checkpoint has told, None without one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config.scheme if isinstance(config, ApiQQuantizationConfig) else None


def unmark_quantized(model: nn.Module) -> None:
    """Undo `mark_quantized`, wherever in `model` it was done."""
    for module in model.modules():
        if vars(module).get("quantization_method") == METHOD:
            marked: Any = module
            del marked.config.quantization_config
            marked.hf_quantizer, marked.is_quantized, marked.quantization_method = None, False, None


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Replace every packed layer of `model` by the plain one it was, in place; give the model.

    LoRA layers stay and become mergeable; the sizes in memory are those of full precision again.
    With `dtype` all of the model but its adapters is cast to it, as far as it is saved.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedLinear):
            continue
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        plain = _written_out(module, dtype or module.dtype)
        if isinstance(owner, ApiQLinear):
            owner.set_plain_base(plain)
        else:
            setattr(owner, child, plain)
    unmark_quantized(model)
    if dtype is not None:
        _cast(model, dtype)
    return model


def _written_out(packed: PackedLinear, dtype: torch.dtype) -> nn.Module:
    """Give the layer that was packed, with the weight that its codes stand for."""
    weight = packed.dequantize(dtype)
    plain: Any
    with torch.device("meta"):
        if packed.conv1d:
            plain, weight = Conv1D(packed.out_features, packed.in_features), weight.t()
        else:
            plain = nn.Linear(packed.in_features, packed.out_features, bias=False)
    plain.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    plain.bias = packed.bias
    return plain.train(packed.training)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and buffers, but those of adapters and those that are not saved."""
    adapters: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for name in layer.adapter_layer_names:
                adapters |= {id(p) for p in getattr(layer, name).parameters()}
    for tensor in model.state_dict(keep_vars=True).values():
        if id(tensor) not in adapters and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
