"""What an adapter has learnt: angles, scales and determinants of its blocks, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels_peft import determinants
from road_peft.adapter_files import PREFIX, load_adapter_files
from road_peft.config import RoadConfig
from road_peft.variants import VARIANTS, block_entries

# query and key projections whose outputs are rotated by position (RoPE) in common models
_ROPE_LAYERS = ("q_proj", "k_proj")


@dataclass(frozen=True)
class LayerReport:
    """Figures of one layer. A block's angle and scale are those of the nearest scaled rotation.

    `rope_share` is the share of blocks that commute with RoPE in rotate-half models, so that they
    act as a fixed offset of phase; None where no RoPE follows or the head size is not known.
    """

    layer: str
    variant: str
    group_size: int
    blocks: int
    mean_angle_degrees: float
    max_angle_degrees: float
    mean_scale: float
    min_determinant: float
    max_determinant: float
    rope_share: float | None


def inspect_adapter(path: str | Path, head_dim: int | None = None) -> list[LayerReport]:
    """Report on every layer of a saved RoAd adapter; the base model is not needed.

    Raises:
        ValueError: the folder holds no readable RoAd adapter.
    """
    config, tensors = load_adapter_files(path)
    layers = [k.removesuffix(".road_theta") for k in tensors if k.endswith(".road_theta")]
    return [
        _report(key.removeprefix(PREFIX), config, tensors, key, head_dim)
        for key in sorted(layers, key=_natural)
    ]


def block_angles(first: Tensor, second: Tensor, group_size: int) -> Tensor:
    """Give the angle of the nearest scaled rotation of every block, in radians.

    Shapes:
        first, second: (n,). Returns (n / 2,).
    """
    a, b, c, d = block_entries(first, second, group_size)
    return torch.atan2(b + c, a + d).flatten()


def rope_commuting(first: Tensor, second: Tensor, group_size: int, head_dim: int) -> Tensor:
    """Tell for every block whether it commutes with RoPE's rotation of the same features.

    It does if it changes nothing, or if it pairs what RoPE pairs (i with i + head_dim / 2 within a
    head) and is a rotation times a scale.

    Shapes:
        first, second: (n,). Returns (n / 2,), bool.
    """
    a, b, c, d = block_entries(first, second, group_size)
    channel = torch.arange(first.shape[0]).view(-1, 2, group_size // 2)
    low, high = channel.unbind(1)
    same_pairs = (low % head_dim < head_dim // 2) & (high == low + head_dim // 2)
    identity = (a == 1) & (d == 1) & (b == 0) & (c == 0)
    return (identity | (same_pairs & (a == d) & (b == c))).flatten()


def _report(
    name: str, config: RoadConfig, tensors: dict[str, Tensor], key: str, head_dim: int | None
) -> LayerReport:
    arguments = config.layer_arguments(name)
    variant, group_size = VARIANTS[arguments["variant"]], arguments["group_size"]
    theta, alpha = (tensors[f"{key}.road_{p}"].float() for p in ("theta", "alpha"))
    first, second = variant.coefficients(theta, alpha, group_size)
    angles = block_angles(first, second, group_size).abs().rad2deg()
    determinant = determinants(first, second, group_size)
    share = None
    if head_dim and name.rpartition(".")[2] in _ROPE_LAYERS:
        share = rope_commuting(first, second, group_size, head_dim).float().mean().item()
    return LayerReport(
        layer=name,
        variant=variant.name,
        group_size=group_size,
        blocks=len(angles),
        mean_angle_degrees=angles.mean().item(),
        max_angle_degrees=angles.max().item(),
        mean_scale=determinant.abs().sqrt().mean().item(),
        min_determinant=determinant.min().item(),
        max_determinant=determinant.max().item(),
        rope_share=share,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def plot(reports: Iterable[LayerReport], path: Path) -> None:
    """Draw mean angle and mean scale, one row a kind of module, one column a block, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells: dict[str, dict[int, LayerReport]] = {}
    for report in reports:
        numbers = [p for p in report.layer.split(".") if p.isdigit()]
        kind = report.layer.rpartition(".")[2]
        cells.setdefault(kind, {})[int(numbers[0]) if numbers else 0] = report
    depth = max(max(row) for row in cells.values()) + 1
    figure, axes = pyplot.subplots(
        2, 1, figsize=(max(5, depth * 0.3), 1.5 + len(cells) * 0.7), layout="constrained"
    )
    for axis, field, title in zip(
        axes,
        ("mean_angle_degrees", "mean_scale"),
        ("mean |angle| of a block, degrees", "mean scale of a block"),
        strict=True,
    ):
        grid = [
            [getattr(row[i], field) if i in row else math.nan for i in range(depth)]
            for row in cells.values()
        ]
        image = axis.imshow(grid, aspect="auto", interpolation="nearest")
        axis.set(title=title, xlabel="block", yticks=range(len(cells)), yticklabels=list(cells))
        figure.colorbar(image, ax=axis)
    temporary = path.with_name(path.name + ".part.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    pyplot.close(figure)
