"""Adapting a parameter of a module that is not a layer: stacked experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from kernels_peft import rotate_reference
from road_peft.layer import RoadLayer


class ParamWrapper(RoadLayer):
    """Rotates what a parameter of `base_layer` produces, by rotating the parameter.

    For experts stacked as (experts, out, in), or (experts, in, out) if the module says
    `is_transposed`, every expert has its own blocks; they lie one expert after the other in theta
    and alpha. A bias `<name>_bias` is rotated too. Each forward builds the rotated parameter, so it
    costs memory and time of the size of the weights, not of the outputs. Several parameters of one
    module are wrapped one inside the other.

    PEFT recognises such a wrapper by the name of its class.
    """

    lora_beside = False

    def __init__(self, base_layer: nn.Module, parameter_name: str, **backend_kwargs: Any) -> None:
        module = base_layer.get_base_layer() if isinstance(base_layer, RoadLayer) else base_layer
        parameter = getattr(module, parameter_name)
        if parameter.dim() not in (2, 3):
            raise ValueError(
                f"parameter {parameter_name} has {parameter.dim()} dimensions; only (out, in) and"
                " stacks (experts, out, in) can be rotated"
            )
        transposed = parameter.dim() == 3 and getattr(module, "is_transposed", False)
        in_features, out_features = parameter.shape[-2:] if transposed else parameter.shape[:-3:-1]
        super().__init__(
            base_layer,
            in_features,
            out_features,
            feature_dim=1 if transposed else 0,
            copies=parameter.shape[0] if parameter.dim() == 3 else 1,
            **backend_kwargs,
        )
        self.weight_name, self.bias_name = parameter_name, f"{parameter_name}_bias"
        self.parameter_name = parameter_name  # PEFT looks it up

    def get_base_weight(self) -> Tensor:
        return getattr(self.get_base_layer(), self.weight_name).data

    def set_base_weight(self, weight_data: Tensor) -> None:
        getattr(self.get_base_layer(), self.weight_name).data = weight_data

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give the wrapped module, this parameter and those wrapped further inside merged."""
        layer: Any = self
        while merge and isinstance(layer, ParamWrapper):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return self.get_base_layer()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", self.routing.current) is not None:
            raise ValueError(
                "adapter_names is given, but experts see tokens and not rows, so a row cannot"
                " choose its adapter there; run one adapter at a time or drop target_parameters"
            )
        if self.disable_adapters and self._unmerged is not None:
            with self._restored():
                return self.base_layer(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            raise ValueError(
                "the adapter is merged with exact_unmerge=False, so the original experts are gone;"
                " unmerge before disabling it"
            )
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        with self._rotated():
            return self.base_layer(x, *args, **kwargs)

    @contextmanager
    def _rotated(self) -> Iterator[None]:
        module: Any = self.get_base_layer()
        names = self._present(self.active_adapters)
        turns = [(*self.coefficients(name), self.group_size[name]) for name in names]
        done = []
        try:
            for name in (self.weight_name, self.bias_name):
                if turns and getattr(module, name, None) is not None:
                    is_bias = name == self.bias_name
                    dim = -1 if is_bias or self.feature_dim == 1 else -2  # of the features
                    frozen = not getattr(module, name).requires_grad
                    parametrize.register_parametrization(
                        module, name, _Rotation(turns, self.copies, dim), unsafe=True
                    )
                    module.parametrizations[name].original.requires_grad_(not frozen)
                    done.append(name)
            with parametrize.cached():
                yield
        finally:
            for name in done:
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)


class _Rotation(nn.Module):
    """The parametrization: features of a weight along `dim`, one row of coefficients a copy."""

    def __init__(self, turns: list[tuple[Tensor, Tensor, int]], copies: int, dim: int) -> None:
        super().__init__()
        self.turns, self.copies, self.dim = turns, copies, dim

    def forward(self, parameter: Tensor) -> Tensor:
        rotated = parameter.transpose(self.dim, -1)
        for first, second, group_size in self.turns:
            first, second = (self._fit(v, rotated.dim()) for v in (first, second))
            rotated = rotate_reference(rotated, first, second, group_size)
        return rotated.transpose(self.dim, -1)

    def _fit(self, vector: Tensor, dims: int) -> Tensor:
        if self.copies == 1:
            return vector
        return vector.view(self.copies, *(1,) * (dims - 2), -1)
