"""The tuner: which modules are adapted, and what PEFT asks of a model with adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import peft.tuners.road as upstream
import torch
from peft.tuners.tuners_utils import onload_layer
from peft.utils import get_quantization_kwargs
from torch import nn
from transformers import PreTrainedModel

from road_peft.batching import LoadedAdapters, generate_batch
from road_peft.composition import COMBINATIONS
from road_peft.config import RoadConfig
from road_peft.experts import ParamWrapper
from road_peft.layer import RoadEmbedding, RoadLayer, RoadLinear
from road_peft.mixed_batch import BASE, Rows, repeats_of, route_rows
from road_peft.routing import Routing
from road_peft.shards import layout_of, whole, write
from road_peft.targets import linear_layers_of_blocks, why_bypassed, wrap
from road_peft.variants import VARIANTS
from road_peft.weights import keep_codes_readable


class RoadModel(upstream.RoadModel):
    """A model with RoAd adapters; made by `peft.get_peft_model(model, RoadConfig(...))`.

    Source:
        RoAd (arXiv:2409.00119).
    """

    tuner_layer_cls = RoadLayer  # type: ignore[assignment]  # a subclass, which upstream leaves out

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.routing = Routing()  # before the layers, which are made in the constructor
        super().__init__(*args, **kwargs)

    # ---- which modules ------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        blocks_chosen = getattr(peft_config, "layers_to_transform", None) is not None
        all_linear = peft_config.target_modules == "all-linear"
        # PEFT expands the wildcard to full names, which match whatever the number of the block
        if peft_config.target_modules is None or (all_linear and blocks_chosen):
            if not isinstance(self.model, PreTrainedModel):
                raise ValueError(
                    "Please specify `target_modules` in `peft_config`: the default, every linear"
                    " layer of the blocks, is known for transformers models only"
                )
            peft_config.target_modules = linear_layers_of_blocks(
                self.model, RoadConfig.of(peft_config)
            )
        return peft_config

    def _create_and_replace(  # type: ignore[override]  # the argument's name is upstream's
        self,
        road_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        config = RoadConfig.of(road_config)
        reason = why_bypassed(self.model, parent, target_name)
        if reason is not None:
            raise ValueError(
                f"{current_key} cannot be adapted: {reason}; leave it out of target_modules"
            )
        try:
            if _adapts(target, parameter_name):
                layer: Any = target
            else:
                layer = wrap(target, parameter_name, **get_quantization_kwargs(self.model))
                layer.module_name, layer._active_adapter = current_key, adapter_name
                layer.routing = self.routing
                layer.layout = layout_of(self.model, current_key, target)
            layer.update_layer(adapter_name, **config.layer_arguments(current_key))
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from error
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # layers place their own parameters, and what they wrap keeps its own
        setattr(parent, child_name, new_module)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        wanted = set(RoadConfig.of(config).target_parameters or ())
        for name, other in self.peft_config.items():
            theirs = set(RoadConfig.of(other).target_parameters or ())
            if wanted and theirs and wanted != theirs:
                raise ValueError(
                    f"target_parameters is {sorted(wanted)}, but adapter {name!r} has"
                    f" {sorted(theirs)}; all adapters of a model must have the same"
                )

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add the layers of one adapter, all or none; see `peft.tuners.tuners_utils.BaseTuner`."""
        before = {id(m) for m in model.modules() if isinstance(m, RoadLayer)}
        keep_codes_readable(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            _take_back(model, adapter_name, before)
            raise
        self.peft_config[adapter_name]._resolved_modules = sorted(
            name
            for name, layer in model.named_modules()
            if isinstance(layer, RoadLinear | RoadEmbedding) and adapter_name in layer.road_theta
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # layers hold float32; a user who declines the upcast gets the dtype of the base layer
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for _, layer in self.road_layers():
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if dtype is None or not dtype.is_floating_point:
                continue
            for parameters in (getattr(layer, name) for name in layer.adapter_layer_names):
                if adapter_name in parameters:
                    parameters[adapter_name].data = parameters[adapter_name].data.to(dtype)

    def road_layers(self) -> Iterator[tuple[str, RoadLayer]]:
        """Give every adapted layer with its name in the base model."""
        for name, module in self.model.named_modules():
            if isinstance(module, RoadLayer):
                yield name, module

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter, also from layers whose own name contains PEFT's prefix `road_`."""
        super().delete_adapter(adapter_name)
        for _, layer in self.road_layers():
            if adapter_name in layer.road_theta:
                layer.delete_adapter(adapter_name)
                self.active_adapter = layer.active_adapters

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        # what engines hold in parts is saved whole; every process must save
        selected = super()._get_adapter_state_dict(model, *args, **kwargs)
        empty = {key for key, tensor in selected.items() if not tensor.numel()}  # by ZeRO-3
        selected |= {name: p for name, p in model.named_parameters() if name in empty}
        return {key: whole(tensor).detach() for key, tensor in selected.items()}

    # ---- merging ------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge the active (or the named) adapters into every layer, or into none.

        Raises:
            ValueError: the name of a layer and why it cannot be merged.
        """
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        unload: Any = super()._unload_and_optionally_merge  # annotated None, gives the model
        return unload(merge, progressbar, safe_merge, adapter_names)

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        shared = _shared_weights(self.model)
        for name, layer in self.road_layers():
            weight = getattr(layer.get_base_layer(), layer.weight_name, None)
            others = [n for n in shared.get(id(weight), []) if not n.startswith(name + ".")]
            if others and layer._mergeable(adapter_names):
                raise ValueError(
                    f"{name}: its weight is tied with {', '.join(others)}; merging would rotate"
                    " those as well. Untie them (load the model with tie_word_embeddings=False) or"
                    " leave the layer out of target_modules"
                )
            try:
                with onload_layer(layer):
                    layer.check_merge(adapter_names, safe_merge)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    # ---- combining ----------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "product",
    ) -> None:
        """Add an adapter that combines others in closed form; it is not made active.

        `combination_type` is "product" (apply them in turn; powers for road_1), "linear" (weighted
        sum of the blocks) or "interpolation" (identity plus weighted changes). The result is road_1
        if every adapter is, else road_4, which holds any block. Where an adapter has no layer it
        counts as the identity.

        Raises:
            ValueError: unknown names, adapters of different group sizes or with a LoRA, or a
                result that is not finite; the model is unchanged then.
        """
        self._check_combination(adapters, weights, adapter_name, combination_type)
        combine = COMBINATIONS[combination_type]
        closures, combined = set(), {}
        for name, layer in self.road_layers():
            here = layer._present(adapters)
            if not here:
                continue
            sizes = {layer.group_size[n] for n in here}
            if len(sizes) > 1:
                raise ValueError(
                    f"{name}: the adapters have group sizes {sorted(sizes)}; blocks of different"
                    " pairs do not combine"
                )
            with torch.no_grad():
                found = {n: layer.coefficients(n, every=True) for n in here}
                like = found[here[0]][0]
                identity = (torch.ones_like(like), torch.zeros_like(like))
                blocks = [found.get(n, identity) for n in adapters]
                result = combine(blocks, weights, sizes.pop())
            if not all(torch.isfinite(vector).all() for vector in result):
                raise ValueError(f"{name}: the combination is not finite; check the weights")
            closures |= {VARIANTS[layer.variant[n]].closure for n in here}
            combined[name] = result
        self._add_combined(adapters[0], adapter_name, combined, max(closures))

    def _check_combination(
        self, adapters: list[str], weights: list[float], adapter_name: str, kind: str
    ) -> None:
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; choose another name")
        unknown = sorted(set(adapters) - set(self.peft_config))
        if unknown or not adapters:
            raise ValueError(
                f"adapters {unknown or adapters} do not exist; choose from"
                f" {sorted(self.peft_config)}"
            )
        if len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters but {len(weights)} weights; give one each")
        if kind not in COMBINATIONS:
            raise ValueError(
                f"combination_type is {kind!r}; choose from {', '.join(sorted(COMBINATIONS))}"
            )
        for name, layer in self.road_layers():
            beside = [n for n in adapters if n in layer.road_lora_A]
            if beside:
                raise ValueError(f"{name}: {beside[0]!r} has a LoRA; only rotations combine")

    def _add_combined(
        self,
        like: str,
        adapter_name: str,
        combined: dict[str, tuple[torch.Tensor, torch.Tensor]],
        variant: str,
    ) -> None:
        config = replace(
            RoadConfig.of(self.peft_config[like]),
            variant=variant,
            variant_pattern={},
            target_modules=[
                name
                for name, layer in self.road_layers()
                if name in combined and not isinstance(layer, ParamWrapper)
            ],
            modules_to_save=None,
            trainable_token_indices=None,
            recompute=False,
            init_weights=True,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for name, layer in self.road_layers():
            if adapter_name in layer.road_theta:
                group_size = layer.group_size[adapter_name]
                theta, alpha = VARIANTS[variant].parameters(*combined[name], group_size)
                write(layer.road_theta[adapter_name], theta)
                write(layer.road_alpha[adapter_name], alpha)

    # ---- one adapter per row ------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            with self.routing.keep():  # for the steps of a generation
                yield
            return
        self._check_names(adapter_names)
        rows = Rows(adapter_names, repeats_of(self.model, args, kwargs))
        if isinstance(self.model, PreTrainedModel):  # hooks do it too, but not while compiling
            rows.note_shape(self.model, args, kwargs)
        with route_rows(self.model, self.routing, rows):
            yield

    def generate_batch(
        self, inputs: Any, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Any:
        """Generate by transformers' continuous batching, prompt i with the adapter named i.

        Without `adapter_names` every prompt takes the active adapters. See
        `road_peft.batching.generate_batch`.

        Raises:
            ValueError: a name is unknown, or its adapter holds modules or tokens of its own, which
                cannot be switched between the requests of one packed row.
        """
        if adapter_names is None:
            return self.model.generate_batch(inputs, *args, **kwargs)
        self._check_names(adapter_names)
        names = [name for name in dict.fromkeys(adapter_names) if name != BASE]
        for name in names:
            config = RoadConfig.of(self.peft_config[name])
            if config.modules_to_save or config.trainable_token_indices:
                raise ValueError(
                    f"adapter {name!r} has modules_to_save or trainable_token_indices, which"
                    " generate_batch cannot switch by request; use generate(adapter_names=...)"
                )
        adapters = LoadedAdapters(self.model, self.routing, names)
        if args:  # transformers' order
            order = ("generation_config", "continuous_batching_config")
            kwargs |= dict(zip(order, args, strict=False))
        return generate_batch(adapters, inputs, adapter_names, **kwargs)

    def _check_names(self, adapter_names: list[str]) -> None:
        unknown = sorted(set(adapter_names) - {BASE, *self.peft_config})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")


def _adapts(target: nn.Module, parameter_name: str | None) -> bool:
    """Tell whether `target` is a layer of ours that adapts just this."""
    if parameter_name is None:
        return isinstance(target, RoadLinear | RoadEmbedding)
    return isinstance(target, ParamWrapper) and target.parameter_name == parameter_name


def _take_back(model: nn.Module, adapter_name: str, before: set[int]) -> None:
    """Undo an injection that failed half-way; `before` are the layers that were there already."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, RoadLayer):
            continue
        if id(layer) in before:
            if adapter_name in layer.road_theta:
                layer.delete_adapter(adapter_name)
            continue
        inner: Any = layer
        while isinstance(inner, RoadLayer) and id(inner) not in before:
            inner = inner.base_layer
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, inner)


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners
