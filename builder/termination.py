"""SIGTERM and SIGHUP as interrupts: a command that is ended takes away what it has begun."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["exit_status", "terminable"]


class _Terminated(KeyboardInterrupt):
    """A signal that ends a command as Ctrl-C does: what was begun is taken away."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated(number)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt the block, where that can be said: in the main thread.

    What is ignored stays so (`nohup`).
    """
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    stack.callback(signal.signal, number, signal.signal(number, _terminate))
        yield


def exit_status(stop: KeyboardInterrupt) -> int:
    """Return the status of a command that a signal ended."""
    return 128 + (stop.number if isinstance(stop, _Terminated) else signal.SIGINT)
