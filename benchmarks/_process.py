"""Call a function in a process of its own, whose memory nothing else has touched."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


def alone(function: Callable[[A], T], argument: A) -> T:
    """Give `function(argument)`, computed elsewhere; its module is imported once for all calls.

    Raises:
        RuntimeError: it raised, or its process ended without an answer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, argument), daemon=True)
    process.start()
    sender.close()
    try:
        answer, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with status {process.exitcode}") from None
    process.join()
    if error:
        raise RuntimeError(error)
    return answer


def _answer(sender: Connection, function: Callable[[A], T], argument: A) -> None:
    try:
        sender.send((function(argument), ""))
    except Exception as error:  # noqa: BLE001  # raised again by the one who waits
        sender.send((None, f"{type(error).__name__}: {error}"))
