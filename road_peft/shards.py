"""Layers whose tensors several processes share: who holds which part of an adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

_BLOCK_NUMBER = re.compile(r"\.\d+(?=\.|$)")

# What the styles of transformers' tensor-parallel plans do to the output of a layer. A row-parallel
# layer adds its partial outputs up, then its bias, and only then gives them to the rotation.
_SPLIT = {"colwise"}
_WHOLE = {
    *("colwise_gather_output", "colwise_rep"),
    *("rowwise", "rowwise_rep", "rowwise_split_input"),
    "embedding_rowwise",
}


@dataclass(frozen=True)
class Layout:
    """How the adapter of a tensor-parallel layer lies on the processes of `mesh`.

    If the layer gives each process a slice of its outputs (`split`), so does the adapter: theta and
    alpha lie group after group, so an equal share of them belongs to an equal share of the outputs.
    Else every process has the whole output and the whole adapter.
    """

    mesh: DeviceMesh
    split: bool

    def width(self, out_features: int) -> int:
        """Give how many of a layer's outputs a process has."""
        return out_features // self.mesh.size() if self.split else out_features

    def check(self, out_features: int, group_size: int, lora_rank: int) -> None:
        """Refuse an adapter that cannot be laid out so.

        Raises:
            ValueError: a group would straddle two processes, or there is a LoRA.
        """
        count = self.mesh.size()
        if self.split and out_features % (count * group_size):
            raise ValueError(
                f"its {out_features} outputs lie on {count} processes, {out_features / count:g}"
                f" each, which is not a multiple of group_size ({group_size}): choose another"
                " group_size (for one layer by group_size_pattern), fewer processes, or leave the"
                " layer out by exclude_modules"
            )
        if lora_rank:
            raise ValueError(
                f"lora_rank is {lora_rank}, but a tensor-parallel layer has no LoRA beside its"
                " rotation; set lora_rank=0"
            )

    def place(self, parameter: Tensor) -> nn.Parameter:
        """Give `parameter`, whole on every process, as the first process has it, laid out."""
        source = None if parameter.is_meta else 0
        shares = [Shard(0) if self.split else Replicate()]
        laid = distribute_tensor(parameter.detach(), self.mesh, shares, src_data_rank=source)
        return nn.Parameter(laid, requires_grad=parameter.requires_grad)


def layout_of(model: nn.Module, name: str, module: nn.Module) -> Layout | None:
    """Give how an adapter of `module` must lie, None if `model` is not tensor-parallel.

    Raises:
        ValueError: the plan of the model treats this layer in a way that no adapter can follow.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
        return None
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    if mesh.size() == 1:
        return None
    plan = getattr(model, "tp_plan", None) or {}
    style = plan.get(_BLOCK_NUMBER.sub(".*", name))
    if style in _SPLIT:
        return Layout(mesh, split=True)
    if style in _WHOLE or (style is None and not any(map(is_shared, module.parameters()))):
        return Layout(mesh, split=False)
    raise ValueError(
        f"the tensor-parallel plan treats it as {style!r}, which a rotation of its outputs cannot"
        f" follow; only {', '.join(sorted(_SPLIT | _WHOLE))} can. Leave it out of target_modules"
    )


def is_shared(tensor: Any) -> bool:
    """Tell whether several processes hold parts (or copies) of this tensor."""
    return isinstance(tensor, DTensor) or _is_of_zero(tensor)


def _is_of_zero(tensor: Any) -> bool:
    """Tell whether it is a parameter that DeepSpeed's ZeRO-3 keeps in parts."""
    return hasattr(tensor, "ds_id")


def whole(tensor: Tensor) -> Tensor:
    """Give all of `tensor`; every process must ask, since all send their part.

    Of ZeRO-3 it must be the parameter itself: its `data` and `detach()` are empty most of the time.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if _is_of_zero(tensor) and tensor.numel() == 0 < tensor.ds_numel:  # type: ignore[attr-defined]
        from deepspeed.runtime.zero import GatheredParameters  # only where it is in use

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def own(tensor: Tensor, layout: Layout | None) -> Tensor:
    """Give what this process needs of an adapter's tensor, differentiable.

    Engines that shard parameters show them whole during a forward, and as parts between.
    """
    if layout is not None and isinstance(tensor, DTensor):
        return tensor.to_local()
    return whole(tensor)


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Put `value`, whole on every process, into `target`."""
    if isinstance(target, DTensor):
        value = value.to(target.device)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def check_writable(target: Tensor) -> None:
    """Refuse a tensor that `write` cannot change.

    Raises:
        ValueError: it is DeepSpeed's.
    """
    if _is_of_zero(target):
        raise ValueError(
            "the adapter lies in parts on several processes, and DeepSpeed's optimizer keeps values"
            " of its own; change adapters before the model is given to DeepSpeed"
        )


def check_at_hand(tensor: Tensor | None) -> None:
    """Refuse a weight that lies on several processes, for what changes weights in place.

    Raises:
        ValueError: with what to do instead.
    """
    if is_shared(tensor):
        raise ValueError(
            "its weight lies on several processes, which keep copies that a merge would miss; use"
            " road_peft.merged_state_dict(model) on every process, or save the adapter and merge it"
            " into a model that one process holds"
        )
