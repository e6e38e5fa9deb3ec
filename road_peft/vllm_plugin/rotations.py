"""The rotations of all slots beside one layer of vLLM, and the operator that applies them."""

# no `annotations` from the future: torch reads the types of the operator's arguments

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.utils.torch_utils import direct_register_custom_op

from kernels_peft.rotation_bank import rotate_by_slot

_LIBRARY = Library("road_peft", "FRAGMENT")


@dataclass(frozen=True)
class Shard:
    """The rotation of one slice of a layer's outputs, as far as this process holds them.

    `pair` are the coefficients (first, second): (2, d), float32.
    """

    pair: Tensor
    group_size: int


@dataclass(frozen=True)
class LayerRotations:
    """The tables of one layer: for each slice of its outputs the coefficients of all slots.

    `slots` and `active` belong to all layers of a model: the slot of each token of a batch, -1
    without a rotation, and on the host whether there is any. A captured CUDA graph replays with
    what the tables and `slots` hold by then.

    Shapes:
        tables: (S, 2, d) each, float32. group_sizes: (S,) each, int32. slots: (most tokens,),
        int32. active: (1,), bool, on the host.
    """

    tables: list[Tensor]
    group_sizes: list[Tensor]
    slots: Tensor
    active: Tensor

    def write(self, slot: int, shards: Sequence[Shard | None] | None) -> None:
        """Put one adapter into a slot; None leaves a slice, or all, as the base has them."""
        for i, sizes in enumerate(self.group_sizes):
            shard = None if shards is None else shards[i]
            sizes[slot] = 0 if shard is None else shard.group_size
            if shard is not None:
                self.tables[i][slot].copy_(shard.pair)


def attach(
    modules: Mapping[str, Any], wrapper: Any, slots: Tensor, active: Tensor, count: int
) -> dict[str, LayerRotations]:
    """Give tables of `count` slots to every linear layer that follows the mapping `wrapper`."""
    found: dict[str, LayerRotations] = {}
    for name, module in modules.items():
        if not isinstance(module, BaseLinearLayerWithLoRA) or module.punica_wrapper is not wrapper:
            continue
        widths = [b.shape[2] for b in module.lora_b_stacked]
        found[name] = module._rotations = LayerRotations(
            [torch.zeros(count, 2, width, device=module.device) for width in widths],
            [torch.zeros(count, dtype=torch.int32, device=module.device) for _ in widths],
            slots,
            active,
        )
    return found


def rotate_rows(
    y: Tensor,
    tables: list[Tensor],
    group_sizes: list[Tensor],
    slots: Tensor,
    active: Tensor,
) -> None:
    """Rotate the outputs `y` of a layer in place, every token by the coefficients of its slot."""
    if not active.item():  # on the host: nothing is awaited
        return
    start = 0
    for table, sizes in zip(tables, group_sizes, strict=True):
        part = y[:, start : start + table.shape[2]]
        part.copy_(rotate_by_slot(part, table, sizes, slots[: y.shape[0]]))
        start += table.shape[2]


def _fake(
    y: Tensor,
    tables: list[Tensor],
    group_sizes: list[Tensor],
    slots: Tensor,
    active: Tensor,
) -> None:
    return None


def install() -> None:
    """Make vLLM's linear layers rotate what they give, after the LoRA of rows that have one."""
    if "_rotations" in vars(BaseLinearLayerWithLoRA):
        return
    direct_register_custom_op(
        "rotate_rows", rotate_rows, mutates_args=["y"], fake_impl=_fake, target_lib=_LIBRARY
    )
    add_lora = BaseLinearLayerWithLoRA._apply_lora_to_output

    def apply(self: Any, x: Tensor, output: Tensor) -> Tensor:
        output = add_lora(self, x, output)
        held = self._rotations
        if held is not None:
            torch.ops.road_peft.rotate_rows(
                output.view(-1, output.shape[-1]),
                held.tables,
                held.group_sizes,
                held.slots,
                held.active,
            )
        return output

    BaseLinearLayerWithLoRA._rotations = None
    BaseLinearLayerWithLoRA._apply_lora_to_output = apply


# ---- the outputs that a process holds ---------------------------------------------------------


def widths_of(module: Any) -> list[int]:
    """Give the numbers of outputs of the slices of a layer, over all processes."""
    base = module.base_layer
    if isinstance(base, QKVParallelLinear):  # whose own sizes count copies of keys and values
        keys = base.total_num_kv_heads
        return [
            base.total_num_heads * base.head_size,
            keys * base.head_size,
            keys * base.v_head_size,
        ]
    return list(getattr(base, "output_sizes", None) or [base.output_size])


def shards_of(
    name: str, module: Any, rotations: Sequence[tuple[Tensor, int] | None]
) -> list[Shard | None]:
    """Cut the rotations of a layer's members as vLLM cuts its weight.

    `rotations` are (pair, group size) of each member of a merged layer, or of all its outputs
    together. Features past the last whole group stay as they are.

    Shapes:
        pair: (2, rotated features of the member, over all processes).
    Raises:
        ValueError: a process would hold a part of a group.
    """
    widths = widths_of(module)
    if len(rotations) == 1:
        widths = [sum(widths)]
    rows = [
        None if rotation is None else _labelled(*rotation, width)
        for rotation, width in zip(rotations, widths, strict=True)
    ]
    if len(rows) == 1 and module.n_slices > 1 and rows[0] is not None:
        rows = list(rows[0].split(widths_of(module)))
    if module.tp_size > 1:
        rows = module.slice_lora_b(rows) if module.n_slices > 1 else [module.slice_lora_b(rows[0])]
    return [None if part is None else _shard(name, module, part) for part in rows]


def _labelled(pair: Tensor, group_size: int, width: int) -> Tensor:
    """Give (first, second, place in its group, group size) for every output: (width, 4).

    Cut along the outputs like the B of a LoRA, it still tells whether a group is whole.
    """
    rows = torch.tensor([1.0, 0.0, -1.0, group_size]).repeat(width, 1)
    rotated = pair.shape[1]
    rows[:rotated, :2] = pair.t()
    rows[:rotated, 2] = torch.arange(rotated) % group_size
    return rows


def _shard(name: str, module: Any, rows: Tensor) -> Shard | None:
    place, group_size = rows[:, 2], int(rows[0, 3])
    rotated = int((place >= 0).sum())
    if rotated == 0:
        return None
    whole = torch.arange(rotated) % group_size
    if rotated % group_size or not torch.equal(place[:rotated], whole.to(place.dtype)):
        raise ValueError(
            f"the {len(rows)} outputs of {name} that one of {module.tp_size} processes holds are no"
            f" whole groups of {group_size}; serve with a smaller tensor_parallel_size, or train"
            " with a group size that divides them"
        )
    return Shard(rows[:, :2].t().contiguous(), group_size)
