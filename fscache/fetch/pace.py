"""A limit of bytes a second for all who share it; a pause is never made up for afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Pace"]


class Pace:
    """Gives out turns; safe for many threads.

    Args:
        limit: bytes a second, 0 for no limit.
        clock: seconds, ascending.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._next = 0.0

    def delay(self, length: int) -> float:
        """Take the next turn, for `length` bytes; return the seconds until it comes."""
        if not self._limit:
            return 0.0
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + length / self._limit
        return turn - now

    def wait(self, length: int, stop: threading.Event) -> bool:
        """Wait for a turn of `length` bytes; return False when `stop` was set before."""
        return not stop.wait(self.delay(length))
