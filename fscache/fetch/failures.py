"""Which chunks failed a moment ago: the second event of the same read fails at once.

Nothing is remembered for longer than that: the next read asks again (ondemand 5.14 item 6).
"""

from __future__ import annotations

import threading
import time

from erofs.errors import NydusError
from fscache.cache.cachedblob import CachedBlob

__all__ = ["Failures"]


class Failures:
    """Chunks that failed less than `ttl` seconds ago, with their errors; for many threads."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._lock = threading.Lock()
        self._errors: dict[tuple[CachedBlob, int], tuple[float, NydusError]] = {}

    def add(self, blob: CachedBlob, position: int, error: NydusError) -> None:
        """Remember a failure, and forget old ones."""
        now = time.monotonic()
        with self._lock:
            # The oldest come first, because all live equally long.
            while self._errors:
                key = next(iter(self._errors))
                if self._errors[key][0] > now:
                    break
                del self._errors[key]
            self._errors.pop((blob, position), None)
            self._errors[blob, position] = (now + self._ttl, error)

    def forget(self, blob: CachedBlob) -> None:
        """Forget the failures of one blob."""
        with self._lock:
            self._errors = {key: value for key, value in self._errors.items() if key[0] is not blob}

    def check(self, blob: CachedBlob, positions: range) -> None:
        """Raise the error of a chunk of the range that failed a moment ago."""
        if not self._errors:
            return
        now = time.monotonic()
        for position in positions:
            found = self._errors.get((blob, position))
            if found is not None and found[0] > now and not blob.chunks.is_ready(position):
                raise found[1]
