"""The rules of the house that a program can check: layout, wheel, contracts, README, words."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

# package: the folder that holds it
PACKAGES = {
    "road_peft": ROOT,
    "apiq_peft": ROOT,
    "kernels_peft": ROOT / "kernels",
    "recipes_peft": ROOT / "examples",
}
LONGEST_FILE = 500  # lines
OUR_TEXT = (".py", ".md", ".toml", ".yaml", ".yml")

# what it is: a pattern that no file of ours may match; a bracket keeps a pattern from itself
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/([w]ork|[r]oot|[h]ome|[U]sers)/\w",
    "an index of packages": r"[p]ypi\.org|[p]ythonhosted|[d]ownload\.pytorch|[-]-\S*index-url",
    "who helped": r"\b([s]ub-?)?[a]gents?\b|\b[c]laude\b|\b[a]nthropic\b|\b[c]opilot\b",
    "where it was written": r"\b([t]his|[w]orking|[h]elper|[e]arlier|[p]revious) session\b",
    "unfinished work": r"\b[F]IXME\b|\b[X]XX\b",
}
# what it is: a line that matches once its tildes are taken out, and one that must not match
EXAMPLES = {
    "a path of one machine": ("cd /~work/main", "benchmarks/work/main"),
    "an index of packages": ("https://pypi.~org/simple", "pip install ."),
    "who helped": ("written by an a~gent", "a reagent"),
    "where it was written": ("in this~ session", 'scope="session"'),
    "unfinished work": ("# FIX~ME: later", "# a fix for later"),
}


def _files() -> list[Path]:
    """Give the files of the repository: tracked ones and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout of the repository")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def _text(path: Path) -> str | None:
    data = path.read_bytes()
    return None if b"\0" in data else data.decode()


# ---- layout and wheel ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["kernels", "examples"])
def test_a_source_root_is_not_a_package_and_holds_one(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    inside = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert inside == {f"{'recipes' if folder == 'examples' else folder}_peft"}


def test_the_wheel_ships_the_four_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    done = subprocess.run([*command, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package, folder in PACKAGES.items():
        assert f"{package}/py.typed" in names
        sources = {
            str(path.relative_to(folder))
            for path in _files()
            if path.suffix == ".py" and path.is_relative_to(folder / package)
        }
        assert sources
        assert sources == {n for n in names if n.startswith(f"{package}/") and n.endswith(".py")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_package_is_typed() -> None:
    for package, folder in PACKAGES.items():
        assert (folder / package / "py.typed").is_file()


# ---- import contracts ---------------------------------------------------------------------------


def _lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command as run; run()"
    path = os.pathsep.join(str(folder) for folder in (root, root / "kernels", root / "examples"))
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_import_contracts_hold() -> None:
    done = _lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    kept, broken = re.search(r"(\d+) kept, (\d+) broken", done.stdout).groups()
    assert int(kept) >= 5
    assert int(broken) == 0


# a package, and an import that its contract forbids
BREACHES = (
    ("kernels_peft", "import peft"),
    ("kernels_peft", "import road_peft"),
    ("road_peft", "import apiq_peft"),
    ("apiq_peft", "import road_peft"),
    ("recipes_peft", "import road_peft"),
    ("kernels_peft", "import triton"),
    ("road_peft", "import triton"),
)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", root)
    for package, folder in PACKAGES.items():
        target = root / folder.relative_to(ROOT) / package
        shutil.copytree(folder / package, target, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize(("package", "statement"), BREACHES)
def test_a_breach_of_the_contracts_is_noticed(package: str, statement: str, copied: Path) -> None:
    folder = copied / PACKAGES[package].relative_to(ROOT) / package
    breach = folder / "breach.py"
    breach.write_text(statement + "\n")
    try:
        done = _lint_imports(copied)
    finally:
        breach.unlink()
    assert done.returncode != 0
    assert f"{package}.breach -> {statement.split()[1]}" in done.stdout


def test_a_layer_that_imports_what_stands_on_it_is_noticed(copied: Path) -> None:
    layer = copied / "road_peft" / "layer.py"
    before = layer.read_text()
    layer.write_text(before + "\nimport road_peft.model\n")
    try:
        done = _lint_imports(copied)
    finally:
        layer.write_text(before)
    assert done.returncode != 0
    assert "road_peft.layer -> road_peft.model" in done.stdout


# ---- public names -------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist_and_are_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert _first_line(module)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    undocumented = [
        name
        for name in names
        if callable(getattr(module, name)) and not _first_line(getattr(module, name))
    ]
    assert not undocumented


def _first_line(thing: object) -> str:
    """Give the first line of a docstring of its own, "" if it has none or is no sentence."""
    own = thing.__doc__ if isinstance(thing, ModuleType) or not inspect.isclass(thing) else None
    if inspect.isclass(thing):
        own = vars(thing).get("__doc__")
    line = (own or "").strip().partition("\n")[0]
    generated = inspect.isclass(thing) and line.startswith(f"{thing.__name__}(")  # a dataclass's
    return line if line.endswith((".", ":")) and not generated else ""


# ---- every file ---------------------------------------------------------------------------------


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in _files()
        if path.suffix in OUR_TEXT
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in _files()
        for number, line in enumerate((_text(path) or "").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_pattern_for(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.IGNORECASE)
    wrong, right = EXAMPLES[what]
    assert pattern.search(wrong.replace("~", ""))
    assert not pattern.search(right)


# ---- README -------------------------------------------------------------------------------------


def _fences(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """Give every fenced block: its language, the number of its first line (from 0), its lines."""
    language, start, block = None, 0, []
    for number, line in enumerate(text.splitlines()):
        if not line.startswith("```"):
            block.append(line)
        elif language is None:
            language, start, block = line[3:].strip(), number + 1, []
        else:
            yield language, start, block
            language = None
    assert language is None, f"the block that begins before line {start + 1} has no end"


def _program(text: str) -> str:
    """Give the python blocks as one program whose line numbers are those of `text`."""
    lines = [""] * len(text.splitlines())
    for language, start, block in _fences(text):
        if language == "python":
            lines[start : start + len(block)] = block
    return "\n".join(lines) + "\n"


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    program = _program(README.read_text())
    assert program.strip(), "README.md has no python block"
    script = tmp_path / "README.py"  # an error then names the line of the README
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_blocks_run_in_order_in_one_namespace_with_the_lines_of_the_text() -> None:
    text = "# T\n```python\na = 1\n```\ntext\n```\nnot = python(\n```\n```python\nb = a / 0\n```\n"
    program = _program(text)
    assert program.splitlines() == ["", "", "a = 1", "", "", "", "", "", "", "b = a / 0", ""]
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile(program, "T", "exec"), {})
    assert caught.traceback[-1].lineno == 9  # from 0


def _tree(text: str, name: str) -> list[str]:
    """Give the paths of the tree that begins with the name of the repository."""
    for _, _, block in _fences(text):
        if block and block[0].strip().rstrip("/") == name:
            return list(_paths(block[1:]))
    return []


def _paths(lines: list[str]) -> Iterator[str]:
    above: list[tuple[int, str]] = []
    for line in lines:
        entry = re.match(r"[\s│├└─|`+-]*", line).end()
        name = line[entry:].split(maxsplit=1)[:1]
        if not name:
            continue
        while above and above[-1][0] >= entry:
            above.pop()
        above.append((entry, name[0].strip("/")))
        yield "/".join(part for _, part in above)


def test_the_tree_of_the_readme_is_the_tree() -> None:
    files = [path.relative_to(ROOT) for path in _files()]
    paths = _tree(README.read_text(), "road-apiq-peft")
    assert paths, "README.md has no tree that begins with road-apiq-peft"
    assert [path for path in paths if not (ROOT / path).exists()] == []
    # The README need not name itself, nor a tree what is hidden.
    tops = {path.parts[0] for path in files if not path.parts[0].startswith(".")} - {README.name}
    assert tops - {path.partition("/")[0] for path in paths} == set()


@pytest.mark.parametrize(
    "text",
    [
        "```\nname/\n  a/   folder\n    b.py  file\n  c.md\n```\n",
        "```\nname\n├── a/   folder\n│   └── b.py  file\n└── c.md\n```\n",
    ],
    ids=["indented", "drawn"],
)
def test_a_tree_is_read(text: str) -> None:
    assert _tree(text, "name") == ["a", "a/b.py", "c.md"]
    assert _tree(text, "other") == []
