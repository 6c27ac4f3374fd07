"""Bookkeeping of one run that fetches a whole blob: pace, progress, first error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from erofs.errors import NydusError
from fscache.cache.cachedblob import CachedBlob

__all__ = ["FetchAll", "Progress"]

# Called with the bytes of the uncompressed space that are done and those that there are.
Progress = Callable[[int, int], None]


class FetchAll:
    """One run; `begin` before each group of chunks, `done_with` as its answer, then `wait`.

    Args:
        blob: what is fetched.
        slots: groups that may be under way at once.
        progress: called by several threads, one at a time.
    """

    def __init__(self, blob: CachedBlob, slots: int, progress: Progress | None) -> None:
        self._blob = blob
        self._slots = slots
        self._free = threading.Semaphore(slots)
        self._lock = threading.Lock()
        self._progress = progress
        self._done_bytes = 0
        self._all_bytes = sum(blob.map.uncompressed_sizes)
        self._error: NydusError | None = None

    def begin(self) -> bool:
        """Wait for a free slot; return False when a group has failed."""
        self._free.acquire()
        if self._error is None:
            return True
        self._free.release()
        return False

    def done_with(self, group: range) -> Callable[[NydusError | None], None]:
        """Return the answer for the request of a group, which frees its slot."""
        begin = time.time()

        def done(error: NydusError | None) -> None:
            try:
                self._count(group, begin, error)
            finally:
                self._free.release()

        return done

    def _count(self, group: range, begin: float, error: NydusError | None) -> None:
        length = sum(self._blob.map.uncompressed_sizes[group.start : group.stop])
        with self._lock:
            if error is not None:
                self._error = self._error or error
                return
            self._done_bytes += length
            self._blob.metrics.prefetch(begin, length)
            if self._progress is not None:
                self._progress(self._done_bytes, self._all_bytes)

    def wait(self) -> None:
        """Wait for all groups; raise the first `NydusError`."""
        for _ in range(self._slots):
            self._free.acquire()
        if self._error is not None:
            raise self._error
