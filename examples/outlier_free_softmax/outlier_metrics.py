"""How large activations get and how heavy their tails are, over the tensors that the code names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recipes_peft import loop

__all__ = ["Outliers", "inf_norms", "kurtoses", "measure"]

# model type: ends of the names of modules whose outputs are looked at
OUTPUTS = {
    "bert": (".output.dense", ".output.LayerNorm"),
    "opt": (".fc2", ".self_attn_layer_norm", ".final_layer_norm", ".out_proj"),
}
BLOCKS = {"opt": ".layers."}  # whole blocks whose outputs are looked at as well
INPUTS = {"bert": (".output.LayerNorm",)}  # whose inputs are, for their size only


@dataclass(frozen=True)
class Outliers:
    """Largest mean inf norm of a tensor, and the mean and largest kurtosis; a Gaussian's is 3."""

    max_inf_norm: float
    avg_kurtosis: float
    max_kurtosis: float


def inf_norms(x: Tensor, sequences: int) -> Tensor:
    """Give the largest absolute value of each sequence, (sequences,)."""
    return x.reshape(sequences, -1).float().abs().amax(1)


def kurtoses(x: Tensor, sequences: int) -> Tensor:
    """Give the kurtosis of each sequence as one vector: mean((x - mu)^4) / (std^4 + 1e-6).

    Shapes:
        x: (sequences, T, d) or (sequences * T, d). Returns (sequences,).
    Source:
        The released code of Bondarenko et al.; the deviation is that of the population.
    """
    flat = x.reshape(sequences, -1).double()
    centred = flat - flat.mean(1, keepdim=True)
    return (centred**4).mean(1) / (centred.pow(2).mean(1) ** 2 + 1e-6)


@dataclass
class _Meter:
    norms: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    tails: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    sequences: int = 1

    def see(self, name: str, tensor: Any, tails: bool) -> None:
        x = tensor[0] if isinstance(tensor, tuple) else tensor
        self.norms[name].append(inf_norms(x, self.sequences).cpu())
        if tails:
            self.tails[name].append(kurtoses(x, self.sequences).cpu())


@torch.no_grad()
def measure(model: Any, batches: Iterable[dict[str, Any]]) -> Outliers:
    """Measure the model's outliers on batches, whose sequences have one length each batch."""
    model.eval()
    with _watched(model) as meter:
        for batch in batches:
            meter.sequences = len(batch["input_ids"])
            model(**loop.to(batch, model.device))
    norms = [torch.cat(values).mean().item() for values in meter.norms.values()]
    tails = [torch.cat(values).mean().item() for values in meter.tails.values()]
    return Outliers(max(norms), sum(tails) / len(tails), max(tails))


@contextmanager
def _watched(model: Any) -> Iterator[_Meter]:
    kind, meter, handles = model.config.model_type, _Meter(), []

    def out(name: str) -> Callable[..., None]:
        return lambda module, args, output: meter.see(name, output, True)

    def into(name: str) -> Callable[..., None]:
        return lambda module, args: meter.see(f"{name}, input", args[0], False)

    try:
        for name, module in model.named_modules():
            of_block = name.rpartition(".")[2].isdigit() and BLOCKS.get(kind, "\n") in f"{name}."
            named = name.endswith(OUTPUTS[kind]) and ".attention." not in name
            if of_block or named:
                handles.append(module.register_forward_hook(out(name)))
            if name.endswith(INPUTS.get(kind, ())) and ".attention." not in name:
                handles.append(module.register_forward_pre_hook(into(name)))
        yield meter
    finally:
        for handle in handles:
            handle.remove()
