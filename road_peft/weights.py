"""Rotating a weight matrix, and keeping the one it replaces.

The arithmetic of merging: blockwise, in float32, rounded once; never a d x d matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels_peft import determinants, rotate_reference

BLOCK_ELEMENTS = 1 << 19
SINGULAR = 1e-6  # |det| of a block below this share of its squared norm

Rotation = tuple[Tensor, Tensor, int]  # first, second, group_size
Delta = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank), scale


def rotate_weight(
    weight: Tensor,
    rotations: Sequence[Rotation],
    *,
    before: Iterable[Delta] = (),
    after: Iterable[Delta] = (),
    feature_dim: int = 0,
) -> Tensor:
    """Give R (W + before) + after, where R applies `rotations` in turn along `feature_dim`.

    A stack of weights is rotated one by one, each by its share of the coefficient vectors.

    Shapes:
        weight: (out, in), or (in, out) if feature_dim is 1, or (copies, ...) of these. Returns its
        shape and dtype.
    Source:
        RoAd (arXiv:2409.00119), section 3.2: W' = R W in PyTorch's layout.
    """
    if weight.dim() == 3:
        shares = _shares(rotations, weight.shape[0])
        return torch.stack(
            [
                rotate_weight(w, r, feature_dim=feature_dim)
                for w, r in zip(weight, shares, strict=True)
            ]
        )
    merged = torch.empty_like(weight)
    source, target = (w if feature_dim == 0 else w.t() for w in (weight, merged))
    step = max(1, BLOCK_ELEMENTS // max(1, source.shape[0]))
    before, after = list(before), list(after)
    for start in range(0, source.shape[1], step):
        columns = slice(start, start + step)
        block = source[:, columns].to(_compute_dtype(weight))
        for a, b, scale in before:
            block = block + scale * (b @ a[:, columns]).to(block.dtype)
        for first, second, group_size in rotations:
            block = rotate_reference(block, first, second, group_size, dim=0)
        for a, b, scale in after:
            block = block + scale * (b @ a[:, columns]).to(block.dtype)
        target[:, columns] = block
    return merged


def rotate_bias(bias: Tensor, rotations: Sequence[Rotation]) -> Tensor:
    """Give R b, rounded once. Shapes: (out,) or (copies, out), returned alike."""
    if bias.dim() == 2:
        shares = _shares(rotations, bias.shape[0])
        return torch.stack([rotate_bias(b, r) for b, r in zip(bias, shares, strict=True)])
    rotated = bias.to(_compute_dtype(bias))
    for first, second, group_size in rotations:
        rotated = rotate_reference(rotated, first, second, group_size)
    return rotated.to(bias.dtype)


def negative(deltas: Iterable[Delta]) -> list[Delta]:
    """Give what takes `deltas` away again."""
    return [(a, b, -scale) for a, b, scale in deltas]


def check_finite(weight: Tensor, bias: Tensor | None, names: Iterable[str]) -> None:
    """Refuse what merging the adapters `names` would write, if a value is not finite.

    Raises:
        ValueError: with PEFT's message.
    """
    for kind, value in (("weights", weight), ("bias", bias)):
        if value is not None and not torch.isfinite(value).all():
            raise ValueError(
                f"NaNs detected in the merged {kind}. The adapter {', '.join(names)} seems to be"
                " broken"
            )


def check_invertible(name: str, first: Tensor, second: Tensor, group_size: int) -> None:
    """Refuse an adapter whose merge could not be undone by the inverse of each block.

    Raises:
        ValueError: a block is singular, or nearly.
    """
    squares = (first.square() + second.square()).view(-1, 2, group_size // 2)
    share = determinants(first, second, group_size).abs() / squares.sum(1).flatten()
    bad = torch.nonzero(~(share > SINGULAR)).flatten().tolist()
    if bad:
        raise ValueError(
            f"adapter {name!r} has {len(bad)} singular block(s), the first is number {bad[0]}:"
            " merging it cannot be undone by an inverse; set exact_unmerge=True to keep the"
            " original weight"
        )


def _shares(rotations: Sequence[Rotation], copies: int) -> list[list[Rotation]]:
    return [
        [(u.view(copies, -1)[i], v.view(copies, -1)[i], g) for u, v, g in rotations]
        for i in range(copies)
    ]


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Snapshot:
    """A module's own tensors as they were, quantised ones included; nothing is copied.

    Merging replaces tensors and never writes into them, so holding the old ones costs the memory of
    one weight for as long as the layer stays merged.
    """

    module: nn.Module
    parameters: dict[str, tuple[nn.Parameter, Tensor, dict[str, Any]]]
    buffers: dict[str, Tensor | None]
    state: Any  # of a bitsandbytes 8-bit layer, which caches its codes there

    quantized: bool

    @classmethod
    def take(cls, module: nn.Module, names: Sequence[str] | None = None) -> Snapshot:
        """Remember the named parameters of `module`, or all of a quantised one if not given."""
        return cls(
            module,
            {
                name: (p, p.data, dict(p.__dict__))
                for name, p in module._parameters.items()
                if p is not None and (names is None or name in names)
            },
            dict(module._buffers) if names is None else {},
            copy.copy(getattr(module, "state", None)),
            names is None,
        )

    def restore(self) -> None:
        """Put every tensor back, on the device and in the dtype that the module has by now."""
        tensors = self.tensors()
        for name, (parameter, _, attributes) in self.parameters.items():
            parameter.data = tensors[name]
            parameter.__dict__.update(attributes)
            self.module._parameters[name] = parameter
        self.module._buffers.update(self.buffers)
        if self.state is not None:
            self.module.state = self.state
        module: Any = self.module
        if hasattr(module, "quant_state"):  # of a bitsandbytes 4-bit layer
            module.quant_state = module.weight.quant_state

    def tensors(self) -> dict[str, Tensor]:
        """Give the remembered parameters by name."""
        now = dict(self.module.named_parameters(recurse=False))
        return {
            name: data if self.quantized else data.to(now[name].device, now[name].dtype)
            for name, (_, data, _) in self.parameters.items()
        }


def keep_codes_readable(model: nn.Module) -> None:
    """Keep bitsandbytes 4-bit layers from repacking their codes in evaluation on some CPUs.

    Packed for AVX-512 BF16, a layer has no gradient and its codes dequantise to something else.
    Such CPUs lose the faster product for it.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.state_dict()  # unpacks what was packed already
