"""The kernels of the packed linear layer compiled for GPUs: spills, loads, matrix units."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton.compiler import CompiledKernel

from kernels_peft.packed_linear.kernel import dequantization, finish, low_rank, product
from kernels_peft.packed_linear.kernel.tiles import (
    DEQUANTIZE_TILE,
    FINISH_TILE,
    FUSED_TILES,
    LOW_TILE,
    Tile,
)
from kernels_peft.rotation.kernel import FP_FUSION
from tests.kernels_peft.compilation import ARCHITECTURES, Resources, build, resources

pytestmark = pytest.mark.aot

# Tile, inputs of a step, bits, transposed: every tile, width and direction. And the most
# instructions that read global memory: one for the words of a step, three at 3 bits; a zero point
# and a scale, another zero point at 3 bits; x; and all of it once more for each stage in flight.
LOADS = {
    (0, 128, 2, False): 13,
    (0, 64, 3, True): 19,
    (0, 32, 3, False): 19,
    (1, 64, 4, True): 13,
    (2, 64, 3, False): 38,
}
# By slot, A as it lies in memory and not a transpose of it: x and A for each stage in flight.
LOW_LOADS = {(False, True): 18, (True, True): 19, (True, False): 45}
# Low-rank branch, by slot, rotated: the compiler unrolls the sums of parts where little else is
# done, and a thread reads parts, bias, B and coefficients one by one at the partners of a rotation.
FINISH_LOADS = {
    (False, False, False): 17,
    (True, False, False): 14,
    (True, True, False): 15,
    (False, False, True): 91,
    (True, False, True): 41,
    (True, True, True): 42,
}
# What multiplies matrices, in tiles of 64 rows and in smaller ones.
MATRIX_UNITS = {
    "sm_80": (r"mma\.sync", r"mma\.sync"),
    "sm_90": (r"wgmma", r"mma\.sync"),
    "sm_100": (r"tcgen05\.mma", r"mma\.sync"),
    "gfx942": (r"v_mfma", r"v_mfma"),
}
# What a layer of 4096 x 4096 in groups of 64 makes a multiple of 16.
ALIGNED = (
    "K",
    "N",
    "group_size",
    "stride_xm",
    "R",
    "stride_ar",
    "stride_as",
    "stride_bn",
    "stride_bs",
)
PACKED = {"qweight_ptr": "*i32", "qzeros_ptr": "*i32", "scales_ptr": "*fp16"}


def _compile(
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    tile: Tile,
    name: str,
    ones: tuple[str, ...] = (),
    aligned: tuple[str, ...] = ALIGNED,
) -> CompiledKernel:
    # A launch makes a constant of an integer that is 1.
    constants = {**constants, **{one: 1 for one in ones if one in types}}
    types = {key: kind for key, kind in types.items() if key not in ones}
    return build(
        function, types, constants, ARCHITECTURES[name].target, multiples_of_16=aligned,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip


def _check(compiled: CompiledKernel, name: str) -> Resources:
    needed = resources(compiled)
    assert needed.spilled == 0, f"{needed}"
    assert needed.shared <= ARCHITECTURES[name].shared_limit, f"{needed}"
    return needed


def _code(compiled: CompiledKernel) -> str:
    return compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]


def _loads(compiled: CompiledKernel) -> int:
    """Count the instructions that read global memory, asynchronous copies included."""
    return len(re.findall(r"\b(?:LDG|LDGSTS)\b", compiled.asm["sass"]))


def _partials(case: tuple[int, int, int, bool], name: str, **options: Any) -> CompiledKernel:
    number, inputs, bits, transposed = case
    tile = FUSED_TILES[number][1]
    sizes = dict.fromkeys(("M", "K", "N", "group_size", "stride_xm", "steps_each"), "i32")
    types = {"x_ptr": "*bf16", **PACKED, "out_ptr": "*fp32", **sizes}
    constants = {"BITS": bits, "TRANSPOSED": transposed, "BLOCK_M": tile.rows}
    constants |= {"BLOCK_K": inputs, "BLOCK_N": tile.outputs}
    function = product._packed_linear_partials_kernel
    return _compile(function, types, constants, tile, name, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("case", LOADS, ids=str)
def test_partials(case: tuple[int, int, int, bool], name: str) -> None:
    compiled = _partials(case, name)
    large, small = MATRIX_UNITS[name]
    rows = FUSED_TILES[case[0]][1].rows
    # Three or four programs of four warps have to fit on a processor of 65,536 registers.
    assert _check(compiled, name).registers <= (168 if rows >= 32 else 128)
    assert re.search(large if rows >= 64 else small, _code(compiled))
    if "ptx" in compiled.asm:
        assert _loads(compiled) <= LOADS[case]
        # Runs have to be bit-equal.
        assert not re.search(r"\b(atom|red)\.", _code(compiled))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("by_slot", "contiguous"), [(False, True), (True, True), (True, False)], ids=str
)
def test_the_low_rank_branch(by_slot: bool, contiguous: bool, name: str) -> None:
    tile = LOW_TILE
    strides = ("stride_xm", "stride_as", "stride_ar", "stride_ak")
    sizes = dict.fromkeys(("M", "K", "R", "S", "rows_per_slot", *strides, "steps_each"), "i32")
    data = {"x_ptr": "*bf16", "a_ptr": "*bf16", "slots_ptr": "*i64", "out_ptr": "*fp32"}
    constants = {"BY_SLOT": by_slot, "BLOCK_M": tile.rows}
    constants |= {"BLOCK_K": tile.inputs, "BLOCK_R": tile.outputs}
    # The gradient reads B transposed.
    ones = ("stride_ak" if contiguous else "stride_ar",)
    function, types = low_rank._low_rank_partials_kernel, {**data, **sizes}
    compiled = _compile(function, types, constants, tile, name, ones=ones)
    _check(compiled, name)
    assert re.search(MATRIX_UNITS[name][0], _code(compiled))
    if "ptx" in compiled.asm:
        assert _loads(compiled) <= LOW_LOADS[by_slot, contiguous]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("case", FINISH_LOADS, ids=str)
def test_finish(case: tuple[bool, bool, bool], name: str) -> None:
    (lora, by_slot, rotated), tile = case, FINISH_TILE
    data = {
        **dict.fromkeys(("parts_ptr", "low_ptr", "table_ptr"), "*fp32"),
        **dict.fromkeys(("bias_ptr", "b_ptr", "out_ptr"), "*bf16"),
        **dict.fromkeys(("slots_ptr", "group_sizes_ptr", "turns_ptr"), "*i64"),
    }
    sizes = ("M", "N", "parts", "low_parts", "R", "S", "rows_per_slot", "stride_bs", "stride_bn")
    sizes = (*sizes, "stride_br", "rotations", "rows_per_turn")
    types = {**data, **dict.fromkeys(sizes, "i32"), "scale": "fp32"}
    constants = {"BIAS": True, "LORA": lora, "BY_SLOT": by_slot, "ROTATED": rotated}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "BLOCK_R": tile.inputs}
    function = finish._packed_linear_finish_kernel
    compiled = _compile(function, types, constants, tile, name, ones=("stride_br",))
    # Four programs of four warps have to fit on a processor.
    assert _check(compiled, name).registers <= 128
    assert bool(re.search(MATRIX_UNITS[name][1], _code(compiled))) == lora
    if "ptx" in compiled.asm:
        assert _loads(compiled) <= FINISH_LOADS[case]
        assert not re.search(r"\b(atom|red)\.", _code(compiled))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("bits", "data"), [(2, "*bf16"), (3, "*fp32")])
def test_dequantize(bits: int, data: str, name: str) -> None:
    tile = DEQUANTIZE_TILE
    types = {**PACKED, "out_ptr": data, "N": "i32", "group_size": "i32"}
    constants = {"BITS": bits, "BLOCK_K": tile.inputs, "BLOCK_N": tile.outputs}
    compiled = _compile(dequantization._dequantize_kernel, types, constants, tile, name)
    _check(compiled, name)
    if "ptx" in compiled.asm:
        assert _loads(compiled) <= (3 if bits == 2 else 6)
        assert "st.global.v4" in _code(compiled)


def test_sizes_of_one_and_without_alignment_compile() -> None:
    case = next(iter(LOADS))
    _check(_partials(case, "sm_90", ones=("M", "steps_each")), "sm_90")
    _check(_partials(case, "sm_90", aligned=()), "sm_90")
