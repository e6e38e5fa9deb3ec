"""A model whose calls take `subspaces`, and `sources` to take activations from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from road_peft.interventions.adapters import extract
from road_peft.interventions.calls import (
    Collection,
    Generation,
    Intervention,
    Rows,
    Source,
    StepHook,
)
from road_peft.interventions.config import RoadInterventionConfig
from road_peft.interventions.files import Interventions
from road_peft.interventions.inputs import Inputs, attention_of_prompts, shape_of, tokens_meant
from road_peft.interventions.positions import select
from road_peft.interventions.site import Site
from road_peft.interventions.sites import features_of, find_modules
from road_peft.interventions.subspaces import blocks_of
from road_peft.mixed_batch import route_rows
from road_peft.routing import Routing

Names = Sequence[Sequence[str]]


class RoadInterventionModel(nn.Module):
    """Wraps a decoder or an encoder; hooks rotate what chosen modules give for chosen tokens.

    `forward` and `generate` take `subspaces`, one list of names for each row: the subspaces that
    are rotated there. None is all of them on every row; an empty list leaves a row as the base
    model computes it, bit for bit. With `sources`, the inputs of another batch of as many rows, the
    subspaces take their activations from there instead: an interchange intervention.

    The base model is frozen, and computes as ever when it is called itself. `state_dict` holds the
    interventions alone, and so do the checkpoints of `Trainer`; wrap its collator in
    `SubspaceCollator`. `detach` removes the hooks.

    Raises:
        ValueError: the model has no such modules, their outputs no such subspaces, or the values
            are of others.
    Source:
        RoAd (arXiv:2409.00119), sections 2.3 and 4.3: Phi(h) = R h on a subspace, h elsewhere.
    """

    def __init__(self, model: nn.Module, what: RoadInterventionConfig | Interventions) -> None:
        super().__init__()
        config = what.config if isinstance(what, Interventions) else what
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                "this model has an encoder and a decoder, whose tokens differ; wrap one of them"
                " (model.get_encoder())"
            )
        if config.positions is None:
            raise ValueError(
                "positions are not given: the file was saved with a function of your own; load it"
                " with Interventions.load(folder, positions=...)"
            )
        modules = find_modules(model, config)
        self.interventions_config, self._calls = config, Routing()
        sites = [
            self._site(name, module, features_of(module, model)) for name, module in modules.items()
        ]
        if isinstance(what, Interventions):
            _fill(sites, what)
        self.base_model = model.requires_grad_(False)
        self.sites = nn.ModuleList(sites)
        self._handles = [
            module.register_forward_hook(site.hook)
            for site, module in zip(sites, modules.values(), strict=True)
        ]
        steps = StepHook(self._calls)  # not one for each generation: other threads may be calling
        self._handles.append(_transformer(model).register_forward_pre_hook(steps, with_kwargs=True))
        self.register_load_state_dict_post_hook(_forgive_base)

    def _site(self, name: str, module: nn.Module, features: int) -> Site:
        config = self.interventions_config
        site = Site(
            name,
            features,
            blocks_of(config, features, name),
            variant=config.variant,
            group_size=config.group_size,
            interchange=config.interchange,
        )
        site.calls = self._calls
        some = next(module.parameters(), None)
        return site if some is None else site.to(some.device)

    # ---- calls --------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        subspaces: Names | None = None,
        sources: Inputs | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the base model with interventions on the tokens that `positions` name.

        They name tokens of the prompt. That is what `prompt_mask` marks, also of tokens in a cache
        and of chunks to come; else, for a causal language model with `labels`, the tokens before
        the first label that is not -100; else all of `attention_mask`. `sources` holds arguments
        like these.

        Raises:
            ValueError: names, masks or sources that do not fit the inputs.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            **kwargs,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        rows = self._rows(subspaces, shape_of(inputs)[0])
        meant = self._meant({**inputs, "prompt_mask": prompt_mask})
        source = None if sources is None else self._source(rows, meant, sources)
        with self._in_force(Intervention(rows, meant, source)):
            return self.base_model(**inputs)

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        subspaces: Names | None = None,
        sources: Inputs | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with interventions on the prompt, and on what follows if the config says so.

        Takes what `generate` of the base model takes: beams, `prefill_chunk_size` and so on.

        Raises:
            ValueError: as in `forward`, or prompts with padding come without an attention_mask.
        """
        base: Any = self.base_model
        if inputs is not None:
            kwargs["input_ids"] = inputs
        pad = getattr(base.generation_config, "pad_token_id", None)
        kwargs["attention_mask"] = attention_of_prompts(kwargs, pad)
        prompt = kwargs["attention_mask"].bool().cpu()
        rows, config = self._rows(subspaces, len(prompt)), self.interventions_config
        positions: Any = config.positions
        source = None
        if sources is not None:
            if not config.prefill_only:
                raise ValueError(
                    "sources give nothing for generated tokens; use prefill_only=True with them"
                )
            source = self._source(rows, select(positions, prompt), sources)
        kwargs.setdefault("disable_compile", True)  # a compiled step keeps the tokens of its first
        call = Generation(rows, prompt, positions, config.prefill_only, source)
        with self._in_force(call):
            return base.generate(**kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching packs all requests into one row.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching does not tell the rows of prompts apart; use generate, with one"
            " list of subspaces for each row"
        )

    def _in_force(self, call: Any) -> Any:
        # also for what gradient checkpointing recomputes in the backward
        return route_rows(self.base_model, self._calls, call)

    def _rows(self, subspaces: Names | None, count: int) -> Rows:
        known = self.interventions_config.subspaces
        names = [list(known)] * count if subspaces is None else subspaces
        if isinstance(names, str) or any(isinstance(row, str) for row in names):
            raise ValueError(f"subspaces is {names!r}; give one list of names for each row")
        if len(names) != count:
            raise ValueError(
                f"there are {count} rows but {len(names)} lists of subspaces; give one for each row"
            )
        unknown = sorted({name for row in names for name in row} - set(known))
        if unknown:
            raise ValueError(f"subspaces {unknown} do not exist; choose from {sorted(known)}")
        return Rows(names)

    def _meant(self, inputs: Inputs) -> Tensor:
        asked = getattr(self.base_model, "can_generate", None)
        causal = bool(asked()) if callable(asked) else False
        return tokens_meant(self.interventions_config, inputs, causal)

    def _source(self, rows: Rows, meant: Tensor, sources: Inputs) -> Source:
        """Run the base model on the sources and keep what the sites give there."""
        if shape_of(sources)[0] != len(rows):
            raise ValueError(
                f"sources have {shape_of(sources)[0]} rows and the inputs {len(rows)}; give one"
                " source for each row"
            )
        used = (rows.slots >= 0)[:, None]
        ours, theirs = meant & used, self._meant(sources) & used
        if not torch.equal(ours.sum(1), theirs.sum(1)):
            raise ValueError(
                f"positions name {ours.sum(1).tolist()} tokens of the rows, but"
                f" {theirs.sum(1).tolist()} of their sources; they must be as many"
            )
        collection = Collection(theirs)
        inputs = {name: value for name, value in sources.items() if name != "prompt_mask"}
        with torch.no_grad(), self._in_force(collection):
            self.base_model(**inputs)
        order = ours.flatten().long().cumsum(0).view(ours.shape) - 1
        return Source(collection.states, order)

    # ---- values -------------------------------------------------------------------------------

    def interventions(self) -> Interventions:
        """Copy the configuration and the values of all subspaces, to save, isolate or compose."""
        found = [site.tensors() for site in self._typed_sites()]
        return Interventions(self.interventions_config, {n: t for f in found for n, t in f.items()})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the interventions, not the base model; see `Interventions`."""
        self.interventions().save(folder)

    def extract(self, names: Sequence[str], folder: str | Path) -> None:
        """Write subspaces as a RoAd adapter, which `PeftModel` loads, merges and serves.

        Raises:
            ValueError: the interventions are not the same for every token, or not on the outputs of
                linear layers: no adapter, and no merged weight, computes that.
        """
        self._rows([names], 1)
        sites = self._typed_sites()
        extract(self.base_model, self.interventions_config, sites, names, folder)

    def _typed_sites(self) -> list[Site]:
        return [site for site in self.sites if isinstance(site, Site)]

    def detach(self) -> nn.Module:
        """Remove the hooks and give the base model back; it stays frozen."""
        for handle in self._handles:
            handle.remove()
        return self.base_model

    # ---- what Trainer and others ask of a model -----------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet
                raise
            return getattr(self.base_model, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Give the interventions only; the base model is not trained and has files of its own."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key.startswith(f"{prefix}base_model.")]:
            del state[key]
        return state


def _fill(sites: Sequence[Site], interventions: Interventions) -> None:
    wanted = {name for site in sites for name in site.tensors()}
    odd = sorted(wanted ^ interventions.tensors.keys())
    if odd:
        raise ValueError(
            f"{len(odd)} tensor(s) are missing or unknown ({', '.join(odd[:4])}); the values belong"
            " to another configuration"
        )
    for site in sites:
        site.take(interventions.tensors)


def _transformer(model: nn.Module) -> nn.Module:
    """Give the module whose calls are the steps of a generation."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _forgive_base(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if "base_model." not in key]
