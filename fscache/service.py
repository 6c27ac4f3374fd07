"""Kernel requests become fetches: which file is which blob, and who answers."""

from __future__ import annotations

import threading

from erofs.errors import NydusError
from fscache.cache.cachedblob import CachedBlob
from fscache.channel import ReadRequest, Reply
from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher

__all__ = ["Service"]


class _Together:
    """An answer that is given when several fetches have ended."""

    def __init__(self, reply: Reply, count: int) -> None:
        self._reply = reply
        self._lock = threading.Lock()
        self._missing = count

    def done(self, error: NydusError | None) -> None:
        with self._lock:
            self._missing -= 1
            last = self._missing == 0
        if error is not None:
            self._reply.deny(error)
        elif last:
            self._reply.allow()


class Service:
    """The handler of a channel: answers each request once its bytes are there.

    Blobs are known by device and inode of their data file, never by a name.
    """

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._demand = Demand(fetcher)
        self._blobs: dict[tuple[int, int], CachedBlob] = {}

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
            text = "denied a read of a file that is not of a served image"
            self._demand.complaints.tell(request.inode, text)
            reply.deny("not a file of a served image")
            return

        def done(error: NydusError | None) -> None:
            if error is None:
                reply.allow()
            else:
                reply.deny(error)

        self._demand.request(blob, request.offset, request.length, done)

    def handle_anywhere(self, request: ReadRequest, reply: Reply) -> None:
        """Answer a request whose file is not known: its range is made ready in every blob."""
        wanted = []
        for blob in list(self._blobs.values()):
            length = min(request.length, blob.cache.size - request.offset)
            if request.offset >= 0 and length > 0:
                wanted.append((blob, length))
        if not wanted:
            reply.deny("not within a file of a served image")
            return
        together = _Together(reply, len(wanted))
        for blob, length in wanted:
            self._fetcher.request(blob, request.offset, length, together.done)
