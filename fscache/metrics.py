"""Counters of the blob cache of one image, in nydusd's shape (tools 8.3)."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from itertools import count
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "LATENCY_SECONDS",
    "SIZE_CLASSES",
    "CacheCounts",
    "CacheMetrics",
    "ReadCounts",
    "ReadMetrics",
    "WaitingRead",
    "of_reads",
    "size_class",
]

# Lower ends of the classes of request sizes, upper ends of those of latencies (tools 8.1).
SIZE_CLASSES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20)
LATENCY_SECONDS = (0.0002, 0.001, 0.02, 0.05, 0.5, 1.0, 2.0)
_OPERATIONS = 15
_READ = 4


class WaitingRead(NamedTuple):
    """A read that has no answer yet: since when by the monotonic clock, of which data file."""

    since: float
    inode: int


class ReadCounts(NamedTuple):
    """A copy of `ReadMetrics`: bytes that were answered and wanted, requests by class."""

    bytes_read: int
    bytes_wanted: int
    errors: int
    micros: int
    sizes: tuple[int, ...]
    latencies: tuple[int, ...]


def size_class(length: int) -> int:
    """Return the class of a read of `length` bytes, 0 to 7 (tools 8.1)."""
    return bisect_right(SIZE_CLASSES, length)


def of_reads(value: int) -> list[int]:
    """Return a list by operation that holds something for reads alone (tools 8.1)."""
    return [value if operation == _READ else 0 for operation in range(_OPERATIONS)]


class ReadMetrics:
    """Counters of the reads that the kernel asked for, in nydusd's shape (tools 8.1).

    Only what reaches the daemon is counted: the kernel answers look-ups and cached reads
    itself.
    """

    # Of all images of the process: a number is given once.
    _numbers = count()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, WaitingRead] = {}
        self._bytes = self._wanted = self._errors = self._micros = 0
        self._sizes = [0] * 8
        self._latencies = [0] * 8

    def begin(self, since: float, inode: int) -> int:
        """Note a request that waits from now on; return its number, for `end`."""
        number = next(self._numbers)
        self._waiting[number] = WaitingRead(since, inode)
        return number

    def waiting(self) -> dict[int, WaitingRead]:
        """Return the requests that have no answer yet, by their numbers."""
        return self._waiting.copy()

    def end(self, number: int, length: int, seconds: float, *, failed: bool) -> None:
        """Count an answered request."""
        self._waiting.pop(number, None)
        with self._lock:
            self._sizes[size_class(length)] += 1
            self._latencies[bisect_left(LATENCY_SECONDS, seconds)] += 1
            self._wanted += length
            self._micros += int(seconds * 1_000_000)
            if failed:
                self._errors += 1
            else:
                self._bytes += length

    def counts(self) -> ReadCounts:
        """Return a consistent copy."""
        with self._lock:
            return ReadCounts(
                self._bytes,
                self._wanted,
                self._errors,
                self._micros,
                tuple(self._sizes),
                tuple(self._latencies),
            )

    def as_dict(self) -> dict[str, object]:
        """Return a consistent copy under the names of the API."""
        counts = self.counts()
        return {
            "nr_opens": 0,
            "data_read": counts.bytes_read,
            "block_count_read": list(counts.sizes),
            "fop_hits": of_reads(sum(counts.sizes) - counts.errors),
            "fop_errors": of_reads(counts.errors),
            "fop_cumulative_latency_total": of_reads(counts.micros),
            "read_latency_dist": list(counts.latencies),
        }


class CacheCounts(NamedTuple):
    """A copy of `CacheMetrics`; times of prefetch as seconds since the epoch, 0 for none."""

    files: int
    complete: bool
    requests: int
    whole_hits: int
    partial_hits: int
    chunks_ready: int
    chunks_fetched: int
    digest_failures: int
    buffered_bytes: int
    prefetch_workers: int
    prefetch_bytes: int
    prefetch_requests: int
    prefetch_millis: int
    prefetch_begin: float
    prefetch_end: float


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
        self.reads = ReadMetrics()

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

    def chunk_fetched(self, count: int = 1) -> None:
        """Count chunks that became ready."""
        with self._lock:
            self.chunks_fetched += count
            self._entries += count

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

    def counts(self) -> CacheCounts:
        """Return a consistent copy."""
        with self._lock:
            return CacheCounts(
                files=len(self._files),
                complete=self._complete,
                requests=self._total,
                whole_hits=self._whole_hits,
                partial_hits=self._partial_hits,
                chunks_ready=self._entries,
                chunks_fetched=self.chunks_fetched,
                digest_failures=self.digest_failures,
                buffered_bytes=self._buffered,
                prefetch_workers=self._workers,
                prefetch_bytes=self._prefetch_bytes,
                prefetch_requests=self._prefetch_requests,
                prefetch_millis=self._prefetch_millis,
                prefetch_begin=_joined(self._prefetch_begin),
                prefetch_end=_joined(self._prefetch_end),
            )

    @property
    def _complete(self) -> bool:
        return bool(self._files) and not self._incomplete

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
                "data_all_ready": self._complete,
            }


def _split(moment: float) -> tuple[int, int]:
    return int(moment), int(moment * 1000) % 1000


def _joined(moment: tuple[int, int]) -> float:
    return moment[0] + moment[1] / 1000
