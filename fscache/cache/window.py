"""How much to fetch with what a reader lacks: neighbours, while that costs less than asking again.

Files of a directory lie side by side in a blob, and whoever reads one often reads the next. A
window of stored bytes is worth it as long as moving and decoding them takes no longer than what
another request would cost: the wait for its answer, and itself.
A reader that sweeps through the blob (tar, a copy, a scanner) gets windows that grow.

No I/O and no claims here; `fscache.fetch.fetcher` acts on what this says.
"""

from __future__ import annotations

import threading

from fscache.cache.blobmap import BlobMap
from fscache.cache.chunkmap import ChunkMap

__all__ = ["Window"]

# What a byte costs when it is fetched, decoded, verified and written, as bytes a second.
_COST_RATE = float(64 << 20)
# What a request costs beside the wait: registries count them. With the rate above, on a link that
# is not narrow, no more requests are made than with the windows of the real daemon.
_REQUEST_SECONDS = 1 / 64
_SMALLEST = 64 << 10
# Up to here the time of a request is mostly that of its answer to begin.
_SHORT = 128 << 10
# A sweep goes forward, past what was fetched before, and past files that were left out.
_STEP_CHUNKS = 16
_SWEEP_STEPS = 8
_SWEEP_BYTES = 4 << 20
# A backend that has become slower is believed after some requests.
_LATENCY_GROWTH = 1.25


class _Requests:
    """What requests of about one size take: the least of late, in seconds, and their mean size.

    Others waited for a core, or for each other.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.size = 0.0

    def add(self, seconds: float, size: int) -> None:
        known = self.seconds * _LATENCY_GROWTH
        self.seconds = min(known, seconds) if known else seconds
        self.size = (3 * self.size + size) / 4 if known else size


class Window:
    """The windows of one blob; safe for many threads.

    `limit` is the most stored bytes that one reader's lack is made into (`amplify_io`), 0 for
    never more than that.
    """

    def __init__(self) -> None:
        self.limit = 0
        self._lock = threading.Lock()
        self._short = _Requests()
        self._long = _Requests()
        self._last = -1
        self._steps = 0
        # Up to where a sweep was fetched ahead.
        self._asked = 0

    def answered(self, seconds: float, size: int) -> None:
        """Learn how long the backend took for a request of so many bytes."""
        with self._lock:
            (self._short if size <= _SHORT else self._long).add(seconds, size)

    def _worth(self) -> float:
        """Return how many bytes come in the time that another request would cost.

        Nothing is known of the link before there were short requests.
        """
        short, long = self._short, self._long
        rate = _COST_RATE
        if short.seconds and long.seconds > short.seconds:
            rate = min(rate, (long.size - short.size) / (long.seconds - short.seconds))
        return (short.seconds + _REQUEST_SECONDS) * rate - short.size

    def _size(self, steps: int) -> int:
        size = max(_SMALLEST, int(self._worth()))
        if steps >= _SWEEP_STEPS:
            return min(_SWEEP_BYTES, size << min(steps // _SWEEP_STEPS, 6))
        return min(size, self.limit)

    def around(self, table: BlobMap, chunks: ChunkMap, positions: range) -> range:
        """Return what to fetch for a reader: missing chunks, and more of them behind those.

        Args:
            table: is located.
            chunks: their readiness.
            positions: what is wanted, not all of it ready.
        """
        if not self.limit or chunks.is_ready(positions[-1]):
            return positions
        size = self._size(self._steps)
        return range(positions.start, _stretch(table, chunks, positions[0], positions.stop, size))

    def ahead(self, table: BlobMap, chunks: ChunkMap, positions: range) -> range:
        """Note what a reader asks for; return what to fetch ahead of a sweep, if it is one."""
        with self._lock:
            step = positions.start - self._last
            if 0 <= step <= _STEP_CHUNKS:
                self._steps += step > 0
            else:
                self._steps //= 4
                self._asked = 0
            self._last = positions[-1]
            steps = self._steps
            if steps < _SWEEP_STEPS or not self.limit:
                return range(0)
            start = chunks.first_missing(max(positions.stop, self._asked))
            size = self._size(steps)
            if start < 0 or not table.is_located:
                return range(0)
            if _distance(table, positions[-1], start) > size // 2:
                return range(0)
            stop = _stretch(table, chunks, start, start + 1, size)
            self._asked = stop
        return range(start, stop)


def _distance(table: BlobMap, last: int, start: int) -> int:
    return abs(table.compressed_offsets[start] - table.compressed_end(last))


def _stretch(table: BlobMap, chunks: ChunkMap, first: int, stop: int, size: int) -> int:
    """Return the index behind the last chunk that one request can have, of those missing."""
    end = stop
    while end < table.chunk_count and (
        table.is_together(end - 1, end)
        or (
            table.touches(end - 1, end)
            and table.compressed_end(end) - table.compressed_offsets[first] <= size
        )
    ):
        end += 1
    return chunks.missing_until(stop, end)
