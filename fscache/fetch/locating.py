"""Requests that wait until it is known where the chunks of their blob are stored."""

from __future__ import annotations

import threading
from collections.abc import Callable

from erofs.errors import NydusError
from fscache.cache.cachedblob import CachedBlob

__all__ = ["Locating"]

Then = Callable[[NydusError | None], None]


class Locating:
    """What is to be done when a blob's own table is there, or could not be had.

    Chunks that are fetched together have to be claimed together, and only the table tells
    which these are.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[CachedBlob, list[Then]] = {}

    def wait(self, blob: CachedBlob, then: Then) -> bool:
        """Add to those who wait; return whether it is the caller who has to see to the table."""
        with self._lock:
            first = blob not in self._waiting
            self._waiting.setdefault(blob, []).append(then)
            return first

    def settle(self, blob: CachedBlob, error: NydusError | None) -> None:
        """Call everybody who waits, with the reason when there is no table."""
        with self._lock:
            waiting = self._waiting.pop(blob)
        for then in waiting:
            then(error)
