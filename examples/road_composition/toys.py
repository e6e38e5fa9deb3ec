"""Small nets that tell what composing subspaces promises exactly, and what it does not.

Head A says a language (2 classes), head B does a task (4 classes, or 0 if it does not follow). In
the exact toy each head reads the features of one subspace and nothing else. In the others both read
all features, through a linear layer or a further non-linear one, as the layers of a model do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from composing import product
from torch import Tensor, nn
from torch.nn import functional as F

from road_peft import RoadInterventionConfig, RoadInterventionModel

FEATURES = 64
LANGUAGE_CUE, FOLLOW_CUE = 15, 14  # inputs that are 1 or -1, on or off
HALVES = {"a": (0.0, 0.5), "b": (0.5, 1.0)}
CHOICES = {"none": [], "a": ["a"], "b": ["b"], "both": ["a", "b"]}


@dataclass(frozen=True)
class Toy:
    """How long the net and the adapters train, and on how many inputs they are measured."""

    pretraining: int = 800
    steps: int = 600
    samples: int = 4000


class Net(nn.Module):
    """An encoder 16-128-64 and two heads on its output; `kind` says what the heads read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.config = type("Config", (), {"hidden_size": FEATURES})()
        self.encode = nn.Sequential(
            nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, FEATURES), nn.Tanh()
        )
        self.tail: nn.Module = nn.Identity()
        if kind == "non-linear":
            self.tail = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh())
        width = FEATURES // 2 if kind == "split" else FEATURES
        self.a, self.b = nn.Linear(width, 2), nn.Linear(width, 4)

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor, Tensor]:
        code = self.tail(self.encode(inputs_embeds)[:, 0])
        lower, upper = code.chunk(2, -1) if self.kind == "split" else (code, code)
        return self.a(lower), self.b(upper)


def inputs(rows: int, cues: bool) -> Tensor:
    """Draw inputs; both cues are random with `cues`, else off."""
    x = torch.randn(rows, 16)
    on = torch.randint(0, 2, (rows, 2)) * 2.0 - 1 if cues else torch.full((rows, 2), -1.0)
    x[:, [FOLLOW_CUE, LANGUAGE_CUE]] = on
    return x


def task(x: Tensor) -> Tensor:
    """Give the class that head B should say: the signs of the first two inputs."""
    return (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def pretrain(kind: str, steps: int) -> Net:
    """Train a net whose language, and whether it does the task, follow the cues."""
    net = Net(kind)

    def loss() -> Tensor:
        x = inputs(128, cues=True)
        a, b = net(x[:, None])
        wanted = torch.where(x[:, FOLLOW_CUE] > 0, task(x), 0)
        return F.cross_entropy(a, (x[:, LANGUAGE_CUE] > 0).long()) + F.cross_entropy(b, wanted)

    descend(net.parameters(), steps, 2e-3, loss)
    return net


def descend(parameters: Iterable[Any], steps: int, rate: float, loss: Callable[[], Tensor]) -> None:
    """Take steps of Adam."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def adapt(
    net: Net, steps: int, subspaces: dict[str, Any], rows: list[list[str]], goals: str
) -> Any:
    """Train RoAd1 on the code of the net, with both cues off.

    Row i of a batch of 64 has the subspaces `rows[i % len(rows)]` and the goals among `goals` that
    they name, "a" for language 1 and "b" for the task; a subspace called "all" has all of them.
    """
    config = RoadInterventionConfig(component="encode", positions="all", subspaces=subspaces)
    model = RoadInterventionModel(net, config)
    names = [rows[i % len(rows)] for i in range(64)]
    meant = {g: torch.tensor([g in row or "all" in row for row in names]) for g in goals}

    def loss() -> Tensor:
        x = inputs(64, cues=False)
        a, b = model(inputs_embeds=x[:, None], subspaces=names)
        each = {
            "a": F.cross_entropy(a, torch.ones(64, dtype=torch.long), reduction="none"),
            "b": F.cross_entropy(b, task(x), reduction="none"),
        }
        return torch.stack([each[goal][rows].mean() for goal, rows in meant.items()]).sum()

    descend(model.sites.parameters(), steps, 1e-2, loss)
    return model


@torch.no_grad()
def right(model: Any, x: Tensor, names: list[str]) -> dict[str, float]:
    """Give how often each head is right, and both at once."""
    a, b = model(inputs_embeds=x[:, None], subspaces=[names] * len(x))
    first, second = a.argmax(-1) == 1, b.argmax(-1) == task(x)
    found = {"language": first, "task": second, "both": first & second}
    return {name: share.float().mean().item() for name, share in found.items()}


def statistical(kind: str, seed: int, toy: Toy) -> dict[str, dict[str, dict[str, float]]]:
    """Measure the halves alone and together, joint training, and two adapters multiplied."""
    torch.manual_seed(seed)
    net = pretrain(kind, toy.pretraining)
    x = inputs(toy.samples, cues=False)
    found: dict[str, dict[str, dict[str, float]]] = {}

    model = adapt(net, toy.steps, HALVES, [["a"], ["b"]], "ab")
    found["halves"] = {name: right(model, x, chosen) for name, chosen in CHOICES.items()}
    model.detach()
    model = adapt(net, toy.steps, {"all": (0.0, 1.0)}, [["all"]], "ab")
    found["joint"] = {"both": right(model, x, ["all"])}
    model.detach()
    whole = []
    for goal in "ab":
        model = adapt(net, toy.steps, {"all": (0.0, 1.0)}, [["all"]], goal)
        whole.append(model.interventions())
        model.detach()
    model = RoadInterventionModel(net, product(*whole))
    found["multiplied"] = {"both": right(model, x, ["all"])}
    model.detach()
    return found


def exact(seed: int, toy: Toy) -> dict[str, bool]:
    """Tell whether heads that read one subspace each are served by both as by their own alone."""
    torch.manual_seed(seed)
    net = Net("split")
    with torch.no_grad():
        net.a.bias.copy_(torch.tensor([0.2, -0.2]))  # says language 0, mostly
    model = adapt(net, toy.steps, HALVES, [["a"], ["b"]], "ab")
    x = inputs(toy.samples, cues=False)[:, None]
    with torch.no_grad():
        out = {
            name: model(inputs_embeds=x, subspaces=[chosen] * len(x))
            for name, chosen in CHOICES.items()
        }
    said = {
        name: (a.argmax(-1) == 1, b.argmax(-1) == task(x[:, 0])) for name, (a, b) in out.items()
    }
    model.detach()
    return {
        "head A is the same with both halves as with its own": torch.equal(
            out["both"][0], out["a"][0]
        ),
        "head B is the same with both halves as with its own": torch.equal(
            out["both"][1], out["b"][1]
        ),
        "both are right exactly where each alone is": torch.equal(
            said["both"][0] & said["both"][1], said["a"][0] & said["b"][1]
        ),
    }
