"""Kernel requests become fetches: which file is which blob, and who answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from erofs.errors import NydusError
from fscache.cachedblob import CachedBlob
from fscache.channel import ReadRequest, Reply
from fscache.fetcher import Fetcher

__all__ = ["Service"]

logger = logging.getLogger(__name__)

_TELL_SECONDS = 10.0
_TOLD_MAX = 1000


class Service:
    """The handler of a channel: answers each request once its bytes are there.

    Blobs are known by device and inode of their data file, never by a name.
    """

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._blobs: dict[tuple[int, int], CachedBlob] = {}
        self._lock = threading.Lock()
        self._told: dict[tuple[int, str], float] = {}

    def add(self, blob: CachedBlob) -> None:
        """Serve a blob from now on."""
        self._blobs[blob.cache.inode] = blob

    def remove(self, blob: CachedBlob) -> None:
        """Serve a blob no longer; fine when it never was."""
        self._blobs.pop(blob.cache.inode, None)

    def handle(self, request: ReadRequest, reply: Reply) -> None:
        """Allow when the range is ready, deny when it cannot be made so; never blocks."""
        blob = self._blobs.get((request.device, request.inode))
        if blob is None:
            # A hole of a file that nobody fills would be read as zeros.
            self._tell("denied a read of a file that is not of a served image", request.inode)
            reply.deny("not a file of a served image")
            return
        self._fetcher.request(blob, request.offset, request.length, self._answer(blob, reply))

    def _answer(self, blob: CachedBlob, reply: Reply) -> Callable[[NydusError | None], None]:
        begin = time.monotonic()

        def done(error: NydusError | None) -> None:
            seconds = time.monotonic() - begin
            blob.metrics.reads.count(reply.request.length, seconds, failed=error is not None)
            if error is None:
                reply.allow()
            else:
                self._tell(str(error), reply.request.inode)
                reply.deny(error)

        return done

    def _tell(self, text: str, inode: int) -> None:
        """Log why reads fail, the same reason of the same file once in a while only."""
        now = time.monotonic()
        key = (inode, text)
        with self._lock:
            if now - self._told.get(key, -_TELL_SECONDS) < _TELL_SECONDS:
                return
            if len(self._told) >= _TOLD_MAX:
                self._told.clear()
            self._told[key] = now
        logger.warning("reads fail: %s", text)
