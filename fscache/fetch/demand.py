"""What processes on this machine read, whichever channel asks: made ready, counted, recorded.

Channels that have to give the bytes themselves get them here, too; others only hear when they
are in the data file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from erofs.errors import NydusError
from fscache.cache.cachedblob import CachedBlob
from fscache.fetch.complaints import Complaints
from fscache.fetch.fetcher import Fetcher
from fscache.fetch.outstanding import Done

__all__ = ["Demand", "Piece"]


class Piece(NamedTuple):
    """A range of a blob's uncompressed space that belongs to known chunks."""

    blob: CachedBlob
    offset: int
    length: int


class Demand:
    """Passes reads on to a fetcher, with counters, traces and complaints."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self.complaints = Complaints()

    def request(self, blob: CachedBlob, offset: int, length: int, done: Done) -> None:
        """Make a range ready for somebody who reads it, then call `done`, as `Fetcher.request`."""
        begin = time.monotonic()
        number = blob.metrics.reads.begin(begin, blob.cache.inode[1])

        def finish(error: NydusError | None) -> None:
            seconds = time.monotonic() - begin
            blob.metrics.reads.end(number, length, seconds, failed=error is not None)
            for trace in blob.traces:
                began = time.time() - seconds
                trace.record(blob.blob_id, offset, length, began, error is not None)
            if error is not None:
                self.complaints.tell(blob.blob_id, str(error), error.what)
            done(error)

        self._fetcher.request(blob, offset, length, finish)

    def read(self, pieces: Sequence[Piece]) -> bytes:
        """Return the bytes of pieces, one after the other, as soon as all are there.

        Raises the `NydusError` of one that cannot be had.
        """
        self.ready(pieces)
        return b"".join([blob.read_ready(offset, length) for blob, offset, length in pieces])

    def ready(self, pieces: Sequence[Piece]) -> None:
        """Wait until pieces are in their data files; raise the `NydusError` of one that is not."""
        answers = _Answers(len(pieces))
        for piece in pieces:
            self.request(*piece, answers.take)
        answers.wait()


class _Answers:
    """Waits for a number of answers."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._left = count
        self._error: NydusError | None = None
        # Made by who has to wait: what is ready is answered before that.
        self._ended: threading.Event | None = None

    def take(self, error: NydusError | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            ended = self._ended if self._left == 0 else None
        if ended is not None:
            ended.set()

    def wait(self) -> None:
        with self._lock:
            ended = self._ended = threading.Event() if self._left else None
        if ended is not None:
            ended.wait()
        if self._error is not None:
            raise self._error
