"""The mechanics of the masks, on the model at hand: what must hold exactly, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from directions import Row, Task, collate
from masking import NeuronGates, Table, find_ffns
from torch.nn import functional as F

from recipes_peft.loop import to

__all__ = ["mechanics", "promised"]

TOLERANCE = 1e-6  # of the largest value


def mechanics(
    model: Any, keep: Table, rows: Mapping[Task, Sequence[Row]], bias: str
) -> dict[str, float]:
    """Measure, in evaluation mode and relative to the largest value, what should be zero.

    Logits and gradients with every neuron kept, against those without masks; the gradient of the
    rows of the first linear layers that are masked; logits of rows of several tasks in one batch,
    against a batch for each.
    """
    model.eval()
    tasks = list(rows)[:: max(1, len(rows) - 1)]  # the first and the last
    pieces = [list(rows[task])[:2] for task in tasks]
    every = Table(keep.tasks, {n: torch.ones_like(rows) for n, rows in keep.layers.items()})
    weights = {ffn.name: ffn.first[0].weight for ffn in find_ffns(model)}
    mixed = [row for piece in pieces for row in piece]
    names = [task.name for task, piece in zip(tasks, pieces, strict=True) for _ in piece]

    plain, plain_grads = _run(model, mixed, weights)
    with NeuronGates(model, every, bias) as gates, gates.active(names):
        kept, kept_grads = _run(model, mixed, weights)
    found = {
        "logits with all kept": _difference(plain, kept),
        "gradients with all kept": max(
            _difference(plain_grads[name], kept_grads[name]) for name in weights
        ),
    }
    with NeuronGates(model, keep, bias) as gates:
        with gates.active(tasks[0].name):
            grads = _run(model, pieces[0], weights)[1]
        masked = (~keep.layers[n][keep.tasks.index(tasks[0].name)] for n in weights)
        found["gradients of masked rows"] = max(
            grad[rows.to(grad.device)].abs().sum().item()
            for grad, rows in zip(grads.values(), masked, strict=True)
        )
        with gates.active(names):
            together = _run(model, mixed, weights)[0]
        start, differences = 0, []
        for task, piece in zip(tasks, pieces, strict=True):
            with gates.active(task.name):
                alone = _run(model, piece, weights)[0]
            own = together[start : start + len(piece), : alone.shape[1]]
            real = torch.tensor([[i < len(r.target) for i in range(alone.shape[1])] for r in piece])
            differences.append(_difference(own[real], alone[real]))
            start += len(piece)
        found["logits of mixed batches"] = max(differences)
    return found


def promised(found: Mapping[str, float]) -> dict[str, bool]:
    """Say which of the promises about the mechanics were kept."""
    kept = {f"no difference: {what}": value <= TOLERANCE for what, value in found.items()}
    return {
        **kept,
        "no difference: gradients of masked rows": found["gradients of masked rows"] == 0,
    }


def _run(model: Any, rows: Sequence[Row], weights: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give logits and the gradients of some weights, for the loss of a batch."""
    batch = collate(rows, model.config.pad_token_id, model.config.decoder_start_token_id)
    inputs = to(batch, model.device)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    grads = torch.autograd.grad(loss, list(weights.values()))
    return logits.detach().cpu(), dict(zip(weights, (g.cpu() for g in grads), strict=True))


def _difference(one: Any, other: Any) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()
