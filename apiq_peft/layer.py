"""The adapted layer: packed codes and a LoRA beside them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from apiq_peft.packed import PackedLinear
from apiq_peft.quantizer import Quantizer

_NO_MERGE = (
    "the sum of 2-, 3- or 4-bit weights and a LoRA is not on the grid, so merging would lose one of"
    " them; apiq_peft.dequantize(model) gives a full-precision model, whose LoRA can be merged"
)


class ApiQLinear(lora.Linear):
    """y = x Q^T + s (x A^T) B^T, with Q packed in `base_layer`.

    Source:
        ApiQ (arXiv:2402.05147).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # PEFT finds the sizes, and warns that it does not know why
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(base_layer, adapter_name, **kwargs)
        self.quantization_backend = ForwardOnlyQuantizationBackend("apiq")
        self.fan_in_fan_out = False  # whatever the base was before it was packed

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, name = self.get_base_layer(), self._only_adapter()
        if name is None or args or kwargs or not isinstance(base, PackedLinear):
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[name]
        own_x = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None
        A: Any = self.lora_A[name]
        B: Any = self.lora_B[name]
        return base.product(x, A.weight, B.weight, self.scaling[name], own_x)

    def _only_adapter(self) -> str | None:
        """Give the adapter that goes into one product with the codes: a single, plain LoRA."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or len(active) != 1 or active[0] in self.lora_variant:
            return None
        return None if self.lora_bias[active[0]] else active[0]

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the base, written out; some models ask for its dtype."""
        base: Any = self.get_base_layer()
        return base.weight

    def set_plain_base(self, base: nn.Module) -> None:
        """Take a layer in full precision, into which the LoRA can be merged, for a packed one."""
        self.base_layer, self.quantization_backend = base, None
        self.fan_in_fan_out = isinstance(base, Conv1D)

    def check_merge(self, adapter_names: list[str] | None = None, finite: bool = False) -> None:
        """Refuse what `merge` would, before anything is merged, and with `finite` a broken sum.

        Raises:
            ValueError: the base is packed, or the merged weight would not be finite.
        """
        base: Any = self.get_base_layer()
        if isinstance(base, PackedLinear):
            raise ValueError(_NO_MERGE)
        if not finite:
            return
        merged = base.weight
        for name in adapter_names or self.active_adapters:
            if name in self.lora_A and name not in self.merged_adapters:
                merged = merged + self.get_delta_weight(name).to(merged.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError("the merged weight would not be finite; the adapter is broken")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into a base that was dequantised; see `peft.tuners.lora.layer.Linear`.

        Raises:
            ValueError: the base is packed, with what to do instead.
        """
        self.check_merge()
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Undo `merge`; refused on a packed base, where nothing is ever merged."""
        self.check_merge()
        super().unmerge()

    def __repr__(self) -> str:
        return "apiq." + super().__repr__().removeprefix("lora.")


def weight_of(module: nn.Module) -> torch.Tensor | None:
    """Give the weight (N, K) of a layer that can be quantised, None if it is not one."""
    if isinstance(module, Conv1D):
        return module.weight.t()
    return module.weight if type(module) is nn.Linear else None


def pack_layer(module: nn.Module, bits: int, group_size: int, scheme: str) -> PackedLinear:
    """Quantise a linear layer without data: every group is clipped at the initial share.

    Raises:
        ValueError: the layer is of another kind, or its sizes do not fit.
    """
    weight = weight_of(module)
    if weight is None:
        raise ValueError(
            f"a {type(module).__name__} cannot be quantised by ApiQ; only torch's Linear and"
            " transformers' Conv1D can. Leave it out of target_modules"
        )
    if weight.is_meta:
        raise ValueError("the weight is on the meta device; load the model before quantising it")
    PackedLinear(weight.shape[1], weight.shape[0], bits, group_size, device="meta")  # sizes fit?
    quantizer = Quantizer(weight, bits, group_size, scheme).to(weight.device)
    bias: Any = module.bias
    packed = PackedLinear.from_codes(
        quantizer.codes(weight), bits, bias, weight.dtype, isinstance(module, Conv1D)
    )
    packed.reproducible = True
    return packed
