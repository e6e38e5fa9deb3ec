"""Rotations cut for the processes of tensor parallelism, by vLLM's own functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.model_executor.layers.linear import QKVParallelLinear

from kernels_peft.rotation import rotate
from road_peft.vllm_plugin.rotations import Shard, shards_of, widths_of


def pair(width: int, seed: int = 0) -> Tensor:
    return torch.randn(2, width, generator=torch.Generator().manual_seed(seed))


def layer(cls: Any, processes: int, rank: int, sizes: list[int], **more: Any) -> Any:
    """Give a layer as far as the cutting needs it, without processes."""
    base = SimpleNamespace(output_size=sum(sizes), output_sizes=sizes if len(sizes) > 1 else None)
    shares = [size // processes for size in sizes]
    held = SimpleNamespace(
        base_layer=base,
        tp_size=processes,
        tp_rank=rank,
        n_slices=len(sizes),
        output_size=sum(shares),
        output_slices=tuple(shares),
        output_ids=(rank,) * len(sizes),
        is_merged_col_linear=False,
    )
    vars(held).update(more)
    held.slice_lora_b = lambda rows: cls.slice_lora_b(held, rows)
    return held


def qkv(processes: int, rank: int, keys: int, head: int = 8) -> Any:
    """Give a merged layer of 4 query heads and `keys` heads of keys and values."""
    copies = max(1, processes // keys)
    held = max(1, keys // processes)
    base = QKVParallelLinear.__new__(QKVParallelLinear)
    vars(base).update(total_num_heads=4, total_num_kv_heads=keys, head_size=head, v_head_size=head)
    layer_of_keys = rank // copies
    built = layer(
        MergedQKVParallelLinearWithLoRA,
        processes,
        rank,
        [4 * head, keys * head, keys * head],
        output_slices=(4 // processes * head, held * head, held * head),
        output_ids=(rank, layer_of_keys, layer_of_keys),
    )
    built.base_layer = base
    return built


def rotated(shards: list[Shard | None], y: list[Tensor]) -> Tensor:
    parts = []
    for shard, part in zip(shards, y, strict=True):
        parts.append(part if shard is None else rotate(part, *shard.pair, shard.group_size))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_column_parallel(group_size: int) -> None:
    y, whole = torch.randn(3, 32), pair(32)
    expected = rotate(y, *whole, group_size)
    for rank in range(2):
        module = layer(ColumnParallelLinearWithLoRA, 2, rank, [32])
        shards = shards_of("up", module, [(whole, group_size)])
        cut = slice(16 * rank, 16 * rank + 16)
        torch.testing.assert_close(rotated(shards, [y[:, cut]]), expected[:, cut])


def test_row_parallel_has_all_outputs_and_may_rotate_before_the_sum() -> None:
    whole, parts = pair(32), torch.randn(2, 3, 32)
    found = torch.zeros(3, 32)
    for rank in range(2):
        module = layer(RowParallelLinearWithLoRA, 2, rank, [32])
        found += rotated(shards_of("down", module, [(whole, 8)]), [parts[rank]])
    torch.testing.assert_close(found, rotate(parts.sum(0), *whole, 8))


def test_merged_columns_with_a_member_left_out() -> None:
    y, whole = torch.randn(3, 32), pair(32)
    for rank in range(2):
        module = layer(MergedColumnParallelLinearWithLoRA, 2, rank, [32, 32])
        gate, up = shards_of("gate_up", module, [None, (whole, 4)])
        assert gate is None
        cut = slice(16 * rank, 16 * rank + 16)
        torch.testing.assert_close(rotated([up], [y[:, cut]]), rotate(y, *whole, 4)[:, cut])


@pytest.mark.parametrize(("processes", "keys"), [(1, 2), (2, 2), (4, 2)])
def test_queries_keys_and_values(processes: int, keys: int) -> None:
    """With more processes than heads of keys, several hold the same ones."""
    queries, values = pair(32), pair(8 * keys, 1)
    for rank in range(processes):
        module = qkv(processes, rank, keys)
        assert widths_of(module) == [32, 8 * keys, 8 * keys]
        q, k, v = shards_of("qkv", module, [(queries, 4), None, (values, 8)])
        assert k is None
        assert q is not None
        assert v is not None
        share, held = 32 // processes, module.output_slices[2]
        first = module.output_ids[2] * held
        assert torch.equal(q.pair, queries[:, share * rank : share * (rank + 1)])
        assert torch.equal(v.pair, values[:, first : first + held])


def test_a_cut_group_is_refused() -> None:
    module = layer(ColumnParallelLinearWithLoRA, 4, 1, [96])
    assert shards_of("up", module, [(pair(96), 12)])[0] is not None
    for group_size in (32, 48, 96):
        with pytest.raises(ValueError, match=f"no whole groups of {group_size}"):
            shards_of("up", module, [(pair(96), group_size)])


def test_features_past_the_last_group_stay() -> None:
    module = layer(ColumnParallelLinearWithLoRA, 2, 1, [32])
    (shard,) = shards_of("up", module, [(pair(24), 8)])
    assert shard is not None
    assert shard.group_size == 8
    assert torch.equal(shard.pair[:, 8:], torch.tensor([[1.0], [0.0]]).expand(2, 8))
