"""Train classifiers, look at their representations layer by layer, train heads on frozen ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from study_equations import Head
from study_tasks import Row, Task, score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

__all__ = [
    "Training",
    "block_linears",
    "finetune",
    "head_modules",
    "observe",
    "randomised",
    "train_head",
]

# Each head is trained with each of them, and the one that is best on the validation half is tested.
# Lengths differ by a few percent: without the last rate a head that sees them alone learns nothing
# of a task that they decide.
HEAD_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Training:
    steps: int
    batch_size: int
    learning_rate: float
    max_length: int
    seed: int
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0


def head_modules(model: Any) -> list[str]:
    """Name what stands on the encoder: every method trains it in full."""
    # Names are compared by their end, so `dropout` would be found in every block.
    named = [n for n, m in model.named_children() if any(True for _ in m.parameters())]
    pooler = getattr(model.base_model, "pooler", None)
    on_top = [n for n in named if n != model.base_model_prefix]
    return on_top if pooler is None else [*on_top, "pooler"]


def block_linears(model: Any) -> list[str]:
    """Name the linear layers of the encoder's blocks, to adapt them all and nothing else."""
    prefix = model.base_model_prefix
    return [
        f"{prefix}.{name}"
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("pooler")
    ]


def randomised(model: Any, seed: int) -> Any:
    """Give a model of the same shape whose weights are all random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)(model.config).to(model.device).eval()


def finetune(model: Any, tokenizer: Any, rows: Sequence[Row], how: Training, name: str) -> float:
    """Train whatever has a gradient with AdamW, without decay; give the seconds it took."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(how.warmup * how.steps), how.steps)
    order = torch.Generator().manual_seed(how.seed)
    torch.manual_seed(how.seed)  # of dropout
    started = time.perf_counter()
    model.train()
    batches = _shuffled(rows, how.batch_size, order)
    bar = tqdm(range(how.steps), desc=name)
    for _ in bar:
        chosen = next(batches)
        inputs = encode(tokenizer, chosen, how.max_length).to(model.device)
        labels = torch.tensor([row.label for row in chosen], device=model.device)
        loss = criterion(model(**inputs).logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, how.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.eval()
    return time.perf_counter() - started


@torch.no_grad()
def observe(
    model: Any, tokenizer: Any, rows: Sequence[Row], length: int, layers: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Give the representation of the first token in every layer, and the outputs of the head.

    Shapes:
        returns (layers + 1, n, d), the embeddings before the first block coming first, and
        (n, outputs); both on the CPU. `layers` picks some of the first.
    """
    model.eval()
    ranked = sorted(range(len(rows)), key=lambda i: sum(map(len, filter(None, rows[i][:2]))))
    states, outputs = [], []
    for start in range(0, len(ranked), 32):
        chosen = [rows[i] for i in ranked[start : start + 32]]
        inputs = encode(tokenizer, chosen, length).to(model.device)
        found = model(**inputs, output_hidden_states=True)
        states.append(torch.stack([h[:, 0] for h in found.hidden_states[layers]]).cpu())
        outputs.append(found.logits.cpu())
    back = torch.tensor(ranked).argsort()
    return torch.cat(states, 1)[:, back], torch.cat(outputs)[back]


def encode(tokenizer: Any, rows: Sequence[Row], length: int) -> Any:
    """Make a batch; padding stands on the right, so the first token is the first column."""
    texts = [[row.first for row in rows]]
    if rows[0].second is not None:
        texts.append([row.second or "" for row in rows])
    return tokenizer(
        *texts,
        truncation=True,
        max_length=length,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )


def criterion(outputs: Tensor, labels: Tensor) -> Tensor:
    """Give the cross entropy, or the squared error of a single output."""
    if outputs.shape[1] == 1:
        return F.mse_loss(outputs[:, 0].float(), labels.float())
    return F.cross_entropy(outputs.float(), labels.long())


def train_head(
    kind: str, task: Task, features: tuple[Tensor, Tensor], epochs: int, seed: int
) -> dict[str, float]:
    """Train a head on frozen features; give its score on the test half of what is held out.

    The other half chooses learning rate and epoch; `seed` draws the halves, anew for each run.

    Shapes:
        features: (n, d) of the rows to train on, and of those held out.
    """
    train, held_out = features
    labels = torch.tensor([row.label for row in task.train])
    wanted = torch.tensor([row.label for row in task.held_out])
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
    valid, test = order[::2], order[1::2]
    best = {"valid": -2.0}
    for rate in HEAD_RATES:
        torch.manual_seed(seed)
        head = Head(kind, train.shape[1], task.outputs)
        optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0)
        for epoch in range(epochs):
            for chosen in torch.randperm(len(train)).split(64):
                optimizer.zero_grad()
                criterion(head(train[chosen]), labels[chosen]).backward()
                optimizer.step()
            with torch.no_grad():
                outputs = head(held_out)
            found = score(task.metric, outputs[valid], wanted[valid])
            if found > best["valid"]:
                tested = score(task.metric, outputs[test], wanted[test])
                best = {"valid": found, "test": tested, "rate": rate, "epoch": epoch + 1}
    return best


def _shuffled(rows: Sequence[Row], size: int, order: torch.Generator) -> Iterator[list[Row]]:
    while True:
        for chosen in torch.randperm(len(rows), generator=order).split(size):
            yield [rows[i] for i in chosen]
