"""The layers that `kernels` compares, and what each stands for.

A provider is one row of `LAYERS`: it makes its layer of the same weight, quantised on this
library's grid wherever its own format can hold that, and says which weight the layer then has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq_peft import PackedLinear
from apiq_peft.layer import pack_layer
from benchmarks import _kernel_peers as peers
from benchmarks._cases import BF16, FP16, FP32, GROUP_SIZE
from kernels_peft.packing import FORMATS

RANK, LORA_SCALE = 16, 2.0
_WEIGHT_STD = 0.02

LINEAR, PACKED, LORA = "linear", "packed", "packed + lora"


class Weight:
    """One weight (N, K) in full precision, and its codes by width."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.device = dtype, device
        self.linear = nn.Linear(in_features, out_features, bias=False, device=device)
        self.linear.requires_grad_(False)
        nn.init.normal_(self.linear.weight, std=_WEIGHT_STD)
        self._packed: dict[int, PackedLinear] = {}

    def packed(self, bits: int) -> PackedLinear:
        """Give the packed layer of a width."""
        if bits not in self._packed:
            layer = pack_layer(self.linear, bits, GROUP_SIZE, "asymmetric")
            self._packed[bits] = layer.to(self.device, self.dtype).eval()
        return self._packed[bits]

    @cached_property
    def plain(self) -> nn.Linear:
        """The layer of the library, in the dtype of the case."""
        sizes = self.linear.in_features, self.linear.out_features
        layer = nn.Linear(*sizes, bias=False, device="meta").requires_grad_(False)
        layer.weight = nn.Parameter(self.linear.weight.to(self.dtype), requires_grad=False)
        return layer


@dataclass(frozen=True)
class Layer:
    """A layer that is ready to run.

    `weight` gives the dense (N, K) that it stands for, without its adapter. `stored` is in bytes,
    `trained` are the parameters that get a gradient beside x. Without `differentiable` there is no
    backward.
    """

    module: nn.Module
    weight: Callable[[], Tensor]
    stored: int
    trained: Callable[[nn.Module], tuple[Tensor, ...]] = lambda module: ()
    differentiable: bool = True


@dataclass(frozen=True)
class Provider:
    """A kind of layer: the widths and dtypes it has, and where it runs."""

    build: Callable[[Weight, int], Layer]
    bits: tuple[int, ...] = tuple(FORMATS)
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16, FP16)
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: str = ""  # the package


def _linear(weight: Weight, bits: int) -> Layer:
    layer = weight.plain
    return Layer(layer, lambda: layer.weight, layer.weight.nbytes)


def _packed(weight: Weight, bits: int) -> Layer:
    layer = weight.packed(bits)
    return Layer(layer, partial(layer.dequantize, torch.float32), stored_bytes(layer))


class WithLora(nn.Module):
    """A packed layer and a LoRA in one product, as a quantised model runs and trains."""

    def __init__(self, base: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, device = base, base.qweight.device
        sizes = ((RANK, base.in_features), (base.out_features, RANK))
        self.lora_a, self.lora_b = (
            nn.Parameter((torch.randn(size, device=device) * 0.02).to(dtype)) for size in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base.product(x, self.lora_a, self.lora_b, LORA_SCALE)


def _with_lora(weight: Weight, bits: int) -> Layer:
    base = weight.packed(bits)
    module = WithLora(base, weight.dtype).eval()
    return Layer(
        module,
        partial(base.dequantize, torch.float32),
        stored_bytes(module),
        lambda module: tuple(p for p in module.parameters() if p.requires_grad),
    )


def _peer(make: Callable[..., peers.Made], weight: Weight, bits: int) -> Layer:
    made = make(weight.linear, weight.packed(bits), weight.dtype)
    stored = made.stored or stored_bytes(made.module)
    return Layer(made.module, made.weight, stored, differentiable=made.differentiable)


def stored_bytes(module: nn.Module) -> int:
    """Give the bytes of all parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


NARROW = (BF16, FP16)

LAYERS: dict[str, Provider] = {
    LINEAR: Provider(_linear, bits=(0,)),
    PACKED: Provider(_packed),
    LORA: Provider(_with_lora),
    "bitsandbytes": Provider(partial(_peer, peers.bitsandbytes), (4,), needs="bitsandbytes"),
    "gptqmodel torch": Provider(
        partial(_peer, peers.gptqmodel_torch), dtypes=NARROW, needs="gptqmodel"
    ),
    "gptqmodel triton": Provider(
        partial(_peer, peers.gptqmodel_triton), (2, 4), NARROW, ("cuda",), "gptqmodel"
    ),
    "hqq": Provider(partial(_peer, peers.hqq), needs="hqq"),
    "gemlite": Provider(partial(_peer, peers.gemlite), (2, 4), NARROW, ("cuda",), "gemlite"),
    "torchao": Provider(partial(_peer, peers.torchao), (4,), (BF16,), ("cuda",), "torchao"),
}


def chosen(
    bits: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Provider, int]]:
    """Yield (label, provider, width) of all that can run there; the label says the width."""
    for name, provider in LAYERS.items():
        if dtype in provider.dtypes and device.type in provider.devices:
            for width in provider.bits:
                if width in (0, *bits):
                    yield label(name, width), provider, width


def label(name: str, bits: int) -> str:
    """Give "packed 2-bit" for the provider `packed` at 2 bits."""
    return f"{name} {bits}-bit" if bits else name


def exact(layer: Layer, module: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Give output and gradients, of x and of what is trained, in float64."""
    x, *trained = (t.detach().double().requires_grad_() for t in (x, *layer.trained(module)))
    y = F.linear(x, layer.weight().double())
    if trained:
        lora_a, lora_b = trained
        y = y + LORA_SCALE * F.linear(F.linear(x, lora_a), lora_b)
    return [y, *torch.autograd.grad(y, [x, *trained], cotangent.double())]
