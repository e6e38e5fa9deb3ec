"""Toys that tell what composing subspaces promises, and what it does not.

The exact one has a head for each subspace, which reads nothing else. In the other all heads read
all features, as the layers after an intervention do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from road_peft import RoadInterventionConfig, RoadInterventionModel
from tests.road_peft._interventions import HALVES

FEATURES = 64
CLASSES = {"a": 2, "b": 4}  # head A says the language, head B the task


class _Net(nn.Module):
    """An encoder and two heads; with `split`, each head reads its half of the features only."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split = split
        self.config = type("Config", (), {"hidden_size": FEATURES})()
        self.encode = nn.Sequential(
            nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, FEATURES), nn.Tanh()
        )
        width = FEATURES // 2 if split else FEATURES
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in CLASSES.items()})

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encode(inputs_embeds)[:, 0]
        lower, upper = code.chunk(2, -1) if self.split else (code, code)
        return self.heads["a"](lower), self.heads["b"](upper)


def _descend(parameters: Any, steps: int, rate: float, loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def _inputs(rows: int, cues: bool) -> Tensor:
    """Draw inputs; 14 and 15 are the cues to follow the task and to change the language."""
    x = torch.randn(rows, 16)
    x[:, 14:] = torch.randint(0, 2, (rows, 2)) * 2.0 - 1 if cues else -1.0
    return x


def _task(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def _pretrained(steps: int = 150) -> _Net:
    """Give a net whose language and whether it does the task follow the cues."""
    net = _Net(split=False)

    def loss() -> Tensor:
        x = _inputs(64, cues=True)
        a, b = net(x[:, None])
        task = torch.where(x[:, 14] > 0, _task(x), 0)
        return F.cross_entropy(a, (x[:, 15] > 0).long()) + F.cross_entropy(b, task)

    _descend(net.parameters(), steps, 1e-2, loss)
    return net


def _adapted(net: _Net, steps: int) -> RoadInterventionModel:
    """Train both halves jointly, each row with one of them: A to change language, B to follow."""
    config = RoadInterventionConfig(component="encode", positions="all", subspaces=HALVES)
    model = RoadInterventionModel(net, config)
    rows = [["lower"]] * 32 + [["upper"]] * 32

    def loss() -> Tensor:
        x = _inputs(64, cues=False)
        a, b = model(inputs_embeds=x[:, None], subspaces=rows)
        language = torch.ones(32, dtype=torch.long)
        return F.cross_entropy(a[:32], language) + F.cross_entropy(b[32:], _task(x)[32:])

    _descend(model.sites.parameters(), steps, 2e-2, loss)
    return model


@torch.no_grad()
def _right(model: RoadInterventionModel, x: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    a, b = model(inputs_embeds=x[:, None], subspaces=[names] * len(x))
    return a.argmax(-1) == 1, b.argmax(-1) == _task(x)


def test_heads_that_read_one_subspace_each_compose_exactly() -> None:
    net = _Net(split=True)
    with torch.no_grad():
        net.heads["a"].bias.copy_(torch.tensor([0.2, -0.2]))  # says language 0
    model = _adapted(net, steps=60)
    x = _inputs(500, cues=False)
    with torch.no_grad():
        out = {
            names: model(inputs_embeds=x[:, None], subspaces=[list(names)] * 500)
            for names in ((), ("lower",), ("upper",), ("lower", "upper"))
        }
    none, lower, upper, both = out.values()
    assert torch.equal(both[0], lower[0])
    assert torch.equal(both[1], upper[1])
    assert torch.equal(lower[1], none[1])
    assert torch.equal(upper[0], none[0])
    assert not torch.equal(lower[0], none[0])
    right = {names: _right(model, x, list(names)) for names in out}
    joint = right["lower", "upper"][0] & right["lower", "upper"][1]
    assert torch.equal(joint, right["lower",][0] & right["upper",][1])
    assert 0 < joint.float().mean() < 1
    assert right["lower",][0].float().mean() > right[()][0].float().mean()


def test_heads_that_read_everything_gain_from_both_halves_on_average(
    record_property: Callable[[str, object], None],
) -> None:
    """Measured, not promised: the mean over seeds of both being right at once."""
    choices: tuple[tuple[str, ...], ...] = ((), ("lower",), ("upper",), ("lower", "upper"))
    shares = {names: [] for names in choices}
    for seed in range(5):
        torch.manual_seed(seed)
        model = _adapted(_pretrained(), steps=100)
        x = _inputs(2000, cues=False)
        for names in choices:
            a, b = _right(model, x, list(names))
            shares[names].append((a & b).float().mean().item())
    means = {names: sum(values) / len(values) for names, values in shares.items()}
    for names, values in shares.items():
        record_property(f"both right with {' and '.join(names) or 'neither'}", values)
    assert means["lower", "upper"] > max(means[n] for n in choices[:3]), shares
