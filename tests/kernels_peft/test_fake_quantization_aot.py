"""The kernels of fake quantisation compiled for GPUs: no spills, wide loads, exact division."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton.compiler import CompiledKernel

from kernels_peft.fake_quantization import kernel
from kernels_peft.fake_quantization.kernel import TILE
from kernels_peft.packing import FORMATS
from tests.kernels_peft.compilation import ARCHITECTURES, build, resources

pytestmark = pytest.mark.aot

ISA = {"cuda": ("ptx", "cubin"), "hip": ("amdgcn", "hsaco")}
BYTES = {"*bf16": 2, "*fp32": 4}
GROUP_SIZES = (32, 64, 128, 96, 4096)  # the last is a whole row, which takes several spans
FORWARD, BACKWARD = kernel._fake_quantize_fwd_kernel, kernel._fake_quantize_bwd_kernel
KERNELS = pytest.mark.parametrize("function", [FORWARD, BACKWARD], ids=["forward", "backward"])


def _compile(
    function: Any,
    name: str,
    group_size: int,
    weight: str = "*fp32",
    other: str = "*fp32",
    bits: int = 2,
    aligned: tuple[str, ...] = ("groups",),
    one_group: bool = False,
) -> CompiledKernel:
    """Compile for a weight and the other tensor of its size, the values or their gradient."""
    block_m, block_k = TILE.sides(group_size)
    types = {"weight_ptr": weight, **dict.fromkeys(("scale_ptr", "zero_ptr"), "*fp32")}
    types |= {"out_ptr": other} if function is FORWARD else {"grad_ptr": other, "out_ptr": "*fp32"}
    constants = {
        "HIGHEST": 2**bits - 1, "GROUP": group_size, "BLOCK_M": block_m, "BLOCK_K": block_k,
    }  # fmt: skip
    if one_group:  # a launch makes a constant of an integer that is 1
        constants["groups"] = 1
    else:
        types["groups"] = "i32"
    return build(
        function, types, constants, ARCHITECTURES[name].target,
        multiples_of_16=aligned, num_warps=TILE.warps, enable_fp_fusion=kernel.FP_FUSION,
    )  # fmt: skip


def _check(compiled: CompiledKernel, name: str, registers: int = 80) -> None:
    architecture, needed = ARCHITECTURES[name], resources(compiled)
    assert set(ISA[architecture.target.backend]) <= set(compiled.asm)
    assert needed.spilled == 0, f"{needed}"
    # Sums stay in a warp; what passes through shared memory is one number a group, or little more.
    assert needed.shared <= 256, f"{needed}"
    # 25 programs of one warp have to fit on a processor of 65,536 registers.
    assert needed.registers <= registers, f"{needed}"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("data", BYTES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@KERNELS
def test_resources_and_width_of_access(function, group_size: int, data: str, name: str) -> None:
    compiled = _compile(function, name, group_size, data, data)
    _check(compiled, name)
    text, threads, load, store = (
        (compiled.asm["ptx"], 32, "ld.global.v4", "st.global.v4")
        if "ptx" in compiled.asm
        else (compiled.asm["amdgcn"], 64, "_load_dwordx4", "_store_dwordx4")
    )
    each = TILE.weights // threads * BYTES[data] // 16
    assert text.count(load) >= each * (1 if function is FORWARD else 2)
    assert text.count(store) >= (each if function is FORWARD else 0)
    # Runs have to be bit-equal.
    assert not re.search(r"\b(atom|red)\.|global_atomic", text)


@pytest.mark.parametrize("name", ARCHITECTURES)
@KERNELS
def test_division_and_rounding_are_exact(function, name: str) -> None:
    compiled = _compile(function, name, 64)
    if "ptx" in compiled.asm:
        ptx = compiled.asm["ptx"]
        assert ptx.count("div.rn.f32") == TILE.weights // 32
        assert not re.search(r"div\.(full|approx)|rcp\.approx|\.ftz", ptx)
        # 3 * 2**22 is added and taken away again: nothing has cancelled the two.
        assert "0f4B400000" in ptx
        assert "0fCB400000" in ptx
    else:
        text = compiled.asm["amdgcn"]
        assert text.count("v_div_fixup_f32") == TILE.weights // 64
        assert "0x4b400000" in text
        assert "0xcb400000" in text


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize(("weight", "other"), [("*bf16", "*fp32"), ("*fp32", "*bf16")])
@KERNELS
def test_mixed_dtypes_of_all_widths(function, weight: str, other: str, bits: int) -> None:
    _check(_compile(function, "sm_90", 64, weight, other, bits), "sm_90")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("group_size", [1, 7, 1000])
@KERNELS
def test_any_group_size_and_a_single_group(function, group_size: int, name: str) -> None:
    for one_group in (False, True):
        compiled = _compile(function, name, group_size, aligned=(), one_group=one_group)
        _check(compiled, name, registers=96)
