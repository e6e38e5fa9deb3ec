"""Compile a Triton kernel for a GPU that is not there, and say what the result needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel


@dataclass(frozen=True)
class Architecture:
    """What to compile for, and the bytes of shared memory that a program may have there."""

    target: GPUTarget
    shared_limit: int


# The compiler does not check the limit.
ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 65_536),
}


@dataclass(frozen=True)
class Resources:
    """Registers of a thread, bytes it spills, bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


def build(
    kernel: triton.JITFunction,
    types: dict[str, str],
    constants: dict[str, Any],
    target: GPUTarget,
    *,
    multiples_of_16: tuple[str, ...] = (),
    **options: Any,
) -> CompiledKernel:
    """Compile as a launch with aligned pointers and the sizes named would."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    variable = [name for name in names if signature[name] != "constexpr"]
    aligned = [n for n in variable if signature[n].startswith("*") or n in multiples_of_16]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options=options)


def resources(compiled: CompiledKernel) -> Resources:
    """Read the resources from what the assembler wrote."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled, private = (
            int(_search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return Resources(registers, spilled + private, shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return Resources(int(found[1]), int(found[2]) + int(found[3]), shared)


def _search(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern} is not in the output of the assembler")
    return found
