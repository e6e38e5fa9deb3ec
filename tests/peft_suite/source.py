"""PEFT's test files, taken from the source distribution of a release."""

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# PEFT's folder is named `tests`, as ours is, and only one package can have that name
PACKAGE = "peft_tests"


class SourceError(Exception):
    """The source distribution could not be had."""


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and rename it to `folder` once the body is through.

    A body that fails leaves nothing behind. Of two that fill the same folder the first wins.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".filling-") as scratch:
        fresh = Path(scratch) / folder.name
        fresh.mkdir()
        yield fresh
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def peft_tests(version: str, cache: Path) -> Path:
    """Return the folder of the test files of PEFT `version`, fetched by pip if not in the cache.

    Raises:
        SourceError: pip cannot fetch the source distribution, or it holds no tests.
    """
    folder = cache / f"peft-{version}"
    if not folder.is_dir():
        with appearing(folder) as fresh, tempfile.TemporaryDirectory() as download:
            _unpack(_fetch(version, Path(download)), fresh)
    return folder / PACKAGE


def _fetch(version: str, folder: Path) -> Path:
    """Download the source distribution of PEFT into `folder` and return its path."""
    wanted = ["--no-deps", "--no-binary", "peft", "--dest", str(folder), f"peft=={version}"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    ran = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("*.tar.gz"))
    if ran.returncode or not archives:
        lines = ran.stderr.strip().splitlines() or ["it gave no reason"]
        reason = lines[-1].removeprefix("ERROR: ")
        raise SourceError(
            f"pip could not fetch the source distribution of peft {version}: {reason}"
        )
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the tests of a source distribution as the package PACKAGE in `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        tests = next(Path(scratch).glob("*/tests"), None)
        if tests is None:
            raise SourceError(f"the source distribution {archive.name} holds no folder `tests`")
        tests.rename(folder / PACKAGE)
    # the distribution leaves it out, and the files import each other relatively
    (folder / PACKAGE / "__init__.py").touch()
