"""What importing the package does, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import peft
import peft.tuners.road as upstream
import pytest
from peft import PeftType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import road_peft
from tests.road_peft._models import Mlp, adapted

# packages of the extras: what is imported by PEFT itself or by torch is not our doing
OPTIONAL = ("triton", "bitsandbytes", "matplotlib", "psutil", "datasets", "sacrebleu", "gguf")


def _run(code: str) -> str:
    """Run a program in a process of its own, and give what it printed on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def effects() -> list[str]:
    """What importing the package changes: what it prints, the packages it loads, the types."""
    printed = _run(f"""
import sys, warnings
import peft.tuners.road, transformers
from peft import mapping
tables = [table for name, table in vars(mapping).items() if name.startswith("PEFT_TYPE_TO")]
assert len(tables) >= 3
before, types = set(sys.modules), [dict(table) for table in tables]
print(end="<<<", flush=True)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import road_peft
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert "road_peft" in new
print("|", *sorted(new & set({OPTIONAL!r})), end="|")
assert all(table.keys() == old.keys() for table, old in zip(tables, types))
changed = [k.value for t, old in zip(tables, types) for k in t if t[k] is not old[k]]
print(*changed, end="|")
""")
    return [part.strip() for part in printed.partition("<<<")[2].split("|")]


def test_importing_prints_nothing_and_warns_of_nothing(effects: list[str]) -> None:
    assert effects[0] == ""


def test_importing_loads_no_optional_package_that_peft_has_not_loaded(effects) -> None:
    assert effects[1] == ""


def test_importing_changes_the_classes_of_one_type_only(effects: list[str]) -> None:
    assert effects[2] == "ROAD ROAD"


def test_the_package_works_where_no_extra_is_installed() -> None:
    printed = _run(f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # from here on it is as if it were not installed
import torch
from peft import get_peft_model
from road_peft import RoadConfig
model = get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(4, 4)), RoadConfig(target_modules=["0"], group_size=2)
)
x = torch.randn(3, 4)
before = model(x)
before.square().sum().backward()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
optimizer.step()
after = model(x)
assert not torch.equal(before, after)
model.merge_adapter(safe_merge=True)
assert torch.allclose(model(x), after, atol=1e-5)
print(type(model.base_model.model[0]).__name__)
""")
    assert printed.split()[-1] == "RoadLinear"


def test_importing_twice_and_after_a_model_was_built_changes_no_model() -> None:
    _run("""
import peft, torch
config = peft.RoadConfig(target_modules=["0"], group_size=2, init_weights=False)
before = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
x = torch.randn(2, 4)
wanted = before(x)
import road_peft
road_peft.register()
assert not isinstance(before.base_model, road_peft.RoadModel)
assert torch.equal(before(x), wanted)
before.merge_adapter()
assert torch.allclose(before(x), wanted, atol=1e-5)
""")


# ---- registration -------------------------------------------------------------------------------


@pytest.fixture
def _registered_afterwards() -> Iterator[None]:
    yield
    road_peft.register()


@pytest.mark.parametrize("config_class", [peft.RoadConfig, road_peft.RoadConfig])
def test_both_configurations_give_our_layers(config_class) -> None:
    model = get_peft_model(Mlp(), config_class(target_modules=["up"], group_size=4))
    assert isinstance(model.base_model, road_peft.RoadModel)
    assert [type(layer) for layer in adapted(model)] == [road_peft.RoadLinear]


def test_our_classes_are_kinds_of_those_of_peft() -> None:
    assert issubclass(road_peft.RoadConfig, upstream.RoadConfig)
    assert issubclass(road_peft.RoadModel, upstream.RoadModel)
    assert issubclass(road_peft.RoadLayer, upstream.RoadLayer)
    assert road_peft.RoadConfig().peft_type is PeftType.ROAD
    assert isinstance(get_peft_config({"peft_type": "ROAD"}), road_peft.RoadConfig)


@pytest.mark.usefixtures("_registered_afterwards")
def test_giving_the_type_back_and_taking_it_again() -> None:
    config = peft.RoadConfig(target_modules=["up"], group_size=4)
    ours = get_peft_model(Mlp(), config)
    for _ in range(2):  # harmless to repeat
        road_peft.unregister()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROAD] is upstream.RoadConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ROAD] is upstream.RoadModel
    theirs = get_peft_model(Mlp(), peft.RoadConfig(target_modules=["up"], group_size=4))
    assert not any(isinstance(layer, road_peft.RoadLayer) for layer in adapted(theirs))
    ours.merge_adapter()
    ours.unmerge_adapter()
    for _ in range(2):
        road_peft.register()
    again = get_peft_model(Mlp(), peft.RoadConfig(target_modules=["up"], group_size=4))
    assert all(isinstance(layer, road_peft.RoadLayer) for layer in adapted(again))
