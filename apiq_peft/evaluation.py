"""What a model is worth and what it takes: perplexity, activation errors, tasks, and bits."""

from __future__ import annotations

import importlib
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from apiq_peft.checkpoint import packed_layers
from apiq_peft.packed import PackedLinear


@dataclass(frozen=True)
class Perplexity:
    """exp(nats / tokens), with what it was computed from."""

    nats: float
    tokens: int

    @property
    def value(self) -> float:
        """The perplexity; infinite if it is too large for a float."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf


@torch.no_grad()
def perplexity(
    model: Any,
    tokens: Tensor,
    window: int,
    stride: int | None = None,
    limit: int | None = None,
    show_progress: bool = False,
) -> Perplexity:
    """Give the perplexity of a causal model on a text, window by window.

    Without `stride` windows lie side by side and every token but a window's first is predicted
    (the protocol of GPTQ and its successors). With it windows overlap, and only the tokens that no
    earlier window predicted count. `limit` windows are used at most; the denominator is the number
    of tokens that were predicted.

    Shapes:
        tokens: (length,), token ids.
    Raises:
        ValueError: the text is shorter than two tokens, or a number makes no sense.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window {window} and stride {stride} must satisfy 1 <= stride <= window")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; at least one window is needed")
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give at least two, in one row")
    overlapping = stride < window
    last = len(tokens) - (1 if overlapping else window)
    starts = list(range(0, max(last, 0) + (0 if overlapping else 1), stride)) or [0]
    nats, counted, predicted = 0.0, 0, 1
    with _evaluating(model):
        for start in tqdm(starts[:limit], disable=not show_progress, unit="window"):
            part = tokens[start : start + window].to(model.device)
            first = max(1, predicted - start) if overlapping else 1
            if len(part) <= first:
                continue
            logits = model(input_ids=part.unsqueeze(0), use_cache=False).logits[0, first - 1 : -1]
            nats += float(F.cross_entropy(logits.float(), part[first:], reduction="sum"))
            counted += len(part) - first
            predicted = start + len(part)
    return Perplexity(nats, counted)


@torch.no_grad()
def activation_errors(
    model: Any, original: Any, samples: Tensor | Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Give by name how far the output of each packed layer, with its LoRA, is off.

    The error is relative (Frobenius norm over all samples) to the output of the same layer of
    `original`, the model in full precision; each layer has the input that its own model makes. The
    outputs of one batch are held at a time.

    Shapes:
        samples: token ids (samples, length), taken one by one, or batches of what the models take.
    Raises:
        ValueError: nothing is packed, there are no samples, or `original` is of another shape.
    """
    batches = samples
    if isinstance(samples, Tensor):
        batches = [{"input_ids": ids} for ids in samples.split(1)]
    layers = _layers_by_name(model)
    if not layers or not len(batches):
        raise ValueError(f"there are {len(layers)} packed layers and {len(batches)} samples")
    plain = getattr(original, "get_base_model", lambda: original)()
    pairs = {name: (layer, _same_layer(plain, name)) for name, layer in layers.items()}
    wanted: dict[str, deque[Tensor]] = {name: deque() for name in layers}  # a layer may run twice
    off, whole = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def note(name: str, y: Tensor) -> None:
        wanted[name].append(y)

    def compare(name: str, y: Tensor) -> None:
        reference = wanted[name].popleft().to(y.device).double()
        if reference.shape != y.shape:
            raise ValueError(
                f"{name} gives {tuple(y.shape)}, the original {tuple(reference.shape)}"
            )
        off[name] += float((y.double() - reference).square().sum())
        whole[name] += float(reference.square().sum())

    with _evaluating(model), _evaluating(original), ExitStack() as hooks:
        for name, (quantised, full) in pairs.items():
            for layer, use in ((full, note), (quantised, compare)):
                handle = layer.register_forward_hook(
                    lambda _, __, y, name=name, use=use: use(name, y)
                )
                hooks.callback(handle.remove)
        for batch in batches:
            for one in (original, model):
                one(**{key: tensor.to(one.device) for key, tensor in batch.items()})
    return {name: _ratio(off[name], whole[name]) for name in layers}


def _ratio(off: float, whole: float) -> float:
    """Give a relative norm from two squares; a layer that is right in giving zeros is not off."""
    return math.sqrt(off / whole) if whole else (math.inf if off else 0.0)


def _layers_by_name(model: Any) -> dict[str, nn.Module]:
    """Give what stands in the place of each packed layer: its adapted layer if there is one."""
    base = getattr(model, "get_base_model", lambda: model)()
    return {name: base.get_submodule(name) for name in packed_layers(base)}


def _same_layer(original: nn.Module, name: str) -> nn.Module:
    try:
        return original.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the original has no layer {name}; give the model that was quantised"
        ) from None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def harness() -> tuple[Any, Any, Any]:
    """Give lm_eval, its class for models of transformers, and its class that finds tasks.

    Raises:
        ImportError: lm-eval is not installed.
    """
    names = ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")
    try:
        package, models, tasks = (importlib.import_module(name) for name in names)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"tasks need EleutherAI's harness ({error.name} is missing);"
            " pip install 'road-apiq-peft[eval]'"
        ) from error
    return package, models.HFLM, tasks.TaskManager


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, float]]:
    """Run tasks of EleutherAI's harness; give the metrics of each by their names there.

    `limit` documents of each task are used at most. Tasks are the harness's own, which fetch their
    data, and those whose YAML files lie in the folder `include_path`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such task or folder, or no task at all.
    """
    if not tasks:
        raise ValueError("there are no tasks; give the names of some")
    lm_eval, wrap, find = harness()
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"{include_path} is no folder; give the one that holds the tasks' YAML")
    folders = {"include_path": None if include_path is None else str(include_path)}
    manager = find(**folders, include_defaults=include_path is None)
    if not set(tasks) <= set(manager.all_tasks):  # the harness's own are many and slow to read
        manager = find(**folders)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"the harness has no task {', '.join(map(repr, unknown))}; `lm_eval ls tasks` lists its"
            " own, and others come from include_path"
        )
    with _evaluating(model):
        found = lm_eval.simple_evaluate(
            model=wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    return {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }


@dataclass(frozen=True)
class Size:
    """What a model takes, in bytes and in bits for each weight of its quantised layers."""

    packed_bytes: int
    other_bytes: int  # embeddings, head, norms, biases
    adapter_bytes: int
    weights: int  # in packed layers
    adapter_bits: int  # stored bits of all adapters beside packed layers

    @property
    def bits_per_weight(self) -> float:
        """Of packed layers: codes, zero points and scales."""
        return 8 * self.packed_bytes / self.weights if self.weights else math.nan

    @property
    def bits_with_adapters(self) -> float:
        """The same, with the adapters counted at 16 bits a value."""
        return self.bits_per_weight + (self.adapter_bits / self.weights if self.weights else 0)


def size_of(model: Any, adapter_value_bits: int = 16) -> Size:
    """Measure a model; biases of packed layers count among the others."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    codes = {t for m in packed for t in (m.qweight, m.qzeros, m.scales)}
    held = sum(t.nbytes for t in codes)
    adapters = [p for n, p in model.named_parameters() if ".lora_" in n]
    others = [p for n, p in model.named_parameters() if ".lora_" not in n and p not in codes]
    values = sum(p.numel() for p in adapters)
    return Size(
        held,
        sum(p.nbytes for p in others),
        sum(p.nbytes for p in adapters),
        sum(m.in_features * m.out_features for m in packed),
        values * adapter_value_bits,
    )
