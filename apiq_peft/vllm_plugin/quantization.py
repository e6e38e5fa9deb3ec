"""vLLM's view of a packed model: which layers are packed, their tensors and their product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from apiq_peft.checkpoint import METHOD, ApiQQuantizationConfig
from apiq_peft.packed import PackedLinear
from apiq_peft.quantizer import SCALE_DTYPE
from kernels_peft.packing import RUN

Grid = tuple[int, int]  # bits, group size


class ApiQServingConfig(QuantizationConfig):
    """The packed layers of a model, by the names that vLLM has for them: all widths and schemes."""

    def __init__(self, layers: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.layers: dict[str, Grid] = {n: (g[0], g[1]) for n, g in layers.items()}

    @classmethod
    def get_name(cls) -> str:
        """Give the method as config.json names it."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Give the dtypes of models."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Give the oldest GPU for which the kernels are compiled in tests."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Give no further files: config.json says everything."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ApiQServingConfig:
        """Read `quantization_config` of config.json.

        Raises:
            ValueError: another format, or unknown keys.
        """
        return cls(ApiQQuantizationConfig(**config).layers)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename layers as the model of vLLM does."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Give the method of a layer, None for what is no linear layer.

        Raises:
            ValueError: vLLM keeps as one layer what is packed in different ways, or packs what it
                cannot serve packed.
        """
        grid = self._grid(prefix)
        if isinstance(layer, VocabParallelEmbedding) and grid is not None:
            raise ValueError(
                f"{prefix} is packed, but vLLM reads embeddings and output heads in full precision"
                " only; quantise the model again with target_modules that leave it out"
            )
        if not isinstance(layer, LinearBase):
            return None
        return UnquantizedLinearMethod() if grid is None else ApiQLinearMethod(*grid)

    def _grid(self, prefix: str) -> Grid | None:
        parent, _, last = prefix.rpartition(".")
        members = [f"{parent}.{m}" for m in self.packed_modules_mapping.get(last, [])] or [prefix]
        grids = {member: self.layers.get(member) for member in members}
        if len(set(grids.values())) > 1:
            raise ValueError(
                f"vLLM keeps {', '.join(grids)} as one layer, but they have (bits, group size)"
                f" {list(grids.values())}; quantise them alike, with bits_pattern and"
                " group_size_pattern that do not tell them apart"
            )
        return grids[members[0]]


class ApiQLinearMethod(LinearMethodBase):
    """A layer whose weight is packed codes.

    Shapes:
        As `PackedLinear`, of the inputs and outputs that a process holds.
    Source:
        ApiQ (arXiv:2402.05147).
    """

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that the files fill.

        Raises:
            ValueError: a process would hold a part of a run of codes or of a group.
        """
        K, N = input_size_per_partition, sum(output_partition_sizes)
        group_size = input_size if self.group_size == -1 else self.group_size
        whole_rows = group_size == input_size
        if K % RUN or any(n % RUN for n in output_partition_sizes):
            raise ValueError(
                f"a process would hold {K} inputs and {output_partition_sizes} outputs of a packed"
                f" layer, but codes are cut in runs of {RUN}; serve with a smaller"
                " tensor_parallel_size"
            )
        if K % group_size and not whole_rows:
            raise ValueError(
                f"a process would hold {K} inputs of a packed layer whose groups have {group_size};"
                " serve with a smaller tensor_parallel_size"
            )
        groups = 1 if whole_rows else K // group_size
        loader = extra_weight_attrs["weight_loader"]
        packed = {"packed_factor": Fraction(RUN, self.bits), "weight_loader": loader}
        qweight = torch.empty(K * self.bits // RUN, N, dtype=torch.int32)
        qzeros = torch.empty(groups, N * self.bits // RUN, dtype=torch.int32)
        scales = torch.empty(groups, N, dtype=SCALE_DTYPE)
        layer.register_parameter(
            "qweight",
            PackedvLLMParameter(data=qweight, input_dim=0, output_dim=1, packed_dim=0, **packed),
        )
        if whole_rows:  # every process holds a part of each group
            zeros_of: Any = PackedColumnParameter(data=qzeros, output_dim=1, packed_dim=1, **packed)
            scales_of: Any = ChannelQuantScaleParameter(
                data=scales, output_dim=1, weight_loader=loader
            )
        else:
            zeros_of = PackedvLLMParameter(
                data=qzeros, input_dim=0, output_dim=1, packed_dim=1, **packed
            )
            scales_of = GroupQuantScaleParameter(
                data=scales, input_dim=0, output_dim=1, weight_loader=loader
            )
        layer.register_parameter("qzeros", zeros_of)
        layer.register_parameter("scales", scales_of)
        layer.packed_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the tensors into a packed layer, which knows the quickest product for its device.

        Raises:
            ValueError: the files hold scales that are not finite.
        """
        (rows, N), groups = layer.qweight.shape, layer.scales.shape[0]
        K = rows * RUN // self.bits
        packed = PackedLinear(K, N, self.bits, K // groups, dtype=layer.packed_dtype, device="meta")
        held = {}
        for name in ("qweight", "qzeros", "scales"):
            held[name] = nn.Parameter(getattr(layer, name).data, requires_grad=False)
            setattr(layer, name, held[name])
        packed.load_state_dict(held | {"scales": held["scales"].data}, assign=True)
        packed.check()
        layer.packed = packed.eval()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Give x W^T + bias."""
        y: Tensor = layer.packed.product(x)
        return y if bias is None else y + bias


def install() -> None:
    """Register the method; once."""
    if METHOD in QUANTIZATION_METHODS:
        return
    register_weight_loader_v2_supported_method(ApiQLinearMethod)
    register_quantization_config(METHOD)(ApiQServingConfig)
