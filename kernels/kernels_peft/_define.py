"""One way to register an operator with torch, used by every op of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

from kernels_peft.autocast import without_autocast

_LIBRARY = Library("kernels_peft", "FRAGMENT")


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    implementation: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the operator `schema` declares and return it.

    `check` raises on bad arguments, before the eager implementation and before the fake one, so an
    error is the same with and without `torch.compile`. `implementation` serves every device;
    `cuda` takes over on CUDA and ROCm. All compute in the dtypes they get, autocast or not.
    """
    name = schema.partition("(")[0]

    def checked(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            check(*args)
            return run(*args)

        return call

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, without_autocast(checked(implementation)), "CompositeExplicitAutograd")
    if cuda is not None:
        _LIBRARY.impl(name, without_autocast(checked(cuda)), "CUDA")
    torch.library.register_fake(f"kernels_peft::{name}", checked(fake), lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"kernels_peft::{name}",
            without_autocast(backward),
            setup_context=setup_context,
            lib=_LIBRARY,
        )
    return getattr(torch.ops.kernels_peft, name).default
