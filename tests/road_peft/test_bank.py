"""The bank as a container: slots, leases, versions, and what it says that it holds.

The model of these tests tells by its outputs which adapter, and which version, each layer applied.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from road_peft import BankFullError, RoadBank, RoadConfig, UnknownAdapterError
from tests.road_peft._banks import (
    Loudly,
    heard,
    in_threads,
    loud_bank,
    no_lease,
    scaling,
    vector_bytes,
)
from tests.road_peft._models import no_hooks

ONE = vector_bytes(scaling(2.0))  # bytes of the values of one adapter of `Loudly`


def _write(folder: Path, scale: float) -> Path:
    config, vectors = scaling(scale)
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{key}": vector for key, vector in vectors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def _in_slots(bank: RoadBank) -> set[str]:
    return {slot.entry.name for slot in bank._slots if slot.entry is not None}


# ---- slots ------------------------------------------------------------------------------------


def test_rows_take_their_adapters_and_none_is_the_base() -> None:
    bank = loud_bank(4, count=3)
    assert heard(bank, "n3", None, "n1", "__base__", "n3", "n2") == [4, 1, 2, 1, 4, 3]
    assert heard(bank, None, None) == [1, 1]
    assert no_lease(bank)
    assert no_hooks(bank.model)
    assert torch.equal(bank.model(torch.ones(1, 4)), torch.ones(1, 3, 4))


def test_the_least_recently_used_adapter_makes_room() -> None:
    bank = loud_bank(3, count=5)
    for name in ("n1", "n2", "n3", "n1", "n2"):
        heard(bank, name)
    heard(bank, "n4")
    assert _in_slots(bank) == {"n1", "n2", "n4"}
    heard(bank, "n5", "n1")  # one that is wanted now does not make room for the other
    assert _in_slots(bank) == {"n1", "n4", "n5"}
    assert heard(bank, "n2", "n3", "n4") == [3, 4, 5]
    assert _in_slots(bank) == {"n2", "n3", "n4"}


def test_eviction_follows_the_order_of_use_over_a_long_run() -> None:
    bank, order = loud_bank(4, count=9), []
    for _ in range(200):
        number = int(torch.randint(1, 10, ()))
        assert heard(bank, f"n{number}") == [number + 1]
        order = [*(n for n in order if n != number), number][-4:]
        assert _in_slots(bank) == {f"n{n}" for n in order}
    memory = bank.memory()
    assert memory.evictions == memory.loads - 4


def test_leases_hold_slots_and_a_full_bank_says_so() -> None:
    bank = loud_bank(2, count=3)
    first, second, again = bank.acquire("n1"), bank.acquire("n2"), bank.acquire("n1")
    assert first.slot == again.slot != second.slot
    before = bank.memory()
    with pytest.raises(BankFullError, match=r"'n3' need 1 slot\(s\), but of 2 only 0 are neither"):
        bank.acquire("n3")
    assert bank.memory() == before
    first.release()
    first.release()  # a second time does nothing
    with pytest.raises(BankFullError, match="wait"):
        bank.acquire("n3")
    again.release()
    with bank.acquire("n3") as third:
        assert third.slot == first.slot
    second.release()
    assert no_lease(bank)
    assert bank.acquire(None).slot == bank.acquire("__base__").slot == -1


def test_a_batch_of_more_adapters_than_slots_is_refused_at_once() -> None:
    bank = loud_bank(2, count=3)
    with pytest.raises(BankFullError, match=r"'n1', 'n2', 'n3' need 3 slot\(s\), but of 2 only 2"):
        heard(bank, "n1", "n2", "n3", timeout=1000)
    assert no_lease(bank)
    assert bank.memory().slots_used == 0


def test_waiting_for_a_slot_ends_when_another_thread_releases_one() -> None:
    bank = loud_bank(1, count=2)
    lease = bank.acquire("n1")
    timer = threading.Timer(0.05, lease.release)
    timer.start()
    assert heard(bank, "n2", timeout=30) == [3]
    timer.join()


@pytest.mark.parametrize("how", ["unpin", "remove", "replace"])
def test_waiting_ends_when_a_pinned_adapter_goes(how: str) -> None:
    bank = loud_bank(1, count=2)
    bank.pin("n1")
    actions = {
        "unpin": lambda: bank.unpin("n1"),
        "remove": lambda: bank.remove("n1"),
        "replace": lambda: bank.replace("n1", scaling(8)),
    }
    timer = threading.Timer(0.05, actions[how])
    timer.start()
    assert heard(bank, "n2", timeout=30) == [3]
    timer.join()


def test_waiting_ends_with_an_error_when_the_adapter_is_removed() -> None:
    bank = loud_bank(1, count=2)
    with bank.acquire("n1"):
        timer = threading.Timer(0.05, bank.remove, ["n2"])
        timer.start()
        with pytest.raises(UnknownAdapterError, match="no adapter 'n2'"):
            bank.acquire("n2", timeout=30)
    timer.join()


def test_two_batches_that_need_all_slots_do_not_wait_for_a_half_of_each_other() -> None:
    bank = loud_bank(2, count=4)
    barrier = threading.Barrier(2)

    def run(*numbers: int) -> None:
        barrier.wait()
        for _ in range(50):
            got = heard(bank, *(f"n{n}" for n in numbers), timeout=30)
            assert got == [n + 1 for n in numbers]

    in_threads(lambda: run(1, 2), lambda: run(3, 4))
    assert no_lease(bank)


def test_pinned_adapters_keep_their_slots_until_unpinned() -> None:
    bank = loud_bank(2, count=4)
    bank.pin("n1")
    for name in ("n2", "n3", "n4"):
        heard(bank, name)
    assert _in_slots(bank) == {"n1", "n4"}
    assert bank.memory().slots_pinned == 1
    bank.pin("n4")
    with pytest.raises(BankFullError, match="unpin"):
        heard(bank, "n2")
    with pytest.raises(BankFullError):
        bank.pin("n2")
    assert heard(bank, "n1", "n4") == [2, 5]
    bank.unpin("n1")
    assert heard(bank, "n2") == [3]
    assert _in_slots(bank) == {"n2", "n4"}


# ---- versions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["replace", "remove"])
def test_who_holds_a_lease_keeps_the_old_version(how: str) -> None:
    bank = loud_bank(2, count=1)
    x = torch.ones(1, 4)
    with bank.rows(["n1"]):
        assert bank.model(x)[0, 0, 0] == 2
        if how == "replace":
            bank.replace("n1", scaling(16))
        else:
            bank.remove("n1")
            with pytest.raises(UnknownAdapterError):
                bank.acquire("n1")
        bank.add("other", scaling(32))
        in_threads(lambda: None, lambda: _check(heard(bank, "other"), [32]))
        assert torch.equal(bank.model(x), torch.full((1, 3, 4), 2.0))
        assert bank.memory().slots_used == 2
    assert bank.memory().slots_used == 1
    if how == "replace":
        assert heard(bank, "n1") == [16]
    else:
        assert "n1" not in bank


def _check(got: object, wanted: object) -> None:
    assert got == wanted


def test_two_versions_are_served_side_by_side() -> None:
    bank = loud_bank(2, count=1)
    old = bank.acquire("n1")
    bank.replace("n1", scaling(16))
    new = bank.acquire("n1")
    slots = torch.tensor([old.slot, new.slot, -1])
    with bank.routed(slots):
        assert bank.model(torch.ones(3, 4))[:, 0, 0].tolist() == [2, 16, 1]
    old.release()
    with bank.acquire("n1") as again:
        assert again.slot == new.slot
    new.release()
    assert bank.memory().slots_used == 1


def test_a_pinned_adapter_stays_pinned_when_replaced() -> None:
    bank = loud_bank(1, count=2)
    bank.pin("n1")
    bank.replace("n1", scaling(16))
    assert bank.memory().slots_pinned == 0  # it takes its slot when it is next wanted
    assert heard(bank, "n1") == [16]
    assert bank.memory().slots_pinned == 1
    with pytest.raises(BankFullError):
        heard(bank, "n2")


def test_a_removed_name_can_be_used_again_and_is_not_pinned_then() -> None:
    bank = loud_bank(1, count=2)
    bank.pin("n1")
    bank.remove("n1")
    bank.add("n1", scaling(16))
    assert heard(bank, "n1") == [16]
    assert heard(bank, "n2") == [3]


def test_the_values_that_were_given_may_change_afterwards() -> None:
    config, vectors = scaling(2)
    bank = loud_bank()
    bank.add("x", (config, vectors))
    for vector in vectors.values():
        vector.fill_(9)
    assert heard(bank, "x") == [2]


# ---- the account ------------------------------------------------------------------------------


def test_memory_is_exact() -> None:
    bank = loud_bank(5)
    rows = 3 * 2 * 4 * 4 + 3 * 4  # layers, two vectors, width, bytes; and the group sizes
    empty = bank.memory()
    assert (empty.table_bytes, empty.slot_bytes) == (5 * rows, rows)
    assert (empty.slots, empty.slots_used, empty.host_bytes, empty.host_adapters) == (5, 0, 0, 0)
    for i in range(7):
        bank.add(f"n{i}", scaling(i + 1))
    bank.pin("n0")
    heard(bank, *(f"n{i}" for i in range(4)))
    bank.remove("n6")
    held = bank.acquire("n1")
    bank.remove("n1")
    memory = bank.memory()
    assert (memory.registered, memory.host_adapters, memory.host_bytes) == (5, 5, 5 * ONE)
    assert (memory.slots_used, memory.slots_pinned) == (4, 1)
    assert (memory.loads, memory.reads, memory.evictions) == (4, 0, 0)
    held.release()
    assert bank.memory().slots_used == 3
    assert bank.names == ["n0", "n2", "n3", "n4", "n5"]
    assert len(bank) == 5
    bank.detach()
    assert (bank.memory().host_bytes, bank.memory().registered, bank.memory().table_bytes) == (
        0,
    ) * 3


def test_tables_never_move() -> None:
    bank = loud_bank(2, count=5)
    before = [t.data_ptr() for pair in bank.tables.values() for t in pair]
    for i in range(1, 6):
        heard(bank, f"n{i}")
    bank.replace("n5", scaling(9))
    heard(bank, "n5")
    assert [t.data_ptr() for pair in bank.tables.values() for t in pair] == before


def test_values_beyond_the_limit_are_read_again(tmp_path: Path) -> None:
    bank = loud_bank(1, host_bytes=2 * ONE)
    bank.add("memory", scaling(9))
    for i in range(1, 4):
        bank.add(f"n{i}", _write(tmp_path / f"n{i}", i + 1))
    memory = bank.memory()
    assert (memory.reads, memory.host_bytes, memory.host_adapters) == (3, 2 * ONE, 2)
    assert heard(bank, "n3") == [4]  # the last one read is still there
    assert bank.memory().reads == 3
    for _ in range(2):
        assert heard(bank, "n1") == [2]
        assert heard(bank, "n2") == [3]
        assert heard(bank, "memory") == [9]
    memory = bank.memory()
    assert (memory.reads, memory.host_bytes, memory.host_adapters) == (7, 2 * ONE, 2)


@pytest.mark.parametrize("limit", [0, ONE - 1])
def test_a_bank_may_keep_nothing_in_the_memory_of_the_host(tmp_path: Path, limit: int) -> None:
    bank = loud_bank(2, host_bytes=limit)
    for i in range(1, 4):
        bank.add(f"n{i}", _write(tmp_path / f"n{i}", i + 1))
    assert bank.memory().host_bytes == 0
    assert heard(bank, "n1", "n2") == [2, 3]
    assert heard(bank, "n2", "n3") == [3, 4]
    assert (bank.memory().host_bytes, bank.memory().reads) == (0, 6)
    bank.add("memory", scaling(9))
    bank.add("other", scaling(10))
    assert heard(bank, "memory", "other") == [9, 10]
    assert bank.memory().host_bytes == 2 * ONE  # these cannot be read again


# ---- many -------------------------------------------------------------------------------------


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """Give a folder in memory where there is one, since disks may take long for many links."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() else tmp_path
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def test_ten_thousand_folders_are_registered_unread(fast_path: Path) -> None:
    first = _write(fast_path / "of-all" / "x", 5)
    folder = fast_path / "adapters"
    (folder / "no adapter").mkdir(parents=True)
    for i in range(10_000):
        (folder / f"a{i}").symlink_to(first, target_is_directory=True)
    bank = loud_bank(2)
    bank.add("a77", scaling(3))
    new = bank.add_folder(folder)
    assert len(new) == 9_999
    assert "a77" not in new
    assert (len(bank), bank.memory().reads, bank.memory().host_adapters) == (10_000, 0, 1)
    assert heard(bank, "a9999", "a77") == [5, 3]
    assert bank.memory().reads == 1
    assert bank.add_folder(folder) == []


def test_a_thousand_adapters_in_slots() -> None:
    bank = loud_bank(1000, count=999)  # the next one would scale by more than is allowed
    bank.add("n1000", scaling(0.5))
    names, scales = [f"n{i}" for i in range(1, 1001)], [*range(2, 1001), 0.5]
    assert heard(bank, *names) == scales
    assert heard(bank, *reversed(names)) == scales[::-1]
    memory = bank.memory()
    assert (memory.slots_used, memory.loads, memory.evictions) == (1000, 1000, 0)
    assert memory.host_bytes == 1000 * ONE


def test_a_folder_is_read_when_first_wanted_and_its_errors_come_then(tmp_path: Path) -> None:
    _write(tmp_path / "good", 3)
    broken = _write(tmp_path / "broken", 4)
    (broken / "adapter_model.safetensors").write_bytes(b"nonsense")
    bank = loud_bank(1)
    assert bank.add_folder(tmp_path) == ["broken", "good"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no readable adapter_model\.safetensors"):
            heard(bank, "broken")
    with pytest.raises(ValueError, match="no readable"):
        bank.pin("broken")
    assert heard(bank, "good") == [3]
    shutil.rmtree(broken)
    _write(broken, 4)
    assert heard(bank, "broken") == [4]  # mended meanwhile
    assert no_lease(bank)


# ---- the model --------------------------------------------------------------------------------


def test_detach_gives_the_very_same_modules_back() -> None:
    model = Loudly()
    before = dict(model.named_modules())
    bank = RoadBank(model, 2, target_modules=["0", "2"])
    assert set(bank.tables) == {"layers.0", "layers.2"}
    bank.add("x", (RoadConfig(group_size=2, target_modules=["0"]), _only(scaling(3)[1], 0)))
    with bank.rows(["x"]):
        assert model(torch.ones(1, 4))[0, :, 0].tolist() == [3, 1, 1]
    bank.detach()
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert bank.names == []
    with pytest.raises(UnknownAdapterError):
        bank.acquire("x")
    again = RoadBank(model, 2, target_modules=["0", "1", "2"])
    again.add("y", scaling(4))
    assert heard(again, "y") == [4]


def _only(vectors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    return {key: v for key, v in vectors.items() if key.startswith(f"layers.{layer}.")}


def test_the_mode_of_the_model_is_kept() -> None:
    for mode in (True, False):
        model = Loudly().train(mode)
        RoadBank(model, 2, target_modules=["0"])
        assert all(module.training is mode for module in model.modules())


def test_backward_through_a_bank_reaches_the_inputs_only() -> None:
    bank = loud_bank(2, count=2)
    x = torch.ones(3, 4, requires_grad=True)
    with bank.rows(["n2", None, "n1"]):
        bank.model(x).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [9, 3, 6]  # three layers
    assert not any(t.requires_grad for pair in bank.tables.values() for t in pair)
    assert heard(bank, "n1", "n2") == [2, 3]


def test_a_bank_made_in_inference_mode_goes_on_outside_of_it() -> None:
    model = Loudly()
    with torch.inference_mode():
        bank = RoadBank(model, 1, target_modules=["0", "1", "2"])
        bank.add("n1", scaling(2))
        bank.add("n2", scaling(3))
        assert heard(bank, "n1") == [2]
    assert heard(bank, "n2") == [3]
    with torch.inference_mode():
        assert heard(bank, "n1") == [2]
    x = torch.ones(1, 4, requires_grad=True)
    with bank.rows(["n2"]):
        bank.model(x).sum().backward()
    assert x.grad is not None
