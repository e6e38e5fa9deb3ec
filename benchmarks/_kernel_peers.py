"""Layers of other packages with weights of few bits, each made as its package makes it.

What has this library's grid gets its codes; bitsandbytes (4-bit normal floats), HQQ and torchao
quantise by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from apiq_peft import PackedLinear
from benchmarks._cases import BF16, GROUP_SIZE


@dataclass(frozen=True)
class Made:
    """A layer, the weight (N, K) that it stands for, and its bytes if not those of its tensors."""

    module: nn.Module
    weight: Callable[[], Tensor]
    stored: int = 0
    differentiable: bool = True


def bitsandbytes(linear: nn.Linear, packed: PackedLinear, dtype: torch.dtype) -> Made:
    """Give a layer of 4-bit normal floats in blocks of as many weights as our groups have."""
    package = import_module("bitsandbytes")
    weight = package.nn.Params4bit(
        linear.weight.detach().clone().to(dtype),
        requires_grad=False,
        quant_type="nf4",
        blocksize=GROUP_SIZE,
        compress_statistics=False,
    )
    layer = package.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    layer.weight = weight
    layer = layer.to(linear.weight.device)
    state = layer.weight.quant_state
    dense = package.functional.dequantize_4bit(layer.weight.data, state).float()
    return Made(layer, lambda: dense, layer.weight.nbytes + state.absmax.nbytes)


def _gptqmodel(kind: str, packed: PackedLinear, dtype: torch.dtype) -> Made:
    module = import_module(
        "gptqmodel.nn_modules.qlinear." + {"Torch": "torch"}.get(kind, "tritonv2")
    )
    layer = getattr(module, f"{kind}Linear")(
        bits=packed.bits,
        group_size=packed.group_size,
        sym=False,
        desc_act=False,
        in_features=packed.in_features,
        out_features=packed.out_features,
        bias=False,
    ).to(packed.qweight.device)
    layer.qweight, layer.qzeros = packed.qweight.clone(), packed.qzeros.clone()
    layer.scales = packed.scales.to(dtype)
    groups = torch.arange(packed.in_features, device=packed.qweight.device) // packed.group_size
    layer.g_idx = groups.to(torch.int32)
    layer.qzero_format(format=2)
    layer.post_init()
    return Made(layer.eval(), packed.dequantize)


def gptqmodel_torch(linear: nn.Linear, packed: PackedLinear, dtype: torch.dtype) -> Made:
    """Give the layer that GPTQModel has for every device."""
    return _gptqmodel("Torch", packed, dtype)


def gptqmodel_triton(linear: nn.Linear, packed: PackedLinear, dtype: torch.dtype) -> Made:
    """Give GPTQModel's layer with a Triton kernel."""
    return _gptqmodel("TritonV2", packed, dtype)


def hqq(linear: nn.Linear, packed: PackedLinear, dtype: torch.dtype) -> Made:
    """Give HQQ's own layer, with its default backend."""
    package = import_module("hqq.core.quantize")
    copied = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    copied.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    how = package.BaseQuantizeConfig(nbits=packed.bits, group_size=GROUP_SIZE, axis=1)
    device = str(linear.weight.device)
    layer = package.HQQLinear(copied, how, compute_dtype=dtype, device=device)
    held = [layer.W_q, *(t for t in layer.meta.values() if isinstance(t, Tensor))]
    return Made(layer, lambda: layer.dequantize().float(), sum(t.nbytes for t in held))


def gemlite(linear: nn.Linear, packed: PackedLinear, dtype: torch.dtype) -> Made:
    """Give GemLite's layer with the codes of ours."""
    package = import_module("gemlite.core")
    kind = package.TORCH_TO_DTYPE[dtype]
    layer = package.GemLiteLinearTriton(
        W_nbits=packed.bits,
        group_size=packed.group_size,
        in_features=packed.in_features,
        out_features=packed.out_features,
        input_dtype=kind,
        output_dtype=kind,
    )
    codes = packed.codes()
    grid = (t.reshape(-1, 1).to(dtype) for t in (codes.scales, codes.zeros))
    layer.pack(codes.codes, *grid, bias=None)
    return Made(layer, packed.dequantize, differentiable=False)


def torchao(linear: nn.Linear, packed: PackedLinear, dtype: torch.dtype) -> Made:
    """Give a layer of torchao's int4 weights, laid out for its kernel on CUDA."""
    package: Any = import_module("torchao.quantization")
    copied = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    copied.weight = nn.Parameter(linear.weight.detach().to(BF16), requires_grad=False)
    how = package.Int4WeightOnlyConfig(
        group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    package.quantize_(copied, how)
    # it has no other way to write its weight out
    eye = torch.eye(linear.in_features, dtype=BF16, device=linear.weight.device)
    held: Any = copied.weight
    stored = held.qdata.nbytes + held.scale_and_zero.nbytes
    return Made(copied, lambda: copied(eye).t().float(), stored, differentiable=False)
