"""The kernels of the rotation by slot compiled for GPUs: no spills, wide loads, registers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton.compiler import CompiledKernel

from kernels_peft.rotation_bank import kernel
from kernels_peft.rotation_bank.kernel import FORWARD_TILES, TABLE_TILES, Tile
from tests.kernels_peft.compilation import ARCHITECTURES, Resources, build, resources

pytestmark = pytest.mark.aot

ISA = {"cuda": ("ptx", "cubin"), "hip": ("amdgcn", "hsaco")}
FORWARD = [tile for _, tile in FORWARD_TILES]
TABLE = [tile for _, tile in TABLE_TILES]
# What a width of 4096 makes a multiple of 16.
ALIGNED = ("width", "stride_xm", "stride_gm")
BYTES = {"*bf16": 2, "*fp32": 4}


def _compile(
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    tile: Tile,
    target: Any,
    ones: tuple[str, ...],
    aligned: tuple[str, ...],
) -> CompiledKernel:
    # A launch makes a constant of an integer that is 1.
    constants = {**constants, **{name: 1 for name in ones if name in types}}
    types = {name: kind for name, kind in types.items() if name not in ones}
    return build(
        function, types, {**constants, "BLOCK_M": tile.tokens, "BLOCK_P": tile.pairs}, target,
        multiples_of_16=aligned, num_warps=tile.warps, enable_fp_fusion=kernel.FP_FUSION,
    )  # fmt: skip


def _forward(
    tile: Tile,
    data: str,
    target: Any,
    transposed: bool = False,
    ones: tuple[str, ...] = (),
    index: str = "*i64",
    aligned: tuple[str, ...] = ALIGNED,
) -> CompiledKernel:
    types = {
        **dict.fromkeys(("x_ptr", "out_ptr"), data),
        "table_ptr": "*fp32",
        "group_sizes_ptr": "*i32",
        "slots_ptr": index,
        **dict.fromkeys(("M", "S", "width", "tokens_per_slot", "stride_xm"), "i32"),
    }
    function = kernel._rotate_by_slot_fwd_kernel
    return _compile(function, types, {"TRANSPOSED": transposed}, tile, target, ones, aligned)


def _table(
    tile: Tile, data: str, target: Any, ones: tuple[str, ...] = (), index: str = "*i64"
) -> CompiledKernel:
    sizes = ("width", "tokens_per_slot", "stride_gm", "stride_xm", "splits")
    types = {
        **dict.fromkeys(("grad_ptr", "x_ptr"), data),
        "group_sizes_ptr": "*i32",
        **dict.fromkeys(("order_ptr", "starts_ptr"), index),
        "partials_ptr": "*fp32",
        **dict.fromkeys(sizes, "i32"),
    }
    return _compile(kernel._rotate_by_slot_table_kernel, types, {}, tile, target, ones, ALIGNED)


def _check(compiled: CompiledKernel, name: str) -> Resources:
    architecture, needed = ARCHITECTURES[name], resources(compiled)
    assert set(ISA[architecture.target.backend]) <= set(compiled.asm)
    assert needed.spilled == 0, f"{needed}"
    assert needed.shared <= architecture.shared_limit, f"{needed}"
    return needed


def _wide(compiled: CompiledKernel) -> tuple[int, int]:
    """Count the loads and stores of 16 bytes."""
    ptx = compiled.asm["ptx"]
    return ptx.count("ld.global.v4"), ptx.count("st.global.v4")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tile", FORWARD, ids=str)
@pytest.mark.parametrize("data", BYTES)
@pytest.mark.parametrize("transposed", [False, True])
def test_forward(name: str, tile: Tile, data: str, transposed: bool) -> None:
    compiled = _forward(tile, data, ARCHITECTURES[name].target, transposed)
    needed = _check(compiled, name)
    # Nine programs of one warp have to fit on a processor of 65,536 registers.
    assert needed.registers <= (96 if tile.tokens == 1 else 216)
    if "ptx" in compiled.asm:
        # Of each 16 bytes: both members of the pairs of all tokens, four vectors of coefficients;
        # and the copy of a span of tail, one token at a time.
        pairs = tile.pairs // 32
        rows = 2 * tile.tokens * pairs * BYTES[data] // 16
        copied = 2 * pairs * BYTES[data] // 16
        loads, stores = _wide(compiled)
        assert loads >= rows + 4 * pairs * 4 // 16 + copied
        assert stores >= rows + copied


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tile", TABLE, ids=str)
@pytest.mark.parametrize("data", BYTES)
def test_table(name: str, tile: Tile, data: str) -> None:
    compiled = _table(tile, data, ARCHITECTURES[name].target)
    needed = _check(compiled, name)
    # Three programs of four warps have to fit on a processor of 65,536 registers.
    assert needed.registers <= 168
    if "ptx" in compiled.asm:
        threads = 32 * tile.warps
        loads, _ = _wide(compiled)
        assert loads == 4 * tile.tokens * tile.pairs // threads * BYTES[data] // 16
        # Runs have to be bit-equal.
        assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])


@pytest.mark.parametrize(
    "ones",
    [
        ("tokens_per_slot",),
        ("tokens_per_slot", "S", "splits"),
        ("M", "S", "tokens_per_slot", "stride_xm", "stride_gm", "splits"),
    ],
    ids=str,
)
@pytest.mark.parametrize("index", ["*i32", "*i64"])
def test_sizes_of_one_compile(ones: tuple[str, ...], index: str) -> None:
    target = ARCHITECTURES["sm_90"].target
    for tile in FORWARD:
        _check(_forward(tile, "*bf16", target, ones=ones, index=index), "sm_90")
    _check(_table(TABLE[0], "*bf16", target, ones), "sm_90")


@pytest.mark.parametrize("data", BYTES)
def test_widths_without_alignment_do_not_spill(data: str) -> None:
    for tile in FORWARD:
        _check(_forward(tile, data, ARCHITECTURES["sm_90"].target, aligned=()), "sm_90")


def test_one_program_serves_any_group_size_and_number_of_adapters() -> None:
    # Neither is a constant of the program, so a captured launch stays right when they change.
    constants = {"BLOCK_M", "BLOCK_P", "TRANSPOSED"}
    launch = kernel._rotate_by_slot_fwd_kernel
    assert {p.name for p in launch.params if p.is_constexpr} == constants
