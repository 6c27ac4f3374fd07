"""Counters of the blob cache of one image, in nydusd's shape (tools 8.3)."""

from __future__ import annotations

import threading
import time
from pathlib import Path

__all__ = ["CacheMetrics"]


class CacheMetrics:
    """Counters of one image's cache; safe to use from many threads.

    Beside the API's names: `chunks_fetched` counts chunks that were verified and written,
    `digest_failures` those whose data was wrong.

    Args:
        store_path: the cache directory.
        workers: threads that `fetch_all` may use.
    """

    def __init__(self, store_path: Path, workers: int = 0) -> None:
        self._lock = threading.Lock()
        self._store_path = store_path
        self._workers = workers
        self._files: set[str] = set()
        self._incomplete: set[str] = set()
        self._total = self._whole_hits = self._partial_hits = 0
        self._entries = 0
        self._buffered = 0
        self._prefetch_bytes = self._prefetch_requests = self._prefetch_millis = 0
        self._prefetch_begin = self._prefetch_end = (0, 0)
        self.chunks_fetched = 0
        self.digest_failures = 0

    def add_file(self, name: str, ready_chunks: int) -> None:
        """Count a data file that is in use from now on, with what it already holds."""
        with self._lock:
            self._files.add(name)
            self._incomplete.add(name)
            self._entries += ready_chunks

    def add_chunks(self, name: str, ready_chunks: int) -> None:
        """Count ready chunks of a data file that a further image knows; it may miss others."""
        with self._lock:
            self._incomplete.add(name)
            self._entries += ready_chunks

    def remove_file(self, name: str, ready_chunks: int) -> None:
        """Forget a data file."""
        with self._lock:
            self._files.discard(name)
            self._incomplete.discard(name)
            self._entries -= ready_chunks

    def complete_file(self, name: str) -> None:
        """Note that a data file holds all its chunks durably."""
        with self._lock:
            self._incomplete.discard(name)

    def request(self, *, wanted: int, missing: int) -> None:
        """Count one request for a number of chunks."""
        with self._lock:
            self._total += 1
            if missing == 0:
                self._whole_hits += 1
            elif missing < wanted:
                self._partial_hits += 1

    def chunk_fetched(self) -> None:
        """Count a chunk that became ready."""
        with self._lock:
            self.chunks_fetched += 1
            self._entries += 1

    def digest_failure(self) -> None:
        """Count a chunk with the wrong content."""
        with self._lock:
            self.digest_failures += 1

    def buffer(self, change: int) -> None:
        """Count bytes of the backend that are held (positive) or let go (negative)."""
        with self._lock:
            self._buffered += change

    def prefetch(self, begin: float, length: int) -> None:
        """Count a finished prefetch request of `length` bytes, begun at `time.time()` `begin`."""
        end = time.time()
        with self._lock:
            self._prefetch_requests += 1
            self._prefetch_bytes += length
            self._prefetch_millis += max(0, int((end - begin) * 1000))
            if self._prefetch_begin == (0, 0):
                self._prefetch_begin = _split(begin)
            self._prefetch_end = _split(end)

    def as_dict(self) -> dict[str, object]:
        """Return a consistent copy under the names of the API."""
        with self._lock:
            return {
                "underlying_files": sorted(self._files),
                "store_path": str(self._store_path),
                "partial_hits": self._partial_hits,
                "whole_hits": self._whole_hits,
                "total": self._total,
                "entries_count": self._entries,
                "prefetch_data_amount": self._prefetch_bytes,
                "prefetch_requests_count": self._prefetch_requests,
                "prefetch_workers": self._workers,
                "prefetch_unmerged_chunks": 0,
                "prefetch_cumulative_time_millis": self._prefetch_millis,
                "prefetch_begin_time_secs": self._prefetch_begin[0],
                "prefetch_begin_time_millis": self._prefetch_begin[1],
                "prefetch_end_time_secs": self._prefetch_end[0],
                "prefetch_end_time_millis": self._prefetch_end[1],
                "buffered_backend_size": self._buffered,
                "data_all_ready": bool(self._files) and not self._incomplete,
            }


def _split(moment: float) -> tuple[int, int]:
    return int(moment), int(moment * 1000) % 1000
