"""One exception for what a user can put right: shown as one sentence, without a traceback."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["UserError", "explained", "run"]


class UserError(Exception):
    """Something that the user gave cannot be used: what it was, what is allowed, what to do."""


@contextmanager
def explained(*kinds: type[Exception], before: str = "", after: str = "") -> Iterator[None]:
    """Turn exceptions of these kinds into a `UserError`, with words before and after the message.

    For calls into a library whose messages are already meant for users.
    """
    try:
        yield
    except kinds as error:
        # the first line only: libraries append advice and tracebacks of their own
        said = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"{before}{said}{after}") from error


def run(main: Callable[[], int]) -> int:
    """Call `main` and give the exit status: its own, or 2 and a sentence on stderr."""
    try:
        with warnings.catch_warnings():
            # Libraries announce their plans to those who call them, not to the user of a recipe.
            warnings.simplefilter("ignore", FutureWarning)
            return main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
