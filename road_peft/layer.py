"""The adapted layer: any module whose outputs can be rotated."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import peft.tuners.road as upstream
import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F

from kernels_peft import invert, rotate, rotate_by_slot
from road_peft.mixed_batch import Rows
from road_peft.routing import Route, Routing
from road_peft.shards import Layout, check_at_hand, is_shared, own, whole
from road_peft.variants import VARIANTS
from road_peft.weights import (
    Delta,
    Rotation,
    Snapshot,
    check_finite,
    check_invertible,
    negative,
    rotate_bias,
    rotate_weight,
)


class RoadLayer(nn.Module, upstream.RoadLayer):
    """Rotates the outputs of `base_layer`: z = R (W x + b), plus B A x if the adapter has a LoRA.

    Parameters are two vectors in float32 an adapter, and two matrices if it has a LoRA.
    Several active adapters rotate in turn; their LoRA deltas add up and are not rotated.

    Source:
        RoAd (arXiv:2409.00119), section 3.2. The bias is rotated, as in PEFT; the paper has none.
    """

    adapter_layer_names = ("road_theta", "road_alpha", "road_lora_A", "road_lora_B")
    other_param_names = (
        *("variant", "group_size", "recompute", "exact_unmerge"),
        *("lora_scale", "lora_dropout"),
    )
    lora_beside = True
    weight_name, bias_name = "weight", "bias"
    instances: ClassVar[weakref.WeakSet[RoadLayer]] = weakref.WeakSet()

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        *,
        feature_dim: int = 0,
        copies: int = 1,
        **backend_kwargs: Any,
    ) -> None:
        """Wrap `base_layer`, whose weight has the rotated features along `feature_dim`.

        `copies` is the number of weights of this size, each with coefficients of its own.
        """
        super().__init__()  # upstream's own constructor accepts nn.Linear only
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.feature_dim, self.copies = feature_dim, copies
        self.layout: Layout | None = None  # the model that owns a tensor-parallel layer sets it
        self.module_name = ""  # in the base model; patterns of the configuration match it
        self.road_theta = nn.ParameterDict()
        self.road_alpha = nn.ParameterDict()
        self.road_lora_A = nn.ParameterDict()
        self.road_lora_B = nn.ParameterDict()
        self.variant: dict[str, str] = {}
        self.group_size: dict[str, int] = {}
        self.recompute: dict[str, bool] = {}
        self.lora_scale: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.exact_unmerge: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: Snapshot | None = None
        self.routing = Routing()  # the model that owns this layer puts its own here
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), **backend_kwargs
        )
        self.instances.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and pickles
        super().__setstate__(state)
        self.instances.add(self)

    def update_layer(  # type: ignore[override]  # flat arguments instead of a configuration
        self,
        adapter_name: str,
        *,
        variant: str,
        group_size: int,
        init_weights: bool = True,
        remainder: str = "error",
        recompute: bool = False,
        exact_unmerge: bool = True,
        lora_rank: int = 0,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        inference_mode: bool = False,
    ) -> None:
        """Add the adapter, or replace the one of that name.

        Raises:
            ValueError: group_size does not divide the outputs and `remainder` is "error", no whole
                group fits, a LoRA is asked for where it cannot be had, or the processes of a
                tensor-parallel layer cannot share the adapter.
        """
        if hasattr(nn.ParameterDict, adapter_name):
            raise ValueError(
                f"{adapter_name!r} cannot name an adapter, since torch's ParameterDict has an"
                " attribute of that name; choose another"
            )
        rotated = self.out_features - self.out_features % group_size
        if not rotated or (rotated != self.out_features and remainder == "error"):
            raise ValueError(
                f"The out_features of the base layer must be divisible by group_size ({group_size})"
                f" when using RoadLayer. This one has {self.out_features}: choose another"
                " group_size (for one layer by group_size_pattern), leave the layer out by"
                " exclude_modules" + (", or set remainder='identity'." if rotated else ".")
            )
        if lora_rank and not self.lora_beside:
            raise ValueError(
                f"lora_rank is {lora_rank}, but a {type(self).__name__} has no LoRA beside its"
                " rotation; leave this layer out of target_modules or set lora_rank=0"
            )
        if self.layout is not None:
            self.layout.check(self.out_features, group_size, lora_rank)
        size = VARIANTS[variant].size(rotated) * self.copies
        self.variant[adapter_name] = variant
        self.group_size[adapter_name] = group_size
        self.recompute[adapter_name] = recompute
        self.exact_unmerge[adapter_name] = exact_unmerge
        self.road_theta[adapter_name] = nn.Parameter(torch.empty(size))
        self.road_alpha[adapter_name] = nn.Parameter(torch.empty(size))
        for of_lora in (self.road_lora_A, self.road_lora_B, self.lora_scale, self.lora_dropout):
            if adapter_name in of_lora:
                del of_lora[adapter_name]
        if lora_rank:
            self.lora_scale[adapter_name] = lora_alpha / lora_rank
            self.lora_dropout[adapter_name] = lora_dropout
            self.road_lora_A[adapter_name] = nn.Parameter(torch.empty(lora_rank, self.in_features))
            self.road_lora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, lora_rank))
        self.reset_parameters(adapter_name, init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if self.layout is not None:
            for vectors in (self.road_theta, self.road_alpha):
                vectors[adapter_name] = self.layout.place(vectors[adapter_name])
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Make the adapter the identity, or random if `init_weights` is False (for tests)."""
        with torch.no_grad():
            if init_weights:
                self.road_theta[adapter_name].zero_()
                self.road_alpha[adapter_name].fill_(1)
            else:
                self.road_theta[adapter_name].normal_(0, 0.5)
                self.road_alpha[adapter_name].normal_(1, 0.5)
            if adapter_name in self.road_lora_A:
                nn.init.kaiming_uniform_(self.road_lora_A[adapter_name], a=5**0.5)
                if init_weights:
                    self.road_lora_B[adapter_name].zero_()
                else:
                    self.road_lora_B[adapter_name].normal_(0, 0.02)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # In half precision 1 - 1e-3 rounds back to 1: parameters follow the device of the base
        # layer, never a narrower dtype. `RoadModel._cast_adapter_dtype` casts if a user insists.
        base = self.get_base_layer()
        base_device, base_dtype = self._get_base_layer_device_and_dtype(base)
        if base_device is None:  # HQQ keeps its codes under another name, experts have no weight
            held = getattr(base, "W_q", None)
            held = next(base.parameters(), None) if held is None else held
            base_device = None if held is None else held.device
        device = device if device is not None else base_device
        dtype = torch.float64 if base_dtype == torch.float64 else torch.float32
        for parameters in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name] = parameters[adapter_name].to(device, dtype)

    def coefficients(
        self, adapter_name: str, dtype: torch.dtype | None = None, *, every: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Give the coefficient vectors of the adapter for data of `dtype`, differentiable.

        In a tensor-parallel layer those for the outputs of this process, or all if `every`.

        Shapes:
            Two vectors of the rotated features: out_features less what is left of whole groups;
            float32, or float64 if `dtype` (that of the parameters if not given) is.
        """
        dtype = torch.promote_types(dtype or self.road_theta[adapter_name].dtype, torch.float32)
        layout = None if every else self.layout
        theta = own(self.road_theta[adapter_name], layout)
        alpha = own(self.road_alpha[adapter_name], layout)
        variant = VARIANTS[self.variant[adapter_name]]
        return variant.coefficients(theta.to(dtype), alpha.to(dtype), self.group_size[adapter_name])

    def coefficient_table(self, names: Sequence[str], like: Tensor) -> tuple[Tensor, Tensor]:
        """Stack the coefficients of several adapters for data like `like`, differentiable.

        The number of operations depends on how many pairs of a variant and a group size there are,
        not on the number of adapters.

        Shapes:
            A table (len(names), 2, outputs of this process) in float32 (float64 if the data is),
            and the group sizes (len(names),), 0 for a name without an adapter in this layer.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        width = self.layout.width(self.out_features) if self.layout else self.out_features
        kinds: dict[tuple[str, int], list[str]] = {}
        for name in self._present(names):
            kinds.setdefault((self.variant[name], self.group_size[name]), []).append(name)
        blocks = []
        for (variant, group_size), members in kinds.items():
            theta, alpha = (
                torch.cat([own(vectors[name], self.layout) for name in members]).to(dtype)
                for vectors in (self.road_theta, self.road_alpha)
            )
            pair = VARIANTS[variant].coefficients(theta, alpha, group_size)
            block = torch.stack([vector.view(len(members), -1) for vector in pair], 1)
            blocks.append(F.pad(block, (0, width - block.shape[-1])))
        order = [name for members in kinds.values() for name in members]
        if order != list(names) or len(blocks) != 1:  # rows of the table follow `names`
            blocks.append(like.new_zeros(1, 2, width, dtype=dtype))
            places = {name: place for place, name in enumerate(order)}
            rows = [places.get(name, len(order)) for name in names]
            index = torch.tensor(rows, dtype=torch.int64, device=like.device)
            blocks = [torch.cat(blocks).index_select(0, index)]
        sizes = [self.group_size.get(name, 0) for name in names]
        return blocks[0], torch.tensor(sizes, dtype=torch.int32, device=like.device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.pop("adapter_names", None)
        route = self.routing.current if names is None else Rows(names)
        if route is not None and self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call"
                " `unmerge_adapter` first."
            )
        if self.disable_adapters:
            return self._base_forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if route is not None:
            return self._rotate_rows(x, result, route)
        active = self._present(self.active_adapters)
        for name in active:
            first, second = self._kept_coefficients(name, result.dtype)
            result = rotate(
                result, first, second, self.group_size[name], recompute=self.recompute[name]
            )
        for name in active:
            if name in self.road_lora_A:
                result = result + self._delta(name, x).to(result.dtype)
        return result

    def _kept_coefficients(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kept = self.routing.kept
        if kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.coefficients(name, dtype)
        key = (self, name, dtype)
        if key not in kept:
            kept[key] = self.coefficients(name, dtype)
        return kept[key]

    def _rotate_rows(self, x: Tensor, result: Tensor, route: Route) -> Tensor:
        """Rotate every row by the adapter of its slot; rows without one come back bit for bit."""
        slots = route.slots(self, x)
        table, group_sizes = route.table(self, result)
        if not len(table):  # every row is of the base
            return result
        result = rotate_by_slot(result, table, group_sizes, slots)
        loras = self.road_lora_A
        if not len(loras):  # asking for each name would cost as much as rotating
            return result
        for slot, name in enumerate(route.names):
            if name in loras:
                rows, last = route.rows_of(slot, self, x), slots.dim() - 1
                delta = self._delta(name, x.flatten(0, last).index_select(0, rows))
                flat = result.flatten(0, last).index_add(0, rows, delta.to(result.dtype))
                result = flat.unflatten(0, slots.shape)
        return result

    def _delta(self, name: str, x: Tensor) -> Tensor:
        a, b = self.road_lora_A[name], self.road_lora_B[name]
        x = self._cast_input_dtype(x, a.dtype)
        if not self.merged:  # what was merged knows no dropout
            x = F.dropout(x, self.lora_dropout[name], self.training)
        return F.linear(F.linear(x, a), b) * self.lora_scale[name]

    def _present(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.road_theta]

    # ---- merging ------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the adapters into the base layer: R W + B A and R b, in float32, rounded once.

        The original tensors are kept, unless the configuration says `exact_unmerge=False`.

        Raises:
            ValueError: see `check_merge`; nothing was changed then.
        """
        names = self._mergeable(adapter_names)
        if not names:
            return
        self.check_merge(names)
        weight, bias = self._merged(names)
        if safe_merge:
            check_finite(weight, bias, names)
        if self._keeps_copy() and not self.merged:
            self._unmerged = self._snapshot()
        self._write(weight, bias)
        self.merged_adapters.extend(names)

    def check_merge(self, adapter_names: list[str] | None, safe_merge: bool = False) -> None:
        """Find out whether the adapters can be merged, without changing anything.

        Raises:
            ValueError: the layer is quantised in a way that cannot be written back, its weight lies
                on several processes, a block is singular and the original is not kept, or (if
                `safe_merge`) a value is not finite.
        """
        names = self._mergeable(adapter_names)
        if names:
            check_at_hand(getattr(self.get_base_layer(), self.weight_name, None))
        backend = self.quantization_backend
        if names and backend is not None and not backend.supports_merge:
            raise ValueError(
                f"a {backend.backend_name} layer cannot be merged into; load the model without"
                " quantisation to merge"
            )
        if not self._keeps_copy():
            for name in names:
                check_invertible(name, *self._rotation(name))
        if names and safe_merge:
            check_finite(*self._merged(names), names)

    @torch.no_grad()
    def _merged(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        already = list(self.merged_adapters)
        if self._unmerged is not None:
            weight, bias = self._read(self._unmerged)
            rotating, before = [*already, *names], []
        else:
            held: Any = getattr(self.get_base_layer(), self.weight_name, None)
            weight = whole(held) if is_shared(held) else self.get_base_weight()
            bias = self._bias()
            rotating, before = names, negative(self._deltas(already))
        rotations = [
            (*self.coefficients(name, every=True), self.group_size[name]) for name in rotating
        ]
        merged = rotate_weight(
            weight,
            rotations,
            before=before,
            after=self._deltas([*already, *names]),
            feature_dim=self.feature_dim,
        )
        return merged, None if bias is None else rotate_bias(whole(bias), rotations)

    def unmerge(self) -> None:
        """Give the base layer its own weights back.

        Bit for bit, unless `exact_unmerge=False`: then by the inverse of each block, rounded.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._unmerged is not None:
            self._restore()
            self._unmerged = None
        else:
            with torch.no_grad():
                for name in self.merged_adapters:
                    check_invertible(name, *self._rotation(name))
                turns = self._inverse_rotations()
                before = negative(self._deltas(self.merged_adapters))
                bias = self._bias()
                weight = rotate_weight(
                    self.get_base_weight(), turns, before=before, feature_dim=self.feature_dim
                )
                self._write(weight, None if bias is None else rotate_bias(bias.data, turns))
        self.merged_adapters.clear()

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the base layer computes without adapters, merged or not."""
        if not self.merged:
            return self.base_layer(x, *args, **kwargs)
        if self._unmerged is None:
            result = self.base_layer(x, *args, **kwargs)
            for name in self.merged_adapters:
                if name in self.road_lora_A:
                    result = result - self._delta(name, x).to(result.dtype)
            for first, second, group_size in self._inverse_rotations():
                result = rotate(result, first, second, group_size)
            return result
        if self.quantization_backend is None:
            return torch.func.functional_call(
                self.base_layer, self._unmerged.tensors(), (x, *args), kwargs
            )
        with self._restored():
            return self.base_layer(x, *args, **kwargs)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        merged_module, merged = self.base_layer, self._snapshot()
        self._restore()
        try:
            yield
        finally:
            self.base_layer = merged_module
            merged.restore()

    def _restore(self) -> None:
        assert self._unmerged is not None
        if self._unmerged.quantized:  # some backends replace the whole layer
            self.base_layer = self._unmerged.module
        self._unmerged.restore()

    def _snapshot(self) -> Snapshot:
        quantized = self.quantization_backend is not None
        names = None if quantized else (self.weight_name, self.bias_name)
        return Snapshot.take(self.get_base_layer(), names)

    def _bias(self) -> Tensor | None:
        return getattr(self.get_base_layer(), self.bias_name, None)

    def _read(self, snapshot: Snapshot) -> tuple[Tensor, Tensor | None]:
        """Give the weight, dequantised, and the bias that a snapshot holds."""
        tensors = snapshot.tensors()
        if self.quantization_backend is None:
            return tensors[self.weight_name], tensors.get(self.bias_name)
        with self._restored():
            return self.get_base_weight(), tensors.get(self.bias_name)

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        self.set_base_weight(weight)
        if bias is not None:
            base = self.get_base_layer()
            if getattr(base, self.bias_name) is None:  # HQQ's backend makes a layer without one
                setattr(base, self.bias_name, bias)
            else:
                getattr(base, self.bias_name).data = bias

    def _keeps_copy(self) -> bool:
        """Tell whether the unmerged tensors are (or will be) at hand while adapters are merged."""
        return self._unmerged is not None if self.merged else any(self.exact_unmerge.values())

    def _mergeable(self, adapter_names: list[str] | None) -> list[str]:
        return self._present(check_adapters_to_merge(self, adapter_names))

    def _rotation(self, name: str) -> Rotation:
        first, second = self.coefficients(name)
        return first, second, self.group_size[name]

    def _inverse_rotations(self) -> list[Rotation]:
        turns = [self._rotation(name) for name in reversed(self.merged_adapters)]
        return [(*invert(first, second, g), g) for first, second, g in turns]

    def _deltas(self, names: list[str]) -> list[Delta]:
        return [
            (whole(self.road_lora_A[n]), whole(self.road_lora_B[n]), self.lora_scale[n])
            for n in names
            if n in self.road_lora_A
        ]

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "road." + super().__repr__()


class RoadLinear(RoadLayer):
    """A linear layer, quantised or not, or GPT-2's Conv1D, with rotated outputs."""


class RoadEmbedding(RoadLayer):
    """An embedding whose vectors are rotated."""

    lora_beside = False
