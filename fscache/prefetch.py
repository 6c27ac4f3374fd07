"""Fetch an image in the background: what its bootstrap lists first, then the rest.

Readers come first: while one waits, nothing new is begun here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from erofs.errors import NydusError
from fscache.cachedblob import CachedBlob
from fscache.fetcher import Fetcher
from fscache.settings import PrefetchConfig

__all__ = ["Prefetch"]

logger = logging.getLogger(__name__)

_YIELD_SECONDS = 0.01
# A backend that fails is left alone; readers find out when it is well again.
MAX_FAILURES = 3


class Prefetch:
    """One run for one image; ends by itself, by `stop`, or when the backend keeps failing.

    Args:
        blobs: the image's blobs, in device order.
        listed: (blob number, chunk index) of what the prefetch table names, in order.
        config: `threads` groups are under way at once, of at most `batch_size` bytes, and at
            most `bandwidth_limit` bytes a second are begun (0: no limit).
    """

    def __init__(
        self,
        fetcher: Fetcher,
        blobs: Sequence[CachedBlob],
        listed: Sequence[tuple[int, int]],
        config: PrefetchConfig,
    ) -> None:
        self._fetcher = fetcher
        self._blobs = blobs
        self._listed = listed
        self._config = config
        self._slots = threading.Semaphore(config.threads)
        self._stopped = threading.Event()
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing new, and wait for the thread; what is under way ends by itself."""
        self._stopped.set()
        self._thread.join()

    def _groups(self) -> Iterator[tuple[CachedBlob, range]]:
        """Yield runs of chunks: listed ones in their order, then, if wanted, all of them."""
        for number, index in self._listed:
            yield self._blobs[number], range(index, index + 1)
        if self._config.prefetch_all:
            for blob in self._blobs:
                for group in blob.map.groups(blob.map.positions(), self._config.batch_size):
                    yield blob, group

    def _run(self) -> None:
        begun = time.monotonic()
        sent = 0
        for blob, group in self._groups():
            if blob.chunks.all_ready(group):
                continue
            if not self._may_go_on(begun, sent):
                return
            while not self._slots.acquire(timeout=1.0):
                if self._stopped.is_set():
                    return
            length = blob.map.compressed_end(group[-1]) - blob.map.compressed_offsets[group[0]]
            sent += length
            self._fetcher.prefetch(blob, group, self._done(blob, length))
        logger.info("prefetch is through: %d bytes in %.1f s", sent, time.monotonic() - begun)

    def _may_go_on(self, begun: float, sent: int) -> bool:
        """Wait for readers and for the bandwidth; return False when it is time to end."""
        limit = self._config.bandwidth_limit
        while not self._stopped.is_set() and self._failures < MAX_FAILURES:
            ahead = sent / limit - (time.monotonic() - begun) if limit else 0.0
            if ahead <= 0 and not self._fetcher.has_readers:
                return True
            self._stopped.wait(min(max(ahead, _YIELD_SECONDS), 1.0))
        if self._failures >= MAX_FAILURES:
            logger.warning("prefetch ends early, the backend keeps failing")
        return False

    def _done(self, blob: CachedBlob, length: int) -> Callable[[NydusError | None], None]:
        begin = time.time()

        def done(error: NydusError | None) -> None:
            if error is None:
                blob.metrics.prefetch(begin, length)
            else:
                self._failures += 1
            self._slots.release()

        return done
