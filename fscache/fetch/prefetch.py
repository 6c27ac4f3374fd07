"""Fetch an image in the background: what is listed first, then the rest.

Readers come first: while one waits, nothing new is begun here. Which files are listed says
`fscache.fetch.prefetchlist`; whole blobs by one request each are `fscache.fetch.streamprefetch`'s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from erofs import Bootstrap, open_bootstrap
from erofs.errors import NydusError
from fscache.cache.cachedblob import CachedBlob
from fscache.fetch.fetcher import Fetcher
from fscache.fetch.pace import Pace
from fscache.fetch.prefetchlist import chunks_below, listed_nids
from fscache.settings import PrefetchConfig

__all__ = ["Prefetch"]

logger = logging.getLogger(__name__)

# A backend that fails is left alone; readers find out when it is well again.
MAX_FAILURES = 3

_Run = tuple[CachedBlob, range]


class Prefetch:
    """One run for one image; ends by itself, by `stop`, or when the backend keeps failing.

    Args:
        fetcher: which the blobs are attached to.
        bootstrap: of the image.
        blobs: the image's blobs, in device order.
        files: what to fetch first in place of the bootstrap's table, None without a list.
        config: `threads` groups are under way at once, of at most `batch_size` bytes, and at
            most `bandwidth_limit` bytes a second are begun (0: no limit).
    """

    def __init__(
        self,
        fetcher: Fetcher,
        bootstrap: Path,
        blobs: Sequence[CachedBlob],
        files: Sequence[bytes] | None,
        config: PrefetchConfig,
    ) -> None:
        self._fetcher = fetcher
        self._bootstrap = bootstrap
        self._blobs = blobs
        self._files = files
        self._config = config
        self._pace = Pace(config.bandwidth_limit)
        self._slots = threading.Semaphore(config.threads)
        self._stopped = threading.Event()
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing new, and wait for the thread; what is under way ends by itself."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        begun = time.monotonic()
        sent = 0
        try:
            with open_bootstrap(self._bootstrap) as image:
                for blob, group in self._groups(image):
                    if blob.chunks.all_ready(group):
                        continue
                    _, length = blob.stored_range(group)
                    if not self._may_begin(length):
                        return
                    self._fetcher.prefetch(blob, group, self._done(blob, length))
                    sent += length
        except (NydusError, OSError) as error:
            # Only a hint is lost: readers are served all the same.
            logger.warning("prefetch ends early: %s", error)
            return
        logger.info("prefetch is through: %d bytes in %.1f s", sent, time.monotonic() - begun)

    def _groups(self, image: Bootstrap) -> Iterator[_Run]:
        """Yield runs of chunks: listed ones in their order, then, if wanted, all of them."""
        nids = listed_nids(image, self._files)
        root = image.superblock.root_nid
        for blob, run in self._runs(image, [nid for nid in nids if nid != root]):
            for group in blob.map.groups(run, self._config.batch_size):
                yield blob, group
        if self._config.prefetch_all or root in nids:
            for blob in self._blobs:
                for group in blob.map.groups(blob.map.positions(), self._config.batch_size):
                    yield blob, group

    def _runs(self, image: Bootstrap, nids: Sequence[int]) -> Iterator[_Run]:
        """Yield the chunks of files; neighbours in a blob come together, up to a batch."""
        last: _Run | None = None
        for info in chunks_below(image, nids):
            blob = self._blobs[info.blob_index]
            found = blob.map.chunks_in(info.uncompressed_offset, info.uncompressed_size)
            if last is not None and last[0] is blob and found.start in last[1]:
                # Of files in the same piece of a tar, or the same chunk in several.
                found = range(last[1].stop, found.stop)
                if not found:
                    continue
            if last is not None:
                if (
                    last[0] is blob
                    and last[1].stop == found.start
                    and last[0].stored_range(last[1])[1] < self._config.batch_size
                ):
                    found = range(last[1].start, found.stop)
                else:
                    yield last
            last = blob, found
        if last is not None:
            yield last

    def _may_begin(self, length: int) -> bool:
        """Wait for a slot, the bandwidth, and readers; return False when it is time to end."""
        while not self._slots.acquire(timeout=1.0):
            if self._stopped.is_set():
                return False
        if self._failures >= MAX_FAILURES:
            logger.warning("prefetch ends early, the backend keeps failing")
            return False
        # Readers come last, so that none has begun to wait since.
        return self._pace.wait(length, self._stopped) and self._fetcher.begin_background(
            self._stopped
        )

    def _done(self, blob: CachedBlob, length: int) -> Callable[[NydusError | None], None]:
        begin = time.time()

        def done(error: NydusError | None) -> None:
            if error is None:
                blob.metrics.prefetch(begin, length)
            else:
                self._failures += 1
            self._slots.release()

        return done
