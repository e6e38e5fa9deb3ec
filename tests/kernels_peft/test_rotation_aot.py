"""The kernels of the rotation compiled for GPUs: no spills, wide loads, memory within limits."""

from __future__ import annotations

import os
from typing import Any

import pytest
from triton.compiler import CompiledKernel

from kernels_peft.rotation import kernel
from kernels_peft.rotation.kernel import BACKWARD_TILES, FORWARD_TILES, Tile
from tests.kernels_peft.compilation import ARCHITECTURES, Resources, build, resources

pytestmark = pytest.mark.aot

ISA = {"cuda": ("ptx", "cubin"), "hip": ("amdgcn", "hsaco")}
# The chunk is only the end of a loop: one of each shape is enough.
FORWARD = tuple({tile._replace(chunk=0): tile for _, tile in FORWARD_TILES}.values())
BACKWARD = tuple({tile._replace(chunk=0): tile for _, tile in BACKWARD_TILES}.values())


def _sizes(group: int) -> tuple[str, ...]:
    """Name what a width of 4096 makes a multiple of 16."""
    groups = ("groups",) if 4096 // group % 16 == 0 else ()
    return ("width", "stride_xm", "stride_gm", "stride_sm", *groups)


def _fold(
    types: dict[str, str], constants: dict[str, Any], ones: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Make constants of the sizes in `ones`, as a launch does with an integer that is 1."""
    kept = {name: kind for name, kind in types.items() if name not in ones}
    return kept, {**constants, **{name: 1 for name in ones if name in types}}


def _forward(
    tile: Tile, data: str, group: int, target: Any, tail: bool, ones: tuple[str, ...] = ()
) -> CompiledKernel:
    types = {
        **dict.fromkeys(("x_ptr", "out_ptr"), data),
        **dict.fromkeys(("first_ptr", "second_ptr"), "*fp32"),
        **dict.fromkeys(("M", "groups", "width", "stride_xm"), "i32"),
    }
    constants = {"HALF": group // 2, "BLOCK_M": tile.rows, "BLOCK_P": tile.pairs, "TAIL": tail}
    types, constants = _fold(types, constants, ones)
    return build(
        kernel._rotate_fwd_kernel, types, constants, target,
        multiples_of_16=_sizes(group), num_warps=tile.warps, enable_fp_fusion=kernel.FP_FUSION,
    )  # fmt: skip


def _backward(
    tile: Tile,
    data: str,
    group: int,
    target: Any,
    tail: bool,
    saved_is_output: bool,
    ones: tuple[str, ...] = (),
) -> CompiledKernel:
    types = {
        **dict.fromkeys(("grad_ptr", "saved_ptr", "dx_ptr"), data),
        **dict.fromkeys(("first_ptr", "second_ptr", "partials_ptr"), "*fp32"),
        **dict.fromkeys(("M", "groups", "width", "stride_gm", "stride_sm", "chunks"), "i32"),
    }
    constants = {
        "HALF": group // 2,
        "BLOCK_M": tile.rows,
        "BLOCK_P": tile.pairs,
        "CHUNK": tile.chunk,
        "TAIL": tail,
        "INPUT_GRAD": True,
        "COEFFICIENT_GRAD": True,
        "SAVED_IS_OUTPUT": saved_is_output,
    }
    types, constants = _fold(types, constants, ones)
    return build(
        kernel._rotate_bwd_kernel, types, constants, target,
        multiples_of_16=_sizes(group), num_warps=tile.warps, enable_fp_fusion=kernel.FP_FUSION,
    )  # fmt: skip


def _check(compiled: CompiledKernel, name: str, needed: Resources) -> None:
    architecture = ARCHITECTURES[name]
    assert set(ISA[architecture.target.backend]) <= set(compiled.asm)
    assert needed.spilled == 0, f"{needed}"
    assert needed.shared <= architecture.shared_limit, f"{needed}"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tile", FORWARD, ids=str)
@pytest.mark.parametrize("group", [64, 2])
@pytest.mark.parametrize("data", ["*bf16", "*fp32"])
def test_forward(name: str, tile: Tile, group: int, data: str) -> None:
    compiled = _forward(tile, data, group, ARCHITECTURES[name].target, tail=False)
    needed = resources(compiled)
    _check(compiled, name, needed)
    # A program is one warp, and exchanges nothing.
    assert needed.shared == 0
    if "ptx" in compiled.asm:
        assert "ld.global.v4" in compiled.asm["ptx"]
        assert "st.global.v4" in compiled.asm["ptx"]
        # Two tiles of data and four vectors of coefficients, all in loads of 16 bytes.
        per_thread = tile.pairs // 32
        size = {"*bf16": 2, "*fp32": 4}[data]
        expected = (2 * tile.rows * per_thread * size + 4 * per_thread * 4) // 16
        assert compiled.asm["ptx"].count("ld.global.v4") == expected
        assert compiled.asm["ptx"].count("ld.global") == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tile", BACKWARD, ids=str)
@pytest.mark.parametrize("group", [64, 2])
@pytest.mark.parametrize("data", ["*bf16", "*fp32"])
@pytest.mark.parametrize("saved_is_output", [False, True])
def test_backward(name: str, tile: Tile, group: int, data: str, saved_is_output: bool) -> None:
    target = ARCHITECTURES[name].target
    compiled = _backward(tile, data, group, target, False, saved_is_output)
    needed = resources(compiled)
    _check(compiled, name, needed)
    # Four programs of four warps have to fit on a processor of 65,536 registers.
    assert needed.registers <= 128
    if "ptx" in compiled.asm:
        assert "ld.global.v4" in compiled.asm["ptx"]
        assert "st.global.v4" in compiled.asm["ptx"]
        assert "atom" not in compiled.asm["ptx"]


@pytest.mark.parametrize("group", [6, 16])
def test_tails_and_other_groups_do_not_spill(group: int) -> None:
    target = ARCHITECTURES["sm_90"].target
    for compiled in (
        _forward(FORWARD[-1], "*bf16", group, target, tail=True),
        _backward(BACKWARD[-1], "*bf16", group, target, True, False),
    ):
        _check(compiled, "sm_90", resources(compiled))


@pytest.mark.parametrize(
    "ones",
    [
        ("chunks",),
        ("groups",),
        ("M", "groups", "stride_xm", "stride_gm", "stride_sm", "chunks"),
    ],
    ids=str,
)
def test_sizes_of_one_compile(ones: tuple[str, ...]) -> None:
    target = ARCHITECTURES["sm_90"].target
    _forward(FORWARD[0], "*bf16", 64, target, True, ones)
    _backward(BACKWARD[0], "*bf16", 64, target, True, True, ones)


def test_runs_of_eight_features_are_loaded_at_once() -> None:
    compiled = _forward(FORWARD[-1], "*bf16", 16, ARCHITECTURES["sm_90"].target, tail=False)
    loads = [line for line in compiled.asm["ptx"].splitlines() if "ld.global" in line]
    assert loads
    assert all("ld.global.v4" in line for line in loads)


def test_the_compiler_is_told_about_fused_multiply_add() -> None:
    # Its default changes between versions, and with it the last bit of results.
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"
    fused = _forward(FORWARD[0], "*fp32", 64, ARCHITECTURES["sm_90"].target, tail=False)
    assert "FFMA" in fused.asm["sass"]
