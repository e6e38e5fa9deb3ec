"""The package without triton, and the folder `kernels/` beside a library of that name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import kernels_peft

ROOT = Path(__file__).parents[2]


def _run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_works_without_triton() -> None:
    _run("""
import sys
sys.modules["triton"] = None  # from here on it is as if it were not installed
import torch
from kernels_peft import rotate
assert "kernels_peft.rotation.kernel" not in sys.modules
leaves = [t.requires_grad_() for t in (torch.randn(3, 9), torch.ones(8), torch.zeros(8))]
y = rotate(*leaves, 4)
y.sum().backward()
assert torch.equal(y, leaves[0]) and all(leaf.grad is not None for leaf in leaves)
""")


def test_triton_serves_cuda_where_it_is_installed() -> None:
    assert "kernels_peft.rotation.kernel" in sys.modules
    for name in ("rotate", "rotate_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kernels_peft::{name}", "CUDA")


def test_the_folder_kernels_does_not_hide_a_package_of_that_name() -> None:
    for folder in ("kernels", "examples"):
        assert not (ROOT / folder / "__init__.py").exists()
    # transformers looks for a package `kernels`; the root of the repository is on the path here.
    _run("""
import os, sys
sys.path.insert(0, os.getcwd())
from transformers import LlamaForCausalLM
""")


def test_public_names_are_listed_and_sorted() -> None:
    assert sorted(kernels_peft.__all__) == kernels_peft.__all__
    for name in kernels_peft.__all__:
        assert callable(getattr(kernels_peft, name))
