"""Fetch an image in the background by one request for each blob, without a range.

A peer-to-peer proxy that is asked so takes whole blobs once for all its nodes. Chunks are
decoded as the bytes flow: a stream holds one batch, the fetcher a few more. Readers come
first: while one waits nothing is taken from a stream.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from erofs.errors import NydusError
from fscache.backend.base import BlobReader, ShortRead, Unavailable
from fscache.backend.retry import RetryPolicy
from fscache.cache.blobmap import BlobMap
from fscache.cache.cachedblob import CachedBlob
from fscache.fetch.fetcher import Fetcher
from fscache.fetch.pace import Pace
from fscache.settings import PrefetchConfig

__all__ = ["StreamPrefetch"]

logger = logging.getLogger(__name__)

# Tries for each blob (tools 4.1); a try takes as long as its blob.
RETRY = RetryPolicy(attempts=10, factor=2.0, deadline=float("inf"))
STOP_SECONDS = 1.0


class _Stream:
    """Takes ranges out of a stream, each at or behind the last one; holds that and one piece.

    Args:
        pieces: of the stored blob.
        position: where they begin in it.

    `position` is what was read to, `earliest` where the next range may begin.
    """

    def __init__(self, pieces: Iterator[bytes], position: int) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._last = b""
        self.position = self.earliest = position

    def take(self, start: int, end: int) -> bytes | None:
        """Return a range, None when the stream ends before."""
        # Neighbours in gzip data have bytes in common.
        shared = self._last[max(start - self.earliest, 0) :][: end - start]
        if end <= self.position:
            return shared
        rest = self._take(max(start, self.position), end)
        if rest is None:
            return None
        self._last, self.earliest = shared + rest if shared else rest, start
        return self._last

    def _take(self, start: int, end: int) -> bytes | None:
        """Return a range at or behind `position`."""
        taken = bytearray()
        while self.position < end:
            if not self._piece:
                following = next(self._pieces, None)
                if following is None:
                    return None
                self._piece = memoryview(following)
            skipped = min(max(start - self.position, 0), len(self._piece))
            used = min(end - self.position, len(self._piece))
            taken += self._piece[skipped:used]
            self._piece = self._piece[used:]
            self.position += used
        return bytes(taken)


class StreamPrefetch:
    """One run for one image; ends by itself or by `stop`.

    Args:
        fetcher: which the blobs are attached to.
        blobs: the image's blobs, each with the reader that is asked.
        config: `threads` blobs are under way at once, at most `bandwidth_limit` bytes a second
            are taken from all of them (0: no limit), and at most `batch_size` bytes, or one
            chunk, are decoded at once.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        blobs: Sequence[tuple[CachedBlob, BlobReader]],
        config: PrefetchConfig,
    ) -> None:
        self._fetcher = fetcher
        self._config = config
        self._pace = Pace(config.bandwidth_limit)
        self._stopped = threading.Event()
        self._todo = deque(blobs)
        self._threads = [
            threading.Thread(target=self._work, name=f"stream-{number}", daemon=True)
            for number in range(min(config.threads, len(blobs)))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Take nothing more; a thread that waits for its backend ends by itself a bit later."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                blob, reader = self._todo.popleft()
            except IndexError:
                return
            try:
                RETRY.run(partial(self._stream, blob, reader), self._stopped)
            except NydusError as error:
                logger.warning("blob is not prefetched to its end: %s", error)

    def _missing(self, blob: CachedBlob, table: BlobMap) -> list[range]:
        """Return runs of missing chunks, in the order of the stored blob."""
        positions = [
            position for position in table.positions() if not blob.chunks.is_ready(position)
        ]
        groups = table.groups(positions, self._config.batch_size)
        return sorted(groups, key=table.stored_range)

    def _stream(self, blob: CachedBlob, reader: BlobReader) -> None:
        """Make one try for what is missing of a blob; raise `BackendError`."""
        table = blob.locate(self._stopped)
        groups = self._missing(blob, table)
        if not groups or not self._fetcher.wait_for_readers(self._stopped):
            return
        first, _ = table.stored_range(groups[0])
        # A range is a part of the blob to the proxy, so it has to be worth it.
        start = first if first >= blob.map.entry.compressed_size // 2 else 0
        begun = time.time()
        with reader.stream(start) as pieces:
            stream = _Stream(self._slowly(pieces), start)
            for group in groups:
                if not self._take(blob, table, stream, group):
                    break
        if not self._stopped.is_set():
            taken = stream.position - start
            logger.info(
                "blob %s: %d bytes streamed in %.1f s", blob.blob_id, taken, time.time() - begun
            )

    def _slowly(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield pieces at the pace that bandwidth and readers permit, until told to stop."""
        for piece in pieces:
            if not self._pace.wait(len(piece), self._stopped):
                return
            yield piece
            if not self._fetcher.wait_for_readers(self._stopped):
                return

    def _take(self, blob: CachedBlob, table: BlobMap, stream: _Stream, group: range) -> bool:
        """Take a run of chunks from the stream and have it stored; return False when stopped."""
        start, length = table.stored_range(group)
        if blob.chunks.all_ready(group) or start < stream.earliest:
            # Readers were faster, or chunks share their bytes: left to who wants them.
            return True
        begin = time.time()
        stored = stream.take(start, start + length)
        if self._stopped.is_set():
            return False
        if stored is None:
            raise ShortRead(
                "stream ends too early",
                temporary=True,
                blob=blob.blob_id,
                expected=f"bytes to {start + length}",
                got=stream.position,
            )
        if not self._fetcher.begin_background(self._stopped):
            return False
        read = partial(_part, blob, memoryview(stored), start)
        self._fetcher.prefetch(blob, group, _counted(blob, begin, length), read)
        return True


def _part(
    blob: CachedBlob, stored: memoryview, start: int, table: BlobMap, run: Sequence[int]
) -> memoryview:
    """Return what is stored of some of the chunks whose bytes begin at `start`."""
    first, length = table.stored_range(run)
    part = stored[max(0, first - start) : max(0, first - start) + length]
    if first < start or len(part) != length:
        raise Unavailable("the blob's table has changed", temporary=True, blob=blob.blob_id)
    return part


def _counted(blob: CachedBlob, begin: float, length: int) -> Callable[[NydusError | None], None]:
    def done(error: NydusError | None) -> None:
        if error is None:
            blob.metrics.prefetch(begin, length)

    return done
