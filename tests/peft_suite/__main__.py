"""Run PEFT's own tests of RoAd on our RoadConfig, or on another class.

    python -m tests.peft_suite                           ours
    python -m tests.peft_suite --config peft.RoadConfig  PEFT's, for comparison

The tests come from the source distribution of the installed PEFT, fetched once by pip. All those
that touch RoadConfig run, also on GPT-2's Conv1D and on beams, where PEFT skips RoAd; tests for
GPUs are left out. The last line is `N passed, N failed, N skipped`; errors count as failed.
Exit status: 0 if nothing failed and the counts are those on record or better, 1 if not, 2 if the
tests could not be had.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from tests.peft_suite import models, source

OURS = "road_peft.RoadConfig"


@dataclass(frozen=True)
class Counts:
    """How many tests ended in which way."""

    passed: int
    failed: int
    skipped: int

    @property
    def collected(self) -> int:
        """The number of all tests."""
        return self.passed + self.failed + self.skipped

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


# PEFT release, oldest first: what our class reaches in a full run. Tests that are expected to fail,
# since ours does otherwise on purpose (`plugin.DELIBERATE`), count as skipped.
EXPECTED = {"0.21.2": Counts(passed=731, failed=0, skipped=78)}


def main() -> int:
    """Run the command and return its exit status."""
    args = _parser().parse_args()
    release = version("peft")
    cache = args.cache.resolve()
    try:
        tests = source.peft_tests(release, cache)
    except source.SourceError as error:
        print(error, file=sys.stderr)
        return 2
    hub = models.hub(cache)
    start = time.monotonic()
    cases = _run(tests, hub, args)
    took_s = time.monotonic() - start

    failures = {name: reason for name, (end, reason) in cases.items() if end == "failed"}
    for name, reason in failures.items():
        print(f"failed: {name}\n    {reason}")
    ends = [end for end, _ in cases.values()]
    counts = Counts(ends.count("passed"), ends.count("failed"), ends.count("skipped"))
    reached = bool(cases) and not failures
    if args.config == OURS and not args.k:
        reached = _compare(counts, release) and reached
    versions = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch"))
    print(f"{args.config} in {counts.collected} of PEFT's tests, {took_s:.0f} s; {versions}")
    print(counts)
    return 0 if reached else 1


def _parser() -> argparse.ArgumentParser:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(
        prog="python -m tests.peft_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=OURS, help="class to test (default: %(default)s)")
    parser.add_argument(
        "--cache",
        type=Path,
        default=caches / "road-apiq-peft",
        help="where the tests and the models are kept (default: %(default)s)",
    )
    parser.add_argument("-n", default="2", help="processes, 0 for this one only (default: 2)")
    parser.add_argument("-k", default="", help="pytest's choice of tests by name")
    parser.add_argument("-v", action="store_true", help="show pytest's own output")
    return parser


def _run(tests: Path, hub: Path, args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Run pytest and return the end and the reason of each test by name."""
    # the two GPU files need an accelerator and real models
    files = [
        path
        for path in sorted(tests.glob("test_*.py"))
        if "gpu" not in path.name and "RoadConfig" in path.read_text(encoding="utf-8")
    ]
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        # with a GPU in sight more tests would run, and those want real models
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log.xml"
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tests)]
        command += ["-p", "tests.peft_suite.plugin", "--road-config", args.config]
        command += ["-p", "no:cacheprovider", "-W", "ignore", "--tb=short", f"--junitxml={log}"]
        command += ["-n", args.n, "--dist", "worksteal", "-k", args.k, "-vrs" if args.v else "-q"]
        ran = subprocess.run(
            [*command, *map(str, files)],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdout=None if args.v else subprocess.PIPE,
            stderr=None if args.v else subprocess.STDOUT,
            text=True,
            check=False,
        )
        cases = _read(log) if log.is_file() else {}
    if ran.returncode > 1 or not cases:
        print(f"pytest ended with status {ran.returncode}", (ran.stdout or "")[-3000:], sep="\n")
    return cases


def _read(log: Path) -> dict[str, tuple[str, str]]:
    """Return the end and the reason of each test in a JUnit file."""
    cases = {}
    for case in ElementTree.parse(log).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        cases[name] = ("passed", "")
        for tag, end in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            found = case.find(tag)
            if found is not None:
                cases[name] = (end, _reason(found))
    return cases


def _reason(found: ElementTree.Element) -> str:
    """Return why a test ended so; of a file that cannot be imported, the last error inside."""
    reason = found.get("message", "")
    if reason == "collection failure":
        errors = [line[1:] for line in (found.text or "").splitlines() if line.startswith("E ")]
        reason = " ".join([reason, *errors[-1:]])
    return " ".join(reason.split())[:300]


def _compare(counts: Counts, release: str) -> bool:
    """Hold the counts against the record, say what differs, return whether they are as good."""
    record = EXPECTED.get(release)
    if record is None:
        newest = list(EXPECTED)[-1]
        record = EXPECTED[newest]
        print(f"no counts on record for peft {release}: held against those of {newest}")
    if counts != record:
        print(f"the counts differ from those on record: {record}")
    if counts.collected < record.collected:
        print(f"only {counts.collected} tests of {record.collected} were collected")
    return counts.passed >= record.passed and counts.collected >= record.collected


if __name__ == "__main__":
    sys.exit(main())
