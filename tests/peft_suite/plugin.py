"""pytest plugin: another class in RoadConfig's place, and only the tests that touch it.

Nothing of PEFT is changed on disk. What a test file finds in place of the real thing:
    peft.RoadConfig   the class of --road-config
    the hub           the cache of HF_HUB_CACHE, of which all is said to be fetched already
    optional packages an empty stand-in where they are not installed
    skips for RoAd    none for GPT-2's Conv1D nor for mixed batches with beams
What ours does otherwise on purpose is expected to fail, test by test, with the reason.
"""

import functools
import importlib.util
import pkgutil
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub.constants
import peft
import pytest

from tests.peft_suite.source import PACKAGE

ROAD: pytest.StashKey[type] = pytest.StashKey()

# a test whose own body reads one of these is about RoadConfig, whatever its parameters
NAMES = {"RoadConfig", "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"}
# imported at the top of test files or by what these import, for tests of other methods
AT_COLLECTION = ("attr", "diffusers", "scipy")
# asked for by another method's config, which the walk over all methods makes
AT_CALL = ("sklearn",)
# skips of what stock RoAd lacks, and a slip that skips merging on two models for every method
LIFTED_SKIPS = (
    *("_skip_if_not_conv1d_supported", "_skip_if_conv1d_not_supported"),
    "check_beft_config",
)
# what ours does otherwise, by the name of the test's function
DELIBERATE = {
    "test_mixed_adapter_batches_training_mode_raises": (
        "a batch whose rows belong to different adapters is trained, not refused"
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the class."""
    parser.addoption("--road-config", default="peft.RoadConfig", help="class to test, dotted")


def pytest_configure(config: pytest.Config) -> None:
    """Put the class in place before any test file imports it."""
    name = config.getoption("--road-config")
    try:
        config.stash[ROAD] = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"cannot import {name}: {error}") from error
    vars(peft).update(RoadConfig=config.stash[ROAD])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import the test files with stand-ins for what they need and RoAd does not."""
    with _stand_ins(AT_COLLECTION):
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that touch the class, and let them run: no hub, no skips for Conv1D."""
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        (kept if _touches(item, config.stash[ROAD]) else others).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)
    if config.stash[ROAD].__module__.startswith("road_peft."):
        for item in kept:
            reason = DELIBERATE.get(getattr(item, "originalname", ""))
            if reason:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    instead = {"_HUB_MODEL_ACCESSES": _Everything(int), **dict.fromkeys(LIFTED_SKIPS, _never)}
    for name, module in sys.modules.items():
        if name.startswith(f"{PACKAGE}."):
            held = vars(module)
            held.update({key: value for key, value in instead.items() if key in held})


@pytest.fixture(autouse=True)
def _call_stand_ins() -> Iterator[None]:
    with _stand_ins(AT_CALL):
        yield


@pytest.fixture(autouse=True)
def _beams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the skip of mixed batches, which compares the class with the name `LoraConfig`."""
    if "mixed_adapter_batches" in request.node.name and "config_cls" in request.fixturenames:
        for module in (request.module, sys.modules[f"{PACKAGE}.testing_common"]):
            monkeypatch.setattr(module, "LoraConfig", request.config.stash[ROAD])


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve a download into a folder of the test's own from the hub cache."""
    real = peft.config.hf_hub_download

    @functools.wraps(real)
    def download(repo_id: str, *args: Any, cache_dir: str | None = None, **kwargs: Any) -> str:
        if cache_dir is not None:
            name = f"models--{repo_id.replace('/', '--')}"
            held = Path(huggingface_hub.constants.HF_HUB_CACHE, name)
            shutil.copytree(held, Path(cache_dir, name), dirs_exist_ok=True)
        return real(repo_id, *args, cache_dir=cache_dir, **kwargs)

    monkeypatch.setattr(peft.config, "hf_hub_download", download)


def _never(*_: object) -> None:
    """Skip nothing, in place of a function that skips some tests."""


def _touches(item: pytest.Item, road: type) -> bool:
    """Say whether a test has the class among its parameters or reads it in its body."""
    if not isinstance(item, pytest.Function):
        return False
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return _holds(parameters, road) or not NAMES.isdisjoint(item.function.__code__.co_names)


def _holds(value: Any, road: type) -> bool:
    """Say whether a parameter is the class, an instance of it, or a collection with one."""
    if isinstance(value, dict):
        return any(_holds(part, road) for part in value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds(part, road) for part in value)
    return value is road or isinstance(value, road)


class _Everything(defaultdict[str, int]):
    """The tests' record of fetched models, with every model in it."""

    def __contains__(self, key: object) -> bool:
        return True


class _Name:
    """Any name of a stand-in: an empty class, or a decorator that changes nothing."""

    def __new__(cls, *args: Any) -> Any:
        return args[0] if args else super().__new__(cls)


class _StandIn(ModuleType):
    """A package of which any name can be imported."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Name,), {})


@contextmanager
def _stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    """Let `names` be imported for the time of the body, where they are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    sys.modules.update({name: _StandIn(name) for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
